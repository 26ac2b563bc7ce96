"""Kernels against FP64, at odd shapes, with outputs poisoned: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch

from tests.kernels.build import DEVICE, LIMIT, can_run, error, exact, random_weight
from tests.triton_interpreter import needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(not can_run, reason="needs a CUDA GPU, or a process that interprets")]

if can_run:
    from klquant.kernels.linear import dispatch
    from klquant.kernels.linear.tiles import Tile
    from klquant.kernels.linear.triton import linear, linear_beside, linear_in_parts, unpacked
    from klquant.kernels.moe import grouping, reference, router
    from klquant.kernels.moe import triton as moe_triton
    from klquant.kernels.moe.dispatch import QuantExperts, apply_experts

NARROW, WIDE, SCALED = (32, 8, 8, 8, 2), (64, 16, 4, 1, 2), (64, 16, 4, 1, 2, True)
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel does not write is NaN, or an index out of all bounds."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*size, **options):
        out = empty(*size, **options)
        return out.fill_(float("nan") if out.is_floating_point() else -(1 << 20))

    monkeypatch.setattr(torch, "empty", poisoned)


def silu_mul(x, gate, up):
    g = x @ gate.T
    return g * g.sigmoid() * (x @ up.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [NARROW, WIDE, SCALED])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_linear(bits, group, symmetric, tile, dtype):
    w = random_weight((33, 384), bits, group, symmetric)
    packed = dispatch.pack_weight(w).to(DEVICE)
    x = torch.randn(3, 384).to(dtype)
    y = linear(dispatch.pad_inputs(x.to(DEVICE), packed), packed, Tile(*tile))
    assert y.shape == (3, 33)
    assert error(y, x.double() @ exact(w).T) < LIMIT[dtype] / 1.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_logits_keep_fp32(bits, dtype):
    w = random_weight((33, 384), bits, 128)
    x = torch.randn(2, 3, 384).to(dtype)
    y = dispatch.QuantLinear(dispatch.pack_weight(w).to(DEVICE)).wide(x.to(DEVICE))
    assert y.dtype == torch.float32 and y.shape == (2, 3, 33)
    assert error(y, x.double() @ exact(w).T) < (1e-5 if y.is_cuda else LIMIT[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [NARROW, WIDE, (32, 8, 2, 1, 5)])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_plain_weight_beside(bits, tile, dtype):
    """Two tiles of tokens; inputs that fill no brick; a row beside more than a tile has. The large one's bits stay."""
    large, small = random_weight((33, 200), bits, -1), torch.randn(17, 200).to(dtype) / 200**0.5
    packed = dispatch.pack_weight(large).to(DEVICE)
    x = torch.randn(19, 200).to(dtype)
    padded = dispatch.pad_inputs(x.to(DEVICE), packed)
    y, beside = linear_beside(padded, packed, Tile(*tile), small.to(DEVICE))
    assert torch.equal(y, linear(padded, packed, Tile(*tile)))
    assert error(beside, x.double() @ small.double().T) < LIMIT[dtype]


@pytest.mark.parametrize("tile", [NARROW, WIDE])
@pytest.mark.parametrize(("bits", "parts"), [(8, 2), (4, 3), (4, 5)])
def test_linear_in_parts(bits, parts, tile):
    """Parts of unlike lengths, one of them empty: 7 or 4 bricks along K."""
    w = random_weight((33, 448 if bits == 8 else 512), bits, 64)
    packed, x = dispatch.pack_weight(w).to(DEVICE), torch.randn(3, w.codes.shape[1]).bfloat16()
    rows = linear_in_parts(x.to(DEVICE), packed, Tile(*tile), parts).rows_TRC
    assert rows.shape == (3, parts, 33) and rows.dtype == torch.float32
    assert error(rows.sum(1), x.double() @ exact(w).T) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [NARROW, WIDE])
def test_linear_16_bits(tile, dtype):
    w = random_weight((33, 160), 16)
    packed = dispatch.pack_weight(w).to(DEVICE)
    x = torch.randn(3, 160).to(dtype)
    assert error(linear(x.to(DEVICE), packed, Tile(*tile)), x.double() @ exact(w).T) < LIMIT[dtype] / 1.5


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(("start", "stop"), [(0, 64), (64, 175), (128, 190)])
def test_rows_of_a_weight(start, stop, tokens):
    """A view of some rows is a linear map of its own, whatever rows follow."""
    w = random_weight((190, 128), 4)
    x = torch.randn(tokens, 128).bfloat16()
    y = dispatch.apply_linear(x.to(DEVICE), dispatch.pack_weight(w).to(DEVICE).rows(start, stop))
    assert y.shape == (tokens, stop - start)
    assert error(y, x.double() @ exact(w)[start:stop].T) < LIMIT[x.dtype]


