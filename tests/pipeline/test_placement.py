"""Where things live and how much is done at once: what fits, what is refused with which figure, what is printed."""

import re
from types import SimpleNamespace

import pytest
import torch

from klquant.calibrate import experts
from klquant.calibrate.footprint import Footprint, widest_layer
from klquant.calibrate.walk import WalkSettings
from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.reader import CheckpointReader
from klquant.errors import UserError
from klquant.pipeline import placement
from klquant.pipeline.placement import Limits, place
from klquant.pipeline.units import Units
from tests.pipeline.build import digests, run, unfinished
from tests.tiny import tiny_config

GB = 10**9
# Full width: a calibration of 512 × 2,048 tokens.
WIDE = KimiLinearConfig.from_dict(
    tiny_config(
        hidden_size=2304, intermediate_size=9216, moe_intermediate_size=1024, num_experts=256, num_experts_per_token=8,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=163840, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128,
        linear_attn_config=tiny_config()["linear_attn_config"] | {"head_dim": 128, "num_heads": 32},
    )
)  # fmt: skip
CARD = WalkSettings(torch.device("cuda"), torch.bfloat16, 32)


@pytest.fixture
def machine(monkeypatch):
    """A machine with so much memory free, in GB."""

    def set_free(host: float, card: float) -> None:
        monkeypatch.setattr(placement, "free_memory", lambda device=None: int(GB * (card if device else host)))

    return set_free


def test_a_full_layer_fits_a_24_gb_card_and_32_gb_of_ram(machine):
    machine(30, 23)
    chosen = place(WIDE, CARD, 512, 2048, 2, Limits())
    assert chosen.streams == 2 * 512 * 2048 * 2304 * 2 and not chosen.in_files
    assert chosen.host < 28 * GB and chosen.device < 22 << 30
    assert re.search(r"\(9\.66 GB\) are kept in host memory; about .* GB of RAM in all", str(chosen))


def test_a_limit_counts_like_memory_that_is_not_there(machine):
    machine(64, 80)
    assert not place(WIDE, CARD, 512, 2048, 2, Limits()).in_files
    assert place(WIDE, CARD, 512, 2048, 2, Limits(cpu=16 * GB)).in_files


def test_what_cannot_fit_is_refused_with_a_figure_that_does(machine):
    machine(30, 8)
    with pytest.raises(UserError, match=r"cuda: a layer takes about ([\d.]+) GB, 8\.00 GB are free") as error:
        place(WIDE, CARD, 512, 2048, 2, Limits())
    machine(30, float(re.search(r"about ([\d.]+) GB", str(error.value))[1]) + 0.1)
    place(WIDE, CARD, 512, 2048, 2, Limits())
    with pytest.raises(UserError, match="raise --max-cpu-memory") as error:
        place(WIDE, CARD, 512, 2048, 2, Limits(cpu=GB))
    assert "\n" not in str(error.value)


def test_a_limit_of_host_memory_counts_on_a_cpu(machine, monkeypatch):
    machine(64, 0)
    cpu = WalkSettings(torch.device("cpu"), torch.float32, 4)
    monkeypatch.setattr(placement, "resident_memory", lambda: 3 * GB)
    with pytest.raises(UserError, match=r"a layer takes about ([\d.]+) GB, 5\.00 GB are free or allowed") as error:
        place(WIDE, cpu, 512, 2048, 2, Limits(cpu=8 * GB))
    least = float(re.search(r"about ([\d.]+) GB", str(error.value))[1]) + 3.1
    assert place(WIDE, cpu, 512, 2048, 2, Limits(cpu=int(least * GB))).in_files
    assert not place(WIDE, cpu, 64, 2048, 2, Limits()).in_files


def test_a_limit_of_host_memory_holds_moments_of_fewer_experts(monkeypatch):
    monkeypatch.setattr(experts, "free_memory", lambda device: 1000 * GB)
    monkeypatch.setattr(experts, "resident_memory", lambda: 17 * GB)
    streams = SimpleNamespace(quantized=torch.empty(1, 2048, 1), reference=None)
    fit = []
    for limit in (None, 24 * GB, 0):
        settings = WalkSettings(torch.device("cpu"), torch.float32, 4, host_limit=limit)
        fit.append(experts._blocks_that_fit(SimpleNamespace(settings=settings, streams=streams, config=WIDE), 16))
    assert fit[0] == 16 and 1 < fit[1] < 16 and fit[2] == 1


def test_the_widest_layer_is_the_checkpoints(model):
    reader = CheckpointReader.open(model)
    sizes = {}
    for name, info in reader.tensors.items():
        if name.startswith("model.layers."):
            layer = name.split(".")[2]
            sizes[layer] = sizes.get(layer, 0) + torch.Size(info.shape).numel()
    assert widest_layer(reader.config) == max(sizes.values())


def test_more_tokens_blocks_and_corrections_take_more():
    base = Footprint.of(WIDE, 8192, 2, 16, corrects=False)
    assert Footprint.of(WIDE, 8192, 2, 16, corrects=True).block == 2 * base.block
    assert Footprint.of(WIDE, 8192, 2, 32, corrects=False).block == 2 * base.block
    assert Footprint.of(WIDE, 1 << 20, 2, 16, corrects=False).working > base.working


def test_running_out_of_memory_where_nothing_can_shrink_is_one_line(model, tmp_path, monkeypatch, whole_digests):
    def fail(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(Units, "head", fail)
        with pytest.raises(
            UserError, match=r"cpu: out of memory; .* GB are free or allowed: .* then --resume"
        ) as error:
            run(model, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert (unfinished(tmp_path / "out") / ".state" / "unit-002.json").exists()
    run(model, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == whole_digests


def test_a_limit_below_what_cuda_takes_is_refused():
    with pytest.raises(UserError, match=r"--max-gpu-memory 100 MB: CUDA itself takes"):
        placement.limit_devices(CARD, Limits(gpu=GB // 10))
