"""What `generate`, `chat` and `serve` share: options, loading with its progress, notes on stderr."""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import click

from klquant.cli.options import in_order
from klquant.cli.spell import Size
from klquant.engine.request import SamplingParams
from klquant.errors import UserError

if TYPE_CHECKING:
    from klquant.engine.engine import Engine

_RECOMMENDED = "[default: the checkpoint's]"
_SAMPLING = (
    click.option("--max-new-tokens", type=int, default=SamplingParams.max_new_tokens, show_default=True,
                 metavar="N", help="Tokens of an answer at most."),
    click.option("--temperature", type=float, metavar="T", help=f"0: always the likeliest token.  {_RECOMMENDED}"),
    click.option("--top-k", type=int, metavar="K", help=f"Choose among the K likeliest tokens.  {_RECOMMENDED}"),
    click.option("--top-p", type=float, metavar="P",
                 help=f"Choose among the fewest tokens that reach probability P.  {_RECOMMENDED}"),
    click.option("--min-p", type=float, metavar="P",
                 help=f"Choose among tokens at least P times as likely as the first.  {_RECOMMENDED}"),
    click.option("--repetition-penalty", type=float, metavar="R",
                 help=f"Above 1: make tokens that occurred less likely.  {_RECOMMENDED}"),
    click.option("--seed", type=int, metavar="N", help="Equal seeds give equal answers.  [default: a new one]"),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text. Can be repeated."),
)  # fmt: skip

# Words such as `stop` only at the beginning of an error: what comes from a file has the file's name there.
_PARAMETER = re.compile(
    rf"^({'|'.join(f.name for f in fields(SamplingParams))})\b"
    r"|\b(max_context|max_memory|max_new_tokens|max_batch|cache_tokens|prefixes)\b"
)
_OPTIONS = {"prefixes": "prefix-cache"}  # where the name is not the parameter's


class DeviceSizes(click.ParamType):
    """cuda:0=20GiB,cuda:1=11GiB."""

    name = "sizes"

    def convert(self, value, param, ctx) -> dict[str, int]:
        if isinstance(value, dict):
            return value
        pairs = [part.partition("=") for part in value.split(",")]
        if not all(name and size for name, _, size in pairs):
            self.fail(f"{value!r} is not DEVICE=SIZE,…; write cuda:0=20GiB", param, ctx)
        # Nothing of the host's memory is an answer; nothing of a GPU's is a slip.
        named = ((name.strip(), size) for name, _, size in pairs)
        sizes = {name: Size(least=0 if name == "cpu" else 1).convert(size, param, ctx) for name, size in named}
        if len(sizes) < len(pairs):
            self.fail(f"{value!r} names a device twice", param, ctx)
        return sizes


_PLACING = (
    click.option("--devices", "--device", metavar="NAMES",
                 help="cuda:0,cuda:1 or cpu.  [default: all GPUs, or the CPU]"),
    click.option("--max-memory", type=DeviceSizes(), metavar="SIZES",
                 help="What devices may use at most: cuda:0=20GiB,cuda:1=11GiB; cpu=0 keeps experts that GPUs have no "
                 "room for out of the host's memory.  [default: what is free]"),
)  # fmt: skip
_MAX_CONTEXT = click.option(
    "--max-context", type=click.IntRange(1), metavar="N",
    help="Tokens of prompt and answer together.  [default: 8192, or the model's limit]",
)  # fmt: skip
_CACHE_BITS = click.option(
    "--cache-bits", type=click.Choice(["16", "8"]), default="16", show_default=True,
    help="Bits of a value in the latent cache.",
)  # fmt: skip

# Where the model goes, and how its cache is kept.
placing_options = in_order(*_PLACING, _CACHE_BITS)
# That, and how much room it gets.
loading_options = in_order(*_PLACING, _MAX_CONTEXT, _CACHE_BITS)
# That, and how to answer.
engine_options = in_order(loading_options, *_SAMPLING)


def open_engine(
    model: str, devices: str | None, max_memory: Mapping[str, int] | None, max_context: int | None, cache_bits: str,
    max_batch: int = 1, **more: int | None,
) -> "Engine":  # fmt: skip
    """Load a model for `max_batch` sequences, and say so where it will be slow. `more`: other fields of Limits.

    Raises UserError as the engine does.
    """
    from klquant.checkpoint.hub import resolve_model
    from klquant.engine.engine import Engine
    from klquant.model.first_prompt import building_note

    with named_as_options(), _bar() as progress:
        engine = Engine.from_pretrained(
            resolve_model(model, weights=True), devices=devices, max_memory=max_memory, max_context=max_context,
            max_batch=max_batch, cache_bits=int(cache_bits), progress=progress, **more,
        )  # fmt: skip
    for text in filter(None, (*engine.runner.weights.notes, engine.placement.note)):
        note(text)
    if engine.on_cpu:
        note("running on the CPU: klquant's plain reference path, right but slow; its kernels need a CUDA GPU")
    elif said := building_note(engine.runner.stages[0].device, engine.runner.weights.dtype):
        note(said)
    return engine


def given_sampling(**params: object) -> dict[str, object]:
    """The sampling options that were given. Raises UserError for one out of range, before anything is loaded."""
    given = {name: value for name, value in params.items() if value is not None}
    with named_as_options():
        SamplingParams(**given)
    return given


@contextmanager
def named_as_options() -> Iterator[None]:
    """What Python's callers name as parameters is named as the command's options: max_context → --max-context."""
    try:
        yield
    except UserError as error:
        raise type(error)(_PARAMETER.sub(lambda match: f"--{_option(match[0])}", str(error))) from None


def _option(parameter: str) -> str:
    return _OPTIONS.get(parameter, parameter.replace("_", "-"))


def sampling(engine: "Engine", given: dict[str, object]) -> SamplingParams:
    """What the checkpoint recommends, with what was given in its place."""
    return replace(engine.defaults, **given)


def note(text: str) -> None:
    """A line for people, beside the output."""
    click.echo(f"klquant: {text}", err=True)


def _bar() -> AbstractContextManager:
    """Bytes read while a model loads, on a terminal; None elsewhere."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    class Bar(Progress):
        def __enter__(self):
            super().__enter__()
            task = self.add_task("loading", total=None)
            return lambda done, total: self.update(task, completed=done, total=total)

    return Bar(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=Console(stderr=True), transient=True
    )