@pytest.mark.parametrize(("bits", "tokens"), [(4, 1), (8, 9), (4, 17), (8, 33), (4, 130)])
def test_every_tile_of_linear(bits, tokens):
    """Row counts and strides as views have them: x is a slice of wider rows."""
    w = random_weight((70, 200), bits, -1)
    op = dispatch.QuantLinear.of(w)
    x = torch.randn(tokens, 230).bfloat16()[:, 30:]
    y = dispatch.apply_linear(x.to(DEVICE), op.weight.to(DEVICE))
    assert op.shape == (70, 200)
    assert error(y, x.double() @ exact(w).T) < LIMIT[x.dtype] / 1.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 64), (8, 128), (4, -1)])
def test_many_tokens_meet_an_unpacked_weight(bits, group, symmetric, dtype, monkeypatch):
    w = random_weight((70, 200 if group == -1 else 384), bits, group, symmetric)
    packed, x = dispatch.pack_weight(w).to(DEVICE), torch.randn(5, w.codes.shape[1] + 40).to(dtype)[:, 40:]
    plain = unpacked(packed, dtype)[:, : packed.k]
    # Triton's interpreter cuts the bits that BF16 lacks off; a GPU rounds.
    torch.testing.assert_close(plain.cpu().double(), exact(w), rtol=torch.finfo(dtype).eps, atol=0)
    monkeypatch.setattr(dispatch, "UNPACK_TOKENS", 5)
    y = dispatch.apply_linear(x.to(DEVICE), packed)
    assert error(y, x.double() @ plain.cpu().double().T) < LIMIT[dtype] / 1.5


@pytest.mark.parametrize(("tokens", "unpack"), [(1, 512), (11, 512), (11, 1)])
@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_mlp(bits, tokens, unpack, monkeypatch):
    monkeypatch.setattr(dispatch, "UNPACK_TOKENS", unpack)
    gate, up, down = (random_weight(s, bits, 32) for s in ((96, 160), (96, 160), (160, 96)))
    packed, packed_down = (p.to(DEVICE) for p in dispatch.pack_mlp(gate, up, down))
    x = torch.randn(tokens, 160).bfloat16()
    h = dispatch.apply_linear(x.to(DEVICE), packed, gated=True)
    y = dispatch.apply_linear(h, packed_down)
    assert error(y, silu_mul(x.double(), exact(gate), exact(up)) @ exact(down).T) < 2 * LIMIT[x.dtype]


FORMATS = [((4, -1, True), (8, -1, True)), ((4, 32, False), (16, -1, True)), ((3, -1, True), (8, -1, True)),
           ((8, -1, True), (4, 32, False)), ((16, -1, True), None)]  # fmt: skip


CASES = [(1, torch.bfloat16), (2, torch.float16), (9, torch.bfloat16), (33, torch.bfloat16)]


@pytest.mark.parametrize(("tokens", "dtype"), CASES)
@pytest.mark.parametrize(("routed", "shared"), FORMATS)
def test_experts(routed, shared, tokens, dtype):
    experts, top, hidden, inner = 4, 2, 64, 96
    w1, w3, w2 = (random_weight((experts, *s), *routed) for s in ((inner, hidden), (inner, hidden), (hidden, inner)))
    mlp, beside = None, None
    if shared:
        beside = [random_weight(s, *shared) for s in ((inner, hidden), (inner, hidden), (hidden, inner))]
        mlp = dispatch.QuantMLP(*(p.to(DEVICE) for p in dispatch.pack_mlp(*beside)))
    packed = QuantExperts(*(p.to(DEVICE) for p in dispatch.pack_mlp(w1, w3, w2)), mlp)
    x = torch.randn(tokens, hidden).to(dtype)
    # Expert 0 gets every token, expert 3 none.
    expert = torch.stack([torch.tensor([0, 1 + t % 2]) for t in range(tokens)]).int()
    weight = torch.rand(tokens, top)
    y = apply_experts(packed, x.to(DEVICE), weight.to(DEVICE), expert.to(DEVICE))

    want = torch.zeros(tokens, hidden, dtype=torch.float64)
    for t in range(tokens):
        for r in range(top):
            e = expert[t, r]
            h = silu_mul(x[t].double(), exact(w1)[e], exact(w3)[e])
            want[t] += weight[t, r] * (exact(w2)[e] @ h)
    if beside:
        want += silu_mul(x.double(), exact(beside[0]), exact(beside[1])) @ exact(beside[2]).T
    assert error(y, want) < 2 * LIMIT[dtype]


