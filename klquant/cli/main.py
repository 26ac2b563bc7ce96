"""`klquant`: the group of commands, and what happens to errors.

A command's module is imported when the command runs, so that `--help` and `--version` answer at once.
"""

import errno
import importlib
import io
import os
import sys

import click

import klquant
from klquant.core.allocator import grow_segments
from klquant.errors import UserError

# name → (module that defines `command`, one line for --help)
COMMANDS: dict[str, tuple[str, str]] = {
    "plan": ("klquant.cli.plan", "Show what a recipe does to each tensor, what it costs and what it needs to run."),
    "quantize": ("klquant.cli.quantize", "Quantize a checkpoint, layer by layer; can be stopped and resumed."),
    "eval": ("klquant.cli.eval", "Score a checkpoint on text against its reference."),
    "generate": ("klquant.cli.generate", "Answer a prompt, as the answer comes."),
    "chat": ("klquant.cli.chat", "Talk with a model; its state stays from turn to turn."),
    "serve": ("klquant.cli.serve", "Answer over HTTP as OpenAI's API does, many requests at a time."),
    "bench": ("klquant.cli.bench", "Time prefill and decode here, and show memory and bandwidth."),
    "sensitivity": ("klquant.cli.sensitivity", "Measure what each class or layer costs when only it is quantized."),
    "report": ("klquant.cli.report", "Compare results of eval in one page: size, quality, where it errs."),
    "sweep": ("klquant.cli.sweep", "Quantize by several recipes, evaluate and report in one go."),
    "inspect": ("klquant.cli.inspect", "Show what a checkpoint stores how, and where the error is."),
    "verify": ("klquant.cli.verify", "Check that a checkpoint is whole: exit code 0, or 1 and a list of problems."),
}

# What works on a card layer by layer, and asks for memory in pieces of many sizes. The engine holds what it has.
LAYER_BY_LAYER = {"quantize", "eval", "sensitivity", "sweep"}


class Failure(click.ClickException):
    """One line on stderr and an exit code; no traceback."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def show(self, file=None) -> None:
        click.echo(f"klquant: {' '.join(self.message.splitlines())}", err=True)


class Commands(click.Group):
    """A group that imports a command when it is used, and turns what a user can mend into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in LAYER_BY_LAYER:
            grow_segments()
        return importlib.import_module(COMMANDS[name][0]).command if name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context):
        _mend_streams()
        try:
            return super().invoke(ctx)
        except UserError as e:
            raise Failure(f"error: {e}", 2) from e
        except click.UsageError as e:
            help_for = f" (see {e.ctx.command_path} --help)" if e.ctx else ""
            raise Failure(f"error: {e.format_message().removesuffix('.')}{help_for}", 2) from e
        except OSError as e:
            if e.errno == errno.ENOSPC:
                raise Failure(f"error: {e.filename or 'output'}: no space left; free disk space", 2) from e
            if e.errno == errno.ENAMETOOLONG:
                raise Failure(f"error: {e.filename!s:.60}…: longer than a file's name may be", 2) from e
            raise
        except RuntimeError as e:
            if type(e).__name__ != "OutOfMemoryError":  # torch's, and importing it takes seconds
                raise
            raise Failure(
                f"error: {str(e).partition('. ')[0]}; free memory on the card, or ask for less at once", 2
            ) from e
        except KeyboardInterrupt as e:
            raise Failure("interrupted", 130) from e


def _mend_streams() -> None:
    """A closed stream gives nothing and takes all. A terminal may know fewer characters than are shown; what it sends
    that is no text is told by `unicode_text`."""
    for name in ("stdin", "stdout", "stderr"):
        stream, reads = getattr(sys, name), name == "stdin"
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if reads else "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if reads else "replace")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(klquant.__version__, "--version", prog_name="klquant", message="%(prog)s %(version)s")
def main() -> None:
    """Quantize Kimi-Linear checkpoints to INT8, INT4 or INT3, say what it cost, and run them."""


if __name__ == "__main__":
    main(prog_name="klquant")
