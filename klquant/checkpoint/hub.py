"""Models by hub id, through `huggingface_hub`: their files, or only what a plan needs of them. Never remote code."""

import errno
import re
from pathlib import Path

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.index import check_tensors, read_json, read_tensor_index, require_folder
from klquant.errors import UserError

METADATA = ("*.json", "tiktoken.model", "*.jinja", "LICENSE*", "README.md")
WEIGHTS = ("*.safetensors",)
TIMEOUT = 10  # seconds to wait for the hub's first answer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(model: str) -> bool:
    """Whether `model` reads as owner/name, a slash behind it or not, and nothing of that name is here."""
    return _HUB_ID.fullmatch(_bare(model)) is not None and not Path(model).exists()


def _bare(model: str) -> str:
    """A hub id as the hub writes it: completion by a shell leaves a slash."""
    return model.removesuffix("/")


def resolve_model(model: str, weights: bool) -> Path:
    """The folder of `model`: itself, or a snapshot of the hub repository it names, with or without its weights.

    A snapshot in the cache serves where the hub cannot be reached. Raises UserError when there is neither.
    """
    if not is_hub_id(model):
        require_folder(Path(model), "no such folder, and not a hub id of the form owner/name")
        return Path(model)
    from huggingface_hub import snapshot_download

    model = _bare(model)
    patterns = [*METADATA, *(WEIGHTS if weights else ())]
    offline = not _reachable(model)
    return Path(_ask(model, lambda: snapshot_download(model, allow_patterns=patterns, local_files_only=offline)))


def model_name(folder: Path) -> str:
    """What to call a model in what outlives this machine: a snapshot of the hub by its id, others by their folder."""
    kind, *owner_and_name = folder.parent.parent.name.split("--")
    in_cache = folder.parent.name == "snapshots" and kind == "models" and len(owner_and_name) == 2
    return "/".join(owner_and_name) if in_cache else str(folder)


def read_hub_index(model: str) -> tuple[KimiLinearConfig, dict[str, tuple[str, tuple[int, ...]]]]:
    """Config and name → (dtype, shape) of a hub repository, from its config.json and its shards' headers alone."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    model = _bare(model)
    if not _reachable(model):
        return read_tensor_index(resolve_model(model, weights=True))
    raw = read_json(Path(_ask(model, lambda: hf_hub_download(model, "config.json"))))
    config = KimiLinearConfig.from_dict(raw, f"{model}/config.json")
    files = _ask(model, lambda: get_safetensors_metadata(model)).files_metadata
    tensors = {name: (info.dtype, tuple(info.shape)) for file in files.values() for name, info in file.tensors.items()}
    check_tensors(config, tensors, model)
    return config, tensors


def _reachable(model: str) -> bool:
    """Ask the hub for the model once, without the retries of a download. Raises UserError when it has no such model."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().model_info(model, timeout=TIMEOUT)
    except errors.GatedRepoError as e:
        raise UserError(f"{model}: access is restricted; accept the model's terms and log in to the hub") from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(f"{model}: no such folder here and no such model on the hub") from e
    except errors.HFValidationError as e:
        raise UserError(f"{model}: not a valid hub id; expected owner/name") from e
    except (errors.HTTPError, OSError):  # no network, a time-out, a server error, or offline by choice
        return False
    return True


def _ask(model: str, request):
    """The answer to a request; one line for what can go wrong on the way to it."""
    from huggingface_hub import errors

    try:
        return request()
    except errors.NotASafetensorsRepoError as e:
        raise UserError(f"{model}: has no safetensors weights; klquant reads nothing else") from e
    except errors.SafetensorsParsingError as e:
        raise UserError(f"{model}: the header of a shard cannot be read; the file is damaged") from e
    except errors.LocalEntryNotFoundError as e:
        raise UserError(
            f"{model}: no such folder here, and the hub cannot be reached; check the network, or give a folder"
        ) from e
    except errors.EntryNotFoundError as e:
        raise UserError(f"{model}: has no config.json; not a Kimi-Linear checkpoint") from e
    except (errors.HTTPError, OSError) as e:
        raise UserError(f"{model}: {_failed(e)}") from e


def _failed(error: Exception) -> str:
    """Why a download ended, and what to do: the fault may be the disk's."""
    from huggingface_hub import constants

    cache, why = constants.HF_HUB_CACHE, getattr(error, "strerror", None)
    match getattr(error, "errno", None):
        case errno.ENOSPC | errno.EDQUOT:
            return f"no space left in {cache} ({why}); free disk space, or set HF_HOME to a folder that has room"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"cannot write {error.filename or cache} ({why}); mend that, or set HF_HOME to a folder of yours"
    return f"download failed ({type(error).__name__}{f': {why}' if why else ''}); try again, it continues where it was"
