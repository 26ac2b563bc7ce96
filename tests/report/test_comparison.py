import json

import pytest

from klquant.errors import UserError
from klquant.evaluate.result import Data
from klquant.report.comparison import Comparison
from tests.report.build import CONTEXTS, FLOOR, baseline, checkpoint, result, sensitivity


def compare(*results, files=None) -> Comparison:
    return Comparison.of(list(zip(files or [f"{i}.json" for i in range(len(results))], results, strict=True)))


def names(variants) -> list[str]:
    return [v.name for v in variants]


@pytest.fixture
def five() -> Comparison:
    return compare(
        result("int3", 0.06, 21), result("int8", 0.0021, 50), result("rtn-int4", 0.03, 26.9),
        result("int4", 0.0125, 26.8), result("int4-g32", 0.012, 29),
    )  # fmt: skip


def test_variants_stand_from_the_largest_to_the_smallest(five):
    assert names(five.variants) == ["int8", "int4-g32", "rtn-int4", "int4", "int3"]


def test_the_front_leaves_out_what_another_beats_in_both(five):
    assert names(five.front(lambda v: v.disk)) == ["int3", "int4", "int4-g32", "int8"]


def test_of_equal_size_only_the_nearer_is_on_the_front():
    c = compare(result("a", 0.02, 20), result("b", 0.01, 20))
    assert names(c.front(lambda v: v.disk)) == ["b"]


def test_a_card_gets_the_nearest_variant_that_fits_and_nothing_where_none_does(five):
    assert five.contexts == list(CONTEXTS)
    assert [c.variant and c.variant.name for c in five.choices("80 GB")] == ["int8"] * 3
    assert [c.variant and c.variant.name for c in five.choices("24 GB")] == ["int3", "int3", None]
    assert all(c.variant is None for c in five.choices("12 GB"))


def test_among_variants_within_the_noise_a_card_gets_the_smallest(five):
    assert five.choices("48 GB")[0].variant.name == "int4"  # int4-g32 is nearer by half the floor
    without = compare(*(v.result.model_copy(update={"floor": None}) for v in five.variants))
    assert without.choices("48 GB")[0].variant.name == "int4-g32"


def test_a_frugal_way_to_run_counts_where_the_plain_one_does_not_fit(five):
    plain, frugal = five.choices("32 GB")[1], five.choices("24 GB")[1]
    assert (plain.memory.cache_bits, frugal.memory.cache_bits) == (16, 16)
    long = compare(result("int4", 0.0125, 26.8)).choices("32 GB")[2]
    assert long.memory.cache_bits == 8 and long.memory.embedding_on_cpu


def test_neighbouring_cards_with_the_same_choices_are_one_row(five):
    rows = five.choices_by_cards()
    assert rows[0][0] == ["12 GB", "16 GB"]
    assert sum(len(cards) for cards, _ in rows) == 7


def test_memory_is_compared_at_128_k_or_at_what_the_model_can():
    assert compare(result()).plot_context == 131_072
    assert compare(result(contexts=[4096])).plot_context == 4096


def test_memory_is_compared_where_it_is_known_of_all():
    """Of models with other limits, say because somebody changed one's config.json."""
    c = compare(result("a"), result("b", contexts=CONTEXTS[:1]))
    assert c.contexts == [CONTEXTS[0]] and c.plot_context == CONTEXTS[0]
    with pytest.raises(UserError, match="memory is predicted for no context that all have"):
        compare(result("a"), result("b", contexts=[4096]))


@pytest.mark.parametrize(("kld", "inside"), [(FLOOR, True), (1.1 * FLOOR, True), (1.2 * FLOOR, False), (0.0, True)])
def test_a_mean_within_the_floors_range_is_inside(kld, inside):
    c = compare(result("a", kld))
    assert c.inside_floor(c.variants[0].result.overall) == inside


def test_a_floor_estimated_below_zero_is_no_noise():
    """The mean KLD against a reference of which only the top is stored may be."""
    below = result("a", 0.01)
    kld = below.floor.overall.kld.model_copy(update={"mean": -1e-6, "low": -2e-6, "high": -1e-7})
    overall = below.floor.overall.model_copy(update={"kld": kld})
    c = compare(below.model_copy(update={"floor": below.floor.model_copy(update={"overall": overall})}))
    assert c.noise == 0 and c.choices("80 GB")[0].variant.name == "a"


def test_without_a_floor_nothing_is_inside():
    c = compare(result("a", 0.0, floor=False))
    assert c.floor is None and not c.inside_floor(c.variants[0].result.overall)
    assert c.times_floor(c.variants[0].result.overall) is None


def test_the_floor_is_that_of_any_result_that_has_one():
    assert compare(result("a", 0.1, 20, floor=False), result("b", 0.2, 10)).floor is not None


def test_neighbours_are_too_close_inside_the_floor_or_where_ranges_overlap():
    c = compare(result("a", 0.010), result("b", 0.0105, 25), result("c", 0.0119, 24), result("d", 0.05, 23))
    assert [(a.name, b.name, noise) for a, b, noise in c.too_close()] == [("a", "b", True), ("b", "c", False)]


def test_single_windows_have_no_ranges_to_overlap():
    c = compare(result("a", 0.01, windows=1), result("b", 0.02, 25, windows=1))
    assert c.too_close() == []


@pytest.mark.parametrize(
    ("made", "files", "expected"),
    [
        ([("x/int4", "int4"), ("x/int8", "int8")], None, ["int4", "int8"]),
        ([("x/one", "int4"), ("x/two", "int4")], None, ["one", "two"]),
        ([("x/int4", "int4"), ("y/int4", "int4")], None, ["x/int4", "y/int4"]),
        ([("x/int4", "int4"), ("x/int4", "int4")], ["a.json", "b.json"], ["a.json", "b.json"]),
        ([("x/int4", "int4"), ("x/int4", "int4")], ["a.json", "a.json"], ["a.json (1)", "a.json (2)"]),
    ],
)
def test_names_tell_variants_apart(made, files, expected):
    results = [result(name, recipe=recipe, gigabytes=26 - i) for i, (name, recipe) in enumerate(made)]
    assert names(compare(*results, files=files).variants) == expected


