"""Experts in the host's memory: the same bits as on the card, wherever they lie: interpreted, and compiled on a GPU."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.kernels.build import DEVICE, can_run, random_weight
from tests.triton_interpreter import interpreting, needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(not can_run, reason="needs a CUDA GPU, or a process that interprets")]

if can_run:
    from klquant.kernels.linear import dispatch
    from klquant.kernels.moe import exchange
    from klquant.kernels.moe.dispatch import QuantExperts, added_up, apply_experts, expert_parts
    from klquant.kernels.moe.offload import Offload, Staging
    from klquant.kernels.moe.tiles import JOINED_TOKENS

EXPERTS, TOP, HIDDEN, INNER = 9, 3, 128, 96
FORMATS = [(4, 32, True), (3, -1, True), (8, 32, False), (16, 0, True)]


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    torch.manual_seed(0)
    if interpreting:  # one program after the other
        monkeypatch.setattr(exchange, "PIECES", 2)


def weights(bits, group, symmetric):
    """Gate·up and down of all experts, on the CPU."""
    shapes = (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    return dispatch.pack_mlp(*(random_weight((EXPERTS, *s), bits, group, symmetric) for s in shapes))


def host(packed):
    return packed.map(lambda t: t.clone().pin_memory() if DEVICE == "cuda" else t.clone())


def offloaded(whole, near):
    here = [w[:near].map(torch.clone).to(DEVICE) for w in whole]
    return QuantExperts(*here, None, Offload.of(near, tuple(host(w[near:]) for w in whole), DEVICE))


def live(tokens):
    """Slots of a step without padding."""
    return torch.arange(tokens, dtype=torch.int32, device=DEVICE)


def step(w, x, weight, expert):
    """What a decode step computes."""
    return added_up(expert_parts(w, x, weight, expert, slot_T=live(len(x))), x.dtype)


def routes(tokens):
    return torch.stack([torch.randperm(EXPERTS)[:TOP] for _ in range(tokens)]).int().to(DEVICE)


def gathered(experts):
    """Gate·up and down in order of experts, from wherever they lie."""
    place = experts.offload.place_E.cpu().long()
    for here, there in zip((experts.gate_up, experts.down), experts.offload.far, strict=True):
        yield [
            None if t is None else torch.cat([t.cpu(), far])[place]
            for t, far in zip(here.tensors, there.tensors, strict=True)
        ]


@pytest.mark.parametrize(("form", "near"), [*zip(FORMATS, (5, 1, 8, 4), strict=True)])
def test_an_expert_is_the_same_wherever_it_lies(form, near):
    whole = weights(*form)
    plain, experts = QuantExperts(*(w.to(DEVICE) for w in whole), None), offloaded(whole, near)
    places = set()
    for tokens in (1, 2, 5, JOINED_TOKENS + 1, 1):
        args = torch.randn(tokens, HIDDEN).bfloat16().to(DEVICE), torch.rand(tokens, TOP).to(DEVICE), routes(tokens)
        want = apply_experts(plain, *args)
        assert torch.equal(step(experts, *args), want)
        assert tokens > JOINED_TOKENS or torch.equal(apply_experts(experts, *args), want)
        places.add(tuple(experts.offload.place_E.tolist()))
        assert sorted(experts.offload.place_E.tolist()) == list(range(EXPERTS))
    assert len(places) > 1
    for mine, w in zip(gathered(experts), whole, strict=True):
        for t, want in zip(mine, w.tensors, strict=True):
            assert (t is None and want is None) or torch.equal(t, want)


@pytest.mark.gpu
def test_a_layers_experts_come_while_the_one_before_is_at_work():
    """Layer by layer, whole or from the middle, with experts that change places in between, and again in a graph."""
    staging, plain, layers = Staging(), [], []
    for near in (5, 3, 6, 4):
        whole = weights(4, 32, True)
        plain.append(QuantExperts(*(w.to(DEVICE) for w in whole), None))
        experts = offloaded(whole, near)
        layers.append(replace(experts, offload=replace(experts.offload, staging=staging)))
    staging.open([w.offload for w in layers], max(sum(w.nbytes for w in e.offload.far) for e in layers))
    x = torch.randn(JOINED_TOKENS + 9, HIDDEN, device=DEVICE).bfloat16()
    weight, expert = torch.rand(len(x), TOP, device=DEVICE), routes(len(x))

    def run(some, x):
        for w in some:
            x = apply_experts(w, x, weight, expert)
        return x

    for first in (0, 0, 2, 0, 3, 1):
        assert torch.equal(run(layers[first:], x), run(plain[first:], x))
        step(layers[first], x[:1], weight[:1], routes(1))
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        captured = run(layers, x)
    for _ in range(3):
        x.normal_()
        step(layers[1], x[:1], weight[:1], routes(1))
        graph.replay()
        assert torch.equal(captured, run(plain, x))


@pytest.mark.parametrize("near", [2, 4, 7])
@pytest.mark.parametrize("tokens", [1, 3])
def test_who_was_not_needed_for_the_longest_goes(near, tokens):
    """After a step all that it chose are on the card, as far as there is room; who went had been idle the longest."""
    experts = offloaded(weights(4, 32, True), near)
    offload, last, asked, missed = experts.offload, Counter(), 0, 0
    for now in range(1, 26):
        before = {e for e in range(EXPERTS) if offload.place_E[e] < near}
        # Behind the step's rows is padding, which asks for nothing.
        expert, slot = routes(tokens + 2), torch.cat([live(tokens), live(2) * 0 - 1])
        exchange.exchange(offload, experts.gate_up, experts.down, expert, slot)
        expert = expert[:tokens]
        chosen = set(expert.flatten().tolist())
        asked, missed = asked + len(chosen), missed + len(chosen - before)
        assert offload.totals.tolist() == [now, asked, missed]
        last.update({e: now - last[e] for e in chosen})
        after = {e for e in range(EXPERTS) if offload.place_E[e] < near}
        assert len(after) == near
        assert len(chosen & after) == min(near, len(chosen))
        gone, stayed = before - after, (before & after) - chosen
        assert not gone & chosen
        assert all((last[a], a) < (last[b], b) for a in gone for b in stayed)


def test_no_more_change_places_than_a_step_may_move(monkeypatch):
    monkeypatch.setattr(exchange, "MOST", 2)
    whole = weights(4, 32, True)
    experts = offloaded(whole, 4)
    expert = torch.tensor([[5, 6, 8]], dtype=torch.int32, device=DEVICE)
    exchange.exchange(experts.offload, experts.gate_up, experts.down, expert, live(1))
    assert experts.offload.place_E.tolist() == [4 + 1, 4 + 2, 2, 3, 4, 0, 1, 4 + 3, 4 + 4]
    for mine, w in zip(gathered(experts), whole, strict=True):
        assert torch.equal(mine[0], w.words)
