"""Folding a channel scale through any seam changes nothing; leaving out a consumer does."""

from dataclasses import replace

import pytest
import torch

from klquant.calibrate import folding
from klquant.calibrate.folding import Seam, fold
from klquant.calibrate.paths import get
from klquant.checkpoint.reader import CheckpointReader
from klquant.model.block import block
from klquant.model.weights import LayerWeights

LAYERS = {"KDA, dense MLP": 0, "KDA, MoE": 1, "MLA, MoE": 3}


def layer(folder, index, dtype=torch.float32):
    reader = CheckpointReader.open(folder)
    return reader.config, LayerWeights.load(reader, index, dtype, "cpu")


def seams(weights):
    """Every seam of the table whose fields the layer has."""

    def has(path):
        try:
            return get(weights, path) is not None
        except AttributeError:
            return False

    table = [seam for seam in vars(folding).values() if isinstance(seam, Seam)]
    return [seam for seam in table if all(map(has, (seam.producer, *seam.consumers)))]


def channels(config, weights, seam):
    return config.kda_dim if seam.kind == "tiled" else get(weights, seam.consumers[0]).shape[-1]


def powers(*shape, seed=0):
    return torch.exp2(torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float())


@pytest.mark.parametrize("index", LAYERS.values(), ids=LAYERS.keys())
def test_folding_leaves_the_output_unchanged(tiny, index):
    config, weights = layer(tiny, index)
    x = torch.randn(2, 65, config.hidden_size, generator=torch.Generator().manual_seed(1))
    before = block(config, weights, x)
    folded = weights
    for seam in seams(weights):
        n = channels(config, weights, seam)
        s = powers(config.num_experts, n) if seam.producer == "mlp.w3" else powers(n)
        folded = fold(config, folded, seam, s)
    after = block(config, folded, x)
    # Powers of two commute with rounding, so even the order of sums is the same.
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", LAYERS.values(), ids=LAYERS.keys())
def test_every_consumer_in_the_table_is_needed(tiny, index):
    config, weights = layer(tiny, index)
    x = torch.randn(2, 65, config.hidden_size, generator=torch.Generator().manual_seed(1))
    before = block(config, weights, x)
    for seam in seams(weights):
        n = channels(config, weights, seam)
        s = powers(config.num_experts, n) if seam.producer == "mlp.w3" else powers(n)
        for forgotten in seam.consumers:
            rest = replace(seam, consumers=tuple(c for c in seam.consumers if c != forgotten))
            after = block(config, fold(config, weights, rest, s), x)
            assert (after - before).abs().max() > 1e-3, (seam.producer, forgotten)


@pytest.mark.parametrize("index", LAYERS.values(), ids=LAYERS.keys())
def test_bf16_tensors_fold_without_rounding(tiny, index):
    config, weights = layer(tiny, index, torch.bfloat16)
    for seam in seams(weights):
        n = channels(config, weights, seam)
        s = powers(config.num_experts, n) if seam.producer == "mlp.w3" else powers(n)
        there_and_back = fold(config, fold(config, weights, seam, s), seam, 1 / s)
        for path in (seam.producer, *seam.consumers):
            *part, field = path.split(".")
            old, new = weights, there_and_back
            for name in (*part, field):
                old, new = getattr(old, name), getattr(new, name)
            assert torch.equal(old, new), path
