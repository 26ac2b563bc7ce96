"""Devices by name: what is there is taken, what is not is said."""

import pytest
import torch

from klquant.core.device import pick_device, pick_devices
from klquant.errors import UserError


@pytest.fixture
def cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize("names", ["cpu", "cuda", "cuda:1", "cuda:0,cuda:1", "cuda:1, cuda:0"])
def test_devices_that_are_there_come_in_the_order_named(cards, names):
    assert pick_devices(names) == [torch.device(name.strip()) for name in names.split(",")]


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ("cuda:2", r"device cuda:2: 2 CUDA device\(s\) found here"),
        ("cpu:3", "unknown device 'cpu:3'"),
        ("meta", "unknown device 'meta'"),
        ("card", "unknown device 'card'"),
        ("cuda:0,", "unknown device ''"),
        ("cpu,cpu", "devices cpu,cpu: one comes twice; name each once"),
        ("cpu,cuda:0", "devices cpu,cuda:0: of several kinds"),
        ("cuda:1,cuda:1", "devices cuda:1,cuda:1: one comes twice; name each once"),
        ("cuda,cuda:0", "devices cuda,cuda:0: one comes twice; name each once"),
    ],
)
def test_devices_that_cannot_be_used_are_refused_by_name(cards, names, match):
    with pytest.raises(UserError, match=match):
        pick_devices(names)


def test_a_card_is_refused_where_none_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"device cuda: 0 CUDA device\(s\) found here"):
        pick_device("cuda")


@pytest.mark.parametrize(("there", "found"), [(True, "cuda"), (False, "cpu")])
def test_a_gpu_is_taken_where_there_is_one(there, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(there))
    assert str(pick_device(None)) == found
