"""Decode kernels against FP64, what they must not read poisoned: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch
from torch import Tensor

from klquant.kernels.kda.tiles import Tile as KDATile
from klquant.kernels.kda.weights import KDADecode
from klquant.kernels.mla.pages import CODE_MAX, PAGE_SIZE, LatentPages
from klquant.kernels.mla.tiles import Tile
from klquant.kernels.norm.reference import rms_norm
from tests.kernels.build import DEVICE, LIMIT, can_run, error
from tests.kernels.gluon_on_cpu import OnCPU
from tests.triton_interpreter import interpreting, needs_triton, teach_bf16_products, teach_bf16_rounding

pytestmark = [needs_triton, pytest.mark.skipif(not can_run, reason="needs a CUDA GPU, or a process that interprets")]

if can_run:
    from klquant.kernels.kda import dispatch as kda_dispatch
    from klquant.kernels.kda import reference as kda_reference
    from klquant.kernels.kda import triton as kda_triton
    from klquant.kernels.mla import dispatch as mla_dispatch
    from klquant.kernels.mla import hopper, write
    from klquant.kernels.mla import reference as mla_reference
    from klquant.kernels.mla import triton as mla_triton
    from klquant.kernels.moe import reference as moe_reference
    from klquant.kernels.moe import router
    from klquant.kernels.moe import triton as moe_triton
    from klquant.kernels.moe.tiles import RouterTile
    from klquant.kernels.norm import reference as norm_reference
    from klquant.kernels.norm import triton as norm_triton
    from klquant.kernels.norm.parts import Parts

NAN = float("nan")
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel does not write is NaN, or an index out of all bounds."""
    torch.manual_seed(0)
    if interpreting:
        teach_bf16_products()
        teach_bf16_rounding()
    empty = torch.empty

    def poisoned(*size, **options):
        out = empty(*size, **options)
        return out.fill_(NAN if out.is_floating_point() else -(1 << 20) if out.itemsize > 1 else 127)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(x.shape, dtype=x.dtype, device=x.device))


def to_device(*tensors: Tensor) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


# The stream is as wide as the activations or, as in the engine, FP32.
streams = pytest.mark.parametrize(("stream", "dtype"), [*((d, d) for d in DTYPES), (torch.float32, DTYPES[0])])


def strided(x: Tensor, extra: int = 8) -> Tensor:
    """The same rows with NaN between them."""
    wide = torch.full((len(x), x.shape[1] + extra), NAN).to(x.dtype)
    wide[:, : x.shape[1]] = x
    return wide.to(DEVICE)[:, : x.shape[1]]


@streams
@pytest.mark.parametrize("width", [40, 300])
def test_add_rms_norm(width, stream, dtype):
    h, delta, weight = (torch.randn(*s).to(dtype) for s in ((5, width), (5, width), (width,)))
    h = torch.randn(5, width).to(stream)
    want, _ = norm_reference.add_rms_norm(h, delta, weight, 1e-5)
    total, normed = norm_triton.add_rms_norm(strided(h), strided(delta), weight.to(DEVICE), 1e-5)
    assert torch.equal(total.cpu(), want) and (total.dtype, normed.dtype) == (stream, dtype)
    exact = norm_reference.rms_norm(total.cpu().double(), weight.double(), 1e-5)
    assert error(normed, exact) < LIMIT[dtype]
    turns = torch.ones(5, 4, dtype=torch.int32, device=DEVICE)
    alone, normed = norm_triton.add_rms_norm(strided(h), None, weight.to(DEVICE), 1e-5, turns)
    assert not turns.any()
    assert torch.equal(alone.cpu(), h)
    assert error(normed, norm_reference.rms_norm(h.double(), weight.double(), 1e-5)) < LIMIT[dtype]


