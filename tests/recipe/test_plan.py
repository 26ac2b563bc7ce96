import pytest
import torch

from klquant.checkpoint.index import read_tensor_index
from klquant.checkpoint.names import TensorClass, parse_name
from klquant.core.grid import Quantized
from klquant.core.spec import WeightSpec
from klquant.errors import UserError
from klquant.recipe.decision import Decision, stored_tensors
from klquant.recipe.plan import make_plan
from klquant.recipe.rows import plan_rows, spell_layers
from klquant.recipe.schema import known_recipes, load_recipe
from tests.recipe.build import INT4, index, recipe

GROUP_64 = "weights: {bits: 8, group_size: 64}, algorithm: rtn, why: exact"


def test_a_later_rule_overrides_an_earlier_one():
    config, tensors = index()
    plan = make_plan(
        recipe(
            f"{{tensors: routed_experts, {INT4}}}",
            f"{{tensors: routed_experts, roles: [w2], layers: 1-2, {GROUP_64}}}",
        ),
        config, tensors,
    )  # fmt: skip
    w2, first = "model.layers.1.block_sparse_moe.experts.7.w2.weight", WeightSpec(bits=4, group_size=128)
    assert (plan[w2].spec, plan[w2].why, plan[w2].algorithm) == (WeightSpec(bits=8, group_size=64), "exact", "rtn")
    assert plan[w2.replace("w2", "w1")].spec == first
    assert plan[w2.replace("layers.1", "layers.3")].spec == first
    rows = [(r.cls, r.roles, spell_layers(r.layers), r.count) for r in plan_rows(plan)][:2]
    assert rows == [("routed_experts", (), "", 56), ("routed_experts", ("w2",), "1-2", 16)]


def test_what_no_rule_names_is_kept_and_says_so():
    config, tensors = index()
    plan = make_plan(recipe(f"{{tensors: head, {INT4}}}"), config, tensors)
    kept = plan["model.layers.0.mlp.gate_proj.weight"]
    assert kept.spec is None and kept.why == "no rule names it"
    assert [s[:3] for s in stored_tensors(kept)] == [(kept.key.name, "BF16", (256, 256))]
    assert not plan.needs_calibration


def test_decisions_cover_the_index_in_file_order():
    config, tensors = index()
    plan = make_plan(load_recipe("int4"), config, tensors)
    assert [d.key.name for d in plan.decisions] == list(tensors)
    assert plan.needs_calibration
    sizes = plan.stored_sizes()
    assert sum(sizes.values()) == plan.part().bytes_after
    assert next(iter(sizes)) == "model.embed_tokens.weight" and list(sizes)[-1] == "lm_head.weight_shape"
    assert plan.specs()["lm_head"].bits == 8 and plan.specs()["model.layers.0.self_attn.b_proj"] is None
    assert "model.norm" not in plan.specs()


@pytest.mark.parametrize("name", known_recipes())
def test_every_built_in_recipe_plans_and_leaves_sensitive_tensors_alone(name):
    plan = make_plan(load_recipe(name), *index())
    for d in plan.decisions:
        if d.key.cls in ("kda_gates", "router", "conv", "norm", "mla_kv_b", "embedding"):
            assert d.spec is None, d.key.name
        else:
            assert d.spec is not None, d.key.name
    assert len(plan_rows(plan)) == len(TensorClass)


