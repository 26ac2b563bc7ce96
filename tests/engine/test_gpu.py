"""Loading and measuring on a GPU: the same words as on a CPU, and memory that was predicted."""

import pytest
import torch

from klquant.checkpoint.quantized import QuantizedReader
from klquant.engine.bench import Cells, count_launches, fill_with_noise, measure_decode, measure_prefill
from klquant.engine.ceilings import Ceilings, copy_rate, launch_seconds
from klquant.engine.load import load_weights, place
from klquant.engine.placement import find_devices
from klquant.engine.runner import Runner
from klquant.engine.sizes import Outline, held_sizes
from klquant.engine.usage import measured_usage
from klquant.kernels.linear.layout import Packed
from klquant.kernels.mla.pages import PAGE_SIZE
from tests.engine.build import RULES, checkpoint, load

pytestmark = pytest.mark.gpu


def packed_parts(holder: object) -> list[Packed]:
    if isinstance(holder, Packed):
        return [holder]
    if isinstance(holder, tuple | list):
        return [part for item in holder for part in packed_parts(item)]
    return packed_parts(list(vars(holder).values())) if hasattr(holder, "__dataclass_fields__") else []


@pytest.mark.parametrize("rule", RULES)
def test_a_gpu_packs_the_words_that_a_cpu_packs(tmp_path, rule):
    reader = QuantizedReader.open(checkpoint(tmp_path / "m", rule, "wide"))
    placement = place(Outline.of(reader), find_devices("cuda:0"), torch.bfloat16, context=256)
    there, here = load_weights(reader, placement, torch.bfloat16), load(tmp_path / "m", dtype=torch.bfloat16)
    parts = [packed_parts((w.layers, w.head)) for w in (there, here)]
    assert parts[0]
    for a, b in zip(*parts, strict=True):
        for x, y in zip(a.tensors, b.tensors, strict=True):
            assert (x is None and y is None) or torch.equal(x.cpu(), y)
    assert there.nbytes() == {placement.head: here.nbytes()[torch.device("cpu")]}


def test_an_embedding_that_must_stays_on_the_host(tmp_path):
    reader = QuantizedReader.open(checkpoint(tmp_path / "m", "int4", "wide"))
    outline, card = Outline.of(reader), torch.device("cuda", 0)
    room = place(outline, {card: 1 << 40}, torch.bfloat16, context=256).memory.total - 1
    weights = load_weights(reader, place(outline, {card: room}, torch.bfloat16, context=256), torch.bfloat16)
    assert weights.embedding_VC.is_pinned() and weights.layers[0].device == card


def test_a_benchmark_of_graphs(tmp_path):
    reader = QuantizedReader.open(checkpoint(tmp_path / "m", "int4", "wide"))
    outline, devices = Outline.of(reader), find_devices("cuda:0")
    cells = Cells(prefill=(100,), batch=(3,), context=(200,), steps=4)
    placement = place(outline, devices, torch.bfloat16, context=cells.most_cached, sequences=3)
    weights = load_weights(reader, placement, torch.bfloat16)
    runner = Runner(weights, slots=3, pages=cells.most_cached // PAGE_SIZE, max_context=cells.longest)
    fill_with_noise(runner)
    ceilings = Ceilings(copy_rate(placement.head), launch_seconds(placement.head), count_launches(runner))
    row = measure_decode(runner, held_sizes(outline, torch.bfloat16), 3, 200, 4, 16)
    assert measure_prefill(runner, 100).first_token_s > 0
    assert runner.stages[0].state.length[0] == 100
    assert ceilings.launches > 10 * len(weights.layers) // 2
    assert ceilings.predict(row.traffic.total, row.step_s, 1e12) > 0
    for usage in measured_usage(placement, weights, [stage.state for stage in runner.stages])[:3]:
        assert usage.actual == pytest.approx(usage.predicted, rel=0.03)
