import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import klquant
from klquant.__main__ import _imports
from klquant.cli import main as cli
from klquant.core.allocator import VARIABLES
from klquant.errors import UserError

DEMO = Path(__file__).parents[2] / "demo" / "model"


def run(*args: str):
    return CliRunner().invoke(cli.main, args, prog_name="klquant")


@pytest.fixture
def fail(monkeypatch):
    """A command `fail` that raises what it is given."""

    def install(error: BaseException) -> None:
        @click.command()
        def command() -> None:
            raise error

        module = types.ModuleType("fail")
        module.command = command
        monkeypatch.setitem(sys.modules, "fail", module)
        monkeypatch.setitem(cli.COMMANDS, "fail", ("fail", "Fails."))

    return install


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"klquant {klquant.__version__}\n")


def test_a_user_error_is_one_line_on_stderr_and_exit_2(fail):
    fail(UserError("a.yaml:3: two\nlines"))
    result = run("fail")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "klquant: error: a.yaml:3: two lines\n")


def test_a_full_card_is_one_line(fail):
    fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB. GPU 0 has …"))
    result = run("fail")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "klquant: error: CUDA out of memory; free memory on the card, or ask for less at once\n"
    fail(RuntimeError("a bug"))
    assert isinstance(run("fail").exception, RuntimeError)


def test_an_interrupt_is_one_line_and_exit_130(fail):
    fail(KeyboardInterrupt())
    result = run("fail")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "klquant: interrupted\n")


def test_an_interrupt_while_the_first_modules_are_imported():
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from klquant.__main__ import run; run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "klquant: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("module", ["click", "klquant.cli.inspect", "torch"])
def test_an_interrupt_that_an_import_swallows(module):
    """As torch and numpy do: what they catch of a KeyboardInterrupt is lost."""
    code = (
        "import os, signal, sys\n"
        "class Swallow:\n"
        "    def find_spec(self, name, *_):\n"
        "        try:\n"
        f"            if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "        except BaseException: pass\n"
        "sys.meta_path.insert(0, Swallow())\n"
        f"sys.argv = ['klquant', 'inspect', {str(DEMO)!r}]\n"
        "from klquant.__main__ import run; run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "klquant: interrupted\n")


def test_what_a_library_imports_in_the_midst_of_its_work_is_interrupted_as_ever(monkeypatch):
    seen = []

    class Look:
        def find_spec(self, name, *_):
            if name == "no_such_module":
                seen.append(_imports(sys._getframe()))

    monkeypatch.setattr(sys, "meta_path", [Look(), *sys.meta_path])
    for package in ("klquant", "klquant.pipeline", "torch.fx"):
        for code in ("import no_such_module", "import importlib; importlib.import_module('no_such_module')"):
            with pytest.raises(ModuleNotFoundError):
                exec(code, {"__name__": package, "__package__": package})
    assert seen == [True] * 4 + [False] * 2


def test_a_bug_keeps_its_traceback(fail):
    fail(ZeroDivisionError())
    assert isinstance(run("fail").exception, ZeroDivisionError)


def test_a_full_disk_is_one_line_and_exit_2(fail):
    fail(OSError(errno.ENOSPC, "No space left on device", "result.json"))
    result = run("fail")
    assert (result.exit_code, result.stderr) == (2, "klquant: error: result.json: no space left; free disk space\n")
    fail(OSError(errno.EIO, "Input/output error"))
    assert isinstance(run("fail").exception, OSError)


@pytest.mark.parametrize(
    "args", [("inspect",), ("verify",), ("generate", "--raw", "hello"), ("eval", "-o", "r.json")], ids=" ".join
)
def test_a_name_that_no_file_can_have_is_one_line_and_exit_2(args):
    command, *others = args
    result = run(command, "x" * 5000, *others)
    assert result.exit_code == 2 and result.stderr.endswith("x…: longer than a file's name may be\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [("plan",), ("inspect",), ("verify",), ("quantize", "-o", "out"), ("generate", "hello"), ("eval", "-o", "r.json"),
     ("sensitivity", "-o", "r.json"), ("bench",)],
    ids=lambda args: args[0],
)  # fmt: skip
def test_a_file_where_a_folder_belongs(args, tmp_path):
    command, *others = args
    file = tmp_path / "config.json"
    file.touch()
    result = run(command, str(file), *others)
    assert (result.exit_code, result.stderr) == (
        2, f"klquant: error: {file}: is a file; give the checkpoint folder\n")  # fmt: skip


def test_a_terminal_that_knows_few_characters_gets_others():
    """Not a traceback: many symbols that tables use are in no 8-bit encoding."""
    done = subprocess.run(
        [sys.executable, "-m", "klquant.cli.main", "plan", str(DEMO), "--recipe", "int4"],
        capture_output=True, text=True, encoding="ascii", env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and " ? " in done.stdout


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(closed):
    command = f'"{sys.executable}" -m klquant.cli.main plan "{DEMO}" --recipe int4 {closed}'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_wrong_command_line_is_one_line_that_names_the_help(fail):
    unknown = run("plam")
    assert unknown.exit_code == 2
    assert unknown.stderr.startswith("klquant: error: No such command 'plam'") and unknown.stderr.count("\n") == 1
    fail(UserError("unused"))
    wrong = run("fail", "--what")
    assert wrong.exit_code == 2 and wrong.stderr.count("\n") == 1
    assert "No such option" in wrong.stderr and "(see klquant fail --help)" in wrong.stderr


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_loads_and_explains_itself(name):
    result = run(name, "--help")
    assert result.exit_code == 0 and "Usage: klquant" in result.stdout
    assert name in run("--help").stdout


@pytest.mark.parametrize("arg", ["--version", "--help"])
def test_start_up_imports_no_command_and_nothing_heavy(arg):
    code = (
        "import sys; from klquant.cli.main import main\n"
        f"try: main(['{arg}'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pydantic', 'rich', 'yaml', 'transformers', 'huggingface_hub', 'compressed_tensors'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(("command", "own", "want"), [
    *((name, {}, "expandable_segments:True") for name in ("quantize", "eval", "sensitivity", "sweep")),
    ("inspect", {}, ""),
    ("eval", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:200"}, "max_split_size_mb:200"),
    ("eval", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:300"}, "max_split_size_mb:300"),
])  # fmt: skip
def test_what_works_layer_by_layer_lets_segments_grow(command, own, want):
    """As torch's allocator sees it when the command has begun; what the user has set is left alone."""
    code = (
        "from klquant.cli.main import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "import torch; print('\\n' + torch._C._accelerator_getAllocatorSettings())"
    )
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], env=clean | own, check=True, capture_output=True, text=True)
    assert done.stdout.rpartition("\n\n")[2].strip() == want


@pytest.mark.parametrize(("commands", "options"), [
    (("eval", "sensitivity", "sweep"), ("data", "windows", "window", "device", "dtype")),
    (("plan", "quantize", "sweep"), ("target",)),
    (("plan", "quantize"), ("recipe",)),
    (("quantize", "sweep"), ("calib_tokens",)),
    (("generate", "serve", "bench"), ("devices", "max_memory", "cache_bits")),
])  # fmt: skip
def test_an_option_that_commands_share_says_the_same_in_each(commands, options):
    params = [{p.name: p.to_info_dict() for p in cli.main.get_command(None, name).params} for name in commands]
    for option in options:
        assert all(own[option] == params[0][option] for own in params), option
