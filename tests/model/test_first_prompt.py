"""Who is told that the first prompt on a machine takes longer."""

import threading

import torch

from klquant.model import first_prompt
from klquant.model.first_prompt import building_note, import_fla
from tests.triton_interpreter import needs_triton

GPU = torch.device("cuda", 0)


@needs_triton
def test_only_who_has_to_wait_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("klquant.model.delta.has_fla", lambda: True)
    assert "half a minute" in building_note(GPU, torch.bfloat16)
    assert building_note(GPU, torch.float32) is None
    assert building_note(torch.device("cpu"), torch.bfloat16) is None
    (tmp_path / "hash").mkdir()
    (tmp_path / "hash" / "chunk_kda_fwd_kernel_inter_solve_fused.cubin").write_bytes(b"")
    assert building_note(GPU, torch.bfloat16) is None


@needs_triton
def test_nobody_is_told_who_has_no_such_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("klquant.model.delta.has_fla", lambda: False)
    assert building_note(GPU, torch.bfloat16) is None


def test_imports_begin_where_kernels_will_run(monkeypatch):
    """And what is wrong with them is not said by a thread that nobody asked."""
    asked, done = [], threading.Event()

    def load(name: str) -> None:
        asked.append(name)
        done.set()
        raise ImportError(name)

    monkeypatch.setattr("klquant.model.delta.has_fla", lambda: True)
    monkeypatch.setattr(first_prompt.importlib, "import_module", load)
    monkeypatch.setattr(threading, "excepthook", lambda args: asked.append("a traceback"))
    import_fla(torch.device("cpu"), torch.bfloat16)
    import_fla(GPU, torch.float32)
    assert asked == []
    import_fla(GPU, torch.bfloat16)
    assert done.wait(10)
    for thread in threading.enumerate():
        if thread.name == "import fla":
            thread.join(10)
    assert asked == ["fla.ops.kda"]
