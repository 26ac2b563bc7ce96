"""Draws of the kernels against their references: the same hash bit for bit, the same noise but for the last bits of a
log, the same tokens left by top-k, top-p and min-p."""

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


def one_of(gen, rows, *values):
    return torch.tensor(values)[torch.randint(0, len(values), (rows,), generator=gen)]


def narrowings(gen, rows, vocab):
    """Tables of so many slots: what `draw_narrowed` takes between `seen` and the rows' slots."""
    top_k = one_of(gen, rows, 1, 3, vocab // 2 + 1, vocab, vocab)
    floats = [(0.0, 0.7, 1.0, 2.0), (0.1, 0.5, 0.9, 0.99, 1.0, 1.0), (0.0, 0.0, 0.05, 0.3), (1.0, 1.0, 1.3, 0.7)]
    temperature, top_p, min_p, penalty = (one_of(gen, rows, *values) for values in floats)
    return temperature, top_k, top_p, min_p, penalty, torch.randint(0, 1 << 62, (rows,), generator=gen)


def both_narrowed(z, seen, *rest):
    """(tokens, what counts as seen behind them) of the reference and of the kernels."""
    from klquant.kernels.sample import narrow

    tables = seen.clone(), seen.to(DEVICE, copy=True)
    want = reference.draw_narrowed(z, tables[0], *rest)
    got = narrow.draw_narrowed(z.to(DEVICE), tables[1], *(x.to(DEVICE) for x in rest))
    return (want, tables[0]), (got.cpu(), tables[1].cpu())


@pytest.mark.parametrize("vocab, block", [(1, 64), (50, 64), (300, 128)])
@pytest.mark.parametrize("dtype, ties", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
@runs
def test_draw_narrowed(vocab, block, dtype, ties, monkeypatch):
    """Parts of the vocabulary, rows that ask for different things, many equal logits."""
    from klquant.kernels.sample import narrow

    monkeypatch.setattr(narrow, "BLOCK", block)
    rows, gen = 5, torch.Generator().manual_seed(vocab)
    z = 3 * torch.randn(rows, vocab, generator=gen)
    z = (z.round() if ties else z).to(dtype)
    seen = torch.rand(rows + 2, vocab, generator=gen) < 0.2
    slot, position = torch.randperm(rows + 2, generator=gen)[:rows], torch.randint(0, 9999, (rows,), generator=gen)
    want, got = both_narrowed(z, seen, *narrowings(gen, rows + 2, vocab), slot, position.int())
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@runs
def test_a_narrowed_row_is_its_own(monkeypatch):
    from klquant.kernels.sample import narrow

    monkeypatch.setattr(narrow, "BLOCK", 64)
    gen = torch.Generator().manual_seed(0)
    z, position = torch.randn(3, 100, generator=gen), torch.tensor([4, 8, 15], dtype=torch.int32)
    tables = torch.zeros(3, 100, dtype=torch.bool), *narrowings(gen, 3, 100)
    slot = torch.tensor([2, 0, 1])
    _, (together, _) = both_narrowed(z, *tables, slot, position)
    for i in range(3):
        _, (alone, _) = both_narrowed(z[i : i + 1], *tables, slot[i : i + 1], position[i : i + 1])
        assert alone == together[i]


@runs
def test_the_first_of_equal_logits_stay(monkeypatch):
    """Of 300 equal ones in three parts: top-k's five; the fewest that reach a fifth of all, of 200, and of five."""
    from klquant.kernels.sample import narrow

    monkeypatch.setattr(narrow, "BLOCK", 128)
    kinds = {(5, 1.0): 5, (300, 0.2): 60, (200, 0.2): 40, (5, 0.2): 1}
    for (top_k, top_p), left in kinds.items():
        one = torch.ones(1)
        rest = one, torch.tensor([top_k]), top_p * one, 0 * one, one, torch.tensor([7])
        slot, position = torch.zeros(4, dtype=torch.int64), torch.arange(4, dtype=torch.int32)
        z = torch.zeros(4, 300)
        (want, _), (got, _) = both_narrowed(z, torch.zeros(1, 300, dtype=torch.bool), *rest, slot, position)
        assert torch.equal(got, want) and got.max() < left


@runs
def test_narrowed_logits_that_are_no_numbers():
    """No token, and none counts as seen; −∞ is never drawn."""
    z = torch.full((6, 100), float("-inf"))
    z[:, 40:44] = torch.tensor([1.0, 2.0, 3.0, 2.5])
    z[1, 5], z[2, 99], z[3] = float("nan"), float("inf"), float("-inf")
    gen, slot = torch.Generator().manual_seed(3), torch.arange(6)
    ones, seed = torch.ones(6), torch.randint(0, 99, (6,), generator=gen)
    rest = 2 * ones, torch.full((6,), 100), 0.999 * ones, 0 * ones, 1.1 * ones, seed
    want, got = both_narrowed(z, torch.zeros(6, 100, dtype=torch.bool), *rest, slot, slot.int())
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert (got[0][1:4] == -1).all() and (got[0][[0, 4, 5]] // 4 == 10).all() and got[1].sum() == 3


@needs_triton
@pytest.mark.skipif(interpreting, reason="this process interprets kernels")
def test_it_compiles(monkeypatch):
    from klquant.kernels.sample import narrow, triton

    def meta(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def picks(temperature):
        seed, slot = meta(9, dtype=torch.int64), meta(4, dtype=torch.int64)
        z = meta(4, 163_840, dtype=torch.bfloat16)
        return lambda: triton.draw(z, temperature, seed, slot, meta(4, dtype=torch.int32))

    def narrows(dtype):
        floats, wholes = meta(9, dtype=torch.float32), meta(9, dtype=torch.int64)
        seen, slot = meta(9, 163_840, dtype=torch.bool), meta(4, dtype=torch.int64)
        tables = floats, wholes, floats, floats, floats, wholes
        return lambda: narrow.draw_narrowed(
            meta(4, 163_840, dtype=dtype), seen, *tables, slot, meta(4, dtype=torch.int32)
        )

    runs = narrows(torch.float32), narrows(torch.bfloat16), picks(None), picks(meta(9, dtype=torch.float32))
    for card, run in zip(CARDS, runs, strict=True):
        for found in dict.fromkeys(record(run, monkeypatch)):
            used = compile_for(found, card)
            assert used.shared <= CARDS[card] * 1024 and used.spilled == 0
