import pytest

from klquant.checkpoint.index import read_tensor_index
from klquant.errors import UserError
from klquant.recipe.plan import make_plan
from klquant.recipe.schema import load_recipe
from tests.recipe.build import INT4, index, recipe

INT8 = "weights: {bits: 8, group_size: 64}, algorithm: rtn, why: exact"


def test_vllm_keeps_what_it_fuses_and_the_cost_is_recorded():
    config, tensors = index()
    free, plan = (make_plan(load_recipe("int4"), config, tensors, target) for target in ("klquant", "vllm"))
    attn = "model.layers.0.self_attn."
    assert all(plan[f"{attn}{x}_proj.weight"].spec is None for x in ("q", "k", "v", "b", "f_a"))
    assert "vLLM 0.33 fuses" in plan[attn + "q_proj.weight"].why
    assert plan[attn + "o_proj.weight"] == free[attn + "o_proj.weight"]
    assert plan["model.layers.3.self_attn.q_proj.weight"].spec is not None  # MLA is not fused
    [change] = plan.changes
    assert (change.cls, change.roles, change.count) == ("kda_proj", ("q_proj", "k_proj", "v_proj"), 9)
    assert change.extra_bytes == plan.part().bytes_after - free.part().bytes_after > 0
    assert free.changes == ()


def test_vllm_keeps_gates_kv_b_and_router_even_when_a_rule_asks():
    sensitive = f"{{tensors: [kda_gates, mla_kv_b, router], roles: [b_proj, f_a_proj, g_b_proj, kv_b_proj, gate], allow_sensitive: true, {INT8}}}"  # noqa: E501
    plan = make_plan(recipe(sensitive), *index(), "vllm")
    assert [(c.cls, c.roles) for c in plan.changes] == [
        ("kda_gates", ("f_a_proj", "b_proj")), ("router", ("gate",)), ("mla_kv_b", ("kv_b_proj",)),
    ]  # fmt: skip
    assert [d.key.role for d in plan.decisions if d.spec] == ["g_b_proj"] * 3


REFUSED = [
    ([f"{{tensors: routed_experts, {INT4}}}", f"{{tensors: routed_experts, roles: w2, {INT8}}}"],
     "layer 1: routed_experts w1 is INT4 g128 and w2 INT8 g64, but vLLM reads one scheme"),
    ([f"{{tensors: routed_experts, roles: [w1, w3], {INT4}}}"], "routed_experts w1 is INT4 g128 and w2 BF16"),
    ([f"{{tensors: shared_experts, roles: up_proj, {INT4}}}"], "vLLM fuses gate and up"),
    ([f"{{tensors: dense_mlp, roles: gate_proj, {INT4}}}"],
     "layer 0: dense_mlp gate_proj is INT4 g128 and up_proj BF16"),
    (["{tensors: head, weights: {bits: 3}, algorithm: rtn, why: w}"],
     "r.yaml:4: vLLM 0.26 to 0.33 has no INT3 kernel for head lm_head; it takes INT4 and INT8"),
    (["{tensors: head, weights: {bits: 4, symmetric: false}, algorithm: rtn, why: w}"], "symmetric weights only"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "message"), REFUSED, ids=[m[-40:] for _, m in REFUSED])
def test_what_vllm_cannot_load_is_refused_and_klquant_takes_it(rules, message):
    with pytest.raises(UserError) as error:
        make_plan(recipe(*rules), *index(), "vllm")
    assert str(error.value).startswith("r.yaml:") and message in str(error.value)
    assert make_plan(recipe(*rules), *index()).changes == ()


def test_rows_must_suit_marlin():
    with pytest.raises(UserError, match="needs output features in multiples of 64; mla_proj q_proj has 224"):
        make_plan(recipe(f"{{tensors: mla_proj, {INT4}}}"), *index(qk_rope_head_dim=48), "vllm")


def test_experts_may_differ_by_layer():
    rules = f"{{tensors: routed_experts, {INT4}}}", f"{{tensors: routed_experts, layers: 2, {INT8}}}"
    make_plan(recipe(*rules), *index(), "vllm")


def test_mixed_dense_and_shared_down_projections_are_free():
    make_plan(recipe(f"{{tensors: [shared_experts, dense_mlp], roles: down_proj, {INT4}}}"), *index(), "vllm")


def test_int3_is_refused_for_vllm():
    with pytest.raises(UserError, match=r"int3\.yaml:\d+: vLLM 0.26 to 0.33 has no INT3 kernel"):
        make_plan(load_recipe("int3"), *index(), "vllm")


def test_an_unknown_target_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown target 'sglang'; known: klquant, vllm"):
        make_plan(load_recipe("int4"), *index(), "sglang")


def test_the_cost_on_the_48b(kimi_48b):
    [change] = make_plan(load_recipe("int4"), *read_tensor_index(kimi_48b), "vllm").changes
    assert change.extra_bytes == 60 * (4096 * 2304 * 2 - (4096 * 2304 + 4096 * 18 * 2 + 16))
