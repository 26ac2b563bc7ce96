"""A whole run: what it writes, and what it does with unusual models and recipes."""

import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import klquant.pipeline.run as pipeline
from klquant.calibrate import experts, sharing
from klquant.calibrate.walk import LayerWalk
from klquant.checkpoint.index import read_json
from klquant.checkpoint.quantized import QuantizedReader
from klquant.checkpoint.reader import CheckpointReader
from klquant.checkpoint.verify import verify
from klquant.core.spec import WeightSpec
from klquant.errors import UserError
from klquant.pipeline.report import Silent, UnitDone
from klquant.quantize.rtn import rtn
from tests.pipeline.build import ROUND, RULES, TEXT, digests, recipe, run, unfinished, weights
from tests.recipe.build import WIDE
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tensors, write_checkpoint

W1 = "model.layers.1.block_sparse_moe.experts.{}.w1"


class Log(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.units: list[str] = []
        self.finished = -1
        self.phases: list[tuple[str, str]] = []
        self.summaries: list[UnitDone] = []
        self.notes: list[str] = []

    def begin(self, units, finished):
        self.units, self.finished = units, finished

    def phase(self, unit, phase, fraction):
        assert 0 <= fraction <= 1
        self.phases.append((unit, phase))

    def done(self, unit):
        self.summaries.append(unit)

    def note(self, text):
        self.notes.append(text)


def change(model, name, edit):
    """Change one tensor of a checkpoint in place."""
    shard = CheckpointReader.open(model).tensors[name].shard
    tensors = load_file(shard)
    tensors[name] = edit(tensors[name]).contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.fixture
def copied(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copied")


@pytest.fixture(scope="module")
def provenance(whole):
    return read_json(whole / "klquant.json")


def test_the_result_is_whole(whole, model):
    assert verify(whole) == []
    assert not unfinished(whole).exists() and not [p for p in whole.iterdir() if p.name.startswith(".")]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (whole / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize("rules", [RULES, ROUND])
def test_weights_are_near_the_original_and_the_rest_is_untouched(model, tmp_path, rules):
    run(model, tmp_path / "out", recipe(rules))
    before, after = CheckpointReader.open(model), QuantizedReader.open(tmp_path / "out")
    for name in before.tensors:
        old, new = before.weight(name, torch.float32), after.weight(name, torch.float32)
        spec = after.spec(name.removesuffix(".weight"))
        # Corrections move weights on purpose; two weights mixed up would differ by 1.4 times their size.
        most = 0 if spec is None else 0.7 if rules == RULES else {4: 0.15, 8: 0.01}[spec.bits]
        assert (old - new).norm() <= most * old.norm(), name


def test_provenance_repeats_the_run(provenance, whole):
    assert provenance["schema"] == 1 and provenance["target"] == "klquant" and provenance["changes"] == []
    assert provenance["recipe"]["name"] == "small"
    assert {"klquant", "torch", "compressed-tensors"} <= set(provenance["versions"])
    text = provenance["calibration"]
    assert text["windows"] * text["window"] >= 256 and text["sources"][0]["name"] == "tiny"
    quantized = {module for module, spec in QuantizedReader.open(whole).specs.items() if spec}
    assert set(provenance["tensors"]) == quantized
    assert set(provenance["shards"]) == {p.name for p in whole.glob("*.safetensors")}
    assert "/" not in "".join(provenance["versions"].values())


def test_every_expert_has_its_tokens(provenance):
    tokens = provenance["expert_tokens"]
    routed = provenance["calibration"]["windows"] * 64 * 2  # two experts a token
    assert list(tokens) == ["1"] and len(tokens["1"]) == 4 and sum(tokens["1"]) == routed
    for expert, seen in enumerate(tokens["1"]):
        assert provenance["tensors"][W1.format(expert)]["tokens"] == seen


def test_a_watcher_hears_everything_in_order(model, tmp_path):
    log = Log()
    run(model, tmp_path / "out", watcher=log)
    assert (log.units, log.finished) == (["embedding", "layer 0", "layer 1", "head"], 0)
    assert [s.name for s in log.summaries] == log.units
    assert log.summaries[0].mean_error is None and log.summaries[1].worst_tensor.startswith("model.layers.0.")
    assert list(dict.fromkeys(unit for unit, _ in log.phases)) == ["calibration", *log.units]
    sizes = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert sum(s.nbytes for s in log.summaries) == sizes


DOWN_ONLY = "\n  - {tensors: routed_experts, roles: [w2], weights: {bits: 4, group_size: 32}, algorithm: awq, why: w}\n"


@pytest.fixture(scope="module")
def uneven(model, tmp_path_factory):
    """Some hidden units of the experts are far more active than others: worth a scale of their own to AWQ."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("uneven") / "model")
    level = torch.logspace(0, 3, 32, base=4).unsqueeze(-1)
    for expert in range(4):
        change(folder, f"{W1.format(expert)}.weight".replace("w1", "w3"), lambda w: (w * level).to(w.dtype))
    return folder


@pytest.fixture(
    scope="module", params=[RULES, RULES.replace("gptq", "awq"), DOWN_ONLY], ids=["gptq", "awq", "awq of w2 alone"]
)
def in_blocks(uneven, tmp_path_factory, request):
    """A recipe, and the weights of its run with the experts in two blocks."""
    chosen = recipe(request.param, gptq="refine_rounds: 1")
    out = tmp_path_factory.mktemp("blocks") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(experts.BLOCK, "cpu", 2)
        run(uneven, out, chosen)
    return chosen, weights(out)


@pytest.fixture
def blocks_of_two(monkeypatch):
    monkeypatch.setitem(experts.BLOCK, "cpu", 2)


def test_memory_decides_nothing_but_speed(uneven, tmp_path, monkeypatch, in_blocks, blocks_of_two):
    """One block's moments at once, streams in files."""
    monkeypatch.setattr("klquant.pipeline.placement.MEMORY_SHARE", {"cpu": 0})
    monkeypatch.setattr(experts, "free_memory", lambda device: 1)
    log = Log()
    run(uneven, tmp_path / "out", in_blocks[0], watcher=log)
    assert ("layer 1", "experts 0–1: w2") in log.phases
    assert any("are kept in files beside the output" in note for note in log.notes)
    assert weights(tmp_path / "out") == in_blocks[1]


@pytest.mark.parametrize("group", [1, 2])
def test_two_devices_write_the_bytes_of_one(group, uneven, tmp_path, monkeypatch, in_blocks, blocks_of_two):
    """They share the experts, and the groups of batches where each is summed by itself, as on cards."""
    monkeypatch.setattr(sharing, "SPLIT", {"cpu"})
    monkeypatch.setattr(sharing, "GROUP", group)
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", {"cpu": 64})
    shares, batches = [], []
    real, real_norm = experts._quantize_blocks, LayerWalk.norm
    monkeypatch.setattr(experts, "_quantize_blocks", lambda *args: (shares.append(args[1]), real(*args)))
    monkeypatch.setattr(LayerWalk, "norm", lambda *args: (batches.append(threading.get_ident()), real_norm(*args))[1])
    run(uneven, tmp_path / "one", in_blocks[0])
    assert [len(blocks) for blocks in shares] == [2] and len(set(batches)) == 1
    shares.clear(), batches.clear()
    monkeypatch.setattr(pipeline, "pick_devices", lambda names: [torch.device("cpu")] * 2)
    run(uneven, tmp_path / "two", in_blocks[0])
    assert [len(blocks) for blocks in shares] == [1, 1] and len(set(batches)) > 1
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


@pytest.mark.parametrize(("owner", "name"), [(experts, "_hidden_moments"), (LayerWalk, "fit")])
def test_running_out_of_memory_makes_smaller_steps(
    uneven, tmp_path, monkeypatch, in_blocks, blocks_of_two, owner, name
):
    """While moments are summed, and when a block's w2 is fitted, its scale folded already."""
    real, failed = getattr(owner, name), []

    def once(*args, **named):
        if not failed and (name != "fit" or args[1] == ("mlp.w2",)):
            failed.append(args)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **named)

    monkeypatch.setattr(owner, name, once)
    log = Log()
    run(uneven, tmp_path / "out", in_blocks[0], watcher=log)
    assert failed and "cpu: out of memory: moments of 2 experts at once" in log.summaries[2].fallbacks
    assert weights(tmp_path / "out") == in_blocks[1]


@pytest.mark.parametrize(
    ("devices", "message"),
    [("cpu,meta", "unknown device 'meta'"), ("cpu,cuda:99", "device cuda:99: .* found here")],
)
def test_devices_that_are_not_there(model, tmp_path, devices, message):
    with pytest.raises(UserError, match=message):
        run(model, tmp_path / "out", device=devices)


def test_small_shards_hold_the_same_tensors(model, tmp_path, whole):
    run(model, tmp_path / "out", shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 4 and verify(tmp_path / "out") == []
    one, other = CheckpointReader.open(whole), CheckpointReader.open(tmp_path / "out")
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)


def test_an_empty_folder_and_missing_parents_are_fine(model, tmp_path, whole_digests):
    out = tmp_path / "a" / "b" / "out"
    run(model, out)
    shutil.rmtree(out)
    out.mkdir()
    run(model, out)
    assert digests(out) == whole_digests


def test_rounding_needs_no_tokenizer_and_no_text(copied, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (copied / file).unlink()
    provenance = run(copied, tmp_path / "out", recipe(ROUND))
    assert verify(tmp_path / "out") == [] and provenance["calibration"] is None
    assert {record["measured"] for record in provenance["tensors"].values()} == {"weights"}
    with pytest.raises(UserError, match="tokenizer"):
        run(copied, tmp_path / "calibrated")
    assert not unfinished(tmp_path / "calibrated").exists()


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "rtn"])
def test_asymmetric_weights(model, tmp_path, algorithm):
    rules = RULES.replace("gptq", algorithm).replace("group_size: 32", "group_size: 32, symmetric: false")
    run(model, tmp_path / "out", recipe(rules))
    assert verify(tmp_path / "out") == []
    assert f"{W1.format(0)}.weight_zero_point" in CheckpointReader.open(tmp_path / "out").tensors


@pytest.mark.parametrize("bits", [3, 8])
def test_whole_rows_and_other_bits(model, tmp_path, bits):
    run(model, tmp_path / "out", recipe(RULES.replace("bits: 4, group_size: 32", f"bits: {bits}, group_size: -1")))
    assert verify(tmp_path / "out") == []


def test_a_result_for_vllm(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", **WIDE | {"num_hidden_layers": 2, "num_experts": 2,
        "linear_attn_config": WIDE["linear_attn_config"] | {"full_attn_layers": [2], "kda_layers": [1]}})  # fmt: skip
    rules = RULES.replace("group_size: 32", "group_size: 128")
    provenance = run(model, tmp_path / "out", recipe(rules), target="vllm")
    assert verify(tmp_path / "out") == []
    assert [(c["class"], c["count"]) for c in provenance["changes"]] == [("kda_proj", 3)]
    tensors = CheckpointReader.open(tmp_path / "out").tensors
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == "BF16"


