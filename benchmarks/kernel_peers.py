"""Other projects' kernels at the same shapes, for benchmarks/kernels.py. Each is optional and used through its own API.

| peer | beside | how it is called, and how its weight differs from ours (symmetric, a BF16 scale per 128 inputs) |
|---|---|---|
| BF16 | INT4, INT8 | `torch.matmul`; a layer of experts: `torch._grouped_mm`, gathering and summing tokens left out |
| tinygemm | INT4 | `torch.ops.aten._weight_int4pack_mm`: our codes and scales, plus a BF16 zero point a group |
| torchao | INT4 | `Int4WeightOnlyConfig`, `tile_packed_to_4d`: tinygemm with K, and x in every call, padded to 1024s |
| NF4 | INT4 | bitsandbytes' `quantize_4bit`, `matmul_4bit`: 16 fixed levels, an FP32 scale per 64 inputs |
| gemlite | INT4, INT8 | `GemLiteLinear`: our codes and scales; INT8 with one scale a row (its `A16W8_INT8`) |
| int8pack | INT8 | `torch.ops.aten._weight_int8pack_mm`: one scale a row |

A peer computes the plain product x · wᵀ; where the rows are gate and up of an MLP, ours also applies SiLU(gate) · up.
gemlite chooses among the 15 to 25 tiles of its default setting, "fast"; each is timed for 10 ms here instead of 100.
Several of its kernels add partial sums with BF16 atomics on Hopper, which its error shows. Where K is no multiple of
what a split covers they read scales beyond the last group, to multiply them by inputs of 0: harmless unless one is NaN.
The scales are padded with zeros here.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kernel_cases as kc
from benchmarks.kernel_cases import Case
from benchmarks.timing import copies_for, time_us
from klquant.core.grid import Quantized
from klquant.kernels.linear.layout import split_rows, values

# A wrong layout or scale is off by more than 0.1, sums in BF16 atomics by 0.01: enough to tell a peer that computes
# something else from one that rounds more than we do.
MOST_ERROR = 3e-2
# How far the values that a peer stores may lie from the weight it was given: NF4 has its levels where ours are not.
MOST_CHANGE = 0.2
REASON = 110
# Largest split of K times the groups that a tile of gemlite covers.
SPARE_GROUPS = 16


class Weight(NamedTuple):
    """`run(x, *tensors)` is x · wᵀ; `tensors` are what a call reads of w, `exact` the values [N, K] they stand for."""

    run: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    exact: Callable[[], Tensor]


@dataclass(frozen=True)
class Timed:
    """`us` and `error`, ‖y − want‖ / ‖want‖ against FP64 — or `reason`, why there is no time."""

    us: float | None = None
    error: float | None = None
    reason: str | None = None


def _bf16(w: Quantized) -> Weight:
    plain = w.decode(torch.bfloat16)
    return Weight(lambda x, plain: x @ plain.T, (plain,), lambda: plain)


def _tinygemm(w: Quantized) -> Weight:
    # Code 8 means 0, and the even one of two inputs has the high half of a byte. 8: k-tiles of 16 that lie together.
    unsigned = w.codes.int() + 8
    packed = torch.ops.aten._convert_weight_to_int4pack((unsigned[:, ::2] << 4 | unsigned[:, 1::2]).byte(), 8)
    # [G, N, 2]: value = (code − 8) · scale + zero
    scale = torch.stack((w.scale.T, torch.zeros_like(w.scale.T)), -1).bfloat16().contiguous()
    group = w.spec.group_size
    return Weight(lambda x, p, s: torch.ops.aten._weight_int4pack_mm(x, p, group, s), (packed, scale), w.decode)


def _torchao(w: Quantized) -> Weight:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    n, k = w.codes.shape
    linear = torch.nn.Linear(k, n, bias=False, device="meta", dtype=torch.bfloat16)
    linear.weight = torch.nn.Parameter(w.decode(torch.bfloat16), requires_grad=False)
    layout = {"int4_packing_format": "tile_packed_to_4d", "set_inductor_config": False}
    quantize_(linear, Int4WeightOnlyConfig(group_size=w.spec.group_size, **layout))
    # It has no dequantizer. Its min-max grid over 16 levels finds our codes again, so the weight itself will do.
    return Weight(F.linear, (linear.weight.data,), w.decode)


def _nf4(w: Quantized) -> Weight:
    import bitsandbytes as bnb
    from bitsandbytes import functional as bf

    packed, state = bf.quantize_4bit(w.decode(torch.bfloat16), blocksize=64, quant_type="nf4")

    def run(x: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
        fields = {name: getattr(state, name) for name in ("shape", "dtype", "blocksize", "code", "quant_type")}
        return bnb.matmul_4bit(x, packed, quant_state=bf.QuantState(absmax=absmax, **fields))

    return Weight(run, (packed, state.absmax), lambda: bf.dequantize_4bit(packed, state))


def _by_row(w: Quantized) -> tuple[Tensor, Tensor]:
    """INT8 codes and BF16 scales [N, 1] of the same weight, one scale a row."""
    plain = w.decode()
    scale = (plain.abs().amax(1, keepdim=True) / 127).bfloat16()
    return (plain / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def _int8pack(w: Quantized) -> Weight:
    codes, scale = _by_row(w)
    run = torch.ops.aten._weight_int8pack_mm
    return Weight(run, (codes, scale.flatten()), lambda: codes * scale.float())


def _short_bench(call: Callable[[], object], quantiles: tuple[float, ...]) -> list[float]:
    from triton.testing import do_bench

    return do_bench(call, warmup=2, rep=10, quantiles=quantiles)


def _compile_only(call: Callable[[], object], quantiles: tuple[float, ...]) -> list[float]:
    call()
    return [0.0 for _ in quantiles]


def _tune_gemlite(bench: Callable[..., list[float]]) -> None:
    """What gemlite's tuners time a tile with."""
    from gemlite.core import GEMLITE_TRITON_KERNELS

    for kind in GEMLITE_TRITON_KERNELS:
        for tuner in kind.kernel:
            tuner.do_bench = bench


