"""The benchmarks of whole runs go through, narrow and on a CPU."""

from click.testing import CliRunner

from benchmarks import evaluate_scale, quantize_scale


def test_quantize_scale(tmp_path):
    command = [str(tmp_path), "--small", "--layers", "4", "--recipes", "rtn-int4", "--device", "cpu", "--twice"]
    done = CliRunner().invoke(quantize_scale.main, command, catch_exceptions=False)
    assert done.exit_code == 0
    summary = done.output.partition("summary")[2]
    assert "EXTRAPOLATED to 27 layers" in summary and "equal bytes" in summary
    assert not (tmp_path / "out").exists()


def test_evaluate_scale(tmp_path):
    command = [str(tmp_path), "--small", "--layers", "4", "--windows", "3", "--window", "70", "--device", "cpu"]
    done = CliRunner().invoke(evaluate_scale.main, command, catch_exceptions=False)
    assert done.exit_code == 0
    rows = [line.split()[0] for line in done.output.splitlines() if line.startswith(("dense", "kda", "mla"))]
    assert rows == ["dense", "kda", "mla"]
    assert "210 tokens through 4 layers" in done.output and "EXTRAPOLATED to 27 layers" in done.output
