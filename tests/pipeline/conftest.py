"""Runs in this folder use one thread, so that equal runs give equal bytes whatever the machine."""

from pathlib import Path

import pytest
import torch

from tests.pipeline.build import digests, run, short_model


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package", autouse=True)
def copies_of_streams():
    """After every layer, however long they take: what a run leaves behind must not depend on the machine's speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("klquant.pipeline.streams.COPY_SHARE", 1e9)
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A model of two layers; read-only (copy it to change it)."""
    return short_model(tmp_path_factory.mktemp("short") / "model")


@pytest.fixture(scope="session")
def whole(model, tmp_path_factory) -> Path:
    """An undisturbed run of `model`; read-only."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(model, out)
    return out


@pytest.fixture(scope="session")
def whole_digests(whole) -> dict[str, str]:
    return digests(whole)