@pytest.mark.parametrize("tokens", [1, 4, 5, 17])
def test_halves_of_the_experts_may_share_a_launch(tokens):
    """The same bits as in a launch each, with the same tiles; counters are whoever's came before."""
    shapes = ((96, 160), (96, 160), (160, 96))
    (gate_up, down), shared = (
        [p.to(DEVICE) for p in dispatch.pack_mlp(*(random_weight((*lead, *s), bits, 32) for s in shapes))]
        for lead, bits in (((6,), 4), ((), 8))
    )
    x = dispatch.pad_inputs(torch.randn(tokens, 160).bfloat16().to(DEVICE), gate_up)
    expert = torch.stack([torch.randperm(6)[:3] for _ in range(tokens)]).int().to(DEVICE)
    weight, tile = torch.rand(tokens, 3).to(DEVICE), Tile(64, 8, 2, 1, 2)
    args = x, weight, expert, gate_up, down, shared
    apart = moe_triton.many_tokens(*args, None, tile, tile)
    made = torch.zeros(tokens * 4, dtype=torch.int32, device=DEVICE)
    for counters in (None, made):
        joined = moe_triton.joined(*args, tile, tile, counters)
        assert torch.equal(joined.rows_TRC, apart.rows_TRC) and torch.equal(joined.beside_TC, apart.beside_TC)
    assert made.any()


@pytest.mark.parametrize("tokens", [3, 200])
def test_grouping_lists_every_route_once(tokens):
    experts, top, size = 9, 4, 8
    expert = torch.stack([torch.randperm(experts - 2)[:top] for _ in range(tokens)]).int()
    order, tiles = (t.cpu() for t in grouping.group(expert.to(DEVICE), experts, size))
    assert torch.equal(order.long(), expert.flatten().long().argsort(stable=True))
    rows = []
    for e, first, last in tiles.tolist():
        if e >= 0:
            assert 0 < last - first <= size
            assert (expert.flatten()[order[first:last].long()] == e).all()
            rows += range(first, last)
    assert sorted(rows) == list(range(tokens * top))
    assert (tiles[:, 0] >= -1).all()


def test_grouping_in_several_blocks(monkeypatch):
    monkeypatch.setattr(grouping, "CHUNK", 128)
    expert = torch.randint(0, 5, (100, 3)).int()
    order, _ = grouping.group(expert.to(DEVICE), 5, 64)
    assert torch.equal(order.cpu().long(), expert.flatten().long().argsort(stable=True))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "top"), [(256, 8), (13, 3)])
def test_router(experts, top, renormalize):
    logits, bias = torch.randn(5, experts), 0.1 * torch.randn(experts)
    weight, expert = router.route(logits.to(DEVICE), bias.to(DEVICE), top, 2.446, renormalize)
    want, chosen = reference.route(logits.double(), bias.double(), top, 2.446, renormalize)
    assert torch.equal(expert.cpu(), chosen)
    assert torch.allclose(weight.cpu().double(), want, rtol=1e-5)


def test_router_survives_nan():
    logits = torch.randn(2, 16)
    logits[0, 3] = float("nan")
    weight, expert = router.route(logits.to(DEVICE), torch.zeros(16, device=DEVICE), 4, 1.0, True)
    assert 3 not in expert[0].tolist()
    assert ((expert >= 0) & (expert < 16)).all()
    assert weight.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_captured_layer_follows_its_inputs(tokens):
    """The same graph serves other routes, and every run has the same bits."""
    shapes = ((128, 128), (128, 128), (128, 128))
    mlp = dispatch.QuantMLP.of(*(random_weight(s, 8) for s in shapes))
    mlp = dispatch.QuantMLP(mlp.gate_up.to(DEVICE), mlp.down.to(DEVICE))
    packed = QuantExperts(*(p.to(DEVICE) for p in dispatch.pack_mlp(*(random_weight((4, *s), 4) for s in shapes))), mlp)
    x, weight = torch.randn(tokens, 128, device=DEVICE).bfloat16(), torch.rand(tokens, 2, device=DEVICE)
    expert = torch.zeros(tokens, 2, dtype=torch.int32, device=DEVICE)
    packed(x, weight, expert)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = packed(x, weight, expert)
    for _ in range(3):
        expert.copy_(torch.randint(0, 4, (tokens, 2)))
        x.normal_()
        graph.replay()
        assert torch.equal(captured, packed(x, weight, expert))
