"""The server: over real sockets, what the engine answers, to many at a time, and to nobody who has gone."""

import http.client
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import uvicorn

from klquant.engine.engine import Engine
from klquant.engine.limits import Limits
from klquant.engine.request import SamplingParams
from klquant.serve.app import make_app
from klquant.serve.worker import Worker

LIMITS = Limits(max_context=256, max_batch=3, cache_tokens=768, chunk=31)
GREEDY = SamplingParams(max_new_tokens=10)
HELLO = [{"role": "user", "content": "hello"}]
# Long enough that nothing ends it but what a test does.
ENDLESS = {"prompt": "x", "max_tokens": 250, "ignore_eos": True}


@pytest.fixture(scope="module")
def loaded(tiny):
    with Engine.from_pretrained(tiny, devices="cpu") as engine:
        yield engine.runner.weights, engine.tokenizer


@pytest.fixture
def reference(loaded):
    """Another engine on the same weights, asked without a server."""
    return Engine(*loaded, LIMITS, ahead=False)


class Client:
    """Speaks HTTP to a server."""

    def __init__(self, port: int, worker: Worker, engine: Engine, failures: list, headers: dict[str, str]) -> None:
        self.port, self.worker, self.engine = port, worker, engine
        self.failures, self.headers = failures, headers

    def send(self, path: str, body: object = None) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, str | None) else json.dumps(body)
        headers = self.headers | {"Content-Type": "application/json"}
        connection.request("GET" if body is None else "POST", path, data, headers)
        return connection

    def ask(self, path: str, body: object = None) -> tuple[int, dict]:
        answer = self.send(path, body).getresponse()
        return answer.status, json.loads(answer.read())

    def stream(self, path: str, body: dict) -> list[dict]:
        answer = self.send(path, body | {"stream": True}).getresponse()
        assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/event-stream")
        *events, done, rest = answer.read().decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def idle(self) -> bool:
        """Whether the engine comes to rest soon."""
        until = time.monotonic() + 20
        while self.engine.loop.jobs and time.monotonic() < until:
            time.sleep(0.01)
        return not self.engine.loop.jobs


@contextmanager
def serving(loaded, api_key=None, headers=None, limits=LIMITS):
    engine, failures = Engine(*loaded, limits, ahead=False), []
    worker = Worker(engine, failures.append)
    server = uvicorn.Server(uvicorn.Config(make_app(engine, worker, "tiny", api_key), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        (port,) = (s.getsockname()[1] for one in server.servers for s in one.sockets)
        yield Client(port, worker, engine, failures, headers or {})
    finally:
        worker.stop()
        server.should_exit = True
        thread.join(20)
        worker.join()


@pytest.fixture(scope="module")
def client(loaded):
    with serving(loaded) as client:
        yield client


def test_a_chat_is_answered_as_the_engine_answers(client, reference):
    (expected,) = reference.generate([HELLO], GREEDY)
    status, said = client.ask("/v1/chat/completions", {"messages": HELLO, "max_tokens": 10, "model": "tiny"})
    assert status == 200 and said["object"] == "chat.completion" and said["model"] == "tiny"
    (choice,) = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert choice["finish_reason"] == {"eos": "stop", "length": "length"}[expected.finish]
    counts = expected.prompt_tokens, len(expected.tokens)
    assert said["usage"] == dict(
        zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*counts, sum(counts)), strict=True),
        prompt_tokens_details={"cached_tokens": 0},
    )


