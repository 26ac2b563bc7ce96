"""What is read ahead and written behind: in time, in order, and what happens when it fails."""

import threading
import time

import pytest
import torch

from klquant.calibrate.activations import Activations
from klquant.checkpoint.reader import CheckpointReader
from klquant.errors import UserError
from klquant.pipeline.ahead import Ahead
from klquant.pipeline.behind import Behind
from tests.pipeline.build import Stop, Stopped, digests, run, unfinished

CPU = torch.device("cpu")


@pytest.fixture
def reader(model):
    return CheckpointReader.open(model)


def test_the_next_unit_is_read_while_this_one_is_worked_on(reader, monkeypatch):
    names = list(reader.tensors)
    first, second = names[:3], names[3:7]
    read, all_read = [], threading.Event()
    real = CheckpointReader.read

    def log(self, name, *, out=None):
        read.append(name)
        if set(second) <= set(read):
            all_read.set()
        return real(self, name, out=out)

    monkeypatch.setattr(CheckpointReader, "read", log)
    with Ahead(reader, [first, second], CPU) as ahead:
        for name in first:
            assert torch.equal(ahead.weight(name, torch.float32), real(reader, name).float())
        assert not set(second) & set(read)
        ahead.advance()
        assert all_read.wait(10)
        for name in second:
            assert torch.equal(ahead.weight(name, torch.float32), real(reader, name).float())
        ahead.advance()
        ahead.weight(names[9], torch.float32)  # what nobody announced is read when asked for
        assert ahead.nbytes == sum(reader.info(name).nbytes for name in (*first, *second, names[9]))
    assert len(read) == len(set(read)) == 8


def test_one_buffer_serves_all_units_of_a_gpu(reader, monkeypatch):
    pinned = []
    monkeypatch.setattr("klquant.pipeline.ahead.pin", lambda tensor: pinned.append(tensor) or True)
    monkeypatch.setattr("klquant.pipeline.ahead.unpin", lambda tensor: pinned.clear())
    names = list(reader.tensors)
    units = [names[:9], names[9:30]]
    with Ahead(reader, units, torch.device("cuda")) as ahead:
        (buffer,) = pinned
        for unit in units:
            for name in unit:
                stored = reader.read(name)
                got = ahead.weight(name, stored.dtype)
                assert torch.equal(got, stored)
                assert got.untyped_storage().data_ptr() == buffer.data_ptr()
            ahead.advance()
        del buffer
    assert not pinned


def test_what_is_wrong_with_a_tensor_is_said_where_it_is_asked_for(reader, monkeypatch):
    good, bad = list(reader.tensors)[:2]

    def read(self, name, *, out=None):
        if name == bad:
            raise UserError(f"{name}: cannot be read")
        return torch.zeros(1)

    monkeypatch.setattr(CheckpointReader, "read", read)
    with Ahead(reader, [[good], [bad]], CPU) as ahead:
        ahead.weight(good, torch.float32)
        ahead.advance()
        with pytest.raises(UserError, match=f"{bad}: cannot be read"):
            ahead.weight(bad, torch.float32)


def test_jobs_follow_one_another_and_fail_at_the_next():
    seen = []

    def fail():
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"), Behind() as behind:
        behind.submit(lambda: (time.sleep(0.05), seen.append(1)))
        behind.submit(lambda: seen.append(2))
        behind.submit(fail)
        behind.wait()
    assert seen == [1, 2]
    with pytest.raises(UserError, match="the disk is full"), Behind() as behind:
        behind.submit(fail)


def test_a_failure_lets_what_is_under_way_end():
    seen = []
    with pytest.raises(KeyError), Behind() as behind:
        behind.submit(lambda: (time.sleep(0.05), seen.append(1)))
        raise KeyError
    assert seen == [1]


def test_nothing_is_changed_before_it_is_copied():
    part = Activations(4, 1, 1, torch.float32)
    part.write(0, torch.zeros(4, 1, 1))
    part.gate.close()
    changed = threading.Event()

    def change():
        part.write(0, torch.ones(2, 1, 1))
        changed.set()

    thread = threading.Thread(target=change)
    thread.start()
    part.gate.passed(1)
    assert not changed.wait(0.05)
    part.gate.passed(2)
    thread.join(10)
    assert changed.is_set() and part.read(0, 4).flatten().tolist() == [1, 1, 0, 0]


def test_a_slow_disk_changes_no_bytes(model, tmp_path, monkeypatch, whole_digests):
    """The streams that leave a unit are copied while the next unit would change them."""
    real = Activations.write

    def slow(self, start, values):
        if self.path is not None:
            time.sleep(0.05)
        real(self, start, values)

    monkeypatch.setattr(Activations, "write", slow)
    monkeypatch.setattr("klquant.pipeline.streams.WINDOWS_A_COPY", 1)
    with pytest.raises(Stopped):
        run(model, tmp_path / "out", watcher=Stop("head"))
    run(model, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == whole_digests


def test_what_fails_behind_ends_the_run_with_the_units_before_safe(model, tmp_path, monkeypatch, whole_digests):
    from klquant.pipeline.streams import StreamStore

    def fail(self, unit):
        raise UserError("streams cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(StreamStore, "save", fail)
        with pytest.raises(UserError, match="streams cannot be written"):
            run(model, tmp_path / "out")
    state = unfinished(tmp_path / "out") / ".state"
    assert sorted(path.name for path in state.glob("unit-*")) == ["unit-000.json"]
    run(model, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == whole_digests


def test_a_run_that_stops_gives_its_streams_back(model, tmp_path, monkeypatch):
    """Memory left locked would stand in the way of the next run in the same process."""
    held = set()
    make, close = Activations.__init__, Activations.close
    monkeypatch.setattr(Activations, "__init__", lambda self, *a, **k: (held.add(self), make(self, *a, **k))[1])
    monkeypatch.setattr(Activations, "close", lambda self: (held.discard(self), close(self))[1])
    with pytest.raises(Stopped):
        run(model, tmp_path / "out", watcher=Stop("layer 1"))
    assert not held
