"""The benchmark measures what it says: steps of real sequences, bytes that were moved, room that there is."""

import pytest
import torch

from klquant.engine.bench import Cells, fill_with_noise, measure_decode, measure_prefill, prepare
from klquant.engine.build import OneDevice
from klquant.engine.ceilings import Ceilings
from klquant.engine.runner import Runner
from klquant.engine.sizes import held_sizes
from klquant.engine.synthetic import random_weights, synthetic_outline
from klquant.engine.usage import step_traffic
from klquant.kernels.mla.pages import PAGE_SIZE
from tests.engine.build import CPU
from tests.engine.test_synthetic import CONFIG


@pytest.fixture(scope="module")
def weights():
    return random_weights(synthetic_outline(CONFIG, "int4"), OneDevice(CPU, CONFIG.num_layers, False), torch.float32)


@pytest.mark.parametrize("bits", [16, 8])
def test_a_cell_takes_the_room_it_says_and_no_more(weights, bits):
    cells = Cells(prefill=(70,), batch=(3,), context=(100,), steps=5)
    pages = cells.most_cached // PAGE_SIZE
    assert pages == 3 * 2
    runner = Runner(weights, slots=3, pages=pages, max_context=cells.longest, cache_bits=bits)
    fill_with_noise(runner)
    sizes = held_sizes(synthetic_outline(CONFIG, "int4"), torch.float32, False)
    row = measure_decode(runner, sizes, 3, 100, cells.steps, bits)
    assert row.step_s > 0 and row.tokens_s == 3 / row.step_s
    state = runner.stages[0].state
    assert state.length[:3].tolist() == [100 + 3 + 5] * 3
    tables = state.table[:3, :2].flatten().tolist()
    assert sorted(tables) == list(range(6))
    assert row.traffic == step_traffic(CONFIG, sizes, 3, 105, bits, 4)
    prefill = measure_prefill(runner, 70, chunk=32)
    assert prefill.tokens_s == 70 / prefill.first_token_s
    assert state.length[0] == 70


def test_noise_gives_logits_that_are_numbers(weights):
    runner = Runner(weights, slots=2, pages=8, max_context=256, cache_bits=8)
    fill_with_noise(runner)
    slots = prepare(runner, 2, 200, 1)
    assert (runner.decode(slots, "greedy").token >= 0).all()


def test_cells_keep_to_the_models_context():
    cells = Cells((512, 4096, 8192), (1, 64), (128, 4000, 4090), 16).within(CONFIG)
    # The last one fills the model's 4,096 but for three steps that warm up, 16 to time and the token behind them.
    assert cells.prefill == (512,) and cells.context == (128, 4000, 4076)
    assert cells.within(CONFIG) == cells
    assert cells.longest <= CONFIG.max_context
    assert cells.most_cached >= max(cells.cached(b, c) for b in cells.batch for c in cells.context)
    assert Cells((), (), (), 1).most_cached == PAGE_SIZE


def test_a_prediction_scales_bytes_and_keeps_launches():
    ceilings = Ceilings(copy_bytes_s=4e12, launch_s=1e-6, launches=400)
    seconds = 400e-6 + 2e9 / 2e12  # half the bandwidth
    assert ceilings.predict(int(2e9), seconds, 1e12) == pytest.approx(400e-6 + 2e9 / 0.5e12)
    assert ceilings.predict(int(2e9), seconds, 4e12) == pytest.approx(seconds)
    assert Ceilings(4e12, None, None).predict(1, 1.0, 1e12) is None
