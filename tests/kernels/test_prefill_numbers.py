"""Prefill kernels against FP64, what they must not read poisoned: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch

from klquant.kernels.kda.borders import Borders
from klquant.kernels.mla.pages import PAGE_SIZE, page_position
from tests.kernels.build import DEVICE, LIMIT, can_run, error
from tests.kernels.test_decode_numbers import DTYPES, FORMATS, NAN, cached, on_device, poison, strided, to_device
from tests.triton_interpreter import needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(not can_run, reason="needs a CUDA GPU, or a process that interprets")]
__all__ = ["poison"]  # a fixture that every test here uses

if can_run:
    from klquant.kernels.kda import prefill as kda_prefill
    from klquant.kernels.kda import reference as kda_reference
    from klquant.kernels.mla import prefill as mla_prefill
    from klquant.kernels.mla import reference as mla_reference
    from klquant.kernels.norm import reference as norm_reference
    from klquant.kernels.norm import triton as norm_triton


def rows_of(x):
    """`strided` sequences [B, S, ·]."""
    return strided(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "dim", "taps"), [(1, 3, 32, 4), (3, 1, 16, 3), (2, 2, 16, 2)])
@pytest.mark.parametrize("lengths", [(1, 1, 2, 1), (2, 70, 3), (32, 33, 1), (129, 97)])
def test_prefill_inputs(lengths, batch, heads, dim, taps, dtype):
    """Chunk after chunk on one tail: shorter than the taps, around a tile's borders, several tiles and programs."""
    width = heads * dim
    weights = (torch.randn(3 * width, taps) / taps**0.5).to(dtype)
    tail = torch.randn(batch, 3 * width, taps - 1).to(dtype)
    want_tail, tail = tail.double(), tail.to(DEVICE)
    for count in lengths:
        qkv, b = torch.randn(batch, count, 3 * width).to(dtype), torch.randn(batch, count, heads).to(dtype)
        for got_tail, its in ((tail, want_tail), (None, None)):
            got = kda_prefill.prefill_inputs(rows_of(qkv), rows_of(b), weights.to(DEVICE), got_tail)
            want = kda_reference.prefill_inputs(qkv.double(), b.double(), weights.double(), its)
            for x, y in zip(got, want, strict=True):
                assert x.shape == y.shape
                assert x.is_contiguous()
            for x, y in zip(got[:3], want[:3], strict=True):
                assert error(x, y) < LIMIT[dtype]
            assert got[3].dtype == torch.float32
            assert error(got[3], want[3]) < 1e-6
        assert torch.equal(tail.cpu().double(), want_tail)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_inputs_of_sequences_one_behind_the_other(dtype):
    heads, dim, taps = 2, 16, 4
    border = torch.tensor([0, 1, 34, 36, 100, 103])
    borders, count = Borders(border, border.to(DEVICE)), 103
    weights = (torch.randn(3 * heads * dim, taps) / taps**0.5).to(dtype)
    tail = torch.randn(5, 3 * heads * dim, taps - 1).to(dtype)
    want_tail, tail = tail.double(), tail.to(DEVICE)
    for _ in range(2):
        qkv, b = torch.randn(1, count, 3 * heads * dim).to(dtype), torch.randn(1, count, heads).to(dtype)
        for got_tail, its in ((tail, want_tail), (None, None)):
            got = kda_prefill.prefill_inputs(rows_of(qkv), rows_of(b), weights.to(DEVICE), got_tail, borders)
            for n, (start, end) in enumerate(borders.spans):
                mine = None if its is None else its[n : n + 1]
                alone = (qkv[:, start:end].double(), b[:, start:end].double(), weights.double(), mine)
                want = kda_reference.prefill_inputs(*alone)
                for x, y in zip(got, want, strict=True):
                    assert error(x[:, start:end], y) < (LIMIT[dtype] if x.dtype == dtype else 1e-6)
        assert torch.equal(tail.cpu().double(), want_tail)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 2, 32, 70])
