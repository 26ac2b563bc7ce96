"""One part at a time: what is mixed, that parts are all and disjoint, the budget, resuming, and what is refused."""

import shutil
from dataclasses import replace
from math import prod
from types import SimpleNamespace

import pytest
import torch

from klquant.checkpoint.names import TensorClass, expected_tensors, parse_name
from klquant.checkpoint.quantized import QuantizedReader
from klquant.core.spec import WeightSpec
from klquant.errors import UserError
from klquant.evaluate import passes as passes_module
from klquant.evaluate import trace
from klquant.evaluate.baselines import BaselineModel, plan_for
from klquant.evaluate.run import UNFINISHED, evaluate
from klquant.evaluate.sensitivity import sensitivity
from klquant.evaluate.sensitivity_result import load_sensitivity
from klquant.evaluate.source import DeviceSource, Mixed
from klquant.evaluate.tensor_parts import EVERYTHING, parts
from klquant.evaluate.trace import Runner
from tests.checkpoint.build import INT8, edit_json, quantized_checkpoint
from tests.evaluate.conftest import WINDOW
from tests.evaluate.test_run import Stages
from tests.pipeline.build import recipe
from tests.tiny import tiny_config, tiny_tensors, write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def measure(tiny, variant, options, reference_cache, tmp_path):
    """The variant's parts in the tiny model, into tmp_path/s.json."""

    def call(quantizer=variant, by="class", minutes=None, watcher=None, model=tiny, **changes):
        chosen = replace(options, reference_cache=reference_cache, **changes)
        clock = {} if not hasattr(watcher, "clock") else {"clock": watcher.clock}
        return sensitivity(model, quantizer, tmp_path / "s.json", by, chosen, minutes, watcher, **clock)

    return call


def same(a, b):
    left, right = (x.model_dump(exclude={"provenance": True, "entries": {"__all__": {"seconds"}}}) for x in (a, b))
    return left == right


def entry(result, name):
    return next(e for e in result.entries if e.part.name == name)


def grids(seed, config):
    """Some matrices on some grids, at random."""
    generator = torch.Generator().manual_seed(seed)
    choices = [None, None, WeightSpec(bits=3), WeightSpec(bits=4, group_size=32), WeightSpec(bits=8, group_size=-1)]
    keys = [key for key in (parse_name(name, config) for name in expected_tensors(config)) if key.is_matrix]
    return {key.module: choices[int(torch.randint(5, (), generator=generator))] for key in keys}


def stored_bytes(reader):
    return {name: info.nbytes for name, info in reader.files.tensors.items()}


@pytest.mark.parametrize("by", ["class", "layer"])
@pytest.mark.parametrize("seed", range(4))
def test_parts_have_every_quantized_matrix_once(tiny, by, seed):
    reader = QuantizedReader.open(tiny)
    config, nbytes = reader.config, stored_bytes(reader)
    specs = {m: s and s.model_copy(update={"group_size": 32}) for m, s in grids(seed, config).items()}
    every, *rest = parts(config, specs, by, nbytes)
    quantized = {f"{module}.weight" for module, spec in specs.items() if spec is not None}
    assert every.names == quantized and every.said.name == EVERYTHING and every.said.is_whole
    assert sorted(name for part in rest for name in part.names) == sorted(quantized)
    assert len({part.said.name for part in rest}) == len(rest)
    for field in ("weights", "bytes_before", "bytes_after"):
        assert sum(getattr(part.said, field) for part in rest) == getattr(every.said, field)
    assert [p.importance for p in rest] == sorted((p.importance for p in rest), reverse=True)
    for part in rest:
        keys = [parse_name(name, config) for name in part.names]
        places = {key.layer for key in keys} if part.said.layer is not None else {key.cls for key in keys}
        assert places == {part.said.layer if part.said.layer is not None else TensorClass(part.said.tensor_class)}


