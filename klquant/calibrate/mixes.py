"""Calibration mixes as data: which public datasets, which revision, how many rows (`klquant/mixes/*.yaml`)."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from klquant.errors import UserError
from klquant.recipe.yamlfile import packaged

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)
Role = Literal["system", "user", "assistant"]
_Text = Annotated[str, Field(min_length=1)]


class MixSource(BaseModel):
    """One domain of a mix, from one public dataset. The row's content is one of `text`, `messages`, `turns`."""

    model_config = _STRICT

    name: _Text
    dataset: Annotated[str, Field(pattern=r"^\w[\w.-]*/\w[\w.-]*$")]
    config: str | None = None
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$", description="a commit, so that the text cannot change")]
    split: _Text
    rows: Annotated[int, Field(gt=0)]
    licence: _Text
    text: _Text | None = Field(default=None, description="field that holds a document")
    messages: _Text | None = Field(default=None, description="field that holds a list of chat messages")
    turns: dict[Role, str] | None = Field(default=None, description="role → field; one message a role, in Role's order")

    @model_validator(mode="after")
    def _one_content(self) -> "MixSource":
        if sum(bool(v) for v in (self.text, self.messages, self.turns)) != 1:
            raise ValueError("give exactly one of text, messages, turns")
        return self

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """A dataset's row under the keys of our own files: `text` or `messages`."""
        if self.turns:
            roles = [role for role in get_args(Role) if role in self.turns]
            return {"messages": [{"role": role, "content": row.get(self.turns[role])} for role in roles]}
        if self.messages:
            return {"messages": row.get(self.messages)}
        return {"text": row.get(self.text)}


class Mix(BaseModel):
    """A calibration mix: its sources get equal shares of the windows, in this order."""

    model_config = _STRICT

    name: _Text
    about: str = ""
    sources: Annotated[tuple[MixSource, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _distinct(self) -> "Mix":
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError("two sources have the same name")
        return self


def known_mixes() -> list[str]:
    """Names of the mixes that come with the package as data."""
    return packaged("klquant.mixes")


def load_mix(name_or_path: str) -> Mix:
    """A packaged mix by name, or the user's .yaml. Raises UserError naming the file and the key that is wrong."""
    ours = name_or_path in known_mixes()
    path = files("klquant.mixes") / f"{name_or_path}.yaml" if ours else Path(name_or_path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{name_or_path}: no such calibration mix (known: {', '.join(known_mixes())})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    try:
        return Mix.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        what = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise UserError(f"{path}: {key}: {what}") from None
