"""Configs, tensor indices and recipes for tests, without any weights."""

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import expected_tensors
from klquant.recipe.schema import Recipe, parse_recipe
from tests.tiny import tiny_config

# Wide enough for groups of 128 and rows in multiples of 64, but for the narrow KDA gates.
WIDE = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "kv_lora_rank": 128,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
    "linear_attn_config": {
        "full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 64, "num_heads": 2, "short_conv_kernel_size": 4,
    },
}  # fmt: skip


def index(**changes) -> tuple[KimiLinearConfig, dict[str, tuple[str, tuple[int, ...]]]]:
    """Config and tensor index of a checkpoint of the WIDE shape, with `changes` to its config.json."""
    config = KimiLinearConfig.from_dict(tiny_config(**(WIDE | changes)))
    full = ("A_log", "dt_bias", "e_score_correction_bias")
    return config, {
        name: ("F32" if name.endswith(full) else "BF16", shape) for name, shape in expected_tensors(config).items()
    }


def recipe(*rules: str, tail: str = "") -> Recipe:
    """A recipe r.yaml of one-line rules, the first of them on line 4; `tail` goes below them."""
    return parse_recipe(text(*rules, tail=tail), "r.yaml")


def text(*rules: str, tail: str = "") -> str:
    return "name: r\ndescription: d\nrules:\n" + "".join(f"- {rule}\n" for rule in rules) + tail


INT4 = "weights: {bits: 4, group_size: 128}, algorithm: rtn, why: small"
