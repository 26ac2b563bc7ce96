"""Who is told that the first prompt on a machine takes longer."""

import torch

from klquant.model.tuning import tuning_note
from tests.triton_interpreter import needs_triton

GPU = torch.device("cuda", 0)


@needs_triton
def test_only_who_has_to_wait_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("klquant.model.delta.has_fla", lambda: True)
    assert "one to three minutes" in tuning_note(GPU, torch.bfloat16)
    assert tuning_note(GPU, torch.float32) is None
    assert tuning_note(torch.device("cpu"), torch.bfloat16) is None
    (tmp_path / "hash").mkdir()
    (tmp_path / "hash" / "chunk_kda_fwd_kernel_inter_solve_fused.autotune.json").write_text("{}")
    assert tuning_note(GPU, torch.bfloat16) is None


@needs_triton
def test_nobody_is_told_who_has_no_such_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("klquant.model.delta.has_fla", lambda: False)
    assert tuning_note(GPU, torch.bfloat16) is None
