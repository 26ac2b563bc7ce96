"""OpenAI's HTTP interface over an engine: /v1/models, /v1/chat/completions, /v1/completions; /health; a page at /."""

import asyncio
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import resources

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from klquant.engine.engine import Engine, Prompt
from klquant.engine.request import Delta
from klquant.errors import UserError
from klquant.serve.replies import Kind, Reply, error_body
from klquant.serve.schema import FIELDS, Asked, ChatAsked, TextAsked
from klquant.serve.worker import Request as Work
from klquant.serve.worker import Worker, WorkerStopped

# Answers that one request may ask for: prompts times choices.
MAX_ANSWERS = 1024
# Characters of a token, generously.
LONGEST_TOKEN = 128
# The page speaks to nobody else, and runs nothing that it did not bring.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class AnswerError(Exception):
    """An answer ended by an error of the engine, in one line."""


def make_app(engine: Engine, worker: Worker, name: str, api_key: str | None = None) -> FastAPI:
    """The application. `name`: what the model is called in requests; `api_key`: what they must carry, if anything."""
    app = FastAPI(title="klquant", docs_url=None, redoc_url=None, openapi_url=None)
    _install_errors(app)
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(_carries(api_key))])
    desk = _Desk(engine, worker, name)
    page = (resources.files("klquant.serve") / "page.html").read_text(encoding="utf-8")
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "klquant"}
    card["max_model_len"] = engine.limits.max_context

    @app.get("/", response_class=HTMLResponse)
    async def chat_page() -> HTMLResponse:
        """A chat, which needs no key; what it asks of /v1 does."""
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "no-referrer"})

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"}) if worker.alive else _error("the engine has stopped", 503)

    @v1.get("/models")
    async def models() -> dict:
        return {"object": "list", "data": [card]}

    @v1.get("/models/{wanted:path}")
    async def model(wanted: str):
        return card if wanted == name else _no_model(wanted, name)

    @v1.post("/chat/completions")
    async def chat(asked: ChatAsked, request: Request):
        return await desk.answer("chat", asked, request)

    @v1.post("/completions")
    async def text(asked: TextAsked, request: Request):
        return await desk.answer("text", asked, request)

    app.include_router(v1)
    return app


def _carries(api_key: str | None) -> Callable[[Request], Awaitable[None]]:
    """A check that a request carries the key."""

    async def allowed(request: Request) -> None:
        scheme, _, said = request.headers.get("authorization", "").partition(" ")
        known = api_key is None or secrets.compare_digest(said.encode("latin-1"), os.fsencode(api_key))
        if not known or (api_key is not None and scheme.lower() != "bearer"):
            raise HTTPException(401, "the API key is missing or wrong")

    return allowed


def _install_errors(app: FastAPI) -> None:
    """Whatever is raised becomes an error as OpenAI's API has them."""

    @app.exception_handler(UserError)
    async def bad_input(_: Request, error: UserError) -> JSONResponse:
        return _error(str(error).replace("max_new_tokens", "max_tokens"), 400)

    @app.exception_handler(RequestValidationError)
    async def bad_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return _error(_wrong_with(error), 400)

    @app.exception_handler(HTTPException)
    async def no_such_page(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.detail, error.status_code)

    @app.exception_handler(AnswerError)
    async def no_answer(_: Request, error: AnswerError) -> JSONResponse:
        return _error(str(error), 500)

    @app.exception_handler(WorkerStopped)
    async def gone(_: Request, error: WorkerStopped) -> JSONResponse:
        return _error(str(error), 503)

    @app.exception_handler(Exception)
    async def a_bug(_: Request, error: Exception) -> JSONResponse:
        return _error(f"{type(error).__name__}: {error}", 500)


