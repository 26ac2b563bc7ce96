"""Rounding rows so that later ones make up for earlier ones, in a metric of the outputs."""

import torch

from klquant.core.spec import WeightSpec
from klquant.quantize.coupled import MIN_ROWS, coupled_gptq
from klquant.quantize.gptq import gptq

E, N, K = 2, 100, 64
SPEC = WeightSpec(bits=3, group_size=32)


def problem(seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(E, 500, K, generator=gen) @ (torch.eye(K) + torch.randn(K, K, generator=gen) / K**0.5)
    read = torch.randn(10, N, generator=gen)  # ten readers of a hundred outputs
    metric = read.T @ read
    metric = 0.3 * torch.eye(N) + 0.7 * metric / metric.diagonal().mean()
    return torch.randn(E, N, K, generator=gen), x.mT @ x / 500, metric


def loss(w, h, metric, result):
    d = w - result.quantized.decode()
    return float(((metric @ d @ h) * d).sum())


def test_the_loss_in_the_metric_falls_at_little_cost_without_it():
    w, h, metric = problem()
    plain = gptq(w, h, SPEC, damp=0.05, rounds=2)
    coupled = coupled_gptq(w, h, metric, SPEC, damp=0.05, rounds=2)
    assert loss(w, h, metric, coupled) < 0.8 * loss(w, h, metric, plain)
    assert loss(w, h, torch.eye(N), coupled) < 1.6 * loss(w, h, torch.eye(N), plain)


def test_without_coupling_it_is_gptq():
    w, h, _ = problem(1)
    plain, coupled = (f(w, h, *m, SPEC, damp=0.05, rounds=1) for f, m in ((gptq, ()), (coupled_gptq, (torch.eye(N),))))
    assert (plain.quantized.codes != coupled.quantized.codes).float().mean() < 0.002


def test_rows_come_back_where_they_were():
    """A diagonal metric only orders the rows: the result is that of GPTQ, row for row."""
    w, h, _ = problem(2)
    order = torch.rand(N, generator=torch.Generator().manual_seed(5)) + 0.5
    plain, coupled = (f(w, h, *m, SPEC, damp=0.05, rounds=0) for f, m in ((gptq, ()), (coupled_gptq, (order.diag(),))))
    torch.testing.assert_close(plain.quantized.scale, coupled.quantized.scale)
    assert (plain.quantized.codes != coupled.quantized.codes).float().mean() < 0.002


def test_rows_that_count_most_go_first():
    """Nothing was rounded before them, so they are what GPTQ makes of them alone; what they leave moves the others."""
    w, h, metric = problem(3)
    metric = metric * torch.outer(*2 * [1 + torch.rand(N, generator=torch.Generator().manual_seed(6))])
    order = metric.diagonal().argsort(descending=True, stable=True)
    first, rest = order[:MIN_ROWS], order[MIN_ROWS:]
    coupled = coupled_gptq(w, h, metric, SPEC, damp=0.05, rounds=1).quantized.codes
    alone, others = (gptq(w[:, rows], h, SPEC, damp=0.05, rounds=1).quantized.codes for rows in (first, rest))
    assert torch.equal(coupled[:, first], alone)
    assert (coupled[:, rest] != others).float().mean() > 0.1