def _gemlite(w: Quantized) -> Weight:
    import gemlite

    _tune_gemlite(_short_bench)
    if w.spec.bits == 8:
        codes, scale = _by_row(w)
        module = gemlite.helper.A16W8_INT8(device=codes.device, dtype=torch.bfloat16).from_weights(codes, scales=scale)
        exact = lambda: codes * scale.float()  # noqa: E731
    else:
        n, k = w.codes.shape
        kinds = {"input_dtype": gemlite.DType.BF16, "output_dtype": gemlite.DType.BF16}
        module = gemlite.GemLiteLinear(4, group_size=w.spec.group_size, in_features=k, out_features=n, **kinds)
        module.pack((w.codes + 8).byte(), w.scale, zeros=8)
        exact = w.decode
    meta = module.get_meta_args()
    run = lambda x, *tensors: gemlite.forward_functional(x, None, list(tensors), meta)  # noqa: E731
    words, scales, *rest = module.get_tensor_args()
    return Weight(run, (words, F.pad(scales, (0, 0, 0, SPARE_GROUPS)), *rest), exact)


BF16 = "BF16"
PEERS: dict[str, dict[int, Callable[[Quantized], Weight]]] = {
    BF16: {4: _bf16, 8: _bf16},
    "tinygemm": {4: _tinygemm},
    "torchao": {4: _torchao},
    "NF4": {4: _nf4},
    "gemlite": {4: _gemlite, 8: _gemlite},
    "int8pack": {8: _int8pack},
}


def names_for(case: Case, names: tuple[str, ...]) -> list[str]:
    """Those of `names` that stand beside this case."""
    return [name for name in names if name == BF16 or (case.shape != kc.LAYER and case.bits in PEERS[name])]


@lru_cache(maxsize=1)
def _weight(shape: str, bits: int) -> Quantized:
    return kc.random_weight(kc.SHAPES[shape][:2], bits)


@lru_cache(maxsize=len(PEERS))
def _packed(name: str, shape: str, bits: int) -> Weight:
    w = _weight(shape, bits)
    packed = PEERS[name][bits](w)
    plain = w.decode()
    change = ((packed.exact().float() - plain).norm() / plain.norm()).item()
    if not change < MOST_CHANGE:
        raise ValueError(f"its weight differs from the one it was given by {change:.2g}")
    return packed


