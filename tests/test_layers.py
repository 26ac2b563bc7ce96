"""Folders are layers: an import points to the same folder or to a lower one, lazy imports included."""

import ast
from pathlib import Path

import klquant

ROOT = Path(klquant.__file__).parent
# Lowest first; folders on one line may not import each other.
LAYERS = [
    {"errors", "__init__"},
    {"core"},
    {"checkpoint", "quantize", "kernels"},
    {"recipe", "model"},
    {"calibrate"},
    {"engine"},
    {"pipeline", "evaluate"},
    {"report", "serve"},
    {"cli"},
    {"__main__"},
]
RANK = {folder: rank for rank, folders in enumerate(LAYERS) for folder in folders}


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("klquant"):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("klquant"))


def test_imports_never_point_up():
    wrong = []
    for path in ROOT.rglob("*.py"):
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for module in imports(path):
            there = [*module.split("."), "__init__"][1]
            if there != here and RANK[there] >= RANK[here]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, wrong
