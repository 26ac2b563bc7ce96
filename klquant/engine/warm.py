"""Before anyone waits: kernels are built for a size, and captured in graphs, when it is first met."""

from dataclasses import replace

from klquant.engine.engine import Engine
from klquant.engine.request import SamplingParams
from klquant.engine.runner import BUCKETS, GRAPHED

# Tokens of an answer: two steps of decoding behind the prompt's.
ANSWER = 3


def warm_up(engine: Engine) -> None:
    """Answer noise in every number of sequences and every size of prompt, alone and two in a chunk, that the engine
    treats apart: minutes on a new machine, seconds once Triton's cache has what they need. Nothing of it stays.
    """
    limits, vocab = engine.limits, engine.cfg.vocab_size
    greedy = SamplingParams(max_new_tokens=ANSWER, ignore_eos=True)

    def ask(*lengths: int, params: SamplingParams = greedy, keep: bool = False) -> None:
        """keep: the next prompt goes on from this one."""
        engine.generate([[(7919 * i + n) % vocab for i in range(length)] for n, length in enumerate(lengths)], params)
        for prefix in [] if keep else engine.loop.scheduler.prefixes.copy():
            engine.loop.scheduler.forget(prefix)

    most = max(1, min(limits.max_context, limits.cache_tokens) - ANSWER)
    longest = min(limits.chunk, most)
    # What takes the most memory first: in its pieces all else has room.
    ask(min(2 * longest, most))
    engine.runner.capture_prompts(longest)
    for length in sorted({n for n in (*GRAPHED, *doubled(GRAPHED[-1], longest)) if n <= longest} | {longest}):
        ask(length)
        if limits.max_batch > 1 and length > 2:
            ask(length // 2, (length - 1) // 2)
    if limits.prefixes and (first := engine.runner.least_prefix) < most:
        ask(first, keep=True)
        ask(min(first + GRAPHED[0], most))
    # Who asks for nothing gets the checkpoint's defaults; temperature 0 is what people ask for most.
    usual = replace(engine.defaults, max_new_tokens=ANSWER, ignore_eos=True)
    for rows in sorted({n for n in BUCKETS if n <= limits.max_batch} | {limits.max_batch}):
        for params in {greedy, usual}:
            ask(*[min(2, longest)] * rows, params=params)


def doubled(start: int, stop: int) -> list[int]:
    """start, 2 · start, … up to stop."""
    return [] if start > stop else [start, *doubled(2 * start, stop)]
