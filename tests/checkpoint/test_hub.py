"""Hub access with a fake `huggingface_hub`: no test touches the network."""

import errno
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from klquant.checkpoint.hub import is_hub_id, model_name, read_hub_index, resolve_model
from klquant.checkpoint.index import read_tensor_index
from klquant.errors import UserError

MODEL = "owner/name"


class FakeHub:
    """Answers like the hub would for a checkpoint folder; `fail` maps a call's name to what it raises."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fail, self.calls = folder, {}, []

    def call(self, name: str, **kwargs):
        self.calls.append((name, kwargs))
        if name in self.fail:
            raise self.fail[name]

    def model_info(self, model, timeout):
        self.call("model_info")

    def snapshot_download(self, model, allow_patterns, local_files_only):
        self.call("snapshot_download", patterns=allow_patterns, offline=local_files_only)
        return str(self.folder)

    def hf_hub_download(self, model, file):
        self.call("hf_hub_download")
        return str(self.folder / file)

    def get_safetensors_metadata(self, model):
        self.call("get_safetensors_metadata")
        _, tensors = read_tensor_index(self.folder)
        infos = {name: SimpleNamespace(dtype=dtype, shape=list(shape)) for name, (dtype, shape) in tensors.items()}
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=infos)})


@pytest.fixture
def hub(tiny, monkeypatch) -> FakeHub:
    fake = FakeHub(tiny)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    for name in ("snapshot_download", "hf_hub_download", "get_safetensors_metadata"):
        monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
    return fake


def http_error(cls):
    return cls("first\nsecond", response=SimpleNamespace(headers={}, request=None, status_code=404, text=""))


def test_hub_ids_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("moonshotai/Kimi-Linear-48B-A3B-Base")
    assert not any(map(is_hub_id, ("name", "./a/b", "/a/b", "a/b/c", "../b", "a/", "")))
    (tmp_path / "a/b").mkdir(parents=True)
    assert not is_hub_id("a/b") and not is_hub_id("a/b/")


def test_a_slash_behind_a_hub_id_is_no_part_of_it(hub):
    assert is_hub_id(f"{MODEL}/") and not is_hub_id(f"{MODEL}//")
    assert read_hub_index(f"{MODEL}/") == read_tensor_index(hub.folder)
    hub.fail["model_info"] = errors.HFValidationError("x")
    for ask in (read_hub_index, partial(resolve_model, weights=True)):
        with pytest.raises(UserError, match=r"^owner/name: "):
            ask(f"{MODEL}/")


def test_a_folder_is_itself(tiny, hub):
    assert resolve_model(str(tiny), weights=True) == tiny
    assert hub.calls == []
    with pytest.raises(UserError, match="none: no such folder, and not a hub id"):
        resolve_model("none", weights=True)


def test_a_download_takes_weights_only_when_asked_and_never_code(hub):
    assert resolve_model(MODEL, weights=True) == hub.folder
    resolve_model(MODEL, weights=False)
    (_, full), (_, light) = [call for call in hub.calls if call[0] == "snapshot_download"]
    assert "*.safetensors" in full["patterns"] and "*.safetensors" not in light["patterns"]
    assert {"*.json", "tiktoken.model"} <= set(light["patterns"])
    assert not any(p.endswith((".py", ".bin", ".pt", "*")) and p != "LICENSE*" for p in full["patterns"])


def test_a_plan_reads_headers_only(hub):
    assert read_hub_index(MODEL) == read_tensor_index(hub.folder)
    assert "snapshot_download" not in [name for name, _ in hub.calls]


@pytest.mark.parametrize(
    ("folder", "name"),
    [("a/hub/models--owner--name/snapshots/0a1b", "owner/name"), ("some/where/model", "some/where/model"),
     ("a/datasets--owner--name/snapshots/0a1b", "a/datasets--owner--name/snapshots/0a1b")],
)  # fmt: skip
def test_a_snapshot_is_called_by_its_id(folder, name):
    assert model_name(Path(folder)) == name


def test_without_network_the_cache_serves(hub):
    hub.fail["model_info"] = errors.OfflineModeIsEnabled("offline")
    assert read_hub_index(MODEL) == read_tensor_index(hub.folder)
    assert hub.calls[-1][1]["offline"] is True


FAULTS = [
    ("model_info", http_error(errors.RepositoryNotFoundError), "no such folder here and no such model on the hub"),
    ("model_info", http_error(errors.GatedRepoError), "access is restricted"),
    ("model_info", errors.HFValidationError("x"), "not a valid hub id"),
    ("hf_hub_download", http_error(errors.RemoteEntryNotFoundError), "has no config.json"),
    ("hf_hub_download", http_error(errors.HfHubHTTPError), "download failed (HfHubHTTPError)"),
    ("hf_hub_download", OSError(errno.EIO, "Input/output error"), "download failed (OSError: Input/output error)"),
    ("hf_hub_download", PermissionError(errno.EACCES, "Not you", "/a/lock"), "cannot write /a/lock (Not you)"),
    ("get_safetensors_metadata", errors.NotASafetensorsRepoError("x"), "has no safetensors weights"),
    ("get_safetensors_metadata", errors.SafetensorsParsingError("x"), "the header of a shard cannot be read"),
    ("get_safetensors_metadata", errors.HTTPError("refused"), "download failed"),
]


@pytest.mark.parametrize(("call", "fault", "message"), FAULTS, ids=[m for _, _, m in FAULTS])
def test_every_fault_is_one_line_that_names_the_model(hub, call, fault, message):
    hub.fail[call] = fault
    with pytest.raises(UserError) as error:
        read_hub_index(MODEL)
    assert str(error.value).startswith(f"{MODEL}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_fault_of_the_disk_names_the_cache_and_how_to_have_another(hub, number):
    hub.fail["snapshot_download"] = OSError(number, os.strerror(number))
    with pytest.raises(UserError) as error:
        resolve_model(MODEL, weights=True)
    assert all(word in str(error.value) for word in (constants.HF_HUB_CACHE, os.strerror(number), "set HF_HOME"))


def test_nothing_in_the_cache_and_no_network_is_one_line(hub):
    hub.fail |= {
        "model_info": errors.HTTPError("unreachable"),
        "snapshot_download": errors.LocalEntryNotFoundError("x"),
    }
    with pytest.raises(UserError, match="owner/name: no such folder here, and the hub cannot be reached"):
        resolve_model(MODEL, weights=True)
