"""Whole runs on a card: the same bytes each time, however they were stopped and whatever memory they had."""

import pytest
import torch

from klquant.calibrate import experts
from klquant.calibrate.activations import Activations, feed
from klquant.checkpoint.verify import verify
from klquant.pipeline.landing import Landing, room
from tests.pipeline.build import RULES, TEXT, Stop, Stopped, recipe, run, weights
from tests.recipe.build import WIDE
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.gpu
CHOSEN = recipe(RULES.replace("group_size: 32", "group_size: 128"), TEXT, gptq="refine_rounds: 1")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Two layers of a width that the kernels are made for."""
    attention = WIDE["linear_attn_config"] | {"full_attn_layers": [2], "kda_layers": [1]}
    changes = WIDE | {"num_hidden_layers": 2, "num_experts": 4, "linear_attn_config": attention}
    return tiny_checkpoint(tmp_path_factory.mktemp("wide") / "model", **changes)


@pytest.fixture(scope="module")
def once(wide, tmp_path_factory):
    out = tmp_path_factory.mktemp("once") / "out"
    run(wide, out, CHOSEN, device="cuda")
    assert verify(out) == []
    return weights(out)


def test_a_second_run_and_a_stopped_one_write_the_same(wide, once, tmp_path):
    run(wide, tmp_path / "again", CHOSEN, device="cuda")
    assert weights(tmp_path / "again") == once
    with pytest.raises(Stopped):
        run(wide, tmp_path / "stopped", CHOSEN, watcher=Stop("layer 1", "experts"), device="cuda")
    run(wide, tmp_path / "stopped", CHOSEN, device="cuda", resume=True)
    assert weights(tmp_path / "stopped") == once


def test_memory_decides_nothing_but_speed(wide, tmp_path, monkeypatch):
    monkeypatch.setitem(experts.BLOCK, "cuda", 2)
    run(wide, tmp_path / "all", CHOSEN, device="cuda")
    monkeypatch.setattr(experts, "free_memory", lambda device: 1)
    monkeypatch.setattr("klquant.pipeline.placement.MEMORY_SHARE", {"cuda": 0})
    run(wide, tmp_path / "few", CHOSEN, device="cuda")
    assert weights(tmp_path / "all") == weights(tmp_path / "few")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_two_cards_write_the_bytes_of_one(wide, tmp_path, monkeypatch):
    monkeypatch.setitem(experts.BLOCK, "cuda", 2)
    monkeypatch.setattr("klquant.pipeline.run.BATCH_TOKENS", {"cuda": 64})
    run(wide, tmp_path / "one", CHOSEN, device="cuda:0")
    run(wide, tmp_path / "two", CHOSEN, device="cuda:0,cuda:1")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_slices_do_not_pile_up_before_a_busy_card():
    device, passes = torch.device("cuda"), 3
    stream = Activations(16, 512, 4096, torch.bfloat16, pinned=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)["active_bytes.all.current"]
    for _ in range(passes):
        for _ in feed([stream], range(16), 1, device):
            torch.cuda._sleep(20_000_000)
    most = torch.cuda.memory_stats(device)["active_bytes.all.peak"] - before
    stream.close()
    assert most <= 3 * stream.nbytes // 16


def test_a_slice_stays_until_its_work_is_done():
    """The host is ahead of the card, and whoever asked for a slice has forgotten it."""
    device, windows = torch.device("cuda"), 24
    stream = Activations(windows, 64, 4096, torch.bfloat16, pinned=True)
    for i in range(windows):
        stream.write(i, torch.full((1, 64, 4096), float(i), dtype=torch.bfloat16))
    means, slices = [], feed([stream], range(windows), 1, device)
    for _ in range(windows):
        h = next(slices)[1][0]
        torch.cuda._sleep(5_000_000)
        means.append(h.float().mean())
        del h
    slices.close()
    stream.close()
    assert torch.stack(means).tolist() == list(range(windows))


def test_a_unit_lands_beside_the_one_being_written():
    device = torch.device("cuda")
    units = [[torch.arange(n + start, device=device) for n in (1, 1000, 7)] for start in (0, 5)]
    with Landing(room(x.nbytes for x in units[1]), [device]) as landing:
        landed = []
        for unit in units:
            landing.turn()
            landed.append([landing.bring(x) for x in unit])
            landing.settle()
        for unit, copies in zip(units, landed, strict=True):
            for x, copy in zip(unit, copies, strict=True):
                assert not copy.is_cuda and torch.equal(x.cpu(), copy)
