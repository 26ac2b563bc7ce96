"""What a decode step of the 48B launches on a card, counted without one: tensors on the meta device that say they are
on CUDA. An operation that makes the host wait for a value raises there, and could not be captured in a graph."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from klquant.engine import runner as runner_module
from klquant.engine.build import OneDevice
from klquant.engine.runner import Runner
from klquant.engine.synthetic import Noise, parse_synthetic, random_weights, synthetic_outline
from tests.kernels.launches import record
from tests.kernels.test_compile import problems
from tests.triton_interpreter import interpreting, needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(interpreting, reason="this process interprets kernels")]
META = torch.device("meta")
NO_LAUNCH = {
    "split", "split_with_sizes", "unsqueeze", "view", "_unsafe_view", "slice", "select", "expand", "t", "detach",
    "empty", "empty_like", "unbind",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts operations of torch that launch something."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name not in NO_LAUNCH:
            self.count[name] += 1
        return function(*args, **kwargs or {})


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(runner_module, "on", lambda device: nullcontext())
    monkeypatch.setattr(Noise, "_generator", lambda self, device: None)
    h100 = SimpleNamespace(major=9, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    return monkeypatch


def step(layers, batch, mode, card):
    """(kernels of klquant, operations of torch) of a step through the first `layers` layers."""
    config, layers = parse_synthetic(f"kimi-linear-48b:layers={layers}")
    weights = random_weights(synthetic_outline(config, "int4", layers), OneDevice(META, layers), torch.bfloat16)
    runner = Runner(weights, slots=batch, pages=64, max_context=4096, cache_bits=8)
    slot_B = torch.zeros(batch, dtype=torch.int32, device=META)
    with Operations() as operations:
        kernels = list(record(lambda: runner._stage(0, mode, slot_B), card))
    return len(kernels), operations.count


@pytest.mark.parametrize("batch, apart, experts", [(1, 0, 1), (4, 0, 1), (8, 1, 2), (64, 1, 3)])
def test_launches_of_a_layer(batch, apart, experts, card):
    """Both norms, the second in the router's launch or apart, two projections and the experts; and the mixer's own."""
    (two, some), (three, more), (four, most) = (step(n, batch, "greedy", card) for n in (2, 3, 4))
    common = 2 + apart + 2 + experts
    assert three - two == common + 2  # KDA's step; what its gates read is in its projections' launch
    assert four - three == common + 4  # one writes the latent, three attend
    assert some == more == most


@pytest.mark.parametrize("mode, most", [("greedy", 1), ("plain", 1), ("narrow", 1), ("full", 5)])
def test_operations_beside_the_layers(mode, most, card):
    """And none of them waits for the card."""
    _, operations = step(4, 4, mode, card)
    assert operations.total() - operations["mm"] <= most, operations


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_a_step_compiles_as_hopper_runs_it(batch, card):
    """Every launch of a step, as this card's dispatch makes it."""
    config, layers = parse_synthetic("kimi-linear-48b:layers=4")
    weights = random_weights(synthetic_outline(config, "int4", layers), OneDevice(META, layers), torch.bfloat16)
    runner = Runner(weights, slots=batch, pages=64, max_context=4096, cache_bits=16)
    slot_B = torch.zeros(batch, dtype=torch.int32, device=META)
    found = dict.fromkeys(record(lambda: runner._stage(0, "greedy", slot_B), card))
    assert not problems((launch, 90) for launch in found)
