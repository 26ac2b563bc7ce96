"""The noise kernel against its reference: the same hash bit for bit, the same noise but for the last bits of a log."""

import pytest
import torch

from klquant.kernels.sample import reference
from tests.kernels.build import DEVICE, can_run
from tests.kernels.launches import CARDS, compile_for, record
from tests.triton_interpreter import has_triton, interpreting, needs_triton, run_interpreted

runs = pytest.mark.skipif(not (has_triton and can_run), reason="needs Triton, and a CUDA GPU or its interpreter")


@needs_triton
@pytest.mark.skipif(interpreting, reason="this process interprets already")
def test_interpreted():
    run_interpreted("tests/kernels/test_sample.py")


def inputs(rows, vocab):
    gen = torch.Generator().manual_seed(rows + vocab)
    z = torch.randn(rows, vocab, generator=gen) * 4
    temperature = torch.rand(rows, generator=gen) + 0.3
    temperature[::3] = 0
    seed = torch.randint(0, 1 << 62, (rows,), generator=gen)
    return z, temperature, seed, torch.randint(0, 1 << 20, (rows,), generator=gen)


def run(z, *rest):
    from klquant.kernels.sample import triton

    return triton.perturb(z.to(DEVICE), *(None if x is None else x.to(DEVICE) for x in rest)).cpu()


@pytest.mark.parametrize("rows, vocab", [(1, 1), (3, 1023), (5, 2500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@runs
def test_perturb(rows, vocab, dtype):
    z, *row = inputs(rows, vocab)
    z = z.to(dtype)
    assert torch.allclose(run(z, *row, None), reference.perturb(z, *row, None), rtol=1e-5, atol=1e-5)


@runs
def test_columns_in_another_order():
    z, *row = inputs(4, 777)
    order = z.argsort(-1, descending=True)
    want = reference.perturb(z, *row, None).gather(-1, order)
    assert torch.allclose(run(z.gather(-1, order), *row, order), want, rtol=1e-5, atol=1e-5)


@runs
def test_strided_logits_and_the_ends_of_the_noise():
    """A large sample, so that hashes near 0 and near 2³² are among it; rows of logits lie apart."""
    _, _, seed, position = inputs(6, 1)
    z = torch.zeros(6, 40_000)[:, :30_000]
    ones = torch.ones(6)
    got, want = run(z, ones, seed, position, None), reference.perturb(z, ones, seed, position, None)
    assert got.isfinite().all() and torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def drawn(z, temperature, seed, slot, position):
    from klquant.kernels.sample import triton

    return triton.draw(*(None if x is None else x.to(DEVICE) for x in (z, temperature, seed, slot, position))).cpu()


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@runs
def test_draw(dtype, noise):
    """The same columns as the reference over several blocks, the first of equals, and none where z is no number."""
    vocab = 4100
    z, temperature, seed, position = inputs(12, vocab)
    z = z.to(dtype)
    z[0] = -z[0].abs()
    z[1, [17, 2047, 2048, 4099]] = 40.0
    z[2, vocab - 1] = 50.0
    z[3], z[3, 9], z[3, 7] = -1.0, 0.0, -0.0
    temperature[[0, 1, 3]] = 0
    z[4, 3000], z[5, 5], z[6] = float("nan"), float("inf"), float("-inf")
    z[7, 1:] = float("-inf")
    slot = torch.randperm(12)
    tables = (temperature[slot.argsort()] if noise else None), seed[slot.argsort()]
    args = (*tables, slot, position.int())
    want = reference.draw(z, *args)
    assert want[3] == 7 and (want[4:7] == -1).all() and want[7] == 0
    assert torch.equal(drawn(torch.cat([z, z], 1)[:, :vocab], *args), want)


@needs_triton
@pytest.mark.skipif(interpreting, reason="this process interprets kernels")
def test_it_compiles(monkeypatch):
    from klquant.kernels.sample import triton

    def meta(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def launch(dtype, token):
        z = meta(4, 163_840, dtype=dtype)
        row = meta(4, dtype=torch.float32), meta(4, dtype=torch.int64), meta(4, dtype=torch.int64)
        return lambda: triton.perturb(z, *row, token)

    order = meta(4, 163_840, dtype=torch.int64)

    def picks(temperature):
        seed, slot = meta(9, dtype=torch.int64), meta(4, dtype=torch.int64)
        z = meta(4, 163_840, dtype=torch.bfloat16)
        return lambda: triton.draw(z, temperature, seed, slot, meta(4, dtype=torch.int32))

    runs = launch(torch.float32, order), launch(torch.bfloat16, None), picks(None), picks(meta(9, dtype=torch.float32))
    for card, run in zip(CARDS, runs, strict=True):
        for found in record(run, monkeypatch):
            used = compile_for(found, card)
            assert used.shared <= CARDS[card] * 1024 and used.spilled == 0
