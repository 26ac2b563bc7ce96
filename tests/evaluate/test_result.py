"""The result file: what it holds, what is refused, and which results may stand beside one another."""

import json

import pytest

from klquant.checkpoint.writer import write_json
from klquant.errors import UserError
from klquant.evaluate.result import Quantization, Result, check_comparable, load_result
from tests.report.build import tasks as invented_tasks


@pytest.fixture
def file(result, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(result.model_dump_json())
    return path


def change(result: Result, **changes) -> Result:
    """The result with values at dotted paths replaced."""
    raw = result.model_dump(mode="json")
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = raw
        for key in parents:
            place = place[key]
        place[last] = value
    return Result.model_validate(raw)


def test_what_was_written_is_read(result, tmp_path):
    made = Quantization(recipe="int4", target="klquant", errors=[], expert_tokens={1: [2, 3]}, fallbacks=[])
    for value in (result, result.model_copy(update={"quantization": made})):
        write_json(tmp_path / "r.json", value.model_dump(mode="json"))
        assert load_result(tmp_path / "r.json") == value


def test_sizes_are_those_of_the_files(result, variant, tiny):
    ours, theirs = result.model, result.reference.checkpoint
    assert ours.size.disk == sum(f.stat().st_size for f in variant.glob("*.safetensors")) < theirs.size.disk
    assert theirs.scheme == {"kept": sum(ours.scheme.values())}
    assert ours.scheme["INT4 g32"] == 3 * 3 * 8 and 4.5 < ours.size.bits.routed_experts < 4.6
    assert 15.9 < theirs.size.bits.whole < 16.1
    assert ours.size.weights == theirs.size.weights
    assert [m.cache_bits for m in ours.size.memory] == [16, 8] and ours.size.memory[0].fits[0] == "12 GB"


def test_provenance_tells_how_to_repeat_it(result):
    assert result.provenance.versions.keys() >= {"klquant", "torch", "python"}
    assert result.provenance.tokens == result.overall.positions and result.provenance.seconds > 0
    assert len(result.data.sha256) == len(result.model.fingerprint) == 64


def put(raw: dict, value, *path: str) -> dict:
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return raw


def other_parts() -> dict:
    score = invented_tasks(lost=1)[0].model_dump(mode="json")
    score["reference"]["parts"].pop()
    return score


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw | {"schema_version": 2}, "result schema 2, this klquant reads 1"),
        (lambda raw: {k: v for k, v in raw.items() if k != "schema_version"}, "result schema None"),
        (lambda raw: {"kind": "other"}, "not a result of klquant eval"),
        (lambda raw: [raw], "not a result of klquant eval"),
        (lambda raw: raw | {"more": 1}, "more: Extra inputs are not permitted"),
        (lambda raw: raw | {"overall": {}}, "overall.windows: Field required"),
        (lambda raw: raw | {"notes": [1]}, "notes.0: Input should be a valid string"),
        (lambda raw: put(raw, None, "overall", "top1", "low"), "overall.top1: low and high come together"),
        (lambda raw: put(raw, None, "overall", "kld"), "the file: kld, top1, .* belong to a comparison"),
        (lambda raw: put(raw, None, "domains", "code", "top1"), "the file: kld, top1, .* belong to a comparison"),
        (lambda raw: put(raw, None, "floor", "overall", "kld"), "floor.overall: kld, top1, .* belong to a comparison"),
        (lambda raw: put(raw, [], "data", "domains"), "data.domains: List should have at least 1 item"),
        (lambda raw: put(raw, 0, "model", "size", "disk"), "model.size.disk: Input should be greater"),
        (lambda raw: raw | {"tasks": [other_parts()]}, "tasks.0: the reference has other parts"),
    ],
)
def test_another_schema_is_refused(file, edit, message):
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    with pytest.raises(UserError, match=f"r.json: {message}"):
        load_result(file)


def test_a_truncated_missing_or_binary_file_is_refused(file, tmp_path):
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"r\.json: not whole JSON"):
        load_result(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"r\.json: not whole JSON"):
        load_result(file)
    with pytest.raises(UserError, match=r"none\.json: cannot be read: No such file"):
        load_result(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data__window": 4096}, "windows of 80 and 4096 tokens"),
        ({"data__sha256": "0" * 64}, "other text or another tokenizer"),
        (
            {"data__domains": [{"name": "code", "origin": "c", "documents": 1, "tokens": 240, "windows": 3}]},
            "other windows: code × 3, prose × 3 against code × 3",
        ),
        ({"reference": None}, "one has a reference, the other has none"),
        ({"reference__checkpoint__fingerprint": "0" * 64}, "other references"),
        ({"reference__arithmetic__dtype": "bfloat16"}, "references computed in float32 on cpu"),
        ({"arithmetic__device": "cuda"}, r"computed in float32 on cpu \(chunk\) and in float32 on cuda"),
    ],
)
def test_results_that_cannot_be_compared_are_refused_with_the_reason(result, changes, reason):
    check_comparable([("a", result), ("b", result), ("c", change(result, model__name="other"))])
    with pytest.raises(UserError, match=f"a and c cannot be compared: {reason}"):
        check_comparable([("a", result), ("b", result), ("c", change(result, **changes))])
