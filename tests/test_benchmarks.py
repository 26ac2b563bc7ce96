"""The benchmarks of whole runs go through, narrow and on a CPU."""

import sys

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import evaluate_scale, kernel_cases, kernel_peers, kernels, quantize_scale, serving_http
from benchmarks.kernel_cases import Case
from benchmarks.kernel_peers import Timed
from benchmarks.peers.job import make_job, module_name
from benchmarks.synthetic import bytes_of, make_config, open_checkpoint
from klquant.checkpoint.names import parse_name
from klquant.checkpoint.reader import CheckpointReader


@pytest.fixture(autouse=True)
def gradients_stay_on():
    """Benchmarks turn them off for their own process."""
    with torch.enable_grad():
        yield


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


def test_serving_over_http():
    command = ["--pretend", "--cases", "1x5,3x70", "--new", "4", "--runs", "1"]
    done = CliRunner().invoke(serving_http.main, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert [line.split()[:3] for line in done.output.splitlines()[2:]] == [["1", "x", "5"], ["3", "x", "70"]]


def test_layers_of_a_kind_share_their_bytes_on_the_disk(tmp_path):
    reader = open_checkpoint(tmp_path / "small", make_config(27, small=True), torch.device("cpu"), small=True)
    reader.check_complete()
    read, stored = bytes_of(reader.tensors)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) < 1.1 * stored < 0.3 * read
    name = "model.layers.{}.self_attn.q_proj.weight"
    dense, kda, again = (reader.read(name.format(layer)) for layer in (0, 1, 25))
    assert torch.equal(kda, again) and not torch.equal(kda, dense)


@pytest.mark.parametrize(("name", "bits"), [("BF16", 4), ("NF4", 4), ("int8pack", 8)])
def test_a_peer_multiplies_by_the_weight_it_was_given(name, bits):
    if name == "NF4":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(bits)
    w = kernel_cases.random_weight((48, 256), bits, "cpu")
    peer = kernel_peers.PEERS[name][bits](w)
    x = torch.randn(5, 256).bfloat16()
    y = peer.run(x, *peer.tensors)
    assert kernel_peers.product_error(y, x, peer.exact()) < kernels.MOST_ERROR
    assert (peer.exact().float() - w.decode()).norm() < kernel_peers.MOST_CHANGE * w.decode().norm()
    assert kernel_peers.product_error(y, x, w.decode().roll(1, 0)) > 0.5


def test_a_peer_that_is_absent_or_wrong_has_no_time_but_a_reason(monkeypatch):
    w = kernel_cases.random_weight((16, 1024), 8, "cpu")
    tenth = kernel_peers.PEERS["BF16"][8](w)._replace(run=lambda x, w: 1.1 * (x @ w.T))
    monkeypatch.setitem(sys.modules, "gemlite", None)
    monkeypatch.setitem(kernel_peers.PEERS, "a tenth off", {8: lambda w: tenth})
    monkeypatch.setattr(kernel_cases, "inputs", lambda case: torch.randn(case.tokens, 1024).bfloat16())
    monkeypatch.setattr(kernel_cases, "poison", lambda values: None)
    monkeypatch.setattr(kernel_peers, "_weight", lambda shape, bits: w)
    absent, wrong = (kernel_peers.time_peer(name, "shared down", 8, 3) for name in ("gemlite", "a tenth off"))
    assert absent.us is None and "gemlite" in absent.reason
    assert wrong.us is None and 0.05 < wrong.error < 0.2 and "off by 0.1" in wrong.reason


def test_kernel_table_shows_every_peer_or_why_not():
    def row(shape: str, bits: int, us: float, **peers: Timed) -> kernels.Row:
        return kernels.Row(Case(shape, bits, 1), 1e-3, us, 1000.0, 0.5, 0.01, 0.01, peers)

    absent = Timed(reason="ModuleNotFoundError: No module named 'gemlite'")
    rows = [
        row("MLA q·kv_a", 4, 11.0, BF16=Timed(20.0, 2e-3), gemlite=absent),
        row("MLA q·kv_a", 8, 21.5, BF16=Timed(20.0, 2e-3), gemlite=absent),
        row("KDA q·k·v", 8, 20.9, BF16=Timed(20.0, 2e-3), gemlite=Timed(22.0, 9e-3)),
    ]
    names = ("BF16", "gemlite", "tinygemm")
    head, first, *_ = kernels.table(rows, names).splitlines()
    assert all(name in head for name in names)
    assert first.split()[:8] == ["MLA", "q·kv_a", "4", "1", "11.0", "20.0", "–", "0.55"]
    notes = kernels.notes(rows, names)
    assert "more than 5%: 1 of 3" in notes and "MLA q·kv_a, 8 bits, M = 1: 1.07" in notes
    assert "2 cases from MLA q·kv_a, M = 1: ModuleNotFoundError: No module named 'gemlite'" in notes
    assert "gemlite: 1 timed, largest error 9.0e-03" in notes and "tinygemm: 0 timed" in notes


@pytest.mark.gpu
def test_peers_on_a_gpu():
    for name in ("BF16", "tinygemm"):
        timed = kernel_peers.time_peer(name, "shared down", 4, 4)
        assert timed.us and timed.error < kernels.MOST_ERROR, timed
    assert kernel_peers.time_peer("BF16", kernel_cases.LAYER, 4, 16).us


def test_a_peers_weights_get_back_under_the_hubs_names(tmp_path, demo_model):
    job = make_job(demo_model, "int4", str(demo_model.parent / "text" / "calib"), windows=2, device="cpu")
    assert job.ids_WS.shape == (2, 2048) and job.routed.bits == 4
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(demo_model))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    experts = {name for name in job.specs if ".experts." in name}
    fused = {name for name, module in model.named_modules() if type(module).__name__.endswith("Experts")}
    assert {name.rsplit(".", 2)[0] for name in experts} == fused
    assert job.specs.keys() - experts <= linear

    reader, sizes = job.reader, {name: info.shape for name, info in job.reader.tensors.items()}
    made = {}
    for name, shape in sizes.items():
        key = parse_name(name, reader.config)
        if key.is_matrix and (module := module_name(key.module, key.cls)) in job.specs:
            made[module] = torch.full(shape, float(len(made)))
    job.write(tmp_path / "out", made)
    written = CheckpointReader.open(tmp_path / "out")
    assert written.tensors.keys() == reader.tensors.keys()
    down = written.read("model.layers.1.block_sparse_moe.experts.3.w2.weight")
    assert torch.equal(down, made["model.layers.1.mlp.experts.3.down_proj"])
    kept = "model.layers.1.self_attn.b_proj.weight"
    assert torch.equal(written.read(kept), reader.read(kept))
    made.popitem()
    with pytest.raises(ValueError, match="not the modules asked for"):
        job.write(tmp_path / "incomplete", made)
    assert not (tmp_path / "incomplete").exists()
