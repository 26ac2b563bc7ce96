"""The command `klquant`: an interrupt is one line from the first moment on, while the commands are still imported."""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = "klquant: interrupted"


def run() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored: nohup, a job in a script
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from klquant.cli.main import main
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)
    main(prog_name="klquant")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Python's own handler, but what klquant imports is not unwound: torch, numpy and others catch a KeyboardInterrupt
    raised in them and go on, abort in C++, or cannot be imported any more. What is written by then is safe: a run may
    be killed at any moment."""
    if not _imports(frame):
        signal.default_int_handler(number, frame)
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(130)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported because klquant asked for it, not a library in the midst of its work."""
    importing = False
    while frame:
        if importing and (frame.f_globals.get("__package__") or "").partition(".")[0] == "klquant":
            return True
        importing = "importlib" in frame.f_code.co_filename
        frame = frame.f_back
    return False


if __name__ == "__main__":
    run()