def _wrong_with(error: RequestValidationError) -> str:
    """What is wrong with a body, in one line."""
    # Of a value that may be of several kinds there is an error for each: the deepest is the nearest to right, and of
    # equals the one whose kind is right.
    nearest = max(error.errors(), key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    if nearest["type"] == "json_invalid":
        return f"the body is no JSON: {nearest['ctx']['error']}"
    if nearest["type"] == "model_attributes_type" and nearest["loc"] == ("body",):
        return "the body is no JSON object, or not said to be one: Content-Type: application/json"
    if nearest["loc"] == ("body",) and nearest["type"] == "missing":
        return "the body is empty; a JSON object is expected"
    where = ".".join(str(part) for part in nearest["loc"] if isinstance(part, int) or part in FIELDS)
    what = nearest["msg"].removeprefix("Value error, ")
    return f"{where}: {'an object is expected' if nearest['type'] == 'model_attributes_type' else what}"


class _Desk:
    """Takes requests, has the worker answer them and hands the answers out. `name`: what they call the model."""

    def __init__(self, engine: Engine, worker: Worker, name: str) -> None:
        self.engine, self.worker, self.name = engine, worker, name
        self.encoding = asyncio.Lock()  # a tokenizer serves one thread at a time

    async def answer(self, kind: Kind, asked: Asked, request: Request) -> Response:
        """The whole answer or its stream. Raises UserError for what can never be answered, AnswerError and
        WorkerStopped for what was not."""
        if asked.model not in (None, self.name):
            return _no_model(asked.model, self.name)
        params = asked.params(self.engine.defaults, room=self.engine.limits.max_context)
        prompts = await self._encode_all(asked.prompts(), len(params))
        work = self.worker.submit([(ids, one) for ids in prompts for one in params])
        await work.begin()
        reply = Reply(kind, self.name, sum(map(len, prompts)), self.engine.tokenizer.decode)
        if asked.stream:
            events = _stream(work, reply, asked.wants_usage)
            await anext(events)  # one that has begun is closed when nobody reads it, and drops its work
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            return await _unless_left(request, _collect(work, reply))
        finally:
            work.drop()

    async def _encode_all(self, prompts: Sequence[Prompt], times: int) -> list[list[int]]:
        """Token ids of prompts that are answered `times` times each."""
        if (answers := len(prompts) * times) > MAX_ANSWERS:
            raise UserError(f"{answers:,} answers are asked for at once, {MAX_ANSWERS:,} at most")
        async with self.encoding:
            return [await run_in_threadpool(self._encode, prompt) for prompt in prompts]

    def _encode(self, prompt: Prompt) -> list[int]:
        context = self.engine.limits.max_context
        texts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt if isinstance(m, dict)]
        length = sum(map(len, texts))
        if length > LONGEST_TOKEN * context:  # seconds of work that nothing else could be done in
            raise UserError(f"the prompt has {length:,} characters, which no context of {context:,} tokens holds")
        return self.engine.encode(prompt)


def _no_model(wanted: str, name: str) -> JSONResponse:
    return _error(f"there is no model {wanted!r} here, only {name!r}", 404)


def _error(message: str, status: int) -> JSONResponse:
    return JSONResponse(error_body(message, status), status)


async def _collect(work: Work, reply: Reply) -> JSONResponse:
    answers: list[list[Delta]] = [[] for _ in work.orders]
    async for said in work.events():
        if said.delta.finish == "error":
            raise AnswerError(said.delta.error)
        answers[said.index].append(said.delta)
    reply.reused = work.reused
    return JSONResponse(reply.whole(answers))


async def _unless_left(request: Request, work: Awaitable[JSONResponse]) -> JSONResponse:
    """What `work` gives; it is cancelled when the client has gone."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else _error("the client has gone", 499)
    finally:
        task.cancel()
        left.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(work: Work, reply: Reply, usage: bool) -> AsyncIterator[str]:
    """Server-sent events, the first of them empty. What goes wrong once they have begun is an event as well."""
    begun: set[int] = set()
    try:
        yield ""
        async for said in work.events():
            if said.delta.finish == "error":
                raise AnswerError(said.delta.error)
            if body := reply.chunk(said.index, said.delta, first=said.index not in begun):
                yield _event(body)
                begun.add(said.index)
        if usage:
            reply.reused = work.reused
            yield _event(reply.usage_chunk())
    except (AnswerError, WorkerStopped) as error:
        yield _event(error_body(str(error), 500))
    finally:
        work.drop()
    yield "data: [DONE]\n\n"


def _event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
