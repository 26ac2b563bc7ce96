"""The command `klquant`: an interrupt is one line from the first moment on, while the commands are still imported."""

import sys


def run() -> None:
    try:
        from klquant.cli.main import main
    except KeyboardInterrupt:
        print("klquant: interrupted", file=sys.stderr)
        sys.exit(130)
    main(prog_name="klquant")


if __name__ == "__main__":
    run()