@cache
def time_peer(name: str, shape: str, bits: int, tokens: int) -> Timed:
    """One peer at one case: checked, then timed as ours is. Whatever goes wrong is the `reason`."""
    try:
        case = Case(shape, bits, tokens)
        x = kc.inputs(case)
        if shape == kc.LAYER:
            error, calls = _grouped(case, x)
        else:
            n, k, _ = kc.SHAPES[shape]
            w = _packed(name, shape, bits)
            kc.poison(tokens * n)
            error = product_error(w.run(x, *w.tensors), x, w.exact())
            more = range(copies_for(n * k * bits // 8) - 1)
            copies = [w.tensors, *(tuple(map(torch.clone, w.tensors)) for _ in more)]
            calls = [lambda tensors=tensors: w.run(x, *tensors) for tensors in copies]
        if not error < MOST_ERROR:
            return Timed(error=error, reason=f"its result is off by {error:.2g}")
        return Timed(time_us(calls), error)
    except Exception as problem:
        return Timed(reason=one_line(problem))


def one_line(problem: Exception) -> str:
    text = " ".join(f"{type(problem).__name__}: {problem}".split())
    return text if len(text) <= REASON else text[: REASON - 1] + "…"


def product_error(y: Tensor, x: Tensor, w_NK: Tensor) -> float:
    """‖y − x · wᵀ‖ / ‖x · wᵀ‖ in FP64."""
    error = norm = 0.0
    for at in range(0, y.shape[1], 8192):
        want = x.double() @ w_NK[at : at + 8192].double().T
        error += (y[:, at : at + 8192].double() - want).square().sum().item()
        norm += want.square().sum().item()
    return (error / norm) ** 0.5


@cache
def _plain_experts(bits: int) -> tuple[Tensor, ...]:
    """gate·up [E, K, 2I] and down [E, I, K] of the routed experts, then of the shared one, in BF16."""
    w = kc.expert_weights(bits)
    plain = []
    for gate_up, down in (w.gate_up, w.down), (w.shared.gate_up, w.shared.down):
        rows = split_rows(values(gate_up, torch.bfloat16), kc.INNER)
        plain += [torch.cat(rows, -2).mT, values(down, torch.bfloat16).mT]
    return tuple(plain)


def _grouped(case: Case, x: Tensor) -> tuple[float, list[Callable[[], Tensor]]]:
    """(error, calls) of a layer of experts in BF16, its inputs gathered before and its outputs left unsummed."""
    gate_up, down, shared_gate_up, shared_down = _plain_experts(case.bits)

    def swiglu(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up

    def run(rows: Tensor, ends: Tensor) -> Tensor:
        swiglu(x @ shared_gate_up) @ shared_down
        return torch._grouped_mm(swiglu(torch._grouped_mm(rows, gate_up, offs=ends)), down, offs=ends)

    inputs = []
    for _ in range(16 if case.tokens <= 64 else 2):
        expert, order = kc.routing(case.tokens)[1].flatten().sort()
        ends = torch.bincount(expert, minlength=kc.EXPERTS).cumsum(0).int()
        inputs.append((x[order // kc.TOP], ends, expert))
    rows, ends, expert = inputs[0]
    some = torch.randperm(len(rows), device="cuda")[:64]
    kc.poison(len(rows) * kc.HIDDEN)
    y = run(rows, ends)[some].double()
    pairs = zip(rows[some].double(), expert[some].tolist(), strict=True)
    want = torch.stack([swiglu(row @ gate_up[e].double()) @ down[e].double() for row, e in pairs])
    error = ((y - want).norm() / want.norm()).item()
    return error, [lambda rows=rows, ends=ends: run(rows, ends) for rows, ends, _ in inputs]


def compile_gemlite(case: Case) -> None:
    """Fill Triton's cache with the tiles gemlite will choose from. What fails here fails again when it is timed."""
    with suppress(Exception):
        w = _packed("gemlite", case.shape, case.bits)
        _tune_gemlite(_compile_only)
        w.run(kc.inputs(case), *w.tensors)
