"""Layers read ahead: in order, one beyond the one at work, and dropped when they are done with."""

import threading
import time
import weakref

import pytest
import torch

from klquant.checkpoint.quantized import QuantizedReader
from klquant.errors import UserError
from klquant.evaluate import trace
from klquant.evaluate.ahead import one_ahead
from klquant.evaluate.source import DeviceSource

CPU = torch.device("cpu")


class Layer:
    def __init__(self, number: int) -> None:
        self.number = number


def test_two_are_alive_at_a_time_and_the_next_is_read_meanwhile():
    alive, read = weakref.WeakSet(), [threading.Event() for _ in range(5)]

    def load(number: int) -> Layer:
        assert len(alive) < 2
        layer = Layer(number)
        alive.add(layer)
        read[number].set()
        return layer

    layers = one_ahead(load, 4, CPU)
    read[4].set()
    for number in range(4):
        layer = next(layers)
        assert layer.number == number and read[number + 1].wait(10)
        del layer
    assert next(layers, None) is None


def test_a_layer_is_kept_until_the_next_is_whole():
    """On a GPU its kernels may still be at work, and its memory must not go to the layer that is being read."""
    asked, gone = threading.Event(), []

    def load(number: int) -> Layer:
        if number == 1:
            asked.wait(10)
            time.sleep(0.05)  # the caller now waits for this layer, done with the one before
            gone.append(first() is None)
        return Layer(number)

    layers = one_ahead(load, 2, CPU)
    first = weakref.ref(next(layers))
    asked.set()
    assert next(layers).number == 1 and gone == [False] and first() is None


def test_what_reading_raises_comes_where_the_layer_is_asked_for():
    def load(number: int) -> Layer:
        if number:
            raise UserError("layer 1 is damaged")
        return Layer(number)

    layers = one_ahead(load, 3, CPU)
    assert next(layers).number == 0
    with pytest.raises(UserError, match="layer 1 is damaged"):
        next(layers)


def test_a_runner_that_reads_ahead_computes_the_same(demo_model):
    reader, ids = QuantizedReader.open(demo_model), torch.randint(0, 256, (3, 40))
    found = []
    for ahead in (False, True):
        runner = trace.Runner(DeviceSource(reader, CPU), torch.float32, CPU)
        runner.resident, runner.reads_ahead = False, ahead
        found.append(next(iter(runner.run(ids, runner.batches(ids)))).hidden)
    assert torch.equal(*found)
