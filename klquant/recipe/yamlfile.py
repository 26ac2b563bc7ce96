"""Read a YAML file into plain data together with the line of every key, so that an error can point at its cause.

Safe YAML only: no tags, no aliases, no duplicate keys. What comes out is JSON-like (dict, list, str, int, float, bool,
None), which is what the schema validates strictly.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from klquant.errors import UserError

_MAP, _SEQ = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class YamlFile:
    """`data` as plain values; `lines`: path of keys and indices, e.g. ("rules", 0, "why") → its line, from 1."""

    where: str
    data: dict
    lines: dict[KeyPath, int]

    def at(self, path: KeyPath) -> str:
        """`file:line` of the deepest part of `path` that the file has."""
        while path not in self.lines:
            path = path[:-1]
        return f"{self.where}:{self.lines[path]}"


def packaged(package: str) -> list[str]:
    """Names, without .yaml and sorted, of the YAML files that a package of klquant carries."""
    names = (file.name for file in files(package).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def read_yaml(path: Path) -> YamlFile:
    """Parse the mapping in `path`. Raises UserError `file:line: reason`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text (byte {e.start})") from e
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> YamlFile:
    """Parse the mapping in `text`; `where` names it in errors."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{where}:1: not a YAML mapping of keys to values")
        lines: dict[KeyPath, int] = {(): root.start_mark.line + 1}
        return YamlFile(where, _build(loader, root, (), lines, where, set()), lines)
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        hint = " (text that contains ': ' needs quotes)" if "mapping values" in (e.problem or "") else ""
        raise UserError(f"{where}:{line}: not valid YAML: {e.problem or e.context}{hint}") from e
    except yaml.YAMLError as e:
        raise UserError(f"{where}:1: not valid YAML: {' '.join(str(e).split())}") from e
    except RecursionError as e:
        raise UserError(f"{where}:1: nested too deeply") from e


def _build(loader: yaml.SafeLoader, node: yaml.Node, path: KeyPath, lines: dict, where: str, seen: set[int]):
    line = node.start_mark.line + 1
    if id(node) in seen:  # an alias is its anchor's node once more; refusing it also stops exponential documents
        raise UserError(f"{where}:{lines[path]}: YAML anchors and aliases are not used here; write the value out")
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
        out = {}
        for key_node, value in node.value:
            key, key_line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise UserError(f"{where}:{key_line}: a key must be a plain word")
            if key in out:
                raise UserError(f"{where}:{key_line}: key {key!r} appears twice; keep one")
            lines[*path, key] = key_line
            out[key] = _build(loader, value, (*path, key), lines, where, seen)
        return out
    if isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
        out = []
        for i, value in enumerate(node.value):
            lines[*path, i] = value.start_mark.line + 1
            out.append(_build(loader, value, (*path, i), lines, where, seen))
        return out
    try:
        value = loader.construct_object(node)
    except ValueError as e:
        raise UserError(f"{where}:{line}: {node.value[:40]!r} is not a valid value") from e
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{where}:{line}: {node.value!r} reads as a {type(value).__name__}; put it in quotes")
    return value