def test_a_part_weighs_what_the_checkpoint_stores_for_it(tiny, variant):
    reader = QuantizedReader.open(variant)
    infos = reader.files.tensors
    before = {name: 4 * prod(shape) for name, shape in expected_tensors(reader.config).items()}
    every, *_ = parts(reader.config, reader.specs, "class", before)
    assert every.said.bytes_before == 4 * every.said.weights
    packed = sum(info.nbytes for name, info in infos.items() if name.rpartition(".")[2].startswith("weight_"))
    assert every.said.bytes_after == packed
    assert every.said.scheme == {"INT4 g32": 72, "INT8 g32": 28}


def test_nothing_mixed_is_the_reference_and_all_of_it_the_other(tiny, variant):
    base, other = (DeviceSource(QuantizedReader.open(folder), CPU) for folder in (tiny, variant))
    names = parts(other.config, other.reader.specs, "class", stored_bytes(base.reader))[0].names
    ids = torch.arange(3, 3 + WINDOW)[None]

    def last(source):
        (trace,) = Runner(source, torch.float32, CPU).run(ids, [[0]])
        return trace.hidden

    assert torch.equal(last(Mixed(base, other, frozenset(), "none")), last(base))
    assert torch.equal(last(Mixed(base, other, names, "all")), last(other))
    assert not torch.equal(last(base), last(other))


def test_everything_costs_what_the_quantized_checkpoint_does(measure, result):
    found = entry(measure(), EVERYTHING)
    assert found.overall == result.overall and found.domains == result.domains


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("head", lambda key: INT8 if key.cls == TensorClass.HEAD else None),
        ("kda_proj q k v", lambda key: INT8 if key.cls == TensorClass.KDA_PROJ and key.role != "o_proj" else None),
    ],
)
def test_a_part_costs_what_a_checkpoint_with_only_it_quantized_does(measure, tiny, options, tmp_path, name, rule):
    quantized_checkpoint(tmp_path / "only", tiny_config(), rule)
    only = evaluate(tmp_path / "only", tiny, tmp_path / "only.json", options)
    assert entry(measure(), name).overall == only.overall


def test_rounded_parts_together_are_the_rounding_baseline(measure, tiny, options, tmp_path):
    reader, chosen = QuantizedReader.open(tiny), recipe()
    found = measure(chosen, by="layer")
    assert [e.part.layer for e in found.ranked] == [None, 0, 1, 2, 3, None]
    baseline = BaselineModel(reader, plan_for(reader, chosen), "rtn")
    judged = evaluate(tiny, None, tmp_path / "r.json", options, baseline=baseline)
    assert entry(found, EVERYTHING).overall == judged.overall
    assert found.quantizer.method == "rtn" and found.quantizer.recipe == "small"


def test_the_file_is_what_was_returned(measure, tmp_path):
    found = measure()
    assert load_sensitivity(tmp_path / "s.json") == found and found.left_out == []
    assert not (tmp_path / f"s.json{UNFINISHED}").exists()


