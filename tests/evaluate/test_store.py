"""How much of a divergence survives the store."""

import pytest
import torch

from klquant.evaluate.store import divergence, keep

POSITIONS = 500


def pair(vocabulary, sharpness, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(POSITIONS, vocabulary, generator=generator)
    other = logits + noise * torch.randn(POSITIONS, vocabulary, generator=generator)
    return logits.log_softmax(-1), other.log_softmax(-1)


def exact(logp, logq):
    logp, logq = logp.double(), logq.double()
    return (logp.exp() * (logp - logq)).sum(-1)


def stored(kind, logp, seed=0):
    return keep(kind, logp, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["full", "topk"])
@pytest.mark.parametrize(("vocabulary", "sharpness", "noise"), [
    (320, 1.0, 0.3), (8192, 3.0, 0.3), (8192, 3.0, 0.01), (8192, 0.1, 0.5), (2, 1.0, 0.3), (100, 5.0, 2.0),
])  # fmt: skip
def test_the_error_is_within_what_is_stated(kind, vocabulary, sharpness, noise):
    logp, logq = pair(vocabulary, sharpness, noise)
    truth, d = exact(logp, logq), divergence(kind, stored(kind, logp), logq)
    # Three standard errors, and what FP32 itself does to a log-softmax.
    allowed = d.bias.mean() + 3 * d.variance.sum().sqrt() / POSITIONS + 1e-6
    assert (d.kld - truth).mean().abs() <= allowed
    assert d.kld.dtype == torch.float64 and d.kld.min() > -1e-6


@pytest.mark.parametrize("kind", ["full", "topk"])
def test_no_difference_is_zero(kind):
    logp, _ = pair(4096, 2.0, 0)
    assert divergence(kind, stored(kind, logp), logp).kld.abs().max() < 2e-6


def test_the_estimate_is_unbiased_and_its_variance_is_right():
    """Over draws: flat distributions, of which the stored top covers little."""
    logp, logq = pair(2048, 0.5, 0.5)
    truth = exact(logp, logq).mean()
    draws = [divergence("topk", stored("topk", logp, seed), logq) for seed in range(30)]
    means = torch.stack([d.kld.mean() for d in draws])
    expected = torch.stack([d.variance.sum().sqrt() / POSITIONS for d in draws]).mean()
    assert (means.mean() - truth).abs() < 4 * expected / 30**0.5
    assert 0.7 < means.std() / expected < 1.4


def test_rows_are_independent():
    """What a position is worth does not depend on the positions stored with it."""
    logp, logq = pair(512, 2.0, 0.3)
    together = divergence("full", stored("full", logp), logq).kld
    rows = zip(logp.split(7), logq.split(7), strict=True)
    alone = torch.cat([divergence("full", stored("full", p), q).kld for p, q in rows])
    assert torch.equal(together, alone)
