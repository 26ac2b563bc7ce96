"""`klquant serve MODEL`: the engine behind OpenAI's HTTP interface."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from klquant.cli.engine import loading_options, named_as_options, note, open_engine
from klquant.errors import UserError

# Seconds that connections have to end once their answers have; a second Ctrl-C does not wait.
PATIENCE = 5


@click.command("serve")
@click.argument("model")
@loading_options
@click.option(
    "--max-batch",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    metavar="N",
    help="Sequences at a time; more wait.",
)
@click.option(
    "--cache-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens in the latent cache, over all sequences.  [default: max-batch × max-context]",
)
@click.option(
    "--prefix-cache",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    metavar="N",
    help="Prompts whose state is kept, as long as the latent cache has room: a chat's next turn, and what begins with "
    "the same instructions, computes only what is new. On a GPU, of 512 tokens and more.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0: on all interfaces.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--name", help="What requests call the model.  [default: the last part of MODEL]")
@click.option(
    "--api-key", envvar="KLQUANT_API_KEY", show_envvar=True, help="What requests must carry.  [default: none]"
)
def command(
    model: str, devices: str | None, max_memory: dict[str, int] | None, max_context: int | None, cache_bits: str,
    max_batch: int, cache_tokens: int | None, prefix_cache: int, host: str, port: int, name: str | None,
    api_key: str | None,
) -> None:  # fmt: skip
    """Serve MODEL, a checkpoint folder or a hub id, quantized or not, over HTTP as OpenAI's API: /v1/chat/completions,
    /v1/completions, /v1/models, and /health. At / is a page to chat at.

    Requests that come while others run join them. Ctrl-C ends it.
    """
    if api_key == "":
        raise UserError("--api-key is empty; leave it and KLQUANT_API_KEY out to serve without one")
    try:
        import uvicorn

        from klquant.serve.app import make_app
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}: pip install 'klquant[serve]'") from None
    from klquant.engine.warm import warm_up
    from klquant.serve.worker import Worker

    listener = _bind(host, port)  # before minutes of loading
    cache_tokens = cache_tokens or _all_at_once(model, max_context, max_batch)
    room = {"max_batch": max_batch, "cache_tokens": cache_tokens, "prefixes": prefix_cache}
    with open_engine(model, devices, max_memory, max_context, cache_bits, **room) as engine:
        if engine.tokenizer.template is None:
            note("the model has no chat template: chats are paragraphs of `role: text`")
        if not engine.on_cpu:
            note("warming up: kernels for every size of batch and prompt; minutes the first time on a machine")
            warm_up(engine)
        failures: list[BaseException] = []

        def give_up(error: BaseException) -> None:
            failures.append(error)
            server.should_exit = True

        with _one_line(host, port):
            listener.listen()
        worker = Worker(engine, give_up)
        called = name or Path(model).name
        app = make_app(engine, worker, called, api_key)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=PATIENCE, lifespan="off")
        server = _server(config, worker.stop)
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        note(
            f"{called}: a chat at {url}, OpenAI's API at {url}/v1; {max_batch} sequences of up to "
            f"{engine.limits.max_context:,} tokens; Ctrl-C ends it"
        )
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises it again once it has shut down
            pass
        finally:
            worker.stop()
            worker.join()
    if failures:
        raise failures[0]


def _server(config, on_exit: Callable[[], None]):
    """A server of uvicorn's that calls `on_exit` as soon as a signal asks it to end: it waits for open answers."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame) -> None:
            on_exit()
            super().handle_exit(sig, frame)

    return Server(config)


def _bind(host: str, port: int) -> socket.socket:
    """A socket with the address. It does not listen yet: while a model is loaded, nobody should wait for an answer."""
    with _one_line(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    return listener


@contextmanager
def _one_line(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host}:{port}: {why}; choose another --host or --port") from None


def _all_at_once(model: str, max_context: int | None, max_batch: int) -> int:
    """Tokens of latent cache with which no sequence waits for another's."""
    from klquant.checkpoint.hub import resolve_model
    from klquant.checkpoint.index import read_config
    from klquant.engine.limits import Limits
    from klquant.kernels.mla.pages import PAGE_SIZE, pages_for

    config = read_config(resolve_model(model, weights=False))[1]
    with named_as_options():
        context = Limits(max_context).of(config).max_context
    return max_batch * pages_for(context) * PAGE_SIZE
