"""`klquant chat MODEL`: a conversation whose state stays on the device from turn to turn."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from klquant.cli.engine import engine_options, given_sampling, named_as_options, note, open_engine, sampling
from klquant.cli.spell import unicode_text
from klquant.engine.request import SamplingParams
from klquant.errors import UserError

if TYPE_CHECKING:
    from klquant.engine.engine import Engine
    from klquant.engine.session import Chat

HELP = "/reset forgets the conversation, /stats shows speed and memory, Ctrl-C stops an answer, Ctrl-D leaves"


@click.command("chat")
@click.argument("model")
@engine_options
def command(
    model: str, devices: str | None, max_memory: dict[str, int] | None, max_context: int | None, cache_bits: str,
    **params,
) -> None:  # fmt: skip
    """Talk with MODEL, a checkpoint folder or a hub id, quantized or not.

    Each turn computes only what is new. /reset forgets the conversation, /stats shows speed and memory, Ctrl-C stops an
    answer, Ctrl-D leaves. Lines from a pipe are taken one by one; exit code 2 says that one could not be.
    """
    from klquant.engine.session import Chat

    given = given_sampling(**params)
    with open_engine(model, devices, max_memory, max_context, cache_bits) as engine:
        chosen = sampling(engine, given)
        if engine.tokenizer.template is None:
            note("the model has no chat template: turns are paragraphs of `role: text`")
        if sys.stdin.isatty():
            note(HELP)
        chat, failed = Chat(engine), False
        for text in _lines():
            failed |= not _take(chat, engine, text, chosen)
    if failed and not sys.stdin.isatty():  # each failure was said; a script is told at the end
        sys.exit(2)


def _take(chat: "Chat", engine: "Engine", text: str, params: SamplingParams) -> bool:
    """Do as a line says. False, and a note why, when it could not be done: the conversation goes on all the same."""
    from klquant.engine.session import ConversationFull

    if text == "/reset":
        chat.reset()
    elif text == "/stats":
        click.echo("\n".join(stats(chat, engine)))
    elif text.startswith("/"):
        note(f"unknown command {text.split()[0]}; {HELP}")
        return False
    else:
        try:
            with named_as_options():
                _answer(chat, unicode_text(text, "what you said"), params)
        except ConversationFull as error:
            note(f"error: {error}; /reset starts a new one")
            return False
        except UserError as error:
            note(f"error: {error}")
            return False
    return True


def _lines() -> Iterator[str]:
    """What the user says, until the end of input. Ctrl-C drops the line."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            continue
        if text:
            yield text


def _answer(chat: "Chat", text: str, params: SamplingParams) -> None:
    with _interrupt(chat.session.stop):
        for delta in chat.ask(text, params):
            click.echo(delta.text, nl=False)
            sys.stdout.flush()
    click.echo()
    answer = chat.session.answer()
    if answer.error:
        raise UserError(answer.error)
    if answer.finish in ("length", "context"):
        note(f"cut off by {'--max-new-tokens' if answer.finish == 'length' else 'the end of the context'}")


@contextmanager
def _interrupt(stop) -> Iterator[None]:
    """The first Ctrl-C inside calls `stop`, a second one interrupts."""

    def once(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    before = signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stats(chat: "Chat", engine: "Engine") -> Iterator[str]:
    """Lines on the conversation, the last answer and the memory."""
    from klquant.engine.usage import count_offloaded

    tokens = chat.session.tokens
    yield f"context: {len(tokens):,} of {engine.limits.max_context:,} tokens"
    if tokens:
        answer = chat.session.answer()
        after = answer.seconds - answer.seconds_to_first
        rate = f", then {(len(answer.tokens) - 1) / after:,.1f} tokens/s" if len(answer.tokens) > 1 else ""
        yield f"last answer: {len(answer.tokens):,} tokens, the first after {answer.seconds_to_first:.2f} s{rate}"
        yield f"seed: {answer.seed}"
    if found := count_offloaded(engine.runner.weights):
        share = 1 - found.missing / max(1, found.chosen)
        yield f"experts: {share:.1%} of those that were needed were on the GPU; the others came from the host's memory"
    for row in engine.usage():
        if row.actual is not None:
            name = row.part.replace("_", " ")
            yield f"{row.device} {name}: {row.actual / 2**20:,.1f} MiB, predicted {row.predicted / 2**20:,.1f}"
