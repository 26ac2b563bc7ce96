"""Mix files: the packaged ones, the strict schema, datasets read through a stand-in for the library."""

import sys
from types import SimpleNamespace

import pytest
import yaml

from klquant.calibrate.documents import resolve_sources
from klquant.calibrate.mixes import known_mixes, load_mix
from klquant.errors import UserError

SOURCE = {
    "name": "web", "dataset": "some/data", "revision": "0" * 40, "split": "train", "rows": 3, "text": "body",
    "licence": "MIT",
}  # fmt: skip


def write(tmp_path, *sources, **changes):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"name": "mine", "sources": list(sources or [SOURCE])} | changes))
    return str(file)


def test_packaged_mixes():
    assert "default" in known_mixes()
    for name in known_mixes():
        assert load_mix(name).name == name
    names = [s.name for s in load_mix("default").sources]
    assert names == ["chat", "code", "chinese", "mathematics", "long"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"splitt": "x"}, "sources.0.splitt: unknown key"),
        ({"revision": "main"}, "sources.0.revision"),
        ({"rows": 0}, "sources.0.rows"),
        ({"rows": "3"}, "sources.0.rows"),
        ({"dataset": "../evil"}, "sources.0.dataset"),
        ({"messages": "chat"}, "exactly one of text, messages, turns"),
        ({"text": None}, "exactly one of text, messages, turns"),
        ({"text": None, "turns": {"robot": "x"}}, "sources.0.turns.robot"),
        ({"licence": None}, "sources.0.licence"),
    ],
)
def test_schema_names_file_and_key(tmp_path, change, message):
    with pytest.raises(UserError) as error:
        load_mix(write(tmp_path, SOURCE | change))
    assert "mine.yaml: " in str(error.value) and message in str(error.value)


def test_bad_mix_files(tmp_path):
    with pytest.raises(UserError, match=r"mine.yaml: seed: unknown key"):
        load_mix(write(tmp_path, seed=3))
    with pytest.raises(UserError, match="same name"):
        load_mix(write(tmp_path, SOURCE, SOURCE))
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 20_000)
    with pytest.raises(UserError, match=r"deep.yaml: nested too deeply"):
        load_mix(str(tmp_path / "deep.yaml"))
    (tmp_path / "dir.yaml").mkdir()
    with pytest.raises(UserError, match=r"dir.yaml: cannot be read: Is a directory"):
        load_mix(str(tmp_path / "dir.yaml"))
    with pytest.raises(UserError, match=r"bad.yaml: not YAML"):
        load_mix(str(tmp_path / "bad.yaml"))
    (tmp_path / "bad.yaml").write_text("- 1")
    with pytest.raises(UserError, match=r"bad.yaml: the file: "):
        load_mix(str(tmp_path / "bad.yaml"))
    with pytest.raises(UserError, match=r"known: default"):
        load_mix(str(tmp_path / "none.yaml"))


def stand_in(monkeypatch, rows):
    """A `datasets` module that serves `rows`, endlessly lazily, and records how it was called."""
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def documents(spec, seed=0):
    return [list(source.open()) for source in resolve_sources(spec, seed)]


def test_dataset_rows(tmp_path, monkeypatch):
    spec = write(tmp_path, SOURCE | {"rows": 20, "config": "zh"})
    served = iter({"body": f"text {i}"} for i in range(1000))
    calls = stand_in(monkeypatch, served)
    sources = resolve_sources(spec, 0)
    assert not calls  # nothing is asked of the network before the first document
    got = list(sources[0].open())
    options = {"split": "train", "revision": "0" * 40, "streaming": True}
    assert calls == [(("some/data", "zh"), options)]
    assert sources[0].origin == "some/data@" + "0" * 40
    assert next(served) == {"body": "text 20"}  # no row beyond `rows` was read
    assert sorted(got) == sorted(f"text {i}" for i in range(20)) and got != sorted(got)


def test_seed_orders_the_rows(tmp_path, monkeypatch):
    spec = write(tmp_path, SOURCE | {"rows": 20})
    stand_in(monkeypatch, [{"body": f"text {i}"} for i in range(20)])
    assert documents(spec, 1) == documents(spec, 1) != documents(spec, 2)


def test_chat_rows_and_turns(tmp_path, monkeypatch):
    chat = [{"role": "user", "content": "a"}]
    common = {"rows": 1, "text": None}
    spec = write(
        tmp_path,
        SOURCE | common | {"name": "m", "messages": "chat"},
        SOURCE | common | {"name": "t", "turns": {"user": "q", "assistant": "a"}},
    )
    stand_in(monkeypatch, [{"chat": chat, "q": "why", "a": "so"}])
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    assert documents(spec) == [[chat], [turns]]


def test_row_without_the_field(tmp_path, monkeypatch):
    stand_in(monkeypatch, [{"other": "x"}])
    with pytest.raises(UserError, match=r"mix 'mine', source 'web': row 1 of some/data has neither"):
        documents(write(tmp_path))


def test_library_missing_or_offline(tmp_path, monkeypatch):
    spec = write(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"mix 'mine', source 'web' needs .*pip install 'klquant\[data\]'.*tiny"):
        documents(spec)
    stand_in(monkeypatch, ConnectionError("no route\nto host"))
    with pytest.raises(UserError, match=r"some/data cannot be read \(no route\); check the network") as error:
        documents(spec)
    assert "\n" not in str(error.value)