def test_a_checkpoint_of_another_tool_has_its_folders_name():
    c = compare(result("hub/theirs", quantization=None), result("x/int4", 0.1, 20, recipe="int4"))
    assert set(names(c.variants)) == {"theirs", "int4"}


def test_results_over_other_text_are_refused_by_name():
    other = result("b")
    data = Data(**other.data.model_dump() | {"sha256": "cd" * 32})
    with pytest.raises(UserError, match=r"one\.json and two\.json cannot be compared: other text"):
        compare(result("a"), other.model_copy(update={"data": data}), files=["one.json", "two.json"])


def test_another_reference_is_refused():
    a, b = result("a"), result("b")
    reference = b.reference.model_copy(update={"checkpoint": checkpoint("owner/other", 98.2)})
    with pytest.raises(UserError, match="other references"):
        compare(a, b.model_copy(update={"reference": reference}))


def test_a_result_without_reference_is_refused_with_what_to_do():
    with pytest.raises(UserError, match=r"a\.json: evaluated without a reference; .*--against"):
        compare(result().model_copy(update={"reference": None}), files=["a.json"])


def test_results_are_read_from_files(tmp_path):
    for name, size in (("a", 20), ("b", 30)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(name, 0.1, size).model_dump(mode="json")))
    assert names(Comparison.load([tmp_path / "a.json", tmp_path / "b.json"]).variants) == ["b", "a"]


def test_a_baseline_is_neither_taken_nor_on_the_front():
    c = compare(result("int4", 0.0125, 26.8), baseline("NF4 (bnb)", 0.001, 20), result("int3", 0.06, 21))
    assert names(c.variants) == ["int4", "int3", "NF4 (bnb)"] and names(c.takable) == ["int4", "int3"]
    assert names(c.front(lambda v: v.disk)) == ["int3", "int4"]
    assert {choice.variant.name for choice in c.choices("80 GB")} == {"int4"}
    assert [(b.name, v.name) for b, v in c.beaten()] == [("NF4 (bnb)", "int4"), ("NF4 (bnb)", "int3")]


@pytest.mark.parametrize(("kld", "gigabytes"), [(0.0125 - 0.9 * FLOOR, 20), (0.001, 26.9), (0.02, 20)])
def test_a_baseline_beats_what_is_no_smaller_and_further_by_more_than_the_noise(kld, gigabytes):
    assert compare(result("int4", 0.0125, 26.8), baseline(kld=kld, gigabytes=gigabytes)).beaten() == []


def test_baselines_of_one_method_are_told_apart_by_their_recipes():
    first, second = (baseline(gigabytes=size) for size in (28, 27))
    made = second.model.baseline.model_copy(update={"recipe": "int3"})
    second = second.model_copy(update={"model": second.model.model_copy(update={"baseline": made})})
    assert names(compare(first, second).variants) == ["NF4 (bnb), int4", "NF4 (bnb), int3"]
    rounded = first.model_copy(update={"model": first.model.model_copy(update={
        "baseline": first.model.baseline.model_copy(update={"method": "rtn", "title": "RTN of int4"})})})  # fmt: skip
    assert sorted(names(compare(first, second, rounded).variants))[2] == "RTN of int4"


def test_headers_of_files_are_no_size():
    """A checkpoint has them, a baseline does not."""
    int4 = result("int4", 0.0125, 26.8)
    size = int4.model.size.model_copy(update={"disk": 27_000_000_000})
    c = compare(int4.model_copy(update={"model": int4.model.model_copy(update={"size": size})}))
    assert c.variants[0].disk == 26_800_000_000


def test_sensitivities_stand_beside_results_of_the_same_windows(tmp_path):
    for name, value in (("r", result()), ("s", sensitivity(0.01, 0.02))):
        (tmp_path / f"{name}.json").write_text(json.dumps(value.model_dump(mode="json")))
    c = Comparison.load([tmp_path / "s.json", tmp_path / "r.json"])
    assert len(c.variants) == len(c.sensitivities) == 1
    with pytest.raises(UserError, match="a report needs a result of klquant eval"):
        Comparison.load([tmp_path / "s.json"])


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        (result(windows=4), "other windows"),
        (result(data=result().data.model_copy(update={"sha256": "cd" * 32})), "other text"),
        (
            result(reference=result().reference.model_copy(update={"checkpoint": checkpoint("x", 9)})),
            "other references",
        ),
    ],
    ids=["windows", "text", "reference"],
)
def test_a_sensitivity_over_other_windows_or_another_reference_is_refused(beside, reason):
    with pytest.raises(UserError, match=rf"r\.json and s\.json cannot be compared: {reason}"):
        Comparison.of([("r.json", result())], [("s.json", sensitivity(0.01, beside=beside))])


def test_a_floor_that_only_a_sensitivity_knows_is_the_floor():
    known = sensitivity(0.01, floor=result().floor)
    assert Comparison.of([("r", result(floor=False))], [("s", known)]).noise == FLOOR


def test_classes_stand_by_what_they_cost_and_layers_in_their_order():
    assert [e.part.name for e in sensitivity(0.01, 0.03, 0.02).ranked] == [
        "everything", "kda_proj", "head", "routed_experts"]  # fmt: skip
    assert [e.part.layer for e in sensitivity(0.01, 0.03, 0.02, by="layer").ranked] == [None, 0, 1, 2]
