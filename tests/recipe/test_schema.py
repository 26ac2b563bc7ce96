import json

import pytest
from pydantic import ValidationError

from klquant.core.spec import WeightSpec
from klquant.errors import UserError
from klquant.recipe.schema import GPTQParams, Recipe, known_recipes, load_recipe, parse_recipe
from tests.recipe.build import INT4, recipe, text

BUILT_IN = ["int3", "int4", "int4-all", "int4-awq", "int4-g32", "int8", "rtn-int4"]


def test_the_built_in_recipes_are_the_promised_ones():
    assert known_recipes() == BUILT_IN


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_recipe_is_named_as_its_file_and_explains_every_rule(name):
    r = load_recipe(name)
    assert r.name == name
    assert all(len(rule.why) > 15 for rule in r.rules)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_recipe_survives_json(name):
    r = load_recipe(name)
    again = Recipe.model_validate(json.loads(json.dumps(r.model_dump(mode="json"))))
    assert again.model_dump() == r.model_dump()


def test_a_recipe_file_is_read_by_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text(f"{{tensors: head, {INT4}}}"))
    assert load_recipe(str(path)).rules[0].weights == WeightSpec(bits=4, group_size=128)


def test_sections_have_their_defaults_and_take_values():
    r = recipe(f"{{tensors: head, {INT4}}}", tail="gptq: {damp: 0.05}\n")
    assert r.gptq == GPTQParams(damp=0.05)
    assert r.calibration == load_recipe("int4").calibration


def test_layers_and_roles_are_read_in_every_spelling():
    spellings = ['"1-3,8"', "[1, 2, 3, 8]", '["1-3", 8]', "[8, 3, 2, 1]"]
    layers = [recipe(f"{{tensors: norm, layers: {s}, keep: true, why: w}}").rules[0].layers for s in spellings]
    assert layers == [(1, 2, 3, 8)] * 4
    assert recipe("{tensors: norm, layers: 0, keep: true, why: w}").rules[0].layers == (0,)
    assert recipe("{tensors: norm, roles: o_norm, keep: true, why: w}").rules[0].roles == ("o_norm",)


def test_a_recipe_is_frozen():
    r = load_recipe("int4")
    with pytest.raises(ValidationError):
        r.name = "other"
    with pytest.raises(ValidationError):
        r.rules[0].weights.bits = 8


HEAD = "{tensors: head, keep: true, why: w}"

