"""Calibration text that the model writes itself."""

import pytest
import torch

from klquant.calibrate import sample
from klquant.calibrate.sample import sample_windows
from klquant.calibrate.text import start_tokens
from klquant.calibrate.tokenizer import load_tokenizer
from klquant.calibrate.walk import WalkSettings
from klquant.checkpoint.reader import CheckpointReader
from klquant.errors import UserError
from klquant.model.forward import Model
from tests.calibrate.build import calibration_windows

CPU = WalkSettings(torch.device("cpu"), torch.float32, batch=4)


@pytest.fixture(scope="module")
def model(tiny):
    return CheckpointReader.open(tiny), load_tokenizer(tiny)


def draw(model, seed=3, n=4, length=12):
    return sample_windows(*model, n, length, seed, CPU)


def test_sequences_begin_as_told_and_repeat_with_their_seed(model):
    ids = draw(model)
    assert ids.shape == (4, 12) and ids.dtype == torch.int64
    for row, start in zip(ids.tolist(), start_tokens(model[1], 4, 3), strict=True):
        assert row[: len(start)] == start
    assert torch.equal(ids, draw(model))
    assert not torch.equal(ids, draw(model, seed=4))


def test_tokens_are_drawn_from_the_models_own_distribution(model):
    """Its likelihood of what it wrote is far above that of shuffled tokens."""
    reader, _ = model
    ids = draw(model, n=8, length=24)
    whole = Model.load(reader, torch.float32, "cpu")

    def likelihood(tokens):
        scores = whole.logits(tokens[:, :-1]).log_softmax(-1)
        return float(scores.gather(-1, tokens[:, 1:, None]).mean())

    with torch.no_grad():
        shuffled = ids[:, torch.randperm(24, generator=torch.Generator().manual_seed(0))]
        assert likelihood(ids) > likelihood(shuffled) + 0.3


def test_self_is_a_mix(model):
    reader, tokenizer = model

    def generate(n, length, seed):
        return sample_windows(reader, tokenizer, n, length, seed, CPU)

    calibration = calibration_windows("self", tokenizer, reader.config, tokens=64, window=16, generate=generate)
    assert calibration.ids.shape == (4, 16)


def test_a_model_that_does_not_fit_is_refused_with_figures(model, monkeypatch):
    monkeypatch.setattr(sample, "free_memory", lambda device=None: 1000)
    with pytest.raises(UserError, match=r"needs the whole model in memory: [\d.]+ MB, 1\.00 kB are free"):
        draw(model)
