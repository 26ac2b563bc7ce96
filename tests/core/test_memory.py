"""What torch is asked about a card's memory, on a machine that has none."""

import resource
from types import SimpleNamespace

import pytest
import torch

from klquant.calibrate.walk import WalkSettings
from klquant.core.memory import CUDA_CONTEXT, free_memory, locked_pages, own_pages, pin, resident_memory
from klquant.errors import UserError
from klquant.pipeline.placement import CARD_SHARE, Limits, limit_devices

GB = 10**9


@pytest.fixture
def card(monkeypatch):
    """A card of 80 GB, 60 of them free, of which this process has 3 reserved and 2 in use; torch checks the devices."""
    share = {0: 1.0}
    monkeypatch.setattr("torch.cuda.memory._lazy_init", lambda: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (60 * GB, 80 * GB))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 2 * GB)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 3 * GB)
    set_share = lambda fraction, index: share.update({index: fraction})  # noqa: E731
    monkeypatch.setattr("torch._C._cuda_setMemoryFraction", set_share, raising=False)
    monkeypatch.setattr("torch._C._cuda_getMemoryFraction", lambda index: share[index], raising=False)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_card_has_what_is_free_and_allowed(card, name):
    device = torch.device(name)
    assert free_memory(device) == 61 * GB
    limit_devices(WalkSettings(device, torch.bfloat16, 32), Limits(gpu=24 * GB))
    assert free_memory(device) == pytest.approx(CARD_SHARE * 24 * GB - CUDA_CONTEXT - 2 * GB, abs=2)


def test_what_this_process_takes_is_counted():
    before = resident_memory()
    kept = torch.ones(1 << 26, dtype=torch.uint8)
    assert resident_memory() - before == pytest.approx(kept.nbytes, rel=0.2)


def test_locked_memory_shares_no_page():
    page = resource.getpagesize()
    for nbytes in (0, 1, page, 3 * page + 7):
        memory = own_pages(nbytes)
        assert memory.shape == (nbytes,) and (not nbytes or memory.data_ptr() % page == 0)
    a, b = own_pages(5).fill_(1), own_pages(5).fill_(2)
    assert abs(a.data_ptr() - b.data_ptr()) >= page and a.tolist() == [1] * 5


def test_pages_stay_locked_as_long_as_a_tensor_lies_on_them(monkeypatch):
    locked = {}
    cuda = SimpleNamespace(
        cudaHostRegister=lambda address, nbytes, flags: locked.update({address: nbytes}) or 0,
        cudaHostUnregister=locked.pop,
    )
    monkeypatch.setattr("torch.cuda.cudart", lambda: cuda)
    view = locked_pages(4096).view(torch.int16).view(2, 1024)[1:]
    assert list(locked.values()) == [4096] and view.data_ptr() - 2048 in locked
    view = view.fill_(7)[0, 0]
    assert locked and view == 7
    del view
    assert not locked


def test_memory_that_kernels_need_and_cannot_have_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 1))
    monkeypatch.setattr("torch.ones", lambda *_, **__: None)
    with pytest.raises(UserError, match="does not let 3 MiB of the host's memory be locked"):
        locked_pages(3 << 20)


@pytest.mark.parametrize("error", [0, 1])
def test_memory_that_cannot_be_locked_leaves_no_error_behind(monkeypatch, error):
    """CUDA reports a refused registration again at the next launch."""
    pending = []

    def register(pointer, size, flags):
        pending.extend([error] * (error > 0))
        return error

    def launch(*_, **__):
        if pending:
            raise RuntimeError(f"CUDA error {pending.pop()}")

    monkeypatch.setattr("torch.cuda.cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr("torch.ones", launch)
    assert pin(torch.empty(8)) == (error == 0)
    assert not pending