BAD = [
    # YAML
    ("", "r.yaml:1: not a YAML mapping"),
    ("- a", "r.yaml:1: not a YAML mapping"),
    ("name: r\nrules: [", "r.yaml:2: not valid YAML"),
    ("name: r\ndescription: a: b", "needs quotes"),
    ("name: r\n---\nname: s", "r.yaml:2: not valid YAML"),
    ("name: \x00", "r.yaml:1: not valid YAML"),
    ("name: r\nname: s", "r.yaml:2: key 'name' appears twice"),
    ("name: r\n? [1]\n: 2", "r.yaml:2: a key must be a plain word"),
    ("name: &n r\ndescription: *n", "r.yaml:2: YAML anchors and aliases are not used"),
    ("name: r\ndescription: !!python/object/apply:os.getcwd []", "r.yaml:2: not valid YAML: could not determine"),
    ("name: r\ndescription: 2024-01-01", "r.yaml:2: '2024-01-01' reads as a date"),
    ("name: r\ndescription: 2024-99-01", "r.yaml:2: '2024-99-01' is not a valid value"),
    ("name: " + "[" * 1000, "r.yaml:1: nested too deeply"),
    # keys and values
    ("name: r\nrules: []", "r.yaml:1: description is missing"),
    ("name: r\ndescription: d\nrules: []", "r.yaml:3: rules is empty"),
    ("name: a/b\ndescription: d\nrules: []", "r.yaml:1: name is 'a/b'"),
    (text(HEAD, tail="gtpq: {damp: 1}"), "r.yaml:5: unknown key 'gtpq' (did you mean gptq?); known here: name"),
    (text(HEAD, tail="gptq:\n  dump: 1"), "r.yaml:6: unknown key 'gptq.dump' (did you mean damp?)"),
    (text(HEAD, tail="gptq:\n  damp: 0"), "r.yaml:6: gptq.damp is 0"),
    (text(HEAD, tail="gptq:\n  damp: .nan"), "r.yaml:6: gptq.damp is nan"),
    (text(HEAD, tail="awq:\n  clip: 1"), "r.yaml:6: awq.clip is 1"),
    (text(HEAD, tail="calibration: {tokens: 10}"), "r.yaml:5: calibration needs window ≤ tokens"),
    (text("head"), "r.yaml:4: rules is 'head'"),
    (text("{tensor: head, keep: true, why: w}"), "r.yaml:4: unknown key 'tensor' (did you mean tensors?)"),
    (text("{keep: true, why: w}"), "r.yaml:4: tensors is missing"),
    (text("{tensors: head, keep: true}"), "r.yaml:4: why is missing"),
    (text("{tensors: head, keep: true, why: ''}"), "r.yaml:4: why is ''"),
    (text("{tensors: experts, keep: true, why: w}"), "r.yaml:4: tensors: unknown tensor class 'experts'"),
    (text("{tensors: experts, keep: true, why: w}"), "known: routed_experts, shared_experts, dense_mlp, kda_proj"),
    (text("{tensors: [head, head], keep: true, why: w}"), "r.yaml:4: tensors: a name appears twice"),
    (text("{tensors: [], keep: true, why: w}"), "r.yaml:4: tensors: expected a name or a list"),
    (text("{tensors: 3, keep: true, why: w}"), "r.yaml:4: tensors: expected a name or a list"),
    (text(HEAD, "{tensors: norm, layers: 3-1, keep: true, why: w}"),
     "r.yaml:5: layers: the range '3-1' runs backwards"),
    (text("{tensors: norm, layers: x, keep: true, why: w}"), "r.yaml:4: layers: 'x' is not a layer"),
    (text("{tensors: norm, layers: true, keep: true, why: w}"), "r.yaml:4: layers: True is not a layer"),
    (text("{tensors: norm, layers: 1-999999999, keep: true, why: w}"),
     "r.yaml:4: layers: '1-999999999' is not a layer"),
    (text("{tensors: norm, layers: [], keep: true, why: w}"), "r.yaml:4: layers: names no layer"),
    (text("{tensors: head, weights: {bits: 5}, algorithm: rtn, why: w}"), "r.yaml:4: weights.bits is 5"),
    (text("{tensors: head, weights: {bits: '4'}, algorithm: rtn, why: w}"), "r.yaml:4: weights.bits is '4'"),
    (text("{tensors: head, weights: {bits: 4, group: 3}, algorithm: rtn, why: w}"), "unknown key 'weights.group'"),
    (text("{tensors: head, weights: {bits: 4, symmetric: 1}, algorithm: rtn, why: w}"), "weights.symmetric is 1"),
    (text("{tensors: head, weights: {bits: 4}, algorithm: best, why: w}"), "r.yaml:4: algorithm is 'best'"),
    (text("{tensors: head, weights: {bits: 4}, why: w}"), "r.yaml:4: a rule with weights needs `algorithm"),
    (text("{tensors: head, why: w}"), "r.yaml:4: a rule has either"),
    (text("{tensors: head, keep: true, weights: {bits: 4}, algorithm: rtn, why: w}"), "a rule has either"),
    (text("{tensors: head, keep: false, why: w}"), "r.yaml:4: keep is False"),
    (text("{tensors: head, keep: true, algorithm: rtn, why: w}"), "a rule that keeps its tensors has no algorithm"),
    (text("{tensors: norm, keep: true, allow_sensitive: true, why: w}"), "has no algorithm and no allow_sensitive"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD, ids=[m[-40:] for _, m in BAD])
def test_a_bad_recipe_is_one_line_with_its_place(content, message):
    with pytest.raises(UserError) as error:
        parse_recipe(content, "r.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("r.yaml:")
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(UserError, match=r"unknown recipe 'int5' .*known: int3, int4, int4-all, int4-awq"):
        load_recipe("int5")
    with pytest.raises(UserError, match=r"unknown recipe '\.\./int4'"):
        load_recipe("../int4")


def test_a_recipe_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(UserError, match=r"latin\.yaml: not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
