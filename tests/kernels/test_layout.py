import pytest
import torch

from klquant.kernels.linear.dispatch import pack_weight
from klquant.kernels.linear.layout import interleave, pack, pack_plain, packed_bytes, split_rows, unpack, values
from tests.kernels.build import exact, random_weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "k"), [(32, 96), (64, 320), (128, 384), (-1, 70)])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_unpack_inverts_pack(lead, bits, group, k, symmetric):
    w = random_weight((*lead, 37, k), bits, group, symmetric)
    back = unpack(pack(w))
    assert back.spec == w.spec
    assert torch.equal(back.codes, w.codes)
    assert torch.equal(back.scale, w.scale)
    assert symmetric or torch.equal(back.zero, w.zero)


@pytest.mark.parametrize(("bits", "most"), [(3, 3.125), (4, 4.125), (8, 8.125)])
def test_a_weight_takes_its_codes_and_scales_and_nothing_else(bits, most):
    packed = pack(random_weight((64, 2304), bits))
    assert packed.nbytes * 8 == 64 * 2304 * most


def test_scales_keep_their_dtype():
    w = random_weight((64, 128), 4)
    half = type(w)(w.spec, w.codes, w.scale.half())
    assert pack(half).scale.dtype == torch.float16
    full = type(w)(w.spec, w.codes, w.scale.float())
    assert pack(full).nbytes == packed_bytes(w.spec, 64, 128, scale_bytes=4)


def test_experts_packed_in_pieces_are_the_same(monkeypatch):
    w = random_weight((5, 64, 128), 3)
    whole = pack(w)
    monkeypatch.setattr("klquant.kernels.linear.layout.CODES_AT_ONCE", 2 * 64 * 128)
    pieces = pack(w)
    assert all(torch.equal(a, b) for a, b in zip(pieces.tensors, whole.tensors, strict=True) if a is not None)


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_interleaved_rows_come_apart_again(bits):
    pieces = [random_weight((2, 40, 128), bits) for _ in "gu"]
    packed = interleave(*((pack_plain if bits == 16 else pack)(w) for w in pieces))
    for rows, w in zip(split_rows(values(packed, torch.float64), 40), pieces, strict=True):
        assert torch.equal(rows, exact(w))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_rows_are_views(bits, symmetric):
    w = random_weight((200, 96), bits, 32, symmetric)
    packed = pack_weight(w)
    for start, stop in ((0, 64), (64, 200), (128, 150)):
        part = packed.rows(start, stop)
        assert torch.equal(values(part, torch.float64), exact(w)[start:stop])
        assert part.row_bricks % 4 == 0  # whole tiles of 64 rows
        for a, b in zip(part.tensors, packed.tensors, strict=True):
            assert a is None or a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@pytest.mark.parametrize("row_multiple", [64, 192])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_bytes_are_known_without_packing(bits, group, symmetric, row_multiple):
    w = random_weight((70, 384), bits, group, symmetric)
    packed = pack_weight(w, row_multiple)
    assert packed.nbytes == packed_bytes(packed.spec, 70, 384, row_multiple=row_multiple)
