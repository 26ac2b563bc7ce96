"""config.json is read once and strictly: every refusal names the file and the key."""

import copy
import re

import pytest

from klquant.checkpoint.config import KimiLinearConfig
from klquant.errors import UserError
from tests.tiny import tiny_config

REFUSED = {
    "another architecture": ({"model_type": "llama"}, "model_type is 'llama'"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number from 1"),
    "layers by the million": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "experts by the million": ({"num_experts": 10**6}, "num_experts is 1000000"),
    "a word for a number": ({"hidden_size": "64"}, "hidden_size is '64'"),
    "a truth value for a number": ({"hidden_size": True}, "hidden_size is True"),
    "a size that is missing": ({"kv_lora_rank": None}, "kv_lora_rank is missing"),
    "an infinite epsilon": ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
    "a low-rank query": ({"q_lora_rank": 16}, "q_lora_rank 16 is not supported"),
    "rotary attention": ({"mla_use_nope": False}, "mla_use_nope is False"),
    "a tied head": ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    "grouped queries": ({"num_key_value_heads": 1}, "num_key_value_heads must equal"),
    "more routes than experts": ({"num_experts_per_token": 9}, "num_experts_per_token 9 exceeds"),
    "groups that do not divide": ({"num_expert_group": 3}, "num_expert_group 3 does not divide"),
    "more groups a token than there are": ({"topk_group": 2}, "topk_group 2 exceeds num_expert_group 1"),
    "groups of one expert": (
        {"num_experts": 8, "num_expert_group": 8, "topk_group": 4},
        "num_expert_group 8 leaves groups of a single expert",
    ),
    "groups too few for a token's experts": (
        {"num_experts": 8, "num_expert_group": 4, "topk_group": 1, "num_experts_per_token": 4},
        "topk_group 1, groups of 2 experts, is too few for num_experts_per_token 4",
    ),
    "a token beyond the vocabulary": ({"bos_token_id": 320}, "token id 320 is outside the vocabulary of 320"),
    "no end of text": ({"eos_token_id": None}, "eos_token_id is missing"),
    "an end of text that is no number": ({"eos_token_id": ["x"]}, "eos_token_id is ['x']"),
    "an empty list of ends": ({"eos_token_id": []}, "eos_token_id is []"),
    "no list of KDA layers": ({"linear_attn_config": None}, "linear_attn_config is missing"),
    "sections that are no objects": ({"linear_attn_config": 3}, "linear_attn_config is 3"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_is_named(change, says):
    with pytest.raises(UserError, match=r"^x/config\.json: .*" + re.escape(says)):
        KimiLinearConfig.from_dict(tiny_config(**change), "x/config.json")


@pytest.mark.parametrize("mla", [[], [4, 4], [3, 4], [0], [5], ["4"]])
def test_layer_lists_name_each_layer_once(mla):
    raw = copy.deepcopy(tiny_config())
    raw["linear_attn_config"]["full_attn_layers"] = mla
    with pytest.raises(UserError, match="full_attn_layers"):
        KimiLinearConfig.from_dict(raw, "config.json")


def test_layers_count_from_one_in_the_file_and_from_zero_in_here():
    config = KimiLinearConfig.from_dict(tiny_config())
    assert [config.is_mla(layer) for layer in range(4)] == [False, False, False, True]
    assert [config.is_moe(layer) for layer in range(4)] == [False, True, True, True]


def test_ends_of_text_may_be_several():
    assert KimiLinearConfig.from_dict(tiny_config(eos_token_id=[1, 2])).eos_ids == (1, 2)


def test_a_config_that_is_no_object():
    with pytest.raises(UserError, match="not a JSON object"):
        KimiLinearConfig.from_dict([1], "config.json")