BAD = [
    (["{tensors: routed_experts, layers: 0, keep: true, why: w}"],
     "r.yaml:4: layer 0 (counted from 0) has no tensor of"),
    (["{tensors: norm, layers: 2-4, keep: true, why: w}"], "r.yaml:4: there is no layer 4; layers count from 0 to 3"),
    (["{tensors: routed_experts, roles: [w2, w4], keep: true, why: w}"],
     "r.yaml:4: routed_experts has no role 'w4'; it has w1, w2, w3"),
    (["{tensors: norm, layers: 0, roles: kv_a_layernorm, keep: true, why: w}"], "r.yaml:4: layer 0"),
    ([f"{{tensors: head, {INT4}}}", "{tensors: [head, norm], keep: true, why: w}"],
     "r.yaml:4: this rule has no effect: later rules (r.yaml:5) override all of it"),
    ([f"{{tensors: [head, kda_gates], {INT4}}}"], "r.yaml:4: kda_gates loses much accuracy"),
    ([f"{{tensors: router, {INT4}}}"], "add `allow_sensitive: true`"),
    ([f"{{tensors: mla_kv_b, {INT4}}}"], "add `allow_sensitive: true`"),
    ([f"{{tensors: embedding, allow_sensitive: true, {INT4}}}"], "r.yaml:4: embedding is a table of rows and never"),
    ([f"{{tensors: norm, allow_sensitive: true, {INT4}}}"], "r.yaml:4: norm input_layernorm is not a matrix"),
    ([f"{{tensors: conv, allow_sensitive: true, {INT4}}}"], "r.yaml:4: conv q_conv1d is not a matrix"),
    ([f"{{tensors: router, allow_sensitive: true, {INT4}}}"],
     "r.yaml:4: router e_score_correction_bias is not a matrix and cannot be quantized; narrow the rule with "
     "`roles: [gate]`"),
    ([f"{{tensors: kda_gates, allow_sensitive: true, roles: [f_b_proj], {INT4}}}"],
     "r.yaml:4: group_size 128 does not divide the 64 input features of kda_gates f_b_proj"),
    ([f"{{tensors: mla_kv_b, allow_sensitive: true, {INT4}}}".replace("rtn", "gptq")],
     "r.yaml:4: no calibration inputs are gathered for mla_kv_b kv_b_proj, so gptq cannot quantize it; give it a rule "
     "of its own with `algorithm: rtn`, or keep it"),
    ([f"{{tensors: kda_gates, roles: [b_proj, g_b_proj], allow_sensitive: true, {GROUP_64}}}".replace("rtn", "awq")],
     "r.yaml:4: no calibration inputs are gathered for kda_gates g_b_proj, so awq cannot quantize it"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "message"), BAD, ids=[m[-40:] for _, m in BAD])
def test_a_rule_that_cannot_apply_is_refused_with_its_line(rules, message):
    with pytest.raises(UserError) as error:
        make_plan(recipe(*rules), *index())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_the_model_lacks_is_refused():
    with pytest.raises(UserError, match=r"r\.yaml:4: this rule matches nothing: the model has no tensor of dense_mlp"):
        make_plan(recipe("{tensors: dense_mlp, keep: true, why: w}"), *index(first_k_dense_replace=0))


def test_a_group_that_only_an_overridden_rule_has_does_not_matter():
    rules = (
        f"{{tensors: [mla_proj, kda_gates], roles: [o_proj, f_b_proj], allow_sensitive: true, {INT4}}}",
        "{tensors: kda_gates, keep: true, why: w}",
    )
    assert make_plan(recipe(*rules), *index())["model.layers.3.self_attn.o_proj.weight"].spec.bits == 4


def test_sensitive_tensors_can_be_quantized_when_the_rule_says_so():
    rule = f"{{tensors: kda_gates, roles: [f_a_proj, g_a_proj], allow_sensitive: true, {GROUP_64}}}"
    plan = make_plan(recipe(rule), *index())
    assert plan["model.layers.0.self_attn.f_a_proj.weight"].spec.bits == 8
    assert plan["model.layers.0.self_attn.b_proj.weight"].spec is None


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n,k", [(64, 128), (100, 384), (7, 256)])
def test_stored_tensors_are_what_the_packer_writes(bits, group_size, symmetric, n, k):
    from klquant.checkpoint.quantized import compress

    config, _ = index()
    spec = WeightSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    key = parse_name("lm_head.weight", config)
    groups = spec.groups(k)
    zero = None if symmetric else torch.zeros(n, groups, dtype=torch.int8)
    weight = Quantized(spec, torch.zeros(n, k, dtype=torch.int8), torch.ones(n, groups, dtype=torch.bfloat16), zero)
    written = compress(key.module, weight)
    names = {"I32": torch.int32, "BF16": torch.bfloat16, "I64": torch.int64}
    planned = stored_tensors(Decision(key, (n, k), "BF16", spec, "rtn"))
    assert [s.name for s in planned] == list(written)
    for s in planned:
        t = written[s.name]
        assert (names[s.dtype], s.shape, s.nbytes) == (t.dtype, tuple(t.shape), t.numel() * t.element_size())