def test_prefill_inputs_before_padding(count, dtype):
    heads, dim, taps, rows = 2, 16, 4, 70
    borders = Borders(None, torch.tensor([0, count], device=DEVICE))
    weights = (torch.randn(3 * heads * dim, taps) / taps**0.5).to(dtype)
    tail = torch.randn(1, 3 * heads * dim, taps - 1).to(dtype)
    qkv, b = torch.randn(1, rows, 3 * heads * dim).to(dtype), torch.randn(1, rows, heads).to(dtype)
    qkv[:, count:], b[:, count:] = NAN, NAN
    want_tail, got_tail = tail.double(), tail.to(DEVICE)
    got = kda_prefill.prefill_inputs(rows_of(qkv), rows_of(b), weights.to(DEVICE), got_tail, borders)
    on_cpu = Borders(None, borders.device.cpu())
    want = kda_reference.prefill_inputs(qkv.double(), b.double(), weights.double(), want_tail, on_cpu)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert not x[:, count:].any() and not y[:, count:].any()
        assert not count or error(x[:, :count], y[:, :count]) < (LIMIT[dtype] if x.dtype == dtype else 1e-6)
    assert torch.equal(got_tail.cpu().double(), want_tail)
    assert count or torch.equal(want_tail, tail.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 1, 16), (5, 3, 40), (70, 2, 64)])
def test_gated_rms_norm(rows, heads, dim, dtype):
    gate, weight = torch.randn(rows, heads, dim).to(dtype), torch.randn(dim).to(dtype)
    for x in (torch.randn(rows, heads, dim).to(dtype), torch.randn(rows, heads, dim)):
        got = norm_triton.gated_rms_norm(*to_device(x, gate, weight), 1e-5)
        want = norm_reference.gated_rms_norm(x.double(), gate.double(), weight.double(), 1e-5)
        assert got.dtype == dtype
        assert got.shape == want.shape
        assert error(got, want) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", FORMATS)
def test_read_latent(stored, dtype):
    """The bits that the plain gather gives, from the middle of a page to the middle of another."""
    pages, table, _ = cached([2 * PAGE_SIZE + 30], 48, stored or dtype, dtype)
    position = torch.arange(2 * PAGE_SIZE + 30)
    at = page_position(table[0, position // PAGE_SIZE], position)
    for start, stop in ((0, 1), (0, 130), (63, 65), (17, 140), (128, 158)):
        want = mla_reference.read_latent(pages, at[start:stop], dtype)
        got = mla_prefill.read_latent(on_device(pages), at[start:stop].to(DEVICE), dtype)
        assert torch.equal(got.cpu(), want)
    at[5:20] = -1
    want = mla_reference.read_latent(pages, at, dtype)
    assert not want[5:20].any() and torch.equal(
        mla_prefill.read_latent(on_device(pages), at.to(DEVICE), dtype).cpu(), want
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "nope", "rope", "v"), [(3, 32, 16, 32), (1, 24, 8, 16), (2, 16, 16, 40)])
def test_keys_values(heads, nope, rope, v, dtype):
    for count in (1, 16, 35):
        kv, shared = torch.randn(count, heads * (nope + v)).to(dtype), torch.randn(count, rope).to(dtype)
        got = mla_prefill.keys_values(kv.to(DEVICE), strided(shared), heads, nope)
        want = mla_reference.keys_values(kv, shared, heads, nope)
        assert all(torch.equal(x.cpu(), y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 35])
def test_join(count, dtype):
    """What lies behind the values is not read; sums far apart, where one set is nothing beside the other."""
    heads, v = 3, 24
    a, b = (torch.randn(count, heads, v + 8).to(dtype).transpose(0, 1) for _ in "ab")
    a[..., v:], b[..., v:] = NAN, NAN
    a_sum, b_sum = (torch.randn(heads, count) * spread for spread in (1, 200))
    want, want_sum = mla_reference.join(a.double(), a_sum.double(), b.double(), b_sum.double(), v, torch.float64)
    for out, limit in ((torch.float32, 1e-6), (dtype, LIMIT[dtype])):
        got, total = mla_prefill.join(*to_device(a, a_sum, b, b_sum), v, out)
        assert got.dtype == out
        assert error(got, want) < limit
        assert error(total, want_sum) < 1e-6
    again, _ = mla_prefill.join(got.to(torch.float32), total, *to_device(b, b_sum), v, torch.float32)
    want, _ = mla_reference.join(want, want_sum, b.double(), b_sum.double(), v, torch.float64)
    assert error(again, want) < LIMIT[dtype]