def test_the_next_turn_of_a_chat_computes_what_is_new(loaded, reference):
    """Streamed or whole; the answer is the engine's that computes everything."""
    with serving(loaded, limits=replace(LIMITS, prefixes=2)) as client:
        chat, before = list(HELLO), 0
        for turn, path in enumerate(["whole", "stream", "whole"]):
            body = {"messages": chat, "max_tokens": 10}
            (expected,) = reference.generate([chat], GREEDY)
            if path == "whole":
                said = client.ask("/v1/chat/completions", body)[1]
                text, usage = said["choices"][0]["message"]["content"], said["usage"]
            else:
                body |= {"stream_options": {"include_usage": True}}
                *pieces, last = client.stream("/v1/chat/completions", body)
                text, usage = "".join(p["choices"][0]["delta"].get("content", "") for p in pieces), last["usage"]
            assert text == expected.text
            assert usage["prompt_tokens_details"] == {"cached_tokens": before}, turn
            before = usage["prompt_tokens"]
            chat += [{"role": "assistant", "content": text}, {"role": "user", "content": "and then?"}]


def test_what_was_known_is_counted_once_a_prompt(loaded):
    with serving(loaded, limits=replace(LIMITS, prefixes=2)) as client:
        known = client.ask("/v1/completions", {"prompt": "hello, world", "max_tokens": 3})[1]["usage"]["prompt_tokens"]
        said = client.ask("/v1/completions", {"prompt": "hello, world and", "n": 3, "max_tokens": 3})[1]
        assert said["usage"]["prompt_tokens_details"] == {"cached_tokens": known}


def test_the_page_is_whole_and_speaks_to_this_server_only(client):
    connection = client.send("/")
    answer = connection.getresponse()
    page = answer.read().decode()
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert not re.search(r"https?://|\bsrc=|\bhref=|innerHTML|@import|url\(", page)
    # What it asks of the interface is what the interface has.
    asked = set(re.findall(r'fetch\("([^"]+)"', page))
    assert asked == {"v1/models", "v1/chat/completions"}
    fields = {"messages": HELLO, "temperature": 0.5, "top_p": 0.9, "max_tokens": 3, "stream": True}
    assert all(f'"{name}"' in page or f"{name}:" in page for name in fields)
    *_, last = client.stream("/v1/chat/completions", fields | {"stream_options": {"include_usage": True}})
    assert last["usage"]["completion_tokens"] == 3 and "cached_tokens" in last["usage"]["prompt_tokens_details"]


