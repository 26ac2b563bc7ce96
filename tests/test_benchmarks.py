"""The benchmark of a whole run goes through, narrow and on a CPU."""

from click.testing import CliRunner

from benchmarks.quantize_scale import main


def test_quantize_scale(tmp_path):
    command = [str(tmp_path), "--small", "--layers", "4", "--recipes", "rtn-int4", "--device", "cpu", "--twice"]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0
    summary = done.output.partition("summary")[2]
    assert "EXTRAPOLATED to 27 layers" in summary and "equal bytes" in summary
    assert not (tmp_path / "out").exists()
