"""Hub names of Kimi-Linear's tensors: the one table that knows them.

The names are the ones on disk (`moonshotai/Kimi-Linear-48B-A3B-*`), which differ from those of a loaded transformers
model. Experts' w1, w3 and w2 are gate, up and down.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from klquant.checkpoint.config import KimiLinearConfig


class TensorClass(StrEnum):
    """What a recipe can name. One row of `klquant plan` each."""

    ROUTED_EXPERTS = "routed_experts"
    SHARED_EXPERTS = "shared_experts"
    DENSE_MLP = "dense_mlp"
    KDA_PROJ = "kda_proj"
    MLA_PROJ = "mla_proj"
    MLA_KV_B = "mla_kv_b"
    KDA_GATES = "kda_gates"
    ROUTER = "router"
    CONV = "conv"
    NORM = "norm"
    EMBEDDING = "embedding"
    HEAD = "head"


# Classes that keep their dtype unless a recipe's rule says otherwise in so many words.
SENSITIVE = frozenset(
    {TensorClass.KDA_GATES, TensorClass.ROUTER, TensorClass.CONV, TensorClass.NORM, TensorClass.MLA_KV_B}
)


@dataclass(frozen=True)
class TensorKey:
    """A hub name taken apart. `role` is the last meaningful part: q_proj, w1, A_log, input_layernorm, …"""

    name: str
    cls: TensorClass
    role: str
    layer: int | None = None
    expert: int | None = None

    @property
    def module(self) -> str:
        """The name of the linear module: the tensor's name without `.weight`."""
        return self.name.removesuffix(".weight")

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor is the weight of a linear map, and could be quantized at all."""
        return self.cls not in (TensorClass.NORM, TensorClass.CONV, TensorClass.EMBEDDING) and self.role not in (
            "A_log", "dt_bias", "e_score_correction_bias",
        )  # fmt: skip


class Place(NamedTuple):
    """Where a tensor or module is. layer: None outside the layers. name: the one in there, without that of the block
    (experts.5.w2, q_proj.weight); outside the layers the whole name."""

    layer: int | None
    name: str

    @property
    def unit(self) -> str:
        """What is worked on and written in one go: embedding, layer 3, head (which has the final norm)."""
        if self.layer is not None:
            return f"layer {self.layer}"
        return "embedding" if self.name.startswith("model.embed_tokens.") else "head"

    @property
    def routed(self) -> bool:
        """Whether it belongs to a routed expert."""
        return self.layer is not None and self.name.startswith("experts.")


_KDA = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), TensorClass.KDA_PROJ),
    **dict.fromkeys(("b_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj"), TensorClass.KDA_GATES),
    **dict.fromkeys(("q_conv1d", "k_conv1d", "v_conv1d"), TensorClass.CONV),
    "o_norm": TensorClass.NORM,
}
_MLA = {
    **dict.fromkeys(("q_proj", "kv_a_proj_with_mqa", "o_proj"), TensorClass.MLA_PROJ),
    "kv_b_proj": TensorClass.MLA_KV_B,
    "kv_a_layernorm": TensorClass.NORM,
}
_TOP = {
    "model.embed_tokens.weight": (TensorClass.EMBEDDING, "embed_tokens"),
    "model.norm.weight": (TensorClass.NORM, "norm"),
    "lm_head.weight": (TensorClass.HEAD, "lm_head"),
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")


def parse_name(name: str, config: KimiLinearConfig) -> TensorKey | None:
    """Take a hub name apart; None when the architecture has no tensor of that name."""
    if name in _TOP:
        return TensorKey(name, *_TOP[name])
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    layer, rest = int(match[1]), match[2]
    if (expert := _EXPERT.fullmatch(rest)) is not None:
        return TensorKey(name, TensorClass.ROUTED_EXPERTS, expert[2], layer, int(expert[1]))
    table = _MLA if config.is_mla(layer) else _KDA
    parts = rest.removesuffix(".weight").split(".")
    match parts:
        case ["input_layernorm" | "post_attention_layernorm" as role]:
            cls = TensorClass.NORM
        case ["self_attn", "A_log" | "dt_bias" as role]:
            cls = TensorClass.KDA_GATES
        case ["self_attn", role] if role in table:
            cls = table[role]
        case ["mlp", "gate_proj" | "up_proj" | "down_proj" as role]:
            cls = TensorClass.DENSE_MLP
        case ["block_sparse_moe", "shared_experts", "gate_proj" | "up_proj" | "down_proj" as role]:
            cls = TensorClass.SHARED_EXPERTS
        case ["block_sparse_moe", "gate"]:
            cls, role = TensorClass.ROUTER, "gate"
        case ["block_sparse_moe", "gate", "e_score_correction_bias" as role]:
            cls = TensorClass.ROUTER
        case _:
            return None
    return TensorKey(name, cls, role, layer)


def place_of(name: str) -> Place:
    """Where a tensor, packed or plain, or a module of this hub name is; of any name, for no config is asked."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return Place(None, name)
    return Place(int(match[1]), match[2].removeprefix("self_attn.").removeprefix("block_sparse_moe."))


