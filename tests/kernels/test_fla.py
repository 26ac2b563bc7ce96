"""flash-linear-attention's kernels: none is left to be tuned, and the tiles chosen fit every card."""

import pytest
import torch

from klquant.kernels.kda import fla
from klquant.model.delta import kda_chunk_fla
from tests.kernels.launches import CARDS, compile_for, record
from tests.triton_interpreter import interpreting, needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(interpreting, reason="this process interprets kernels")]
HEADS, DIM, TOKENS = 32, 128, 128


def chunks(**how: object) -> None:
    """A prompt through fla's kernels, on the CPU: they are only recorded."""
    x = [torch.zeros(1, TOKENS, HEADS, DIM, dtype=torch.bfloat16) for _ in range(4)]
    with torch.no_grad():
        kda_chunk_fla(*x, torch.zeros(1, TOKENS, HEADS), torch.zeros(1, HEADS, DIM, DIM), **how)


def test_nothing_is_left_to_tune(monkeypatch):
    """Where there is no card fla offers the tiles of cards with the least shared memory, so each has one for those.

    A tuner with more than one would run its kernel, which is no kernel here, to time it.
    """
    pytest.importorskip("fla")
    assert fla.settle() == ()
    gate = {"use_gate_in_kernel": True, "A_log": torch.zeros(HEADS), "dt_bias": torch.zeros(HEADS * DIM)}
    found = {*record(lambda: chunks(normed=True, **gate), monkeypatch), *record(lambda: chunks(), monkeypatch)}
    names = {launch.kernel.__name__ for launch in found}
    assert names == {name.partition(":")[2] for name in fla.TILES}
    for launch in found:
        for card, kib in CARDS.items():
            assert compile_for(launch, card).shared <= kib * 1024, f"sm{card} {launch}"


def test_a_kernel_that_fla_no_longer_has_is_named(monkeypatch):
    """And so is one without that tile; the others have theirs. Whoever runs them is told."""
    kda = pytest.importorskip("fla.ops.kda")
    known = "fla.ops.kda.gate:kda_gate_chunk_cumsum_vector_kernel"
    others = {"fla.ops.kda.gate:older_kernel": (({}, 4, 3),), "fla.ops.nothing:kernel": (({}, 4, 3),)}
    monkeypatch.setattr(fla, "TILES", {known: (({"BS": 1}, 4, 3),)} | others)
    monkeypatch.setattr(kda, "chunk_kda", lambda **_: None)
    fla.settle.cache_clear()
    try:
        assert fla.settle() == ("kda_gate_chunk_cumsum_vector_kernel", "older_kernel", "kernel")
        with pytest.warns(UserWarning, match="tunes kda_gate_chunk_cumsum_vector_kernel, older_kernel, kernel at"):
            chunks()
    finally:
        fla.settle.cache_clear()