def test_an_answer_without_a_limit_may_fill_the_context(client):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    body = {"messages": [{"role": "user", "content": parts}], "ignore_eos": True}
    said = client.ask("/v1/chat/completions", body)[1]
    assert said["usage"]["total_tokens"] == LIMITS.max_context and said["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_pieces_make_the_whole(client, path):
    body = {"max_tokens": 12, "temperature": 0.9, "seed": 5, "n": 2}
    body |= {"messages": HELLO} if "chat" in path else {"prompt": "hello"}
    whole = client.ask(path, body)[1]
    *pieces, last = client.stream(path, body | {"stream_options": {"include_usage": True}})
    assert last["choices"] == [] and last["usage"] == whole["usage"] and {p["id"] for p in pieces} == {last["id"]}
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        if "chat" in path:
            assert mine[0]["delta"]["role"] == "assistant" and not any("role" in m["delta"] for m in mine[1:])
            assert "".join(m["delta"].get("content", "") for m in mine) == choice["message"]["content"]
        else:
            assert "".join(m["text"] for m in mine) == choice["text"]
        assert [m["finish_reason"] for m in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]


def test_several_prompts_and_answers_in_order(client, reference):
    prompts = ["hello", "some other text"]
    body = {"prompt": prompts, "n": 2, "temperature": 1.0, "seed": 7, "max_tokens": 8}
    said = client.ask("/v1/completions", body)[1]
    drawn = [SamplingParams(max_new_tokens=8, temperature=1.0, seed=7 + i) for i in (0, 1)] * 2
    expected = reference.generate([p for p in prompts for _ in range(2)], drawn)
    assert [c["text"] for c in said["choices"]] == [answer.text for answer in expected]
    assert [c["index"] for c in said["choices"]] == [0, 1, 2, 3]
    ids = [reference.encode(prompt) for prompt in prompts]
    assert client.ask("/v1/completions", body | {"prompt": ids})[1]["choices"] == said["choices"]


def test_logprobs_are_the_engines(client, reference):
    (expected,) = reference.generate(["hello"], replace(GREEDY, logprobs=2, max_new_tokens=4))
    text = client.ask("/v1/completions", {"prompt": "hello", "max_tokens": 4, "logprobs": 2})[1]
    said = text["choices"][0]["logprobs"]
    assert said["token_logprobs"] == [one.logprob for one in expected.logprobs]
    assert [len(top) for top in said["top_logprobs"]] == [
        len({reference.tokenizer.decode([token]) for token, _ in one.top}) for one in expected.logprobs
    ]
    chat = {"messages": HELLO, "max_tokens": 4, "logprobs": True, "top_logprobs": 3}
    content = client.ask("/v1/chat/completions", chat)[1]["choices"][0]["logprobs"]["content"]
    assert all(len(one["top_logprobs"]) == 3 and one["logprob"] <= 0 for one in content)
    assert all(one["bytes"] is None or bytes(one["bytes"]).decode() == one["token"] for one in content)
    assert all((one["bytes"] is None) == ("\ufffd" in one["token"]) for one in content)


def test_many_at_a_time_get_what_each_gets_alone(client, reference):
    prompts = [f"text number {i} " + "and more " * i for i in range(9)]
    expected = [answer.text for answer in reference.generate(prompts, GREEDY)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        bodies = [{"prompt": prompt, "max_tokens": GREEDY.max_new_tokens} for prompt in prompts]
        said = list(pool.map(lambda body: client.ask("/v1/completions", body), bodies))
    assert [body["choices"][0]["text"] for _, body in said] == expected


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_not_answered_any_more(client, stream):
    connection = client.send("/v1/completions", ENDLESS | {"stream": stream, "n": 5})
    if stream:
        assert connection.getresponse().read(5) == b"data:"
    else:
        while not client.engine.loop.jobs:
            time.sleep(0.01)
    jobs = [*client.engine.loop.jobs.values()]
    connection.close()
    assert client.idle() and "cancelled" in {job.finish for job in jobs}
    assert client.ask("/v1/completions", ENDLESS)[1]["usage"]["completion_tokens"] == 250


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("chat/completions", {"messages": []}, 400, "messages: "),
        ("chat/completions", {}, 400, "messages: Field required"),
        ("chat/completions", "{nonsense", 400, "the body is no JSON: "),
        ("chat/completions", "[1]", 400, "the body is no JSON object"),
        ("chat/completions", {"messages": HELLO, "temperature": -1}, 400, "temperature is -1.0, expected 0"),
        ("chat/completions", {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ("chat/completions", {"messages": HELLO, "response_format": {"type": "json_object"}}, 400, "response_format"),
        ("chat/completions", {"messages": HELLO, "model": "gpt"}, 404, "no model 'gpt' here, only 'tiny'"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "'text'"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ("chat/completions", {"messages": ["x"]}, 400, "messages.0: an object is expected"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": ["x"]}]},
            400,
            "messages.0.content.0: an object",
        ),
        ("chat/completions", {"messages": HELLO, "stream_options": 5}, 400, "stream_options: an object is expected"),
        ("chat/completions", {"messages": [*HELLO, {"role": "user", "content": None}]}, 400, "messages.1.content: "),
        ("completions", {"prompt": ""}, 400, "the prompt is empty"),
        ("completions", {"prompt": []}, 400, "the prompt is empty"),
        ("completions", {"prompt": [5, 1 << 40]}, 400, "outside the model's vocabulary"),
        ("completions", {"prompt": "x" * 300}, 400, "fills the context of 256"),
        ("completions", {"prompt": ["x", "x" * 300], "stream": True}, 400, "fills the context of 256"),
        ("completions", {"prompt": "a\ud800"}, 400, "character 2 of the text, \\ud800, is only half of one"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\udc80"}]}, 400, "is only half of one"),
        ("completions", {"prompt": "x" * 40_000}, 400, "40,000 characters, which no context of 256 tokens holds"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 40_000}]}, 400, "40,000 characters"),
        ("completions", {"prompt": ["x"] * 600, "n": 2}, 400, "1,200 answers are asked for at once"),
        ("completions", {"prompt": [1.0, 2]}, 400, "prompt.0: Input"),
        ("completions", {"prompt": "x", "stop": [str(i) for i in range(17)]}, 400, "stop: List should have"),
        ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens is 0, expected at least 1"),
        ("completions", {"prompt": "x", "n": 0}, 400, "n: "),
        ("completions", {"prompt": "x", "logprobs": True}, 400, "logprobs: a number of"),
        ("completions", {"prompt": "x", "stop": ""}, 400, "stop has an empty text"),
        ("completions", {"prompt": "x", "stop": ["a", ""]}, 400, "stop has an empty text"),
        ("completions", "", 400, "the body is empty; a JSON object is expected"),
        ("embeddings", {"input": "x"}, 404, "Not Found"),
    ],
)
def test_bad_input_is_one_line(client, path, body, status, message):
    got, said = client.ask(f"/v1/{path}", body)
    assert got == status and message in said["error"]["message"] and "\n" not in said["error"]["message"]
    assert said["error"]["code"] == status and client.idle()


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {
            "structured_outputs": {"json": {}}, "guided_regex": "a+", "json_schema": {}, "min_tokens": 3,
            "continue_final_message": True, "chat_template_kwargs": {"thinking": True}, "prompt": "x",
        }),
        ("completions", {
            "guided_json": {}, "stop_token_ids": [5], "min_tokens": 3, "messages": HELLO, "max_completion_tokens": 3,
        }),
    ],
)  # fmt: skip
def test_what_would_change_an_answer_is_refused(client, path, fields):
    """Whether it is known or not."""
    body = {"messages": HELLO} if "chat" in path else {"prompt": "x"}
    for name, value in fields.items():
        status, said = client.ask(f"/v1/{path}", body | {"max_tokens": 1, name: value})
        assert (status, said["error"]["message"]) == (400, f"{name} is not supported")
    status, said = client.ask(f"/v1/{path}", body | {"max_token": 1})
    assert (status, said["error"]["message"]) == (400, "max_token is not supported; did you mean max_tokens?")


