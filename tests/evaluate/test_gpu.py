"""On a CUDA GPU: BF16 arithmetic, whole and streamed, and both stores."""

from dataclasses import replace

import pytest
import torch

from klquant.evaluate import trace
from klquant.evaluate.baselines import rounding
from klquant.evaluate.run import evaluate
from klquant.evaluate.sensitivity import sensitivity
from klquant.model.delta import has_fla

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(options):
    return replace(options, device="cuda")


def test_bf16_on_a_gpu_is_near_fp32_on_a_cpu(variant, tiny, on_gpu, result, tmp_path):
    ours = evaluate(variant, tiny, tmp_path / "r.json", replace(on_gpu, floor=True))
    assert ours.arithmetic.dtype == "bfloat16" and ours.floor.arithmetic.dtype == "float32"
    assert ours.arithmetic.kda == ("chunk_fla" if has_fla() else "chunk") and ours.floor.arithmetic.kda == "chunk"
    assert ours.overall.perplexity == pytest.approx(result.overall.perplexity, rel=0.02)
    # Both are noise, of other roundings, and few tokens that change experts carry it: the same order is all there is.
    assert 1 / 3 < ours.floor.overall.kld.mean / result.floor.overall.kld.mean < 3


@pytest.mark.parametrize("store", ["full", "topk"])
def test_fp32_on_a_gpu_is_fp32_on_a_cpu(variant, tiny, on_gpu, result, tmp_path, store):
    ours = evaluate(variant, tiny, tmp_path / "r.json", replace(on_gpu, dtype="float32", store=store))
    allowed = ours.overall.kld.store_error * 2 + 0.01 * result.overall.kld.mean
    assert ours.overall.kld.mean == pytest.approx(result.overall.kld.mean, abs=allowed)


def test_streaming_changes_nothing(variant, tiny, on_gpu, tmp_path, monkeypatch):
    whole = evaluate(variant, tiny, tmp_path / "a.json", on_gpu)
    monkeypatch.setattr(trace, "RESIDENT_SHARE", 0)
    streamed = evaluate(variant, tiny, tmp_path / "b.json", replace(on_gpu, reference_cache=tmp_path / "other"))
    assert streamed.overall.kld.mean == pytest.approx(whole.overall.kld.mean, rel=1e-3)


def test_everything_mixed_in_is_the_quantized_model(variant, tiny, on_gpu, tmp_path):
    found = sensitivity(tiny, variant, tmp_path / "s.json", "class", on_gpu, 0)
    whole = evaluate(variant, tiny, tmp_path / "r.json", on_gpu)
    assert found.entries[0].overall.kld.mean == pytest.approx(whole.overall.kld.mean, rel=1e-3)


@pytest.mark.parametrize("method", ["nf4", "nf4-double", "int8"])
def test_bitsandbytes_rounds_alike_on_a_gpu(method):
    """Ties may fall to the other side."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes (the extra `bnb`) is not installed")
    w = torch.randn(100, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    on_cpu, on_gpu = (rounding(method, {})("x.weight", w.to(device)).float().cpu() for device in ("cpu", "cuda"))
    assert torch.isclose(on_cpu, on_gpu, rtol=2**-7).float().mean() > 0.99
