import pytest
import torch

from klquant.evaluate.statistics import BINS, by_position, interval, quality, quantiles


def record(kld, nll=2.0, reference=1.9):
    kld = torch.as_tensor(kld, dtype=torch.float64)
    full = lambda x: torch.full((len(kld) - 1,), x, dtype=torch.float64)  # noqa: E731
    return {
        "kld": kld, "kld_bias": kld * 0 + 0.25, "kld_variance": kld * 0, "top1_same": (kld < 1).double(),
        "nll": full(nll), "reference_nll": full(reference),
    }  # fmt: skip


def test_the_mean_and_percentiles_are_over_all_positions():
    q = quality({"a": [record([0.0, 1, 2, 3])], "b": [record([4.0, 5, 6, 103]), record([0.5] * 4)]})
    assert (q.windows, q.positions, q.targets) == (3, 12, 9)
    assert q.kld.mean == pytest.approx(126 / 12) and q.kld.max == 103 and q.kld.median == 1.5
    assert q.kld.store_error == 0.25
    assert q.top1.mean == pytest.approx(5 / 12)
    assert q.perplexity == pytest.approx(torch.tensor(2.0).exp().item())
    assert q.perplexity_ratio.mean == pytest.approx(torch.tensor(0.1).exp().item())
    assert q.kld.low is None, "one window in a domain is no sample"


@pytest.mark.parametrize("count", [1, 2, 999, 1000])
def test_quantiles_are_torchs(count):
    values, shares = torch.rand(count), (0.0, 0.31, 0.5, 0.999, 1.0)
    want = torch.quantile(values.double(), torch.tensor(shares, dtype=torch.float64))
    assert quantiles(values, shares) == pytest.approx(want.tolist(), rel=1e-12)


def test_the_interval_is_that_of_the_mean_over_windows():
    values = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = interval(values, [64])
    error = values.std().item() / 8
    assert x.mean == pytest.approx(values.mean().item())
    assert x.mean - x.low == pytest.approx(1.96 * error, rel=0.1)
    assert x.high - x.mean == pytest.approx(1.96 * error, rel=0.1)


def test_a_resample_keeps_each_domains_share():
    """Domains differ much, windows of one not at all: nothing is uncertain."""
    x = interval(torch.tensor([0.0, 0, 0, 10, 10], dtype=torch.float64), [3, 2])
    assert (x.mean, x.low, x.high) == (4, 4, 4)


@pytest.mark.parametrize("length", [5, 16, 80, 2048])
def test_position_bins_cover_every_position_once(length):
    kld = torch.arange(length, dtype=torch.float64)
    bins = by_position([{"kld": kld}, {"kld": kld}])
    assert len(bins) == min(BINS, length)
    assert [b.start for b in bins] == [0, *[b.stop for b in bins][:-1]] and bins[-1].stop == length
    assert sum(b.tokens for b in bins) == 2 * length
    assert sum(b.kld * b.tokens for b in bins) == pytest.approx(2 * kld.sum().item())