def test_an_answer_that_called_a_tool_is_refused(client):
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}
    status, said = client.ask("/v1/chat/completions", {"messages": [*HELLO, call, *HELLO]})
    assert (status, said["error"]["message"]) == (400, "tool_calls in a message is not supported")


def test_what_clients_send_of_themselves_is_no_error(client):
    """Clients of OpenAI's API, LangChain, LiteLLM, Open WebUI, vLLM's benchmark; an answer said again as it came."""
    both = {"model": "tiny", "max_tokens": 1, "temperature": 0.7, "top_p": 1, "n": 1, "seed": None, "stop": None}
    both |= {"logit_bias": None, "frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
    both |= {"user": "me", "min_tokens": 0, "skip_special_tokens": True, "ignore_eos": False, "unheard_of": None}
    text = {"prompt": "x", "logprobs": None, "best_of": 1, "echo": False, "suffix": None, "logit_bias": {}}
    assert client.ask("/v1/completions", both | text)[0] == 200
    again = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "annotations": []}
    chat = {"messages": [*HELLO, again, *HELLO], "store": False, "metadata": {"a": "b"}, "service_tier": "auto"}
    chat |= {"safety_identifier": "x", "prompt_cache_key": "y", "parallel_tool_calls": True, "tools": []}
    chat |= {"tool_choice": "auto", "response_format": {"type": "text"}, "chat_template_kwargs": {}, "logprobs": False}
    chat |= {"max_tokens": None, "max_completion_tokens": 1}
    assert client.ask("/v1/chat/completions", both | chat)[0] == 200


