"""The kernels of GPTQ beside the plain functions, on a GPU: the same results first, then times."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch

from klquant.calibrate.routes import Routes, add_moments, hidden
from klquant.checkpoint.config import KimiLinearConfig
from klquant.core.grid import Quantized
from klquant.core.spec import WeightSpec
from klquant.model.weights import MoEWeights
from klquant.quantize import gptq as stages
from klquant.quantize import kernels, rtn
from klquant.quantize.factor import cholesky, inverse_factor, upper_factor
from klquant.quantize.hessian import Moments

CHECKED = 16  # experts compared
# Experts that the plain column loop takes at once beside all there are: as many as a run without kernels does, and one,
# as tools do that know no experts.
AT_ONCE = (16, 1)
SPEC = WeightSpec(bits=4, group_size=128)
GROUPED_TOKENS, GROUPED_EXPERTS = 65536, 128


def compare(experts: int, n: int, k: int, gen: torch.Generator) -> str:
    """A table of seconds at [experts, n, k]; raises AssertionError when a kernel's loss is off by more than 1e-3."""
    w = torch.randn(experts, n, k, generator=gen, device="cuda") / k**0.5
    h = torch.empty(experts, k, k, device="cuda")
    mix = torch.randn(k, k, generator=gen, device="cuda") / k**0.5 + torch.eye(k, device="cuda")
    for e in range(experts):
        x = torch.randn(2 * k, k, generator=gen, device="cuda") @ mix * torch.logspace(-0.5, 0.5, k, device="cuda")
        h[e] = x.T @ x / (2 * k)
    lines = [f"[{experts}, {n}, {k}] {SPEC}", *_check(w[:CHECKED], h[:CHECKED])]
    lines.append(f"{'seconds':<34}{'kernels':>10}{'plain':>10}{'ratio':>8}{'GB, kernels':>13}{'GB, plain':>11}")
    for name, run in _stages(w, h).items():
        fast, fast_bytes = measure(run)
        with kernels.plain():
            slow, slow_bytes = measure(run, repeat=1)
        sizes = f"{fast_bytes / 1e9:>13.2f}{slow_bytes / 1e9:>11.2f}"
        lines.append(f"{name:<34}{fast:>10.4f}{slow:>10.4f}{slow / fast:>8.1f}{sizes}")
    lines += _column_loop(w, h)
    few = h[:CHECKED]
    for name, ours, other in (
        (f"Cholesky of {CHECKED}: panels, library", cholesky, torch.linalg.cholesky_ex),
        (f"factor of {CHECKED}: R, R inverted", lambda x: upper_factor(x, 0.01), lambda x: inverse_factor(x, 0.01)),
    ):
        fast, slow = measure(partial(ours, few))[0], measure(partial(other, few))[0]
        lines.append(f"{name:<34}{fast:>10.4f}{slow:>10.4f}{slow / fast:>8.1f}")
    return "\n".join(lines)


def compare_grouped(config: KimiLinearConfig, gen: torch.Generator) -> list[str]:
    """Moments and hidden units of all experts for a run's batch of tokens: the same as expert by expert, and faster."""
    c, i, e, k = config.hidden_size, config.moe_intermediate_size, config.num_experts, config.top_k
    x, star = (torch.randn(GROUPED_TOKENS, c, generator=gen, device="cuda").bfloat16() for _ in range(2))
    scores = torch.randn(GROUPED_TOKENS, e, generator=gen, device="cuda") + torch.randn(e, generator=gen, device="cuda")
    found = Routes.sort(*(scores.sigmoid().topk(k, -1)), e).part(slice(0, GROUPED_EXPERTS))
    shapes = (e, i, c), (e, i, c), (e, c, i)
    stacks = [(torch.randn(shape, generator=gen, device="cuda") / shape[-1] ** 0.5).bfloat16() for shape in shapes]
    weights = MoEWeights(None, None, *stacks, None)
    moments = Moments.zeros(c, GROUPED_EXPERTS, device="cuda", drift=True)
    jobs = {
        "moments": (
            lambda: add_moments(moments, x, found, star, gathered=False, weighted=False), 3 * c * c, moments.hh,
        ),
        "hidden": (lambda: hidden(weights, slice(0, GROUPED_EXPERTS), x, found), 4 * c * i, None),
    }  # fmt: skip
    lines = []
    for name, (work, flop, sums) in jobs.items():
        results = []
        for context in (nullcontext(), kernels.plain()):
            with context:
                moments.hh.zero_()
                moments.drift.zero_()
                made = work()
                results.append(sums.clone() if made is None else made)
        off = float((results[0].float() - results[1].float()).norm() / results[1].float().norm())
        assert off < 0.01, f"{name}: off by {off:.1e}"
        fast = measure(work)[0]
        with kernels.plain():
            slow = measure(work, repeat=1)[0]
        rate = flop * found.bounds[-1] / fast / 1e12
        lines.append(
            f"{name} of {GROUPED_EXPERTS} experts, {found.bounds[-1]} rows: {fast * 1e3:.1f} ms ({rate:.0f} TFLOP/s), "
            f"expert by expert {slow * 1e3:.1f} ms, relative difference {off:.1e}"
        )
    print(*lines, sep="\n", flush=True)
    return lines


