import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from klquant.cli.main import main
from tests.report.build import result


def run(*args: object):
    return CliRunner().invoke(main, ["report", *map(str, args)], prog_name="klquant", catch_exceptions=False)


@pytest.fixture
def files(tmp_path):
    paths = []
    for name, kld, size in (("int8", 0.002, 50), ("int4", 0.0125, 27)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(result(name, kld, size).model_dump(mode="json")))
    return paths


def test_html_is_written_and_nothing_said(files, tmp_path):
    out = tmp_path / "report.html"
    done = run(*files, "-o", out)
    assert (done.exit_code, done.output) == (0, "")
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not list(tmp_path.glob(".*"))


def test_markdown_json_and_the_plot_are_printed_or_written(files, tmp_path):
    assert run(*files, "--md").stdout.startswith("# owner/base: accuracy against size\n")
    assert json.loads(run(*files, "--json").stdout)["kind"] == "klquant-report"
    assert ElementTree.fromstring(run(*files, "--svg").stdout).tag == "{http://www.w3.org/2000/svg}svg"
    assert run(*files, "--md", "-o", tmp_path / "report.md").stdout == ""
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == run(*files, "--md").stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("none.json", "--md"), "none.json: cannot be read"),
        (("{cut}", "--md"), "cut.json: not whole JSON"),
        (("{other}", "--md"), "other.json: not a result of klquant eval"),
        (("{newer}", "--md"), "newer.json: result schema 2"),
        (("{alone}", "--md"), "alone.json: evaluated without a reference"),
        (("{int4}", "{windows}", "--md"), "cannot be compared: other windows"),
        (("{int4}",), "-o report.html"),
        (("{int4}", "--md", "--json"), "--md, --json and --svg exclude each other"),
        (("{int4}", "{folder}/../{folder.name}/int4.json", "--md"), "int4.json: comes twice"),
        (("{int4}", "--md", "-o", "{int4}"), "int4.json: is there already and no report"),
        (("{int4}", "-o", "{other}"), "other.json: is there already and no report"),
        (("{int4}", "-o", "{folder}/none/report.html"), "none/report.html: cannot be written: No such file"),
        (("{int4}", "--md", "-o", "{cut}/report.md"), "cut.json/report.md: cannot be written: Not a directory"),
        (("{int4}", "--md", "-o", "{folder}/.."), "cannot be written: "),
        (("{int4}", "--md", "-o", "/"), "/: cannot be written: "),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_2(files, tmp_path, args, message):
    whole = json.loads(files[1].read_text())
    alone = whole | {"reference": None}
    named = {
        "cut": files[1].read_text()[:500], "other": "{}", "newer": json.dumps(whole | {"schema_version": 2}),
        "alone": json.dumps(alone), "windows": json.dumps(result("x", windows=4).model_dump(mode="json")),
    }  # fmt: skip
    for name, text in named.items():
        (tmp_path / f"{name}.json").write_text(text)
    paths = {name: tmp_path / f"{name}.json" for name in (*named, "int4")} | {"folder": tmp_path}
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    done = run(*(arg.format(**paths) for arg in args))
    assert done.exit_code == 2 and message in done.stderr.splitlines()[-1] and done.stdout == ""
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("form", ["html", "md", "json", "svg"])
def test_a_report_is_written_again(files, tmp_path, form):
    out = tmp_path / f"report.{form}"
    args = (*files, *(() if form == "html" else (f"--{form}",)), "-o", out)
    out.touch()  # an empty file is nobody's work
    for _ in range(2):
        done = run(*args)
        assert (done.exit_code, done.output) == (0, "")


def test_without_matplotlib_html_says_what_to_install_and_text_does_without(files, tmp_path):
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from klquant.cli.main import main\n"
        "main(['report', *sys.argv[1:]], prog_name='klquant')"
    )

    def bare(*args: object):
        command = [sys.executable, "-c", script, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True)

    html, md = bare(*files, "-o", tmp_path / "r.html"), bare(*files, "--md")
    assert html.returncode == 2 and "pip install 'klquant[report]'" in html.stderr and html.stderr.count("\n") == 1
    assert md.returncode == 0 and "int4" in md.stdout


def test_it_starts_without_torch(files):
    script = (
        "import sys; from klquant.cli.main import main\n"
        "main(['report', '--md', *sys.argv[1:]], prog_name='klquant', standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