def test_what_asks_for_nothing_is_no_error(client):
    body = {"messages": HELLO, "max_tokens": 1, "tools": [], "presence_penalty": 0, "user": "me", "top_k": -1}
    body |= {"n": None, "stream": None, "stop": None, "stream_options": {"include_usage": None}, "logprobs": None}
    assert client.ask("/v1/chat/completions", body)[0] == 200


def test_models_and_health(client):
    (model,) = client.ask("/v1/models")[1]["data"]
    assert model["id"] == "tiny" and model["max_model_len"] == LIMITS.max_context
    assert client.ask("/v1/models/tiny") == (200, model) and client.ask("/v1/models/an/other")[0] == 404
    assert client.ask("/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(("said", "status"), [("Bearer ö", 401), ("Bearer right", 200), (None, 401), ("right", 401)])
def test_the_key(loaded, said, status):
    headers = {} if said is None else {"Authorization": said.encode("latin-1")}
    with serving(loaded, api_key="right", headers=headers) as client:
        assert client.ask("/v1/models")[0] == status
        assert client.ask("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == status
        assert client.ask("/health")[0] == 200


def test_an_answer_that_fails_is_an_error_and_the_others_go_on(loaded):
    with serving(loaded) as client:
        real = client.engine.loop.step

        def step():
            for job in client.engine.loop.jobs.copy().values():
                if job.params.seed == 13:
                    job.end("error", "no numbers")
                    client.engine.loop._retire(job)
            return real() or True

        client.engine.loop.step = step
        status, said = client.ask("/v1/completions", {"prompt": "x", "seed": 13})
        assert (status, said["error"]["message"]) == (500, "no numbers")
        assert client.stream("/v1/completions", {"prompt": "x", "seed": 13})[-1]["error"]["message"] == "no numbers"
        assert client.ask("/v1/completions", {"prompt": "x", "seed": 12})[0] == 200
        assert not client.failures


def test_a_request_that_the_engine_cannot_take_hurts_no_other(loaded):
    with serving(loaded) as client:
        real, other = client.engine.submit, client.send("/v1/completions", ENDLESS)

        def submit(ids, params):
            if params.seed == 14:
                raise MemoryError("no room")
            return real(ids, params)

        client.engine.submit = submit
        status, said = client.ask("/v1/completions", {"prompt": "x", "n": 2, "seed": 13})
        assert (status, said["error"]["message"]) == (500, "MemoryError: no room")
        assert json.loads(other.getresponse().read())["usage"]["completion_tokens"] == 250
        assert client.idle() and not client.failures


def test_a_server_that_ends_does_not_wait_for_a_long_step(loaded):
    with serving(loaded) as client:
        real, go = client.engine.loop._step, threading.Event()

        def step():
            go.wait(30)
            return real()

        client.engine.loop._step = step
        whole = client.send("/v1/completions", ENDLESS)
        answer = client.send("/v1/completions", ENDLESS | {"prompt": "y", "stream": True})
        while not client.engine.loop.jobs:
            time.sleep(0.01)
        client.worker.stop()
        assert "the server is going down" in answer.getresponse().read().decode()
        assert whole.getresponse().status == 503
        go.set()


def test_when_a_step_fails_nothing_is_answered_any_more(loaded):
    with serving(loaded) as client:
        real, steps = client.engine.loop._step, []

        def step():
            steps.append(1)
            if len(steps) == 4:
                raise RuntimeError("the card is gone")
            return real()

        client.engine.loop._step = step
        events = client.stream("/v1/completions", ENDLESS)
        assert "did not come to its end" in events[-1]["error"]["message"]
        assert [str(error) for error in client.failures] == ["the card is gone"]
        assert client.ask("/health")[0] == 503
        assert client.ask("/v1/completions", {"prompt": "x"})[0] == 503


def test_a_server_that_ends_says_so_to_those_who_wait(loaded):
    with serving(loaded) as client:
        connection = client.send("/v1/completions", ENDLESS | {"stream": True})
        answer = connection.getresponse()
        assert answer.read(5) == b"data:"
    assert "the server is going down" in answer.read().decode()
