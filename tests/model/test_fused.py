"""The mixers with kernels: the same functions as in plain torch. Here through the kernels' references, in FP64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from klquant.checkpoint.config import KimiLinearConfig
from klquant.model import fused
from klquant.model.kda import KDAState, kda_mix
from klquant.model.mla import LatentCache, mla_mix
from klquant.model.norm import rms_norm
from klquant.model.weights import DictSource, LayerWeights
from tests.tiny import tiny_config, tiny_tensors

ROOT = Path(__file__).resolve().parents[2]
CONFIG = KimiLinearConfig.from_dict(tiny_config(), "tiny")
MIXERS = {"kda": (kda_mix, 0, KDAState.zeros), "mla": (mla_mix, 3, LatentCache.empty)}


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def parts(cuts, mix, weights, x, state=None):
    return torch.cat([mix(CONFIG, weights, part, state) for part in x.tensor_split(cuts, 1)], 1)


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("cuts", [(), (1, 2), (5, 70)])
def test_mixers(kind, cuts, monkeypatch):
    """Three sequences at once, whole and in parts, of one position too."""
    mix, layer, new = MIXERS[kind]
    source = DictSource(CONFIG, tiny_tensors(tiny_config()))
    weights = LayerWeights.load(source, layer, torch.float64, "cpu").attn
    x = torch.randn(3, 75, CONFIG.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = [new(CONFIG, 3, torch.float64, "cpu") for _ in "ab"]
    want = parts(cuts, mix, weights, x, states[0]) if cuts else mix(CONFIG, weights, x)
    taken = []
    monkeypatch.setattr(fused, "serves", lambda x: taken.append(x.shape) or True)
    got = parts(cuts, mix, weights, x, states[1]) if cuts else mix(CONFIG, weights, x)
    assert taken
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    for name in ("conv", "s") if kind == "kda" else ():
        assert torch.allclose(getattr(states[1], name), getattr(states[0], name), rtol=1e-9, atol=1e-12)


def test_norm_of_a_part_of_each_row(monkeypatch):
    x, weight = torch.randn(2, 3, 40)[..., :24], torch.randn(24)
    want = rms_norm(x, weight, 1e-5)
    monkeypatch.setattr(fused, "serves", lambda x: True)
    assert torch.equal(rms_norm(x, weight, 1e-5), want)


def test_a_cpu_never_meets_a_kernel():
    """Whatever the dtype: figures made on a CPU stay what they were."""
    code = """
import sys, torch
from tests.model.test_fused import CONFIG, DictSource, LayerWeights, tiny_config, tiny_tensors
from klquant.model.block import block
for dtype in (torch.bfloat16, torch.float32):
    with torch.no_grad():
        source = DictSource(CONFIG, tiny_tensors(tiny_config()))
        for layer in (1, 3):
            x = torch.randn(2, 9, CONFIG.hidden_size).to(dtype)
            block(CONFIG, LayerWeights.load(source, layer, dtype, "cpu"), x)
assert not any(m.startswith("klquant.kernels") and m.rpartition(".")[2] in ("triton", "prefill") for m in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
