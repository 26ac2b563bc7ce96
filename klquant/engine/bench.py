"""How fast the engine is on this machine: prefill, decode, memory, and the share of the bandwidth that it reaches.

What is timed is the runner with random tokens: launches, graphs, sampling, and tokens brought to the host while the
next step runs, as `klquant.engine.engine` does it; not text. A cache is not filled by a prefill before a decode step at
a long context is timed, but with noise: time does not depend on what latents say.
"""

import time
from dataclasses import dataclass
from statistics import median

import torch

from klquant.checkpoint.config import KimiLinearConfig
from klquant.engine.ceilings import synchronize
from klquant.engine.prefill import Span
from klquant.engine.reply import Reply
from klquant.engine.request import SamplingParams
from klquant.engine.runner import Runner
from klquant.engine.usage import Offloaded, Traffic, count_offloaded, step_traffic
from klquant.errors import UserError
from klquant.kernels.mla.pages import PAGE_SIZE, pages_for
from klquant.recipe.memory import PREFILL_CHUNK, WeightSizes

# Steps before the timed ones: the graph is captured, caches of compiled kernels are filled.
WARM_STEPS = 3
# Timed repetitions of a prefill, and the seconds after which one is enough.
REPEATS, ENOUGH = 3, 5.0


@dataclass(frozen=True)
class Prefill:
    """A prompt of `tokens`: seconds until its first token is on the host."""

    tokens: int
    first_token_s: float

    @property
    def tokens_s(self) -> float:
        return self.tokens / self.first_token_s


@dataclass(frozen=True)
class Decode:
    """Steps of `batch` sequences that hold `context` tokens: seconds a step, on average over `steps`. offloaded: of all
    of them, where experts lie in the host's memory; whose they are depends on the tokens, which are noise here."""

    batch: int
    context: int
    steps: int
    step_s: float
    traffic: Traffic
    offloaded: Offloaded | None = None

    @property
    def tokens_s(self) -> float:
        return self.batch / self.step_s

    @property
    def bytes_s(self) -> float:
        return self.traffic.total / self.step_s


def fill_with_noise(runner: Runner) -> None:
    """Give every page of the latent caches values of order one."""
    for stage in runner.stages:
        for pages in stage.state.latent.values():
            if pages.scale is None:
                pages.data.normal_()
            else:
                pages.data.random_(-127, 128)
                pages.scale.fill_(1 / 64)


def measure_prefill(runner: Runner, tokens: int, chunk: int = PREFILL_CHUNK) -> Prefill:
    """A prompt in chunks, as the scheduler cuts it, in slot 0. On GPUs the first runs, up to a graph, do not count."""
    ids = torch.randint(0, runner.cfg.vocab_size, (tokens,)).tolist()

    def once() -> float:
        runner.bind(0, range(pages_for(tokens + 1)), SamplingParams(seed=0), (), fresh=True)
        _wait(runner)
        started = time.perf_counter()
        for start in range(0, tokens, chunk):
            span = Span(ids[start : start + chunk], 0, start)
            h_SC = runner.prefill([span])
        (token,) = Reply.begin(runner.first_tokens(h_SC, [span], "greedy"), 1).tokens()
        if token < 0:
            raise UserError(f"a prompt of {tokens} tokens: the logits are not numbers")
        return time.perf_counter() - started

    for _ in range(runner.runs_before_its_best(tokens) if _on_gpu(runner) else 0):
        once()
    times = [once()]
    while len(times) < REPEATS and sum(times) < ENOUGH:
        times.append(once())
    return Prefill(tokens, median(times))


def measure_decode(
    runner: Runner, sizes: WeightSizes, batch: int, context: int, steps: int, cache_bits: int
) -> Decode:  # fmt: skip
    """Greedy steps in slots 0 … batch − 1, from `context` tokens each on. The caches hold noise (`fill_with_noise`)."""
    slots = prepare(runner, batch, context, WARM_STEPS + steps)
    for _ in range(WARM_STEPS):
        Reply.begin(runner.decode(slots, "greedy"), batch).tokens()
    _wait(runner)
    before = count_offloaded(runner.weights)
    started, reply = time.perf_counter(), None
    for _ in range(steps):
        last, reply = reply, Reply.begin(runner.decode(slots, "greedy"), batch)
        if last:
            last.tokens()
    chosen = reply.tokens()
    step_s = (time.perf_counter() - started) / steps
    if min(chosen) < 0:
        raise UserError(f"{batch} sequences of {context} tokens: the logits are not numbers")
    middle = context + WARM_STEPS + steps // 2
    traffic = step_traffic(runner.cfg, sizes, batch, middle, cache_bits, runner.weights.dtype.itemsize)
    offloaded = before and count_offloaded(runner.weights).since(before)
    return Decode(batch, context, steps, step_s, traffic, offloaded)


def prepare(runner: Runner, batch: int, context: int, steps: int) -> list[int]:
    """Put `batch` sequences of `context` tokens into slots, with pages for `steps` more; returns the slots."""
    each = pages_for(context + steps)
    for slot in range(batch):
        pages = range(slot * each, (slot + 1) * each)
        runner.bind(slot, pages, SamplingParams(seed=slot), (), fresh=True)
        runner.next_token[slot] = slot % runner.cfg.vocab_size
        for stage in runner.stages:
            stage.state.length[slot] = context
    return list(range(batch))


def count_launches(runner: Runner) -> int | None:
    """Kernels of a decode step of one sequence; None on a CPU, and where the profiler may not see them."""
    if not _on_gpu(runner):
        return None
    slots = prepare(runner, 1, 1, WARM_STEPS + 1)
    for _ in range(WARM_STEPS):
        runner.decode(slots, "greedy")
    _wait(runner)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        runner.decode(slots, "greedy")
        _wait(runner)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()) or None


def _wait(runner: Runner) -> None:
    synchronize(stage.device for stage in runner.stages)


def _on_gpu(runner: Runner) -> bool:
    return runner.stages[0].device.type == "cuda"


@dataclass(frozen=True)
class Cells:
    """What to measure: prompts of `prefill` tokens; every batch with every context, for `steps` steps."""

    prefill: tuple[int, ...]
    batch: tuple[int, ...]
    context: tuple[int, ...]
    steps: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, in whole pages."""
        decoded = [c + WARM_STEPS + self.steps for c in self.context if self.batch]
        return pages_for(max([0, *self.prefill, *decoded]) + 1) * PAGE_SIZE

    def cached(self, batch: int, context: int) -> int:
        """Tokens of cache that a cell takes, in whole pages."""
        return batch * pages_for(context + WARM_STEPS + self.steps) * PAGE_SIZE

    @property
    def caches(self) -> list[int]:
        """Tokens of cache that cells take, the most first."""
        prompts = {pages_for(n + 1) * PAGE_SIZE for n in self.prefill}
        decoded = {self.cached(b, c) for b in self.batch for c in self.context}
        return sorted(prompts | decoded | {PAGE_SIZE}, reverse=True)

    @property
    def most_cached(self) -> int:
        return self.caches[0]

    def within(self, config: KimiLinearConfig) -> "Cells":
        """Those that the model's own context allows; one that fills it is cut by the steps to be timed."""
        most = config.max_context
        room = most - WARM_STEPS - self.steps - 1
        contexts = dict.fromkeys(min(c, room) for c in self.context if c <= most and room > 0)
        return Cells(tuple(n for n in self.prefill if n < most), self.batch, tuple(contexts), self.steps)