class Minutes(Stages):
    """A watcher for whom every stage takes a minute."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def clock(self):
        return self.now

    def begin(self, stage, total):
        super().begin(stage, total)
        self.now += 60


@pytest.fixture
def minutes(monkeypatch):
    watcher = Minutes()
    monkeypatch.setattr(passes_module, "time", SimpleNamespace(monotonic=watcher.clock))
    return watcher


@pytest.mark.parametrize(("budget", "measured"), [(0, 1), (1.5, 1), (2, 2), (3.99, 3), (100, 9)])
def test_a_part_is_begun_only_if_it_would_end_in_time(measure, minutes, budget, measured):
    measure(minutes=0)  # the reference, if it is not there yet, and everything
    before, minutes.now = len(minutes.stages), 0.0
    found = measure(minutes=budget, watcher=minutes)
    assert len(minutes.stages) - before == min(measured, 8) and minutes.now <= max(1, budget) * 60
    assert len(found.entries) + len(found.left_out) == 9
    assert bool(found.left_out) == (len(found.entries) < 9)


def test_call_after_call_comes_to_the_same_end(measure, tmp_path):
    whole = measure()
    (tmp_path / "s.json").unlink()
    for calls in range(1, 10):
        found = measure(minutes=0)
        assert len(found.entries) == calls
        assert load_sensitivity(tmp_path / "s.json") == found
    assert same(found, whole) and found.left_out == []
    again = Stages()
    assert measure(watcher=again) == found and again.stages == []


def test_an_interrupted_part_goes_on_where_it_was(measure, monkeypatch, tmp_path):
    monkeypatch.setitem(trace.BATCH_TOKENS, "cpu", WINDOW)
    whole = measure()
    (tmp_path / "s.json").unlink()
    total = 6 * WINDOW * 5  # windows × tokens × (layers and head)
    with pytest.raises(KeyboardInterrupt):
        measure(watcher=Stages(stop_after=total + 4 * WINDOW * 5))
    assert [e.part.name for e in load_sensitivity(tmp_path / "s.json").entries] == [EVERYTHING]
    watcher = Stages()
    assert same(measure(watcher=watcher), whole)
    assert sum(watcher.work) == 7 * total + 2 * WINDOW * 5  # four of the second part's six windows were done


def test_a_floor_that_was_measured_is_shown(measure, result, tiny, variant, options, tmp_path):
    assert measure().floor == result.floor
    alone = sensitivity(tiny, variant, tmp_path / "alone.json", "class", options, 0)
    assert alone.floor is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"windows": 2}, "other windows"), ({"by": "layer"}, "by class, not by layer"),
     ({"quantizer": recipe()}, "quantized otherwise")],
)  # fmt: skip
def test_a_file_of_other_work_is_kept_and_refused(measure, tmp_path, changes, reason):
    measure(minutes=0)
    before = (tmp_path / "s.json").read_bytes()
    with pytest.raises(UserError, match=rf"s\.json: holds another measurement \({reason}"):
        measure(**changes)
    assert (tmp_path / "s.json").read_bytes() == before


def test_a_damaged_or_strange_file_is_refused(measure, tmp_path):
    for strange in ('{"kind": "klquant-sensitiv', '{"kind": "klquant-eval"}', "[]", "notes"):
        (tmp_path / "s.json").write_text(strange)
        with pytest.raises(UserError, match=r"s\.json: is there already and no result of klquant sensitivity"):
            measure()
    (tmp_path / "s.json").write_text('{"kind": "klquant-sensitivity", "schema_version": 2}')
    with pytest.raises(UserError, match=r"result schema 2, this klquant reads 1; run klquant sensitivity again"):
        measure()


def test_parts_that_cannot_stand_alone_are_refused(measure, tiny, variant, tmp_path):
    folded = shutil.copytree(variant, tmp_path / "folded")
    edit_json(folded / "klquant.json", lambda raw: raw.update(tensors={"lm_head": {"algorithm": "awq"}}))
    with pytest.raises(UserError, match="folded: made by AWQ"):
        measure(folded)
    quantized_checkpoint(tmp_path / "theirs", tiny_config())
    raw, tensors = tiny_config(), tiny_tensors(tiny_config())
    tensors["model.layers.2.input_layernorm.weight"][5] *= 2
    moved = write_checkpoint(tmp_path / "moved", raw, tensors)
    with pytest.raises(UserError, match=r"model\.layers\.2\.input_layernorm\.weight is kept, but differs"):
        measure(tmp_path / "theirs", model=moved)
    other = shutil.copytree(variant, tmp_path / "other")
    edit_json(other / "config.json", lambda raw: raw.update(rms_norm_eps=1e-3))
    with pytest.raises(UserError, match=r"other: its config is not that of .*; it is of another model"):
        measure(other)
    edit_json(folded / "klquant.json", lambda raw: raw.update(tensors=[1]))
    with pytest.raises(UserError, match=r"klquant\.json: not as klquant quantize writes it"):
        measure(folded)


def test_only_a_quantized_checkpoint_into_one_in_16_bits(measure, tiny, variant):
    with pytest.raises(UserError, match="is not quantized; give a checkpoint of klquant quantize"):
        measure(tiny)
    with pytest.raises(UserError, match="is quantized already"):
        measure(model=variant)
    with pytest.raises(UserError, match="is quantized already"):
        measure(recipe(), model=variant)