def test_experts_that_see_no_token_are_quantized_named_and_counted(copied, tmp_path):
    def never(bias):
        bias = bias.clone()
        bias[2] = -100
        return bias

    change(copied, "model.layers.1.block_sparse_moe.gate.e_score_correction_bias", never)
    provenance = run(copied, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert provenance["expert_tokens"]["1"][2] == 0 and min(provenance["expert_tokens"]["1"][:2]) > 0
    for role in ("w1", "w2", "w3"):
        record = provenance["tensors"][W1.format(2).replace("w1", role)]
        assert record["tokens"] == 0 and "no token reached it" in record["fallback"] and record["error"] < 0.1
    assert len(provenance["fallbacks"]) == 3
    log = Log()
    run(copied, tmp_path / "again", watcher=log)
    assert len(log.summaries[2].fallbacks) == 3
    rounded = run(copied, tmp_path / "rounded", recipe(RULES.replace("gptq", "rtn", 1)))
    assert rounded["tensors"][W1.format(2)]["tokens"] == 0 and rounded["fallbacks"] == []


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_inputs_that_calibration_never_saw_keep_their_weights(copied, tmp_path, algorithm):
    """About as well as RTN does, but for the length that AWQ's scale may give the column."""
    norm, name = (f"model.layers.0.{x}.weight" for x in ("input_layernorm", "self_attn.q_proj"))
    level = torch.logspace(-2, 1, 64)
    level[10] = 0
    change(copied, norm, lambda w: (w * level).to(w.dtype))
    rules = f"\n  - {{tensors: kda_proj, weights: {{bits: 8, group_size: 32}}, algorithm: {algorithm}, why: w}}\n"
    run(copied, tmp_path / "out", recipe(rules, gptq="refine_rounds: 2"))
    exact, found = (
        reader.open(folder).weight(name, torch.float32)
        for reader, folder in ((CheckpointReader, copied), (QuantizedReader, tmp_path / "out"))
    )
    rounded = rtn(exact, WeightSpec(bits=8, group_size=32)).decode()
    lost, by_rounding = (1 - torch.cosine_similarity(exact.double(), w.double(), dim=0)[10] for w in (found, rounded))
    assert lost < 1.5 * by_rounding


def test_text_is_drawn_until_the_experts_are_covered(model, tmp_path):
    provenance = run(
        model, tmp_path / "out", recipe(text=TEXT.replace("min_expert_tokens: 32", "min_expert_tokens: 99"))
    )
    coverage, calibration = provenance["calibration"]["coverage"], provenance["calibration"]
    assert calibration["windows"] == coverage["wanted"] == min(8, -(-99 // (coverage["rate"] * 64))) > 4


def test_a_hessian_that_is_not_positive_definite_is_damped_and_recorded(model, tmp_path):
    """Two tokens cannot span 64 inputs; next to no damping does not mend that."""
    text = "calibration: {mix: tiny, tokens: 4, window: 4, min_expert_tokens: 0, max_tokens: 4}"
    chosen = recipe(text=text, gptq="refine_rounds: 0, damp: 1.0e-12, shrink_tokens: 0, correction: 0")
    provenance = run(model, tmp_path / "out", chosen)
    assert verify(tmp_path / "out") == []
    damped = [line for line in provenance["fallbacks"] if "Hessian not positive definite: damping raised" in line]
    assert damped
    for line in damped:
        assert provenance["tensors"][line.partition(":")[0]]["damp"] > 1e-12


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.A_log", f"{W1.format(1)}.weight"])
@pytest.mark.parametrize("rules", [RULES, ROUND])
def test_a_weight_that_is_not_finite_is_named(copied, tmp_path, bad, name, rules):
    def spoil(tensor):
        flat = tensor.clone().view(-1)
        flat[-1] = float(bad)
        return flat.view_as(tensor)

    change(copied, name, spoil)
    with pytest.raises(UserError, match=f"{name} holds NaN or infinite values") as error:
        run(copied, tmp_path / "out", recipe(rules))
    assert ".safetensors: " in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "rules", "message"),
    [
        ("model.layers.0.mlp.down_proj.weight", RULES, "down_proj.weight: holds values far too large"),
        ("model.layers.0.mlp.down_proj.weight", ROUND, "down_proj.weight: holds values far too large"),
        ("model.layers.0.self_attn.v_conv1d.weight", RULES, "o_proj.weight: its calibration inputs are not finite"),
    ],
)
def test_a_damaged_weight_that_is_finite_is_found_when_something_overflows(copied, tmp_path, name, rules, message):
    """A flipped exponent bit makes 3e38 of a weight: a number, but no use."""
    change(copied, name, lambda tensor: torch.full_like(tensor, 3e38))
    with pytest.raises(UserError, match=message) as error:
        run(copied, tmp_path / "out", recipe(rules))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    left = {path.name for path in unfinished(tmp_path / "out").iterdir()}
    assert left == {".state", "model-00001-of-00004.safetensors"}


def test_a_tensor_that_does_not_belong_there_is_refused(tmp_path):
    raw = tiny_config()
    model = write_checkpoint(tmp_path / "model", raw, tiny_tensors(raw) | {"model.layers.9.stray": torch.zeros(3)})
    with pytest.raises(UserError, match=r"tensor 'model\.layers\.9\.stray' is not part of a Kimi-Linear checkpoint"):
        run(model, tmp_path / "out")
    assert not unfinished(tmp_path / "out").exists()


def test_provenance_is_json_without_nan(whole):
    json.loads((whole / "klquant.json").read_text(), parse_constant=pytest.fail)


def test_side_files_are_hashed_and_a_missing_tokenizer_is_said(copied, tmp_path):
    """One is needed to calibrate, and none to round."""
    log = Log()
    files = run(copied, tmp_path / "out", recipe(ROUND), log)["files"]
    assert {"tokenizer.json", "config.json", "model.safetensors.index.json"} <= files.keys() and log.notes == []
    assert verify(tmp_path / "out") == []
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: differs from what was written" in verify(tmp_path / "out")[0]
    (copied / "tokenizer.json").unlink()
    run(copied, tmp_path / "bare", recipe(ROUND), log)
    assert len(log.notes) == 1 and "no tokenizer.json" in log.notes[0] and verify(tmp_path / "bare") == []
