"""Resuming, sharing the reference, streaming, determinism, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from klquant.errors import UserError
from klquant.evaluate import trace
from klquant.evaluate.options import Silent
from klquant.evaluate.run import UNFINISHED, evaluate
from tests.checkpoint.build import quantized_checkpoint
from tests.evaluate.conftest import WINDOW
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tensors, write_checkpoint


class Stages(Silent):
    """Remembers stages and their work, and may be told to stop."""

    def __init__(self, stop_after=None):
        self.stages, self.work, self.notes, self.stop_after = [], [], [], stop_after

    def begin(self, stage, total):
        self.stages.append((stage, total))
        self.work.append(0)

    def advance(self, work):
        self.work[-1] += work
        if self.stop_after is not None and sum(self.work) >= self.stop_after:
            raise KeyboardInterrupt

    def note(self, text):
        self.notes.append(text)


def same(a, b):
    return a.model_dump(exclude={"provenance"}) == b.model_dump(exclude={"provenance"})


@pytest.fixture(autouse=True)
def one_window_a_batch(monkeypatch):
    monkeypatch.setitem(trace.BATCH_TOKENS, "cpu", WINDOW)


def test_progress_adds_up_to_what_was_announced(variant, tiny, options, tmp_path):
    watcher = Stages()
    evaluate(variant, tiny, tmp_path / "r.json", replace(options, floor=True), watcher)
    assert [stage for stage, _ in watcher.stages] == ["reference", "floor, bfloat16", "model"]
    assert watcher.work == [total for _, total in watcher.stages] == [3 * 2 * WINDOW * 5] * 3


@pytest.mark.parametrize("windows_done", [0, 2, 6, 9])
def test_an_interrupted_evaluation_goes_on_where_it_was(variant, tiny, options, tmp_path, windows_done):
    """Two stages (reference, model) of six windows; each passes four layers and the head."""
    out, options = tmp_path / "r.json", replace(options, floor=False)
    with pytest.raises(KeyboardInterrupt):
        evaluate(variant, tiny, out, options, Stages(stop_after=(windows_done * 5 + 2) * WINDOW))
    assert not out.exists()
    watcher = Stages()
    resumed = evaluate(variant, tiny, out, options, watcher)
    assert sum(watcher.work) == (12 - windows_done) * 5 * WINDOW
    assert same(resumed, evaluate(variant, tiny, tmp_path / "again.json", options))
    assert {p.name for p in tmp_path.iterdir()} == {"r.json", "again.json", "reference-cache"}


def test_an_interrupted_run_for_another_purpose_is_not_resumed(variant, tiny, options, tmp_path):
    out = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(variant, tiny, out, options, Stages(stop_after=9 * 5 * WINDOW))
    watcher = Stages()
    evaluate(tiny, tiny, out, options, watcher)
    assert watcher.stages == [("model", 6 * 5 * WINDOW)]


def test_variants_share_one_reference_pass(variant, tiny, options, tmp_path):
    evaluate(variant, tiny, tmp_path / "a.json", options)
    watcher = Stages()
    evaluate(tiny, tiny, tmp_path / "b.json", options, watcher)
    assert [stage for stage, _ in watcher.stages] == ["model"]
    watcher = Stages()
    evaluate(tiny, tiny, tmp_path / "c.json", replace(options, windows=2), watcher)
    assert [stage for stage, _ in watcher.stages] == ["reference", "model"], "other windows, another reference"


def test_a_damaged_reference_window_is_named(variant, tiny, options, tmp_path):
    evaluate(variant, tiny, tmp_path / "a.json", options)
    file = next(iter(sorted(tmp_path.glob("reference-cache/*/window-*"))))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"window-00000\.safetensors: damaged .* delete it"):
        evaluate(variant, tiny, tmp_path / "a.json", options)


def test_a_model_that_does_not_fit_is_streamed_to_the_same_result(variant, tiny, options, tmp_path, monkeypatch):
    whole = evaluate(variant, tiny, tmp_path / "whole.json", options)
    monkeypatch.setattr(trace, "RESIDENT_SHARE", 0)
    monkeypatch.setitem(trace.ROUND_TOKENS, "cpu", 4 * WINDOW)
    streamed = evaluate(variant, tiny, tmp_path / "s.json", replace(options, reference_cache=tmp_path / "other"))
    assert same(streamed, whole)


def test_two_runs_find_the_same(variant, tiny, options, tmp_path):
    caches = [replace(options, store="topk", reference_cache=tmp_path / name) for name in "ab"]
    first, again = (evaluate(variant, tiny, tmp_path / "r.json", o) for o in caches)
    assert same(first, again)


def test_a_folder_of_something_else_is_not_touched(variant, tiny, options, tmp_path):
    (tmp_path / f"r.json{UNFINISHED}").mkdir()
    precious = tmp_path / f"r.json{UNFINISHED}" / "precious"
    precious.touch()
    with pytest.raises(UserError, match="holds something else"):
        evaluate(variant, tiny, tmp_path / "r.json", options)
    assert precious.exists()


def test_the_top_store_agrees_with_the_full_one(variant, tiny, options, tmp_path):
    full, top = (evaluate(variant, tiny, tmp_path / "r.json", replace(options, store=s)) for s in ("full", "topk"))
    assert top.reference.store == "topk" and full.reference.store == "full"
    assert 0 < top.overall.kld.store_error < 0.1 * top.overall.kld.mean
    difference = abs(top.overall.kld.mean - full.overall.kld.mean)
    assert difference <= 1.5 * (top.overall.kld.store_error + full.overall.kld.store_error)
    assert top.overall.top1 == full.overall.top1 and top.overall.perplexity == full.overall.perplexity


def test_a_large_reference_is_stored_by_its_top(variant, tiny, options, tmp_path, monkeypatch):
    monkeypatch.setattr("klquant.evaluate.run.FULL_BYTES", 1000)
    assert evaluate(variant, tiny, tmp_path / "r.json", options).reference.store == "topk"


def test_without_a_reference_there_is_perplexity_only(variant, tiny, options, tmp_path):
    alone = evaluate(variant, None, tmp_path / "r.json", options)
    assert alone.reference is alone.overall.kld is alone.overall.top1 is None and alone.positions == []
    assert not (tmp_path / "reference-cache").exists()
    assert alone.overall.perplexity == evaluate(variant, tiny, tmp_path / "r.json", options).overall.perplexity


def test_where_it_differs(result):
    first, *_, last = result.layers
    assert [layer.attention for layer in result.layers] == ["kda", "kda", "kda", "mla"]
    assert first.router_overlap is None and first.expert_tokens is None and last.state_error is None
    assert 0 < first.stream_error < last.stream_error < 1
    for layer in result.layers[:3]:
        assert 0 < layer.state_error < 1
    for layer in result.layers[1:]:
        assert 0.5 < layer.router_overlap < 1
        assert sum(layer.expert_tokens) == 6 * WINDOW * 2
    assert result.floor.layers[1].router_overlap > result.layers[1].router_overlap


def test_text_that_does_not_fill_the_windows_is_counted(variant, tiny, options, tmp_path):
    watcher = Stages()
    result = evaluate(variant, tiny, tmp_path / "r.json", replace(options, windows=10**6, window=700), watcher)
    assert result.notes == watcher.notes and "has text for" in result.notes[0]
    assert result.overall.windows == sum(d.windows for d in result.data.domains)
    with pytest.raises(UserError, match=r"code\.jsonl: \d+ tokens do not fill one window of 999999"):
        evaluate(variant, tiny, tmp_path / "r.json", replace(options, window=999_999))


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_the_layer_where_values_blow_up_is_named(tiny, options, tmp_path, layer):
    raw = tiny_config()
    tensors = tiny_tensors(raw)
    name = "mlp.down_proj" if layer == 0 else "block_sparse_moe.shared_experts.down_proj"
    tensors[f"model.layers.{layer}.{name}.weight"].fill_(3e38)
    broken = write_checkpoint(tmp_path / "broken", raw, tensors)
    with pytest.raises(UserError, match=rf"NaN or infinite values first appear in the output of layer {layer} "):
        evaluate(broken, tiny, tmp_path / "r.json", options)
    assert not (tmp_path / "r.json").exists()


def test_infinite_logits_are_refused(tiny, options, tmp_path):
    raw = tiny_config()
    tensors = tiny_tensors(raw)
    tensors["lm_head.weight"].fill_(3e38)
    broken = write_checkpoint(tmp_path / "broken", raw, tensors)
    with pytest.raises(UserError, match="NaN or infinite logits"):
        evaluate(broken, tiny, tmp_path / "r.json", options)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"vocab_size": 400}, "vocab_size is 400, but .* has 320"),
        ({"num_experts": 4}, "num_experts is 4, but .* has 8"),
        ({"hidden_size": 128}, "hidden_size is 128, but .* has 64"),
        ({"routed_scaling_factor": 1.5}, "routed_scaling is 1.5, but .* has"),
    ],
)
def test_a_model_of_another_shape_is_refused(tiny, options, tmp_path, change, text):
    other = tiny_checkpoint(tmp_path / "other", **change)
    with pytest.raises(UserError, match=rf"{text}.*; the reference must be the model that was quantized"):
        evaluate(other, tiny, tmp_path / "r.json", options)
    assert not any(tmp_path.glob("r.json*"))


def test_another_tokenizer_is_refused_unless_it_cuts_alike(tiny, options, tmp_path):
    other = shutil.copytree(tiny, tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))  # other bytes, same tokens
    evaluate(other, tiny, tmp_path / "r.json", options)
    swapped = json.loads(file.read_text())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    file.write_text(json.dumps(swapped))
    with pytest.raises(UserError, match=r"tokenizer\.json: cuts the text into other tokens than"):
        evaluate(other, tiny, tmp_path / "r.json", options)


def test_a_missing_reference_or_output_folder_is_refused(variant, tiny, options, tmp_path):
    with pytest.raises(UserError, match="none"):
        evaluate(variant, tmp_path / "none", tmp_path / "r.json", options)
    with pytest.raises(UserError, match="choose another output"):
        evaluate(variant, tiny, tmp_path / "none" / "r.json", options)


def test_evaluating_on_the_calibration_text_is_noted(variant, tiny, options, texts, tmp_path):
    model = shutil.copytree(variant, tmp_path / "m")
    provenance = json.loads((model / "klquant.json").read_text())
    provenance["calibration"] = {"sources": [{"origin": str(texts / "code.jsonl")}]}
    (model / "klquant.json").write_text(json.dumps(provenance))
    notes = evaluate(model, tiny, tmp_path / "r.json", options).notes
    assert f"the model was calibrated on text it is evaluated on: {texts / 'code.jsonl'}" in notes


def test_window_files_hold_what_they_say(variant, tiny, options, tmp_path):
    """The reference's choices and states, as the model computes them with a state."""
    evaluate(variant, tiny, tmp_path / "r.json", options)
    window = load_file(next(iter(sorted(tmp_path.glob("reference-cache/*/window-*")))))
    assert {name: tuple(t.shape) for name, t in window.items()} == {
        "store.logp": (WINDOW, 320), "top1": (WINDOW,), "nll": (WINDOW - 1,), "experts": (3, WINDOW, 2),
        "states": (3, 2, 32, 32), "stream": (4, 3, 64),
    }  # fmt: skip
    assert window["store.logp"].exp().sum(-1).sub(1).abs().max() < 1e-2
    assert window["experts"].dtype == torch.int16


def test_a_quantized_reference_is_refused(tiny, options, tmp_path):
    quantized_checkpoint(tmp_path / "quantized", tiny_config())
    with pytest.raises(UserError, match="is quantized already; give the 16-bit one"):
        evaluate(tiny, tmp_path / "quantized", tmp_path / "r.json", options)
    assert not (tmp_path / "r.json").exists()
