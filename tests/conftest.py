"""Fixtures shared by all tests. Nothing here needs a network; tests that need a GPU, or a model from the folder
`shared` beside the repository, are skipped without it."""

import os
from pathlib import Path
from types import SimpleNamespace

# Threads that wait for one another cost small tensors more than they gain, the more so beside other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.tiny import tiny_checkpoint

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config):
    """With TRITON_OVERRIDE_ARCH=sm89 a newer card runs what Triton makes for an RTX 4090: the same instructions, but
    for the last step from PTX. Its kernels are then chosen as on that card too."""
    other = int(os.environ.get("TRITON_OVERRIDE_ARCH", "sm0")[2:])
    if not other or not torch.cuda.is_available():
        return
    real = torch.cuda.get_device_properties

    def properties(device=None):
        names = "name", "total_memory", "multi_processor_count", "L2_cache_size"
        major, minor = divmod(other, 10)
        return SimpleNamespace(major=major, minor=minor, **{name: getattr(real(device), name) for name in names})

    # Triton asks for the capability what the last step is made for: that stays the card's own.
    own = torch.cuda.get_device_capability()
    torch.cuda.get_device_capability = lambda device=None: own
    torch.cuda.get_device_properties = properties


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tiny random checkpoint; read-only by convention (copy it to change it)."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The small trained checkpoint that the repository carries."""
    return Path(__file__).resolve().parents[1] / "demo" / "model"


@pytest.fixture(scope="session")
def testbed() -> Path:
    """The small trained Kimi-Linear model that accuracy claims are made on."""
    folder = SHARED / "testbed"
    if not (folder / "config.json").exists():
        pytest.skip("the testbed model is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def kimi_48b() -> Path:
    """config.json and tensor index of the real 48B checkpoint, without weights."""
    folder = SHARED / "kimi-linear-48b"
    if not (folder / "config.json").exists():
        pytest.skip("the 48B checkpoint's config and index are not beside this checkout")
    return folder
