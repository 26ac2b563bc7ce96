"""The benchmarks of whole runs go through, narrow and on a CPU."""

import torch
from click.testing import CliRunner

from benchmarks import evaluate_scale, quantize_scale
from benchmarks.synthetic import bytes_of, make_config, open_checkpoint


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


def test_layers_of_a_kind_share_their_bytes_on_the_disk(tmp_path):
    reader = open_checkpoint(tmp_path / "small", make_config(27, small=True), torch.device("cpu"), small=True)
    reader.check_complete()
    read, stored = bytes_of(reader.tensors)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) < 1.1 * stored < 0.3 * read
    name = "model.layers.{}.self_attn.q_proj.weight"
    dense, kda, again = (reader.read(name.format(layer)) for layer in (0, 1, 25))
    assert torch.equal(kda, again) and not torch.equal(kda, dense)
