"""As `benchmarks.serving`, but over HTTP: streams of server-sent events to clients in another process.

    PYTHONPATH=. python3 -m benchmarks.serving_http [--cases 1x128,8x128,32x128] [--new 256] [--layers 27] [--pretend]
    PYTHONPATH=. python3 -m benchmarks.serving_http --cases 1x32768+2 --slots 2 --prefixes 4

The first column is "first", the time until the last request has its first piece, as a client sees it. Prompts are token
ids; a tokenizer that makes one character of each token stands in for the model's. 1x32768+2: a prompt of 32,768 tokens,
and two more that begin with the one before and are 256 tokens longer, a row each. 1x8192/3: three prompts, one after
the other, that begin with the same 8,192 tokens and go on with 256 of their own.
"""

import http.client
import json
import multiprocessing
import re
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import click
import torch
import uvicorn

from klquant.calibrate.tokenizer import Tokenizer
from klquant.engine.engine import Engine
from klquant.engine.limits import Limits
from klquant.engine.load import place
from klquant.engine.placement import find_devices
from klquant.engine.request import Delta, SamplingParams
from klquant.engine.synthetic import parse_synthetic, random_weights, synthetic_outline
from klquant.engine.warm import warm_up
from klquant.kernels.mla.pages import PAGE_SIZE
from klquant.serve.app import make_app
from klquant.serve.worker import Worker

# Tokens by which a prompt that begins with another is longer.
MORE = 256


class Characters:
    """A token is a character."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode(self, ids) -> str:
        return "".join(chr(0x4E00 + i % 20_000) for i in ids)


def ask(port: int, body: bytes) -> tuple[float, float]:
    """Seconds until a stream's first piece, and until its end."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    assert answer.readline().startswith(b"data:")
    first, last = time.perf_counter() - began, b""
    for line in answer:
        last = line.strip() or last
    assert last == b"data: [DONE]", last
    return first, time.perf_counter() - began


def ask_all(port: int, bodies: list[bytes]) -> tuple[float, float]:
    """The longest of each, of requests that are sent together."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        times = list(pool.map(lambda body: ask(port, body), bodies))
    return max(first for first, _ in times), max(whole for _, whole in times)


@dataclass(frozen=True)
class Talk:
    """`n` prompts at a time, `rounds` times: of `length` tokens and then longer, or alike in so many."""

    n: int
    length: int
    rounds: int
    alike: bool

    @classmethod
    def of(cls, case: str) -> "Talk":
        n, length, sign, count = re.fullmatch(r"(\d+)x(\d+)(?:([+/])(\d+))?", case).groups()
        return cls(int(n), int(length), int(count or 0) + (sign != "/"), sign == "/")

    @property
    def longest(self) -> int:
        return self.length + MORE * (1 if self.alike else self.rounds - 1)

    def prompts(self) -> list[list[list[int]]]:
        """Those of each round."""

        def noise(length: int) -> list[list[int]]:
            return torch.randint(0, 20_000, (self.n, length)).tolist()

        whole = noise(self.longest)
        if not self.alike:
            return [[prompt[: self.length + i * MORE] for prompt in whole] for i in range(self.rounds)]
        return [
            [prompt[: self.length] + own for prompt, own in zip(whole, noise(MORE), strict=True)]
            for _ in range(self.rounds)
        ]


class Pretender:
    """Stands in for an engine: a step is 1.5 ms of Python and 5.4 of waiting, and gives every answer a token."""

    def __init__(self) -> None:
        self.loop, self.limits, self.defaults = self, Limits(max_context=8192), SamplingParams()
        self.tokenizer, self.jobs = Characters(20_000), {}

    def encode(self, ids: list[int]) -> list[int]:
        return ids

    def submit(self, ids: list[int], params: SamplingParams) -> SimpleNamespace:
        job = SimpleNamespace(deltas=deque(), finish=None, left=params.max_new_tokens)
        self.jobs[id(job)] = job
        return job

    def cancel(self, job: SimpleNamespace) -> None:
        self.jobs.pop(id(job), None)

    def step(self) -> bool:
        until = time.perf_counter() + 0.0015
        while time.perf_counter() < until:
            pass
        time.sleep(0.0054)
        for job in [*self.jobs.values()]:
            job.left -= 1
            if not job.left:
                job.finish = "length"
                self.cancel(job)
            job.deltas.append(Delta("字", (0,), (), job.finish))
        return True


def full_shape(slots: int, prefixes: int, context: int, layers: int, recipe: str) -> Engine:
    """An engine of random weights on the GPU, warmed up."""
    torch.set_grad_enabled(False)
    config, layers = parse_synthetic(f"kimi-linear-48b:layers={layers}")
    limits = Limits(max_context=context, max_batch=slots, cache_tokens=slots * context, prefixes=prefixes)
    outline, devices = synthetic_outline(config, recipe, layers), find_devices("cuda:0")
    needs = {"context": limits.cache_tokens, "sequences": slots, "prefixes": prefixes, "cache_bits": limits.cache_bits}
    placement = place(outline, devices, torch.bfloat16, **needs)
    weights = random_weights(outline, placement, torch.bfloat16)
    tokenizer = Tokenizer(Path("none"), Characters(weights.cfg.vocab_size), 0, 1, None)
    engine = Engine(weights, tokenizer, limits, placement=placement)
    print(f"{torch.cuda.get_device_name()}, {layers} layers, {recipe}")
    began = time.perf_counter()
    warm_up(engine)
    print(f"warm after {time.perf_counter() - began:.0f} s", flush=True)
    return engine


@click.command(help=__doc__)
@click.option("--cases", default="1x128,8x128,32x128", show_default=True)
@click.option("--new", default=256, show_default=True)
@click.option("--slots", default=32, show_default=True)
@click.option("--prefixes", default=0, show_default=True, help="Prompts whose state is kept.")
@click.option("--runs", default=6, show_default=True)
@click.option("--layers", default=27, show_default=True)
@click.option("--recipe", default="int4", show_default=True)
@click.option("--pretend", is_flag=True, help="No model: what HTTP costs, beside steps of 6.9 ms.")
def main(
    cases: str, new: int, slots: int, prefixes: int, runs: int, layers: int, recipe: str, pretend: bool
) -> None:  # fmt: skip
    talks = [Talk.of(case) for case in cases.split(",")]
    context = -(-(max(talk.longest for talk in talks) + new) // PAGE_SIZE) * PAGE_SIZE
    engine = Pretender() if pretend else full_shape(slots, prefixes, context, layers, recipe)
    worker = Worker(engine, on_failure=print)
    server = uvicorn.Server(uvicorn.Config(make_app(engine, worker, "noise"), port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    print(f"{new} new tokens each, over HTTP")
    print(f"{'prompts':>11} {'first, ms':>10} {'all, s':>8} {'answer t/s':>11}")
    with multiprocessing.get_context("spawn").Pool(1) as clients:
        for talk in talks:
            for _ in range(runs):
                rows = []
                for prompts in talk.prompts():
                    asked = {"max_tokens": new, "ignore_eos": True, "stream": True, "temperature": 0}
                    bodies = [json.dumps(asked | {"prompt": prompt}).encode() for prompt in prompts]
                    rows.append((len(prompts[0]), *clients.apply(ask_all, (port, bodies))))
            for length, first, whole in rows:
                speed = talk.n * new / whole
                print(f"{talk.n:>4} x {length:<6} {first * 1e3:>8.1f} {whole:>8.3f} {speed:>11,.0f}", flush=True)
    worker.stop()
    worker.join()
    server.should_exit = True


if __name__ == "__main__":
    main()
