"""The delta rule: every way to run it gives what the plain recurrence gives."""

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch

from klquant.model.delta import delta_path, kda_chunk, kda_chunk_fla, kda_step
from tests.alone import Alone, in_threads


def inputs(length, decay, *, batch=2, heads=3, dim=16, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, length, heads, dim, generator=gen, dtype=dtype) for _ in range(3))
    g = -(torch.rand(batch, length, heads, dim, generator=gen, dtype=dtype) ** 3) * decay
    beta = torch.rand(batch, length, heads, generator=gen, dtype=dtype)
    state = torch.randn(batch, heads, dim, dim, generator=gen, dtype=dtype)
    return q, k, v, g, beta, state


def kda_naive(q, k, v, g, beta, state=None):
    """The recurrence, one position after the other."""
    steps = []
    for t in range(q.shape[1]):
        o, state = kda_step(*(x[:, t : t + 1] for x in (q, k, v, g, beta)), state)
        steps.append(o)
    return torch.cat(steps, 1), state


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("decay", [0.0, 0.1, 5.0, 500.0])
@pytest.mark.parametrize("chunk", [16, 64])
def test_chunk_equals_recurrence(length, decay, chunk):
    *x, state = inputs(length, decay)
    for start in (None, state):
        o, s = kda_chunk(*x, start, chunk=chunk)
        o_ref, s_ref = kda_naive(*x, start)
        assert (o - o_ref).abs().max() < 1e-12
        assert (s - s_ref).abs().max() < 1e-12


@pytest.mark.parametrize("decay", [0.01, 5.0, 500.0])
def test_chunk_in_fp32_is_exact_to_fp32(decay):
    """One strong decay among weak ones is where differences of cumulative sums would lose their digits."""
    x = inputs(130, decay)
    x[3][:, ::17] = -3000.0
    o, s = kda_chunk(*(t.float() for t in x))
    o_ref, s_ref = kda_naive(*x)
    assert (o - o_ref).abs().max() < 2e-6
    assert (s - s_ref).abs().max() < 2e-6


def test_recurrence_is_the_equation():
    """S_t = (I − β k kᵀ) diag(exp g) S + β k vᵀ, o = Sᵀ q / √D, written with matrices for one head."""
    x = inputs(5, 1.0, batch=1, heads=1)
    s, outs = x[5][0, 0], []
    for q, k, v, g, beta in zip(*(y[0, :, 0] for y in x[:5]), strict=True):
        q, k = (y / (y.square().sum() + 1e-6).sqrt() for y in (q, k))
        forget = (torch.eye(16, dtype=torch.float64) - beta * torch.outer(k, k)) @ torch.diag(g.exp())
        s = forget @ s + beta * torch.outer(k, v)
        outs.append(s.T @ q / 4)
    o, s_end = kda_naive(*x)
    assert torch.allclose(o[0, :, 0], torch.stack(outs), atol=1e-12)
    assert torch.allclose(s_end[0, 0], s, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 4, 6, 9])
def test_threads_and_units_change_nothing(heads):
    """The same bytes with any number of threads, and for a sequence alone as for one among others."""
    x = [t.float() for t in inputs(70, 1.0, batch=3, heads=heads)]
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            torch.set_num_threads(1)
            one = kda_chunk(*x)
            torch.set_num_threads(2)
            two = kda_chunk(*x)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    alone = kda_chunk(*(t[1:2] for t in x))
    for i in range(2):
        assert torch.equal(one[i], two[i])
        assert torch.equal(one[i][1:2], alone[i])
    reference = kda_naive(*x)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(one, reference, strict=True))


def test_inputs_are_left_alone():
    x = inputs(65, 1.0)
    before = [t.clone() for t in x]
    for run in (kda_chunk, kda_naive):
        run(*x)
    kda_step(*(t[:, :1] for t in x[:5]), x[5])
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))


def test_chunk_gradient_equals_recurrence_gradient():
    def gradients(run):
        x = [t.requires_grad_() for t in inputs(37, 2.0, batch=1, heads=2, dim=8)]
        o, s = run(*x)
        (o.square().sum() + (s * torch.arange(8)).sum()).backward()
        return [t.grad for t in x]

    for got, want in zip(gradients(lambda *x: kda_chunk(*x, chunk=16)), gradients(kda_naive), strict=True):
        assert torch.allclose(got, want, atol=1e-10)


def test_path_is_by_device_dtype_and_length(monkeypatch):
    monkeypatch.setattr("klquant.model.delta.has_fla", lambda: True)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert delta_path(cpu, torch.bfloat16, 64) == "chunk"
    assert delta_path(cuda, torch.bfloat16, 64) == "chunk_fla"
    assert delta_path(cuda, torch.float32, 64) == "chunk"
    assert delta_path(cuda, torch.bfloat16, 1) == "step"
    monkeypatch.setattr("klquant.model.delta.has_fla", lambda: False)
    assert delta_path(cuda, torch.bfloat16, 64) == "chunk"


def test_every_flag_given_to_fla_is_one_of_its_parameters(monkeypatch):
    """Its **kwargs would swallow a misspelt one."""
    kda = pytest.importorskip("fla.ops.kda")
    parameters = inspect.signature(kda.chunk_kda).parameters
    passed = {}
    monkeypatch.setattr(kda, "chunk_kda", lambda **kwargs: passed.update(kwargs))
    kda_chunk_fla(*inputs(4, 1.0))
    assert {"q", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"} <= set(passed) <= set(parameters)


def test_one_thread_at_a_time_calls_fla(monkeypatch):
    """Triton's tuner fails when a second thread calls the kernel that it tunes."""
    x = inputs(4, 1.0)
    alone = Alone((x[2], x[5]))
    for name in ("fla", "fla.ops", "fla.ops.kda"):  # it can be imported on a GPU only
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(chunk_kda=alone))
    in_threads(lambda: kda_chunk_fla(*x))
    assert alone.most == 1
