"""`klquant generate MODEL PROMPT`: one answer, as it comes."""

import json
import sys

import click

from klquant.cli.engine import engine_options, given_sampling, named_as_options, note, open_engine, sampling
from klquant.cli.spell import unicode_text
from klquant.errors import UserError


@click.command("generate")
@click.argument("model")
@click.argument("prompt")
@engine_options
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the model's chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of text as it comes.")
def command(
    model: str, prompt: str, raw: bool, as_json: bool, devices: str | None, max_memory: dict[str, int] | None,
    max_context: int | None, cache_bits: str, **params,
) -> None:  # fmt: skip
    """Answer PROMPT ("-": read it from stdin) with MODEL, a checkpoint folder or a hub id, quantized or not.

    PROMPT is one message through the model's chat template; a model without one continues it as text.
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    prompt = unicode_text(prompt, "the prompt")
    if not prompt.strip():
        raise UserError("the prompt is empty")
    given = given_sampling(**params)
    with named_as_options():
        ids, templated = _ids(model, prompt, raw, max_context)
    with open_engine(model, devices, max_memory, max_context, cache_bits) as engine:
        chosen = sampling(engine, given)
        if not raw and not templated:
            note("the model has no chat template: it continues the prompt as text")
        job = engine.submit(ids, chosen)
        for delta in engine.follow(job):
            if not as_json:
                click.echo(delta.text, nl=False)
                sys.stdout.flush()
        answer = job.answer()
    if answer.error:
        raise UserError(answer.error)
    if as_json:
        click.echo(json.dumps(answer_json(answer, model, prompt), ensure_ascii=False))
    else:
        click.echo()


def _ids(model: str, prompt: str, raw: bool, max_context: int | None) -> tuple[list[int], bool]:
    """The prompt's ids, and whether the chat template was used. Needs no weights: a prompt that is longer than the
    context is refused (UserError) before they are loaded."""
    from klquant.calibrate.tokenizer import load_tokenizer
    from klquant.checkpoint.hub import resolve_model
    from klquant.checkpoint.index import read_config
    from klquant.engine.engine import encode
    from klquant.engine.limits import Limits

    folder = resolve_model(model, weights=False)
    config, tokenizer = read_config(folder)[1], load_tokenizer(folder)
    templated = not raw and tokenizer.template is not None
    ids = encode([{"role": "user", "content": prompt}] if templated else prompt, tokenizer, config)
    Limits(max_context).of(config).room(len(ids), config)
    return ids, templated


def answer_json(answer, model: str, prompt: str) -> dict:
    """An answer for machines; seconds since the request was made."""
    return {
        "model": model,
        "prompt": prompt,
        "text": answer.text,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": list(answer.tokens),
        "seed": answer.seed,
        "seconds_to_first_token": answer.seconds_to_first,
        "seconds": answer.seconds,
    }
