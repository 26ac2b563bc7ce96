"""Many requests at once through the engine's loop, on a GPU, with random weights of the 48B's shapes.

    PYTHONPATH=. python3 -m benchmarks.serving [--cases 32x128,32x512,8x2048] [--new 256] [--spread 0] [--layers 27]

32x128: 32 prompts of 128 tokens, all there at the start, at most `--slots` at a time. "first": until the last of them
has its first token; "all": until the last token of all. Answers have `--new` tokens, or with `--spread 0.75` so many
give or take three quarters. Greedy; the last run of each case is reported, when graphs are made and kernels tuned.
"""

import time

import click
import torch

from klquant.engine.job import Job
from klquant.engine.load import place
from klquant.engine.loop import Loop
from klquant.engine.placement import find_devices
from klquant.engine.request import SamplingParams
from klquant.engine.runner import Runner
from klquant.engine.scheduler import Scheduler, Sequence
from klquant.engine.synthetic import parse_synthetic, random_weights, synthetic_outline
from klquant.kernels.mla.pages import PAGE_SIZE
from klquant.recipe.memory import PREFILL_CHUNK


def answer_all(runner: Runner, slots: int, length: int, answers: list[int]) -> tuple[float, float]:
    """Seconds until all have their first token, and until all have finished."""
    pages = slots * (-(-(length + max(answers)) // PAGE_SIZE))
    loop = Loop(runner, Scheduler(slots=slots, pages=pages, page_tokens=PAGE_SIZE, chunk=PREFILL_CHUNK), ahead=True)
    jobs = []
    for new in answers:
        tokens = torch.randint(0, runner.cfg.vocab_size, (length,)).tolist()
        params = SamplingParams(max_new_tokens=new, seed=0)
        jobs.append(Job(Sequence(length, length + new - 1), tokens, params, "length", lambda ids: "", frozenset()))
        loop.add(jobs[-1])
    torch.cuda.synchronize()
    started, first = time.perf_counter(), 0.0
    while not all(job.finish for job in jobs):
        loop.step()
        if not first and all(len(job.tokens) > length for job in jobs):
            first = time.perf_counter() - started
    return first, time.perf_counter() - started


@click.command(help=__doc__)
@click.option("--cases", default="1x32,1x128,1x512,8x128,32x128,32x512,8x2048", show_default=True)
@click.option("--new", default=256, show_default=True)
@click.option("--spread", default=0.0, show_default=True)
@click.option("--slots", default=32, show_default=True)
@click.option("--runs", default=6, show_default=True)
@click.option("--layers", default=27, show_default=True)
@click.option("--recipe", default="int4", show_default=True)
def main(cases: str, new: int, spread: float, slots: int, runs: int, layers: int, recipe: str) -> None:
    sizes = [tuple(map(int, case.split("x"))) for case in cases.split(",")]
    longest_answer = int(new * (1 + spread))
    most = max(min(n, slots) for n, _ in sizes)
    tokens = max(min(n, slots) * (length + longest_answer + PAGE_SIZE) for n, length in sizes)
    longest = max(length for _, length in sizes) + longest_answer
    torch.set_grad_enabled(False)
    config, layers = parse_synthetic(f"kimi-linear-48b:layers={layers}")
    outline, devices = synthetic_outline(config, recipe, layers), find_devices("cuda:0")
    placement = place(outline, devices, torch.bfloat16, context=tokens, sequences=most, cache_bits=16)
    runner = Runner(
        random_weights(outline, placement, torch.bfloat16), slots=most, pages=placement.memory.context // PAGE_SIZE,
        max_context=longest, cache_bits=16,
    )  # fmt: skip
    print(f"{torch.cuda.get_device_name()}, {layers} layers, {recipe}, {new} new tokens each")
    print(f"{'prompts':>10} {'first, ms':>10} {'prompt t/s':>11} {'all, s':>8} {'answer t/s':>11}")
    for n, length in sizes:
        share = torch.rand(n, generator=torch.Generator().manual_seed(0)) * 2 - 1
        answers = (new * (1 + spread * share)).int().tolist()
        for _ in range(runs):
            first, whole = answer_all(runner, min(n, slots), length, answers)
        print(f"{n:>4} x {length:<5} {first * 1e3:>8.1f} {n * length / first:>11,.0f} {whole:>8.3f} "
              f"{sum(answers) / whole:>11,.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