def _stages(w, h) -> dict[str, Callable]:
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    scale, zero = rtn.fit_scales(w, SPEC, importance_K=diagonal)
    q = Quantized(SPEC, stages.sweep(w, stages.put_in_order(h, 0.01), scale, zero, SPEC), scale, zero)
    return {
        "scale search": lambda: rtn.fit_scales(w, SPEC, importance_K=diagonal),
        "sweep, factor included": lambda: stages.sweep(w, stages.put_in_order(h, 0.01), scale, zero, SPEC),
        "refit of scales": lambda: stages.refit_scales(w, h, q),
        "descent, one round": lambda: stages.descend(w, h, q),
        "gptq, three rounds": lambda: stages.gptq(w, h, SPEC, damp=0.01, rounds=3),
    }


def measure(run: Callable, repeat: int = 3) -> tuple[float, int]:
    """Median seconds of `run` after one that warms up, and the memory it took at most beyond what was there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    taken = torch.cuda.max_memory_allocated() - before
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2], taken


def _column_loop(w, h) -> list[str]:
    """GPTQ's loop over columns by itself, the factors made before. Of single experts and small groups one is timed."""
    scale, zero = rtn.fit_scales(w, SPEC)
    ordered = stages.put_in_order(h, 0.01)
    fast = measure(lambda: stages.sweep(w, ordered, scale, zero, SPEC))[0]
    lines = []
    with kernels.plain():
        for count in (len(w), *AT_ONCE):
            ordered = stages.put_in_order(h[:count], 0.01)
            run = partial(stages.sweep, w[:count], ordered, scale[:count], zero, SPEC)
            slow = measure(run, 1)[0] * len(w) / count
            name = f"column loop, {count} in plain torch"
            lines.append(f"{name:<34}{fast:>10.4f}{slow:>10.4f}{slow / fast:>8.1f}")
    return lines


def _check(w, h) -> list[str]:
    """How far the kernels are from the plain functions, and TF32 from both."""

    def both(run: Callable) -> tuple[Quantized, Quantized]:
        fast = run()
        with kernels.plain():
            return fast, run()

    def ratio(a: Quantized, b: Quantized) -> float:
        one, other = (stages.layer_loss(w - q.decode(), h) for q in (a, b))
        return float((one / other - 1).abs().max())

    diagonal = h.diagonal(dim1=-2, dim2=-1)
    with kernels.plain():
        scale, zero = rtn.fit_scales(w, SPEC, importance_K=diagonal)
        start = Quantized(SPEC, stages.sweep(w, stages.put_in_order(h, 0.01), scale, zero, SPEC), scale, zero)
    jobs = {
        "scales": lambda: rtn.rtn(w, SPEC, importance_K=diagonal),
        "sweep": lambda: Quantized(SPEC, stages.sweep(w, stages.put_in_order(h, 0.01), scale, zero, SPEC), scale, zero),
        "refit": lambda: stages.refit_scales(w, h, start),
        "descent": lambda: stages.descend(w, h, start),
        "gptq": lambda: stages.gptq(w, h, SPEC, damp=0.01, rounds=3).quantized,
    }
    lines = []
    for name, run in jobs.items():
        fast, plain = both(run)
        assert torch.equal(fast.codes, run().codes), f"{name}: two runs differ"
        off = ratio(fast, plain)
        assert off < 1e-3, f"{name}: loss off by {off:.1e}"
        codes, scales = ((getattr(fast, x) != getattr(plain, x)) for x in ("codes", "scale"))
        rows = codes.any(-1).float().mean()
        lines.append(
            f"  {name:<8} differ: {float(codes.float().mean()):.1e} of codes, {float(rows):.1e} of rows, "
            f"{float(scales.float().mean()):.1e} of scales; largest relative difference of an expert's loss {off:.1e}"
        )
    exact = jobs["gptq"]()
    torch.backends.cuda.matmul.allow_tf32 = True
    loose = jobs["gptq"]()
    torch.backends.cuda.matmul.allow_tf32 = False
    a, b = (stages.layer_loss(w - q.decode(), h) for q in (loose, exact))
    lines.append(f"  TF32 products would change the loss by {float((a / b - 1).max()):+.1e} (worst expert)")
    return lines
