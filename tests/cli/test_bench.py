import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from klquant.checkpoint.quantized import QuantizedReader
from klquant.cli import bench_run
from klquant.cli import main as cli
from klquant.cli.bench import Numbers
from klquant.engine.placement import CPU, plan_placement
from klquant.engine.sizes import Outline, held_sizes
from klquant.errors import UserError

DEMO = Path(__file__).parents[2] / "demo" / "model"
SMALL = ("--devices", "cpu", "--prefill", "16", "--batch", "1,2", "--context", "16", "--steps", "2")


def run(*args: str):
    return CliRunner().invoke(cli.main, ["bench", *args], prog_name="klquant")


@pytest.fixture(scope="module")
def result() -> dict:
    done = run(str(DEMO), *SMALL, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_every_cell_is_measured(result):
    assert [(p["tokens"], p["fits"]) for p in result["prefill"]] == [(16, True)]
    assert [(d["context"], d["batch"]) for d in result["decode"]] == [(16, 1), (16, 2)]
    for row in result["decode"]:
        assert row["fits"] and row["tokens_s"] == pytest.approx(row["batch"] / row["step_s"])
        moved = row["bytes_moved"]
        assert moved.pop("total") == sum(moved.values())
        assert row["of_copy"] > 0
        assert row["rtx_4090_predicted_tokens_s"] is None  # not from a CPU


def test_predicted_memory_is_actual_memory(result):
    for row in result["memory"][:3]:
        assert row["actual"] == pytest.approx(row["predicted"], rel=0.03), row


def test_tables_say_that_a_cpu_is_slow_and_what_does_not_fit():
    outline = Outline.of(QuantizedReader.open(DEMO))
    sizes, needs = held_sizes(outline, torch.float32), {"context": 6 * 1024, "sequences": 2, "activation_bytes": 4}
    room = plan_placement(outline.config, sizes, {CPU: 1 << 40}, **needs).shares[0].total
    cells = ("--devices", "cpu", "--prefill", "16", "--batch", "1,2", "--context", "4000", "--steps", "2")
    done = run(str(DEMO), *cells, "--max-memory", f"cpu={room}B")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("slow") == 1 and "beyond" not in done.stderr
    assert done.stdout.count("does not fit") == 1
    assert "latent cache" in done.stdout and "of copy" in done.stdout and "predicted" in done.stdout
    assert "RTX" not in done.stdout


def test_what_the_model_cannot_hold_is_left_out_and_said():
    done = run(str(DEMO), "--devices", "cpu", "--prefill", "16,4096", "--batch", "1", "--context", "8k", "--steps", "1")
    assert done.exit_code == 0, done.stderr
    assert "beyond the model's own context of 4,096 tokens" in done.stderr
    assert "Decode" not in done.stdout and "4 k" not in done.stdout


def test_a_known_shape_needs_no_checkpoint():
    done = run(
        "--synthetic", "kimi-linear-48b:layers=1", "--recipe", "int4", "--devices", "cpu", "--max-memory", "cpu=1MB"
    )
    assert done.exit_code == 2
    assert "GiB are missing" in done.stderr and "what would fit" in done.stderr
    assert "cpu (0.0 GiB allowed by --max-memory)" in done.stderr


@pytest.mark.parametrize(("args", "says"), [
    ((), "either MODEL or --synthetic"),
    ((str(DEMO), "--synthetic", "kimi-linear-48b"), "either MODEL or --synthetic"),
    ((str(DEMO), "--recipe", "int4"), "--recipe goes with --synthetic"),
    (("--synthetic", "kimi"), "unknown synthetic model 'kimi'"),
    ((str(DEMO), "--batch", "1,x"), "is not a number"),
    ((str(DEMO), "--devices", "tpu"), "unknown device 'tpu'"),
    (("nowhere",), "no such folder"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(args, says):
    done = run(*args)
    assert done.exit_code == 2
    assert says in done.stderr


def test_numbers():
    assert Numbers().convert("512,2k, 1M,2048,0", None, None) == (512, 2048, 1 << 20)


@pytest.mark.parametrize(
    ("leaving", "chosen"), [({300: 25, 200: 19, 100: 10}, 200), ({300: 25, 200: 21, 100: 10}, 100)]
)
def test_experts_leave_for_larger_cells_until_twice_as_many_do(monkeypatch, leaving, chosen):
    """`leaving`: bytes of experts in the host's memory, by the context of a cell; 100 may be there."""

    def place(*_, context: int, host: int = 0, **needs):
        if leaving[context] > host:
            raise UserError("no room")
        return SimpleNamespace(context=context, offloaded=leaving[context])

    monkeypatch.setattr(bench_run, "place", place)
    cells = SimpleNamespace(batch=(1,), caches=list(leaving))
    assert bench_run._place(None, {}, torch.bfloat16, cells, 16, host=100).context == chosen