def expected_tensors(config: KimiLinearConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this shape has: hub name → shape, in file order."""
    shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (config.hidden_size,)
        shapes |= {prefix + "self_attn." + k: v for k, v in _attention_shapes(config, layer).items()}
        shapes[prefix + "post_attention_layernorm.weight"] = (config.hidden_size,)
        shapes |= {prefix + k: v for k, v in _mlp_shapes(config, layer).items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _attention_shapes(c: KimiLinearConfig, layer: int) -> dict[str, tuple[int, ...]]:
    hidden = c.hidden_size
    if c.is_mla(layer):
        return {
            "q_proj.weight": (c.num_heads * c.qk_dim, hidden),
            "kv_a_proj_with_mqa.weight": (c.latent_dim, hidden),
            "kv_a_layernorm.weight": (c.kv_rank,),
            "kv_b_proj.weight": (c.num_heads * (c.qk_nope_dim + c.v_dim), c.kv_rank),
            "o_proj.weight": (hidden, c.num_heads * c.v_dim),
        }
    wide = c.kda_width
    return {
        **{f"{x}_proj.weight": (wide, hidden) for x in "qkv"},
        **{f"{x}_conv1d.weight": (wide, 1, c.conv_width) for x in "qkv"},
        "A_log": (1, 1, c.kda_heads, 1),
        "dt_bias": (wide,),
        "f_a_proj.weight": (c.kda_dim, hidden),
        "f_b_proj.weight": (wide, c.kda_dim),
        "g_a_proj.weight": (c.kda_dim, hidden),
        "g_b_proj.weight": (wide, c.kda_dim),
        "b_proj.weight": (c.kda_heads, hidden),
        "o_norm.weight": (c.kda_dim,),
        "o_proj.weight": (hidden, wide),
    }


def _mlp_shapes(c: KimiLinearConfig, layer: int) -> dict[str, tuple[int, ...]]:
    if not c.is_moe(layer):
        return {f"mlp.{k}": v for k, v in _gated_mlp(c.hidden_size, c.intermediate_size).items()}
    moe = "block_sparse_moe."
    shapes = {
        moe + "gate.weight": (c.num_experts, c.hidden_size),
        moe + "gate.e_score_correction_bias": (c.num_experts,),
    }
    for expert in range(c.num_experts):
        for role in ("w1", "w2", "w3"):
            down = role == "w2"
            shape = (c.hidden_size, c.moe_intermediate_size) if down else (c.moe_intermediate_size, c.hidden_size)
            shapes[f"{moe}experts.{expert}.{role}.weight"] = shape
    return shapes | {f"{moe}shared_experts.{k}": v for k, v in _gated_mlp(c.hidden_size, c.shared_size).items()}


def _gated_mlp(hidden: int, wide: int) -> dict[str, tuple[int, ...]]:
    return {"gate_proj.weight": (wide, hidden), "up_proj.weight": (wide, hidden), "down_proj.weight": (hidden, wide)}
