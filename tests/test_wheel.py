"""What `pip install` puts on a machine."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, as pip would build it from a checkout."""
    return Path(next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")))))


def test_recipes_mixes_and_every_module_are_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "klquant"
    files = [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {p.suffix for p in files} >= {".py", ".yaml"}
    assert not {p.relative_to(ROOT).as_posix() for p in files} - inside


def test_nothing_but_the_package_and_its_metadata_is_in_the_wheel(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"klquant"}


def test_the_installed_command_runs_and_finds_its_recipes(wheel, tmp_path):
    """The wheel's own files, from a folder that is not the checkout."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    run = (
        "import klquant; from klquant.recipe.schema import load_recipe; from klquant.__main__ import run;"
        f"assert klquant.__file__.startswith({str(tmp_path)!r}); load_recipe('int4'); run()"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", run, "--version"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("klquant ")