def test_odd_rows_fill_whole_words():
    config, _ = index()
    spec = WeightSpec(bits=3, group_size=-1)
    packed = stored_tensors(Decision(parse_name("lm_head.weight", config), (5, 33), "BF16", spec, "rtn"))[0]
    assert (packed.shape, packed.nbytes) == ((5, 4), 80)


def test_the_digest_is_stable_and_tells_work_apart():
    config, tensors = index()
    plan = make_plan(load_recipe("int4"), config, tensors)
    assert plan.digest() == make_plan(load_recipe("int4"), config, tensors).digest()
    others = [
        make_plan(load_recipe("int4-g32"), config, tensors),
        make_plan(load_recipe("int4"), config, tensors, "vllm"),
        make_plan(load_recipe("int4"), config, tensors | {"lm_head.weight": ("F16", tensors["lm_head.weight"][1])}),
        make_plan(load_recipe("int4"), *index(vocab_size=384)),
    ]
    assert len({plan.digest(), *(p.digest() for p in others)}) == 5


# Facts of the real checkpoint: bytes in GB, as facts/kimi-linear.md has them, to the last digit given there.
@pytest.mark.parametrize(("name", "experts"), [("int8", 47.9), ("int4-g32", 26.5), ("int4", 24.3), ("int3", 18.4)])
def test_sizes_of_the_48b(kimi_48b, name, experts):
    config, tensors = read_tensor_index(kimi_48b)
    plan = make_plan(load_recipe(name), config, tensors)
    routed = plan.part(TensorClass.ROUTED_EXPERTS)
    assert routed.bytes_after / 1e9 == pytest.approx(experts, abs=0.06)
    assert routed.weights == 6656 * 7_077_888
    assert plan.part().weights / 1e9 == pytest.approx(49.12, abs=0.005)
    assert plan.always_active.weights == plan.part().weights - routed.weights - 163_840 * 2_304


def test_parts_of_the_48b_at_int4(kimi_48b):
    plan = make_plan(load_recipe("int4"), *read_tensor_index(kimi_48b))
    rows = {r.cls: r for r in plan_rows(plan)}
    counts = {c: rows[c].count for c in rows}
    assert counts == {
        "routed_experts": 19_968, "shared_experts": 78, "dense_mlp": 3, "kda_proj": 80, "mla_proj": 21, "mla_kv_b": 7,
        "kda_gates": 140, "router": 52, "conv": 60, "norm": 82, "embedding": 1, "head": 1,
    }  # fmt: skip
    assert plan.part().bytes_before / 1e9 == pytest.approx(98.2, abs=0.05)
    assert plan.part(TensorClass.ROUTED_EXPERTS).bits == pytest.approx(4.125, abs=1e-4)
    assert plan.read_per_token.bytes_after / 1e9 == pytest.approx(2.5, abs=0.05)


def test_experts_only_on_the_48b_is_the_table_of_the_facts(kimi_48b):
    rule = "{tensors: routed_experts, weights: {bits: 4}, algorithm: gptq, why: w}"
    plan = make_plan(recipe(rule), *read_tensor_index(kimi_48b))
    assert plan.part().bytes_after / 1e9 == pytest.approx(28.3, abs=0.05)
