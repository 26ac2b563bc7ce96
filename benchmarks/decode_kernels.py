"""Time a decode step's kernels at the shapes of Kimi-Linear-48B, each only after its result was checked against FP64.

    PYTHONPATH=. python3 benchmarks/decode_kernels.py [--only kda|mla|write|norm|router|draw] [--sweep] [--out FILE]

Times are of CUDA graph replays, divided by the calls in the graph; those walk over enough copies of weights, states and
pages that none is found in the L2 cache. GB/s counts the least an operation must move. `--sweep` times KDA, MLA
and the router with other tiles and numbers of parts beside the ones that klquant takes.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernel_cases import random_weight
from benchmarks.timing import copies_for, copy_rate, time_us
from klquant.core.grid import decode
from klquant.kernels.kda import reference as kda_reference
from klquant.kernels.kda.dispatch import KDADecode, kda_decode
from klquant.kernels.kda.tiles import Tile as KDATile
from klquant.kernels.linear.dispatch import QuantLinear
from klquant.kernels.mla import reference as mla_reference
from klquant.kernels.mla.dispatch import mla_decode, write_latent
from klquant.kernels.mla.pages import CODE_MAX, PAGE_SIZE, LatentPages, read_latent
from klquant.kernels.mla.tiles import Tile, decode_tile
from klquant.kernels.moe import reference as moe_reference
from klquant.kernels.moe.dispatch import added_up
from klquant.kernels.moe.tiles import RouterTile
from klquant.kernels.norm import reference as norm_reference
from klquant.kernels.norm.dispatch import add_rms_norm
from klquant.kernels.norm.parts import Parts
from klquant.kernels.sample import dispatch as sample
from klquant.kernels.sample import reference as sample_reference

HIDDEN, HEADS, DIM, TAPS, LOW = 2304, 32, 128, 4, 128
RANK, ROPE, NOPE, V = 512, 64, 128, 128
EXPERTS, TOP, SCALING = 256, 8, 2.446
VOCAB = 163_840
BATCHES, CONTEXTS = (1, 8, 32), (128, 16 << 10, 128 << 10)
STORED = {"BF16": torch.bfloat16, "FP8": torch.float8_e4m3fn, "INT8": torch.int8}
# About 32 values of a state a thread, so that nothing spills.
KDA_SWEEP = tuple(KDATile(*sizes) for sizes in ((4, 4), (4, 8), (2, 8), (4, 4, True), (2, 8, True)))
# Experts, tokens, columns and warps of a program.
ROUTER_SWEEP = ((2, 4, 512, 4), (4, 4, 512, 4), (4, 4, 512, 8), (8, 2, 512, 4), (2, 8, 512, 4), (4, 8, 512, 8))
# The same without tokens, of a program that makes the norm as well.
FUSED_SWEEP = ((1, 512, 4), (2, 256, 4), (2, 512, 4), (2, 1024, 8), (4, 512, 4))
SCALE = (NOPE + ROPE) ** -0.5
EPS = 1e-5
# BF16 results; KDA's and MLA's go through several roundings.
MOST_ERROR = 1e-2


@dataclass(frozen=True)
class Row:
    op: str
    batch: int
    context: int
    error: float
    us: float
    gb_s: float
    of_copy: float


@dataclass(frozen=True)
class Case:
    """`run` on inputs number i of `copies`; `error` of run(0) and the most it may be; the least bytes moved."""

    op: str
    batch: int
    context: int
    run: Callable[[int], object]
    copies: int
    error: Callable[[], float]
    nbytes: int
    most_error: float = MOST_ERROR


def bf16(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).bfloat16()


def error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def doubled(w: KDADecode) -> KDADecode:
    return KDADecode(**{name: t.double() for name, t in vars(w).items()})


def kda_case(batch: int, tile: KDATile | None = None) -> Case:
    width = HEADS * DIM
    state_bytes = 4 * HEADS * DIM * DIM + 2 * 3 * width * (TAPS - 1)
    nbytes = 2 * batch * state_bytes + 2 * 2 * width * LOW + 2 * batch * (4 * width + 2 * LOW + HEADS)
    copies = copies_for(nbytes)
    weights = [
        KDADecode(
            bf16(3 * width, TAPS, scale=0.5), 2 * torch.rand(HEADS, device="cuda"),
            torch.randn(width, device="cuda") - 3, bf16(width, LOW, scale=LOW**-0.5),
            bf16(width, LOW, scale=LOW**-0.5), 1 + bf16(DIM, scale=0.1),
        )
        for _ in range(copies)
    ]  # fmt: skip
    conv = bf16(copies, batch + 1, 3 * width, TAPS - 1)
    s = torch.randn(copies, batch + 1, HEADS, DIM, DIM, device="cuda")
    slot = torch.randperm(batch + 1, device="cuda")[:batch].int()
    qkv, low = bf16(batch, 3 * width), bf16(batch, 2 * LOW + HEADS)

    def run(i: int) -> Tensor:
        if tile is None:
            return kda_decode(qkv, low, weights[i], conv[i], s[i], slot, EPS)
        from klquant.kernels.kda import triton

        return triton.kda_decode(qkv, low, weights[i], conv[i], s[i], slot, EPS, tile)

    def check() -> float:
        exact = doubled(weights[0]), conv[0].double(), s[0].double()
        want = kda_reference.kda_decode(qkv.double(), low.double(), *exact, slot, EPS)
        return max(error(run(0), want), error(s[0][slot.long()], exact[2][slot.long()]))

    name = "kda_decode" + (f" {tile.splits}/{tile.warps}{' early' if tile.early else ''}" if tile else "")
    return Case(name, batch, 0, run, copies, check, nbytes)


def kda_tiles() -> list[KDATile]:
    """Those this card can run."""
    return [tile for tile in KDA_SWEEP if not tile.early or torch.cuda.get_device_capability() >= (9, 0)]


def random_pages(count: int, dtype: torch.dtype) -> LatentPages:
    """Latents of unit size."""
    pages = LatentPages.empty(count, RANK + ROPE, dtype, "cuda")
    for data in pages.data.split(1 << 12):
        values = torch.randn(data.shape, device="cuda").clamp(-4, 4) * (CODE_MAX.get(dtype, 4.0) / 4)
        data.copy_(values.round() if dtype == torch.int8 else values)
    if pages.scale is not None:
        pages.scale.fill_(4 / CODE_MAX[dtype])
    return pages


def mla_case(batch: int, context: int, stored: str, tile: Tile | None = None) -> Case:
    each = context // PAGE_SIZE
    token_bytes = (RANK + ROPE) * STORED[stored].itemsize + (4 if stored != "BF16" else 0)
    kv_b_bytes = 2 * HEADS * (NOPE + V) * RANK
    nbytes = batch * context * token_bytes + kv_b_bytes + 2 * batch * HEADS * (NOPE + ROPE + V)
    copies = copies_for(nbytes)
    pages = random_pages(copies * batch * each, STORED[stored])
    tables = torch.randperm(copies * batch * each, device="cuda").int().view(copies, batch, each)
    # Room for more, as in a graph that serves all lengths.
    tables = torch.nn.functional.pad(tables, (0, 2048 - each))
    length = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    q = bf16(batch, HEADS, NOPE + ROPE)
    kv_b = bf16(copies, HEADS * (NOPE + V), RANK, scale=RANK**-0.5)

    def run(i: int) -> Tensor:
        if tile is None:
            return mla_decode(q, kv_b[i], pages, tables[i], length, SCALE)
        from klquant.kernels.mla import triton

        return triton.mla_decode(q, kv_b[i], pages, tables[i], length, SCALE, tile)

    def check() -> float:
        some = [0, batch - 1]
        args = pages, tables[0][some], length[some], SCALE
        return error(run(0)[some], mla_reference.mla_decode(q[some].double(), kv_b[0].double(), *args))

    name = f"mla_decode {stored}" + (f" {tile}" if tile else "")
    return Case(name, batch, context, run, copies, check, nbytes)


def write_case(tokens: int, stored: str) -> Case:
    pages = random_pages(-(-tokens // PAGE_SIZE) + 1, STORED[stored])
    kv_a, weight = bf16(tokens, RANK + ROPE), bf16(RANK)
    position = torch.randperm(len(pages.data) * PAGE_SIZE, device="cuda")[:tokens]

    def check() -> float:
        write_latent(kv_a, weight, pages, position)
        back = read_latent(pages, position, torch.float64)
        normed = norm_reference.rms_norm(kv_a[:, :RANK].double(), weight.double(), norm_reference.LATENT_EPS)
        return error(back, torch.cat([normed, kv_a[:, RANK:].double()], -1))

    nbytes = tokens * (RANK + ROPE) * (2 + STORED[stored].itemsize)
    run = lambda i: write_latent(kv_a, weight, pages, position)  # noqa: E731
    # What is rounded to e4m3 differs by a sixteenth at most, mostly by less than half of that.
    return Case(f"write_latent {stored}", tokens, 0, run, 1, check, nbytes, MOST_ERROR if stored == "BF16" else 0.035)


def norm_case(tokens: int) -> Case:
    nbytes = (4 + 2 + 4 + 2) * tokens * HIDDEN
    copies = copies_for(nbytes)
    h, delta, weight = bf16(copies, tokens, HIDDEN).float(), bf16(copies, tokens, HIDDEN), bf16(HIDDEN)

    def check() -> float:
        total, normed = add_rms_norm(h[0], delta[0], weight, EPS)
        assert torch.equal(total, h[0] + delta[0])
        return error(normed, norm_reference.rms_norm(total.double(), weight.double(), EPS))

    return Case("add_rms_norm", tokens, 0, lambda i: add_rms_norm(h[i], delta[i], weight, EPS), copies, check, nbytes)


def parts_case(tokens: int, apart: bool) -> Case:
    """A norm that adds up what the experts made of a token, or has it added up before."""
    nbytes = tokens * HIDDEN * (4 * (TOP + 1) + 4 + 4 + 2)
    copies = copies_for(nbytes)
    h, weight = bf16(copies, tokens, HIDDEN).float(), bf16(HIDDEN)
    parts = [Parts(bf16(tokens, TOP, HIDDEN).float(), bf16(tokens, HIDDEN).float()) for _ in range(copies)]

    def run(i: int) -> tuple[Tensor, Tensor]:
        return add_rms_norm(h[i], added_up(parts[i], torch.float32) if apart else parts[i], weight, EPS)

    def check() -> float:
        total, normed = run(0)
        assert torch.equal(total, h[0] + added_up(parts[0], torch.float32))
        return error(normed, norm_reference.rms_norm(total.double(), weight.double(), EPS))

    return Case(f"norm of parts{', apart' if apart else ''}", tokens, 0, run, copies, check, nbytes)


def qkv_case(tokens: int, beside: bool) -> Case:
    """KDA's projections in INT8 and what its gates and b read, in one launch or apart."""
    rows, low_rows = 3 * HEADS * DIM, 2 * LOW + HEADS
    nbytes = rows * HIDDEN + 2 * rows * (HIDDEN // 128) + 2 * low_rows * HIDDEN
    copies = copies_for(nbytes)
    codes = [random_weight((rows, HIDDEN), 8) for _ in range(copies)]
    weights = [QuantLinear.of(w) for w in codes]
    x, low = bf16(tokens, HIDDEN), bf16(copies, low_rows, HIDDEN, scale=HIDDEN**-0.5)

    def run(i: int) -> tuple[Tensor, Tensor]:
        return weights[i].beside(x, low[i]) if beside else (weights[i](x), x @ low[i].T)

    def check() -> float:
        y, found = run(0)
        exact = x.double() @ decode(codes[0].codes, codes[0].scale, None, codes[0].spec, torch.float64).T
        return max(error(y, exact), error(found, x.double() @ low[0].double().T))

    return Case(f"qkv_low {'beside' if beside else 'apart'}", tokens, 0, run, copies, check, nbytes)


def draw_case(batch: int, noise: bool) -> Case:
    copies = copies_for(2 * batch * VOCAB)
    z, seed = bf16(copies, batch, VOCAB, scale=4.0), torch.arange(batch, device="cuda")
    temperature = torch.ones(batch, device="cuda") if noise else None

    def run(i: int) -> Tensor:
        return sample.draw(z[i], temperature, seed, seed, seed)

    def check() -> float:
        drawn = sample_reference.perturb(z[0], temperature, seed, seed, None) if noise else z[0].float()
        return error(drawn.gather(-1, run(0)[:, None])[:, 0], drawn.amax(-1).double())

    return Case(f"draw {'noise' if noise else 'greedy'}", batch, 0, run, copies, check, 2 * batch * VOCAB)


def narrowed_case(batch: int, top_k: int, top_p: float, sorts: bool) -> Case:
    """The draw of who narrows the choice; `sorts`: by the reference, in plain torch."""
    copies = copies_for(4 * batch * VOCAB)
    z, slot = torch.randn(copies, batch, VOCAB, device="cuda") * 4, torch.arange(batch, device="cuda")
    seen, ones = torch.zeros(batch, VOCAB, device="cuda", dtype=torch.bool), torch.ones(batch, device="cuda")
    rest = ones, torch.full_like(slot, top_k), top_p * ones, 0 * ones, ones, slot, slot, slot

    def run(i: int) -> Tensor:
        return (sample_reference if sorts else sample).draw_narrowed(z[i], seen, *rest)

    def check() -> float:
        return (run(0) != sample_reference.draw_narrowed(z[0], seen, *rest)).float().mean().item()

    name = "draw" + f" top-k {top_k}" * (top_k < VOCAB) + f" top-p {top_p}" * (top_p < 1) + " sorted" * sorts
    return Case(name, batch, 0, run, copies, check, 4 * batch * VOCAB)


def router_case(tokens: int, how: str, tile: RouterTile | None = None) -> Case:
    """A norm, which clears what programs count in as in a step, and the router behind it.

    `one`: a launch behind the norm; `fused`: one that makes a norm of its own; `two`: cuBLAS's logits, then the choice.
    """
    nbytes = 4 * EXPERTS * HIDDEN + 2 * tokens * HIDDEN
    copies = copies_for(nbytes)
    h, norm, bias = bf16(tokens, HIDDEN).float(), 1 + bf16(HIDDEN, scale=0.1), torch.randn(EXPERTS, device="cuda") * 0.1
    delta, maps = bf16(tokens, HIDDEN), torch.randn(copies, EXPERTS, HIDDEN, device="cuda") * HIDDEN**-0.5
    turns = torch.empty(tokens, 1, device="cuda", dtype=torch.int32)
    turn = turns.view(-1)

    def run(i: int) -> tuple[Tensor, ...]:
        from klquant.kernels.moe import router

        choice = maps[i], bias, TOP, SCALING, True
        total, x = add_rms_norm(h, delta, norm, EPS, turns)
        if how == "fused":
            return total, *router.add_rms_norm_route(h, delta, norm, EPS, *choice, turn, tile)[2:]
        if how == "one":
            return total, *router.route_normed(total, x, norm, EPS, *choice, turn, tile)
        return x, *router.route_tokens(x, *choice)

    def check() -> float:
        x, weight, expert = run(0)
        if how != "two":
            x = norm_reference.rms_norm(x, norm.double(), EPS)
        args = x.double(), maps[0].double(), bias.double(), TOP, SCALING, True
        want, chosen = moe_reference.route_tokens(*args)
        # Two scores nearer than FP32 tells apart may change places.
        same = (expert == chosen).all(-1)
        return error(weight[same], want[same]) if same.float().mean() > 0.98 else float("nan")

    name = f"norm + route {how}"
    if tile:
        name += f" {tile.experts}/{tile.tokens}/{tile.columns}/{tile.warps}"
    return Case(name, tokens, 0, run, copies, check, nbytes)


def router_cases(tokens: int, sweep: bool) -> Iterator[Case]:
    yield router_case(tokens, "two")
    yield router_case(tokens, "one")
    if tokens <= 4:
        yield router_case(tokens, "fused")
        most = 1 << (tokens - 1).bit_length()
        for rows, columns, warps in FUSED_SWEEP if sweep else ():
            yield router_case(tokens, "fused", RouterTile(rows, most, columns, warps))
    for sizes in ROUTER_SWEEP if sweep else ():
        yield router_case(tokens, "one", RouterTile(*sizes))


def cases(only: str | None, sweep: bool) -> Iterator[Case]:
    for batch in BATCHES:
        if only in (None, "kda"):
            yield kda_case(batch)
            for tile in kda_tiles() if sweep else ():
                yield kda_case(batch, tile)
        if only in (None, "norm"):
            yield norm_case(batch)
            yield parts_case(batch, apart=False)
            yield parts_case(batch, apart=True)
            for tokens in {1: (1, 4), 8: (8, 16), 32: (32, 64)}.get(batch, ()):
                yield qkv_case(tokens, beside=True)
                yield qkv_case(tokens, beside=False)
        if only in (None, "draw"):
            yield draw_case(batch, noise=False)
            yield draw_case(batch, noise=True)
            for top_k, top_p in (40, 1.0), (VOCAB, 0.95), (40, 0.95):
                yield from (narrowed_case(batch, top_k, top_p, sorts) for sorts in (False, True))
        if only in (None, "router"):
            for tokens in {1: (1, 2, 4), 32: (16, 32, 64)}.get(batch, (batch,)):
                yield from router_cases(tokens, sweep)
        for stored in STORED:
            if only in (None, "write"):
                yield write_case(batch, stored)
            for context in CONTEXTS if only in (None, "mla") else ():
                yield mla_case(batch, context, stored)
                for tile in tiles(batch) if sweep else ():
                    yield mla_case(batch, context, stored, tile)


def tiles(batch: int) -> list[Tile]:
    """Those this card can run, the last also with half and twice the parts that `decode_tile` gives."""
    card = torch.cuda.get_device_properties(0)
    hopper = card.major == 9
    splits = decode_tile(batch, 1 << 20, card.multi_processor_count, staged=hopper).splits
    if hopper:
        found = [Tile(64, 8, splits, early, staged=True) for early in (False, True)]
    else:
        found = [Tile(16, 4, splits), Tile(32, 8, splits)]
    return found + [replace(found[-1], splits=count) for count in {max(1, splits // 2), 2 * splits} - {splits}]


def measure(case: Case) -> Row:
    found = case.error()
    if not found < case.most_error:
        sys.exit(f"{case.op}, batch {case.batch}, context {case.context}: error {found}")
    us = time_us([lambda i=i: case.run(i) for i in range(case.copies)])
    rate = case.nbytes / us * 1e6
    return Row(case.op, case.batch, case.context, found, us, rate / 1e9, rate / copy_rate())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("decode.json"))
    parser.add_argument("--only", choices=("kda", "mla", "write", "norm", "router", "draw"))
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/decode_kernels.py: needs a CUDA GPU")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}: copy {copy_rate() / 1e12:.2f} TB/s")
    print(f"{'':36} {'batch':>5} {'context':>7} {'µs':>8} {'GB/s':>5} {'copy':>5} {'error':>7}")
    rows = []
    for case in cases(options.only, options.sweep):
        row = measure(case)
        rows.append(row)
        print(
            f"{row.op:36} {row.batch:5} {row.context or '':>7} {row.us:8.1f} {row.gb_s:5.0f} {row.of_copy:5.0%} "
            f"{row.error:7.1e}",
            flush=True,
        )
    report = {"device": torch.cuda.get_device_name(), "copy_bytes_s": copy_rate(), "rows": [asdict(r) for r in rows]}
    options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
