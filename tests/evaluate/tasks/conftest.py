import pytest
import torch

from klquant.calibrate.tokenizer import load_tokenizer
from klquant.checkpoint.quantized import QuantizedReader
from klquant.evaluate.tasks import model as model_module
from klquant.evaluate.tasks.model import TaskModel
from klquant.evaluate.trace import Runner
from tests.model.oracle import oracle


@pytest.fixture
def open_model():
    def opened(folder) -> TaskModel:
        runner = Runner(QuantizedReader.open(folder), torch.float32, torch.device("cpu"))
        return TaskModel(runner, str(folder))

    return opened


@pytest.fixture
def streamed(monkeypatch):
    """No model stays in memory from here on."""
    monkeypatch.setattr("klquant.evaluate.trace.RESIDENT_SHARE", 0)
    monkeypatch.setattr(model_module, "RESIDENT_SHARE", 0)


@pytest.fixture(scope="session")
def truth(tiny):
    """ids → log-probabilities [S, V] in float64, by transformers."""
    model = oracle(tiny)

    @torch.no_grad()
    def log_probs(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    return log_probs


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return load_tokenizer(tiny)