@streams
@pytest.mark.parametrize("with_shared", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_a_delta_in_parts_is_their_sum(wide, with_shared, stream, dtype):
    h, weight, shared = torch.randn(5, 72).to(stream), torch.randn(72).to(dtype), torch.randn(5, 72).to(dtype)
    routed = torch.randn(5, 3, 72).to(torch.float32 if wide else dtype)
    parts = Parts(routed.to(DEVICE), shared.to(DEVICE) if with_shared else None)
    added = moe_triton.combine(parts, stream)
    if stream == dtype:
        exact = routed.double().sum(1) + (shared.double() if with_shared else 0)
        assert torch.equal(added.cpu(), exact.to(dtype))
    got, want = (norm_triton.add_rms_norm(strided(h), delta, weight.to(DEVICE), 1e-5) for delta in (parts, added))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def kda_case(heads: int, dim: int, rank: int, taps: int, dtype: torch.dtype) -> KDADecode:
    width = heads * dim
    return KDADecode(
        torch.randn(3 * width, taps).to(dtype) / taps**0.5, 2 * torch.rand(heads), torch.randn(width) - 3,
        *(torch.randn(width, rank).to(dtype) / rank**0.5 for _ in "fg"), (1 + 0.1 * torch.randn(dim)).to(dtype),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [2, 4])
@pytest.mark.parametrize(("heads", "dim", "rank", "taps"), [(3, 32, 16, 4), (1, 16, 32, 3)])
@pytest.mark.parametrize("early", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_kda_decode(heads, dim, rank, taps, splits, dtype, early, monkeypatch):
    """More rows than one program projects, the last of its eight; slots criss-cross, and some rows are padding."""
    if early and torch.cuda.get_device_properties(0).major < 9:
        pytest.skip("needs a card that starts launches early")
    monkeypatch.setattr(kda_triton, "BD", 16)
    w = kda_case(heads, dim, rank, taps, dtype)
    slots, slot = 12, torch.tensor([4, -1, 0, 2, 9, 10, 7, -1, 11], dtype=torch.int32)
    used, unused = slot[slot >= 0].long(), [1, 3, 5, 6, 8]
    rows = len(slot)
    conv = torch.full((slots, 3 * heads * dim, taps - 1), NAN).to(dtype)
    s = torch.full((slots, heads, dim, dim), NAN)
    conv[used] = torch.randn(len(used), 3 * heads * dim, taps - 1).to(dtype)
    s[used] = torch.randn(len(used), heads, dim, dim)
    want_conv, want_s = conv.double(), s.double()
    exact = KDADecode(**{name: t.double() for name, t in vars(w).items()})
    on_device = KDADecode(**{name: t.to(DEVICE) for name, t in vars(w).items()})
    conv, s, slot_B = to_device(conv, s, slot)
    for _ in range(3):
        qkv, low = torch.randn(rows, 3 * heads * dim).to(dtype), torch.randn(rows, 2 * rank + heads + 3).to(dtype)
        qkv[slot < 0], low[slot < 0] = NAN, NAN
        low[:, 2 * rank + heads :] = NAN
        tile = KDATile(splits, 4, early)
        out = kda_triton.kda_decode(strided(qkv), strided(low), on_device, conv, s, slot_B, 1e-5, tile)
        want = kda_reference.kda_decode(qkv.double(), low.double(), exact, want_conv, want_s, slot, 1e-5)
        live = slot >= 0
        assert not out[~live.to(DEVICE)].any()
        assert error(out[live.to(DEVICE)], want[live]) < 3 * LIMIT[dtype]
    assert error(s[used.to(DEVICE)], want_s[used]) < 3 * LIMIT[dtype]
    assert torch.equal(conv.cpu()[used].double(), want_conv[used])
    assert s[unused].isnan().all()
    assert conv[unused].isnan().all()


FORMATS = [None, torch.float8_e4m3fn, torch.int8]


def on_device(pages: LatentPages) -> LatentPages:
    return LatentPages(pages.data.to(DEVICE), None if pages.scale is None else pages.scale.to(DEVICE))


def poisoned_pages(count: int, latent: int, dtype: torch.dtype) -> LatentPages:
    """Every value NaN, or a large code with a NaN scale."""
    pages = LatentPages.empty(count, latent, dtype, "cpu")
    pages.data.view(torch.uint8).fill_(0x7F if pages.scale is not None else 0xFF)
    if pages.scale is not None:
        pages.scale.fill_(NAN)
    return pages


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", FORMATS)
def test_write_latent(stored, dtype):
    """The same bits as the reference writes, at the positions given and nowhere else."""
    kv_a, weight = torch.randn(6, 48).to(dtype), torch.randn(32).to(dtype)
    kv_a *= torch.logspace(-3, 2, 6)[:, None].to(dtype)
    kv_a[4] = 0
    position = torch.tensor([70, 3, -1, 64, 0, 191])
    want = poisoned_pages(3, 48, stored or dtype)
    pages = on_device(want)
    kv_a[2] = NAN
    write.write_latent(strided(kv_a), weight.to(DEVICE), pages, position.to(DEVICE), False)
    mla_reference.write_latent(kv_a, weight, want, position)
    got, bits = pages.data.cpu().view(torch.uint8), want.data.view(torch.uint8)
    # rsqrt of a GPU and of a CPU may differ in the last bit, and so may a rounded value now and then.
    assert (got != bits).float().mean() < (0.0 if interpreting else 0.01) + 1e-9
    if stored:
        assert torch.allclose(pages.scale.cpu(), want.scale, rtol=1e-2, equal_nan=True)


def cached(lengths: list[int], latent: int, stored: torch.dtype, dtype: torch.dtype, spare: int = 2):
    """Pages of random latents, a criss-cross page table [B, M] whose unused part points nowhere, lengths."""
    need = [-(-n // PAGE_SIZE) for n in lengths]
    pages = poisoned_pages(sum(need) + spare, latent, stored)
    order = torch.randperm(sum(need) + spare)
    table = torch.full((len(lengths), max(need) + 1), 1 << 28, dtype=torch.int32)
    for b, (n, count) in enumerate(zip(lengths, need, strict=True)):
        mine, order = order[:count], order[count:]
        table[b, :count] = mine
        rows = (mine[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[:n]
        values = torch.randn(n, latent)
        if stored in CODE_MAX:
            scale = values.abs().amax(-1) / CODE_MAX[stored]
            codes = values / scale[:, None]
            codes = codes.round().to(torch.int8) if stored == torch.int8 else codes.to(stored)
            pages.data.view(torch.int8).flatten(0, 1)[rows] = codes.view(torch.int8)
            pages.scale.flatten()[rows] = scale
        else:
            pages.data.flatten(0, 1)[rows] = values.to(dtype)
    return pages, table, torch.tensor(lengths, dtype=torch.int32)


TILES = [Tile(16, 4, 3), Tile(32, 8, 5), Tile(32, 8, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", FORMATS)
def test_mla_decode_staged(stored, dtype, monkeypatch):
    """Hopper's kernel, with torch in place of its instructions."""
    if not interpreting:
        pytest.skip("test_mla_decode_on_hopper runs the kernel itself")

    def codes(words: Tensor, field: int, format: str, dtype: torch.dtype) -> Tensor:
        byte = words.contiguous().view(torch.int8).unflatten(-1, (-1, 2))[..., field]
        value = byte.to(dtype) if format == "int8" else byte.view(torch.float8_e4m3fn).to(dtype)
        return value / unit_of(format, dtype)

    def unit_of(format: str, dtype: torch.dtype) -> float:
        return 256.0 if format == "fp8" and dtype == torch.float16 else 1.0

    kernel = OnCPU(hopper.attend_kernel, {"_codes": codes, "unit": unit_of})
    monkeypatch.setattr(hopper, "attend_kernel", kernel)
    for splits in (1, 3):
        check_mla_decode(stored, dtype, Tile(64, 8, splits, staged=True))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", FORMATS)
def test_mla_decode(stored, dtype, tile):
    check_mla_decode(stored, dtype, tile)


def check_mla_decode(stored: torch.dtype | None, dtype: torch.dtype, tile: Tile) -> None:
    """Lengths around a tile's, a page's and a part's borders; three heads; a page more than anyone uses."""
    heads, nope, rope, v, rank = 3, 32, 32, 16, 64
    tokens, splits = tile.tokens, tile.splits
    lengths = [1, 0, 63, 64, 65, tokens * splits - 1, tokens * splits + 1, 2 * tokens * splits + 3, 200, 17]
    pages, table, length = cached(lengths, rank + rope, stored or dtype, dtype)
    q = torch.randn(len(lengths), heads * (nope + rope) + 5).to(dtype)
    q[1] = NAN
    q_BHK = q[:, 5:].unflatten(1, (heads, nope + rope))
    kv_b = (torch.randn(heads * (nope + v), rank) / rank**0.5).to(dtype)
    for rows in (slice(None), slice(3, 6), slice(4, 5)):
        args = q_BHK[rows], kv_b, pages, table[rows], length[rows]
        want = mla_reference.mla_decode(
            *(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args), 0.3
        )
        on = (a.to(DEVICE) if a is not pages else on_device(a) for a in args)
        out = mla_triton.mla_decode(*on, 0.3, tile)
        assert out.shape == want.shape
        assert error(out, want) < 2 * LIMIT[dtype]
        assert not out[length[rows].to(DEVICE) == 0].any()


def check_on_a_card(heads: int, rank: int, dtype: torch.dtype, decode, tiles: list) -> None:
    """Lengths around the borders of pages and parts, and one long one; the whole batch and one sequence."""
    nope, rope, v = 32, 64, 32
    lengths = [1, 0, 63, 64, 65, 128, 129, 577, 200, 2000]
    q = torch.randn(len(lengths), heads, nope + rope).to(dtype)
    kv_b = (torch.randn(heads * (nope + v), rank) / rank**0.5).to(dtype)
    for stored in FORMATS:
        pages, table, length = cached(lengths, rank + rope, stored or dtype, dtype)
        for rows in (slice(None), slice(7, 8)):
            args = q[rows], kv_b, pages, table[rows], length[rows]
            want = mla_reference.mla_decode(
                *(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args), 0.1
            )
            for tile in tiles:
                on = (a.to(DEVICE) if a is not pages else on_device(a) for a in args)
                out = decode(*on, 0.1, *tile)
                assert error(out, want) < 2 * LIMIT[dtype], (stored, tile)
                assert not out[length[rows].to(DEVICE) == 0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [5, 32])
@pytest.mark.parametrize("splits", [1, 3, 132])
def test_mla_decode_on_hopper(heads, splits, dtype):
    """Kernels that the interpreter does not know: what starts early, and pages that are staged."""
    if torch.cuda.get_device_properties(0).major != 9:
        pytest.skip("needs a Hopper GPU")
    tiles = [(Tile(64, 8, splits, early, staged=True),) for early in (False, True)]
    check_on_a_card(heads, 512, dtype, mla_triton.mla_decode, tiles)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [2, 16, 32])
@pytest.mark.parametrize("rank", [64, 128, 256, 512])
def test_mla_decode_as_a_card_does_it(rank, heads, dtype):
    """Tensor cores take shapes that other tests are too small for."""
    check_on_a_card(heads, rank, dtype, mla_dispatch.mla_decode, [()])


def routing_case(tokens: int, experts: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(tokens, width).to(dtype), torch.randn(experts, width) / width**0.5, 0.1 * torch.randn(experts)


def route_normed(total: Tensor, choice: tuple, tile: object = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Routes of the norm of `total`, by a launch that may not look at it, and that norm in FP64."""
    norm, turn = torch.randn(total.shape[1]).bfloat16(), torch.zeros(len(total), dtype=torch.int32)
    unseen, norm_C, turn_T = to_device(torch.full((1,), NAN), norm, turn)
    found = router.route_normed(strided(total), unseen, norm_C, 1e-5, *choice, turn_T, tile)
    return found, rms_norm(total, norm.double(), 1e-5)


def check_routes(found, x, weights, bias, top, renormalize):
    weight, expert = found
    want, chosen = moe_reference.route_tokens(x.double(), weights.double(), bias.double(), top, 2.446, renormalize)
    assert torch.equal(expert.cpu(), chosen)
    assert torch.allclose(weight.cpu().double(), want, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top"), [(1, 13, 3), (5, 70, 8), (11, 33, 1), (19, 13, 3)])
def test_route_tokens(tokens, experts, top, dtype):
    """Of tokens as they are; and, in one launch, of a norm that is made on the way."""
    x, weights, bias = routing_case(tokens, experts, 600, dtype)
    choice = *to_device(weights, bias), top, 2.446, tokens > 1
    check_routes(router.route_tokens(strided(x), *choice), x, weights, bias, top, tokens > 1)
    found, normed = route_normed(x.float(), choice)
    check_routes(found, normed, weights, bias, top, tokens > 1)


@pytest.mark.parametrize("tile", [(1, 1, 64, 1), (4, 2, 256, 4), (2, 8, 512, 8)])
def test_tiles_of_the_router(tile):
    total, weights, bias = routing_case(9, 13, 600, torch.float32)
    found, normed = route_normed(total, (*to_device(weights, bias), 3, 2.446, True), RouterTile(*tile))
    check_routes(found, normed, weights, bias, 3, True)


@streams
@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_add_rms_norm_route(tokens, stream, dtype):
    """Sum and norm are the norm kernel's, and the choice is made from that norm before it is rounded."""
    h, weights, bias = routing_case(tokens, 37, 1100, dtype)
    h = torch.randn(tokens, 1100).to(stream)
    delta, norm = torch.randn(tokens, 1100).to(dtype), torch.randn(1100).to(dtype)
    for beside in (strided(delta), None):
        args, turns = (strided(h), beside, norm.to(DEVICE), 1e-5), torch.full((tokens, 4), 7, dtype=torch.int32)
        turns = turns.to(DEVICE)
        want_total, want = norm_triton.add_rms_norm(*args, turns)
        assert not turns.any()
        turn = turns.view(-1)[:tokens]
        total, normed, *found = router.add_rms_norm_route(*args, *to_device(weights, bias), 3, 2.446, True, turn)
        assert torch.equal(total, want_total)
        assert error(normed, want.cpu().double()) < LIMIT[dtype]
        check_routes(found, rms_norm(total.cpu(), norm.double(), 1e-5), weights, bias, 3, True)


def test_many_tokens_are_routed_by_the_norm_as_it_is(monkeypatch):
    monkeypatch.setattr(router, "ROUTER_TOKENS", 4)
    normed, weights, bias = routing_case(5, 37, 1100, torch.bfloat16)
    unseen = torch.full((5, 1100), NAN, device=DEVICE)
    args = unseen, normed.to(DEVICE), unseen[0], 1e-5, *to_device(weights, bias), 3, 2.446, True, unseen[0]
    check_routes(router.route_normed(*args), normed, weights, bias, 3, True)


@pytest.mark.parametrize("one_launch", [False, True])
def test_equal_experts_go_by_index(one_launch):
    """Scores that are equal to the last bit, in one part of the experts and across parts; the bias decides the rest."""
    x, weights, bias = torch.ones(2, 64).bfloat16(), torch.zeros(70, 64), torch.zeros(70)
    bias[[66, 3, 40, 41]], bias[9] = 1.0, -1.0
    choice = *to_device(weights, bias), 7, 1.0, True
    _, expert = route_normed(x.float(), choice)[0] if one_launch else router.route_tokens(x.to(DEVICE), *choice)
    assert expert.tolist() == [[3, 40, 41, 66, 0, 1, 2]] * 2


def check_nearly_best(weight, expert, x, weights, bias, scale):
    """Place by place as good a choice as the best: sums in another order may swap two that are nearly equal."""
    score = torch.nn.functional.linear(x, weights).sigmoid()
    choice, chosen = score + bias, expert.long()
    best = choice.topk(chosen.shape[1]).values
    assert torch.allclose(choice.gather(1, chosen), best, rtol=0, atol=1e-5)
    assert (chosen.sort().values.diff() > 0).all(), "an expert twice"
    own = score.gather(1, chosen)
    assert torch.allclose(weight, scale * own / own.sum(1, keepdim=True), rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4, 8, 64])
def test_a_captured_router_counts_anew(tokens):
    """Replays choose as two launches do, from whatever program is last, and repeat their bits."""
    _, weights, bias = to_device(*routing_case(tokens, 256, 2304, torch.bfloat16))
    h, norm = to_device(torch.randn(tokens, 2304), torch.ones(2304).bfloat16())
    turns = torch.empty(tokens, 2, dtype=torch.int32, device=DEVICE)
    turn = turns.view(-1)[:tokens]

    def step():
        _, x = norm_triton.add_rms_norm(h, None, norm, 1e-5, turns)
        if tokens <= 4:
            return router.add_rms_norm_route(h, None, norm, 1e-5, weights, bias, 8, 2.446, True, turn)[2:]
        return router.route_normed(h, x, norm, 1e-5, weights, bias, 8, 2.446, True, turn)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(50):
        h.normal_()
        graph.replay()
        first = [t.clone() for t in captured]
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))
        check_nearly_best(*first, rms_norm(h, norm.float(), 1e-5), weights, bias, 2.446)


@pytest.mark.gpu
def test_a_captured_step_follows_lengths_and_slots():
    """One graph serves other lengths, pages and slots, and repeats its bits."""
    heads, nope, rope, v, rank = 32, 128, 64, 128, 512
    pages, table, _ = cached([3000, 700, 64], rank + rope, torch.int8, torch.bfloat16)
    pages, table = on_device(pages), table.clamp_max(len(pages.data) - 1).to(DEVICE)
    q, kv_b = (
        torch.randn(3, heads, nope + rope).bfloat16(),
        torch.randn(heads * (nope + v), rank).bfloat16() / rank**0.5,
    )
    q, kv_b = to_device(q, kv_b)
    length = torch.tensor([1, 1, 1], dtype=torch.int32, device=DEVICE)
    w = kda_case(4, 128, 128, 4, torch.bfloat16)
    w = KDADecode(**{name: t.to(DEVICE) for name, t in vars(w).items()})
    qkv, low = to_device(torch.randn(3, 3 * 512).bfloat16(), torch.randn(3, 260).bfloat16())
    conv, s = torch.randn(5, 3 * 512, 3).bfloat16().to(DEVICE), torch.randn(5, 4, 128, 128, device=DEVICE)
    slot = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)

    def step(conv, s):
        out = mla_dispatch.mla_decode(q, kv_b, pages, table, length, 0.07)
        return out, kda_dispatch.kda_decode(qkv, low, w, conv, s, slot, 1e-5)

    step(conv.clone(), s.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(conv, s)
    for lengths, slots in (([3000, 700, 64], [4, 0, 1]), ([65, 0, 63], [2, -1, 3]), ([2047, 1, 0], [0, 1, -1])):
        length.copy_(torch.tensor(lengths))
        slot.copy_(torch.tensor(slots))
        before = conv.clone(), s.clone()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(*before), strict=True))
        assert torch.equal(conv, before[0])
        assert torch.equal(s, before[1])
