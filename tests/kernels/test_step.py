"""The beginning of a decode step against its reference: interpreted on a CPU, compiled on a GPU or for one."""

import pytest
import torch

from klquant.kernels.mla.pages import PAGE_SIZE
from klquant.kernels.step import reference
from tests.kernels.build import DEVICE, can_run
from tests.kernels.launches import CARDS, compile_for, record
from tests.triton_interpreter import has_triton, interpreting, needs_triton, run_interpreted

runs = pytest.mark.skipif(not (has_triton and can_run), reason="needs Triton, and a CUDA GPU or its interpreter")


@needs_triton
@pytest.mark.skipif(interpreting, reason="this process interprets already")
def test_interpreted():
    run_interpreted("tests/kernels/test_step.py")


@pytest.mark.parametrize("pages", [3, 1500])
@runs
def test_advance(pages):
    """Lengths around a page's border, several rows of padding, slots that criss-cross, and twice in a row."""
    from klquant.kernels.step import triton

    length = torch.tensor([63, 0, 64, 2 * PAGE_SIZE - 1, 7, 100, 0], dtype=torch.int32)
    table = torch.randint(0, 1 << 30, (7, pages), dtype=torch.int32)
    slot = torch.tensor([3, -1, 0, 2, -1, 1], dtype=torch.int32)
    on_device = [x.clone().to(DEVICE) for x in (slot, length, table)]
    for _ in range(2):
        want = reference.advance(slot, length, table)
        got = triton.advance(*on_device)
        for a, b in zip((*got, on_device[1]), (*want, length), strict=True):
            assert a.dtype == b.dtype and torch.equal(a.cpu(), b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@runs
def test_embed_next(dtype):
    from klquant.kernels.step import triton

    token, index = torch.tensor([4, -1, 0, 9]), torch.tensor([3, 1, 0, 3, 2])
    embedding = torch.randn(10, 1100).to(dtype)
    got = triton.embed_next(*(x.to(DEVICE) for x in (token, index, embedding)))
    assert got.dtype == torch.float32 and torch.equal(got.cpu(), reference.embed_next(token, index, embedding))


@needs_triton
@pytest.mark.skipif(interpreting, reason="this process interprets kernels")
def test_it_compiles(monkeypatch):
    from klquant.kernels.step import triton

    def meta(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    slot, length, table = (meta(*shape, dtype=torch.int32) for shape in ((4,), (9,), (9, 2048)))
    words = meta(9, dtype=torch.int64), meta(4, dtype=torch.int64), meta(163_840, 2304, dtype=torch.bfloat16)
    calls = (lambda: triton.advance(slot, length, table)), (lambda: triton.embed_next(*words))
    for card, run in zip(CARDS, 2 * calls, strict=True):
        for found in record(run, monkeypatch):
            used = compile_for(found, card)
            assert used.shared <= CARDS[card] * 1024 and used.spilled == 0
