"""`klquant generate` and `chat` on the demo model, as a user runs them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from klquant.cli.main import main
from klquant.cli.spell import unicode_text
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tensors, write_checkpoint

DEMO = str(Path(__file__).parents[2] / "demo" / "model")
PROMPT = "def test_open("


def run(*args: object, stdin: str | bytes | None = None):
    return CliRunner().invoke(main, [*map(str, args)], prog_name="klquant", input=stdin, catch_exceptions=False)


def test_generate_continues_the_prompt():
    done = run("generate", DEMO, PROMPT, "--devices", "cpu", "--max-new-tokens", 24)
    assert done.exit_code == 0 and "def test_" in done.stdout
    assert done.stderr.count("running on the CPU") == 1 and "no chat template" in done.stderr
    shown = json.loads(
        run("generate", DEMO, "-", "--devices", "cpu", "--max-new-tokens", 24, "--json", stdin=PROMPT).stdout
    )
    assert shown["text"] + "\n" == done.stdout and len(shown["tokens"]) == 24 and shown["finish"] == "length"


def test_sampling_options_reach_the_sampler():
    options = ("--devices", "cpu", "--max-new-tokens", 30, "--temperature", 1.0, "--top-p", 0.9, "--json")
    first, again, other = (
        json.loads(run("generate", DEMO, PROMPT, *options, "--seed", seed).stdout)["text"] for seed in (1, 1, 2)
    )
    assert first == again != other
    stop = first[5:8]
    ended = json.loads(run("generate", DEMO, PROMPT, *options, "--seed", 1, "--stop", stop).stdout)
    assert ended["finish"] == "stop" and ended["text"] == first[: first.index(stop)]


def test_a_chat_template_is_used_unless_raw(tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}<{{ m.content }}>{% endfor %}")
    options = ("--devices", "cpu", "--max-new-tokens", 1, "--json")
    for extra, tokens in ((), 1 + len("<hello>")), (("--raw",), 1 + len("hello")):
        assert json.loads(run("generate", model, "hello", *options, *extra).stdout)["prompt_tokens"] == tokens


@pytest.mark.parametrize(
    "args, message",
    [
        (["nope", "x"], "nope: no such folder"),
        ([DEMO, " "], "the prompt is empty"),
        ([DEMO, "\udcff"], "the prompt is not UTF-8 text"),  # as Python reads the byte FF of a command line
        ([DEMO, "x", "--device", "tpu"], "unknown device 'tpu'"),
        ([DEMO, "x", "--max-new-tokens", 0], "error: --max-new-tokens is 0"),
        ([DEMO, "x", "--devices", "cuda:9"], "device cuda:9: 0 CUDA"),
        ([DEMO, "x", "--devices", "tpu"], "unknown device 'tpu'"),
        ([DEMO, "x" * 300, "--devices", "cpu", "--max-context", 64], "tokens, which fills the context of 64"),
        ([DEMO, "x", "--devices", "cpu", "--max-context", 5000], "beyond the model's own limit of 4,096"),
        ([DEMO, "x", "--devices", "cpu", "--max-memory", "cpu=100MB"], "GiB are missing"),
        ([DEMO, "x", "--devices", ""], "unknown device ''"),
        ([DEMO, "x", "--devices", "cpu:3"], "unknown device 'cpu:3'"),
        ([DEMO, "x", "--max-memory", "cpu=1GB,cpu=2GB"], "names a device twice"),
        ([DEMO, "x", "--max-memory", "cuda:0=0"], "a size must be at least one byte"),
        ([DEMO, "x", "--devices", "cpu", "--max-memory", "cpu=0"], "cpu (0.0 GiB allowed by --max-memory)"),
        ([DEMO, "x", "--max-memory", "cpu=20"], "'20' has no unit and would be bytes; did you mean 20GiB"),
        ([DEMO, "x", "--max-memory", "cpu=0.5"], "'0.5' has no unit and would be bytes; did you mean 0.5GiB"),
        ([DEMO, "x", "--top-p", 2], "error: --top-p is 2.0, expected above 0 and at most 1"),
        ([DEMO, "x", "--stop", ""], "error: --stop has an empty text"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(args, message):
    done = run("generate", *args)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.exit_code == 2 and len(errors) == 1 and message in errors[0] and not done.stdout


def test_a_prompt_longer_than_the_context_is_refused_before_weights_are_read(monkeypatch):
    monkeypatch.setattr("klquant.engine.engine.load_weights", lambda *_: pytest.fail("weights were read"))
    done = run("generate", DEMO, "x " * 9000, "--devices", "cpu")
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.endswith("which fills the context of 4,096; shorten it\n")
    shorter = run("generate", DEMO, "x " * 90, "--devices", "cpu", "--max-context", 64)
    assert "or raise --max-context (the model's limit is 4,096)" in shorter.stderr


def test_text_is_utf_8_whatever_the_locale():
    assert unicode_text("é".encode().decode("ascii", "surrogateescape"), "it") == "é" == unicode_text("é", "it")
    done = run("generate", DEMO, "-", stdin=b"\xff")
    assert (done.exit_code, done.stderr) == (2, "klquant: error: the prompt is not UTF-8 text\n")


def test_chat_goes_on_after_what_is_no_text():
    done = run("chat", DEMO, "--devices", "cpu", "--max-new-tokens", 2, stdin=b"\xff\nhello\n")
    assert done.exit_code == 2 and "not UTF-8 text" in done.stderr and "cut off by --max-new-tokens" in done.stderr


def test_keys_of_a_file_keep_their_names(tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    (model / "generation_config.json").write_text('{"temperature": "hot"}')
    done = run("generate", model, "hello", "--device", "cpu")
    assert done.exit_code == 2 and "generation_config.json: temperature is 'hot'" in done.stderr


@pytest.fixture
def overflowing(tmp_path):
    """A model with a scale of the norm that no check at load can call wrong, and that overflows."""
    raw = tiny_config()
    tensors = tiny_tensors(raw)
    tensors["model.layers.1.self_attn.o_proj.weight"][:] = 3e38
    return write_checkpoint(tmp_path / "model", raw, tensors)


def test_logits_that_are_no_numbers_are_an_error(overflowing):
    done = run("generate", overflowing, "hello", "--devices", "cpu")
    assert done.exit_code == 2 and "model.layers.1 is the first" in done.stderr and not done.stdout.strip()


def test_chat_says_that_logits_are_no_numbers(overflowing):
    done = run("chat", overflowing, "--devices", "cpu", stdin="hello\n")
    assert "model.layers.1 is the first" in done.stderr and not done.stdout.strip()


def test_chat_goes_on_and_forgets():
    turns = "hello\n/stats\nand more\n/reset\n/stats\n"
    done = run("chat", DEMO, "--devices", "cpu", "--max-new-tokens", 8, stdin=turns)
    assert done.exit_code == 0
    contexts = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("context:")]
    assert len(contexts) == 2 and contexts[0] > 8 and contexts[1] == 0
    assert "cut off by --max-new-tokens" in done.stderr


@pytest.mark.parametrize(
    ("turns", "errors"),
    [
        (f"{'x ' * 60}\nhi\n", ["shorten it, or raise --max-context (the model's limit is 4,096)"]),
        ("hi\nmore\nmore\n/reset\nhi", ["conversation fills the context of 40 tokens; /reset starts a new one"] * 2),
        ("/what\nhi", ["unknown command /what; "]),
    ],
)  # fmt: skip
def test_chat_survives_a_line_that_cannot_be_taken(turns, errors):
    """Piped in, it ends with exit code 2."""
    done = run("chat", DEMO, "--devices", "cpu", "--max-context", 40, stdin=turns)
    said = [line for line in done.stderr.splitlines() if "error: " in line or "unknown" in line]
    assert done.exit_code == 2 and len(said) == len(errors)
    assert all(want in line for want, line in zip(errors, said, strict=True))
    assert len(done.stdout.strip()) > 1


def test_chat_counts_what_a_long_line_had_room_for():
    turns = f"hi\n{'x ' * 60}\nhi\n"
    done = run("chat", DEMO, "--devices", "cpu", "--max-context", 60, "--max-new-tokens", 4, stdin=turns)
    has = re.search(r"has (\d+) of the context's 60 tokens: no room for this; /reset starts", done.stderr)
    assert done.exit_code == 2 and 4 < int(has[1]) < 40 and done.stderr.count("error: ") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_stops_the_answer_and_not_the_chat():
    """A first turn without an end, interrupted; then a second one, and the end of input."""
    command = [sys.executable, "-m", "klquant.cli.main", "chat", DEMO, "--devices", "cpu", "--max-new-tokens", "4000"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"}) as chat:
        chat.stdin.write(b"hello\n")
        chat.stdin.flush()
        assert chat.stdout.read(1)
        time.sleep(0.2)
        chat.send_signal(signal.SIGINT)
        chat.stdin.write(b"/stats\n")
        chat.stdin.close()
        rest = chat.stdout.read().decode()
        assert chat.wait(30) == 0
    tokens = int(rest[rest.index("context: ") :].split()[1].replace(",", ""))
    assert 1 < tokens < 4000
