"""Frozen weights of one layer, where each comes from in a checkpoint, and how they are loaded.

Shape suffixes of `klquant.model`: B = sequences, S = positions, T = B·S tokens, C = hidden size, H = heads,
D = head size, F = heads × head size, E = experts, R = routes a token, I = expert width, L = latent values a token,
V = vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig


class LinearOp(Protocol):
    """A linear map [N, K] that knows how to apply itself to x [..., K]."""

    shape: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor: ...

    def wide(self, x: Tensor) -> Tensor:
        """The same in FP32 whatever x is, as it was summed."""
        ...


# A quantized weight in the engine is a LinearOp.
Linear = Tensor | LinearOp


def linear(x: Tensor, w: Linear) -> Tensor:
    """x [..., K] → [..., N]."""
    return F.linear(x, w) if isinstance(w, Tensor) else w(x)


def wide_linear(x: Tensor, w: Linear) -> Tensor:
    """`linear` whose sums stay FP32: for logits, of which BF16 has only every 0.125th at 20, so that likely tokens
    would tie, and for what is added to an FP32 stream.

    Not of plain 16-bit tensors on a CPU, whose product can only round, nor where gradients are wanted.
    """
    if not isinstance(w, Tensor):
        return w.wide(x)
    if not x.is_cuda or x.itemsize != 2 or (torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)):
        return F.linear(x, w)
    return torch.mm(x.flatten(0, -2), w.T, out_dtype=torch.float32).unflatten(0, x.shape[:-1])


class WeightSource(Protocol):
    """Where weights come from: a checkpoint reader, or tensors in memory. Names are the hub's, `.weight` included."""

    @property
    def config(self) -> KimiLinearConfig: ...

    def weight(self, name: str, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class DictSource:
    """Tensors already in memory, under hub names. Gradients flow through."""

    config: KimiLinearConfig
    tensors: Mapping[str, Tensor]

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.tensors[name].to(dtype)


@dataclass(frozen=True)
class KDAWeights:
    """q, k, v and o projections, their convolutions [F, W], and the gates. A_log [H] and dt_bias [F] are FP32."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    q_conv: Tensor
    k_conv: Tensor
    v_conv: Tensor
    A_log: Tensor
    dt_bias: Tensor
    f_a_proj: Linear
    f_b_proj: Linear
    g_a_proj: Linear
    g_b_proj: Linear
    b_proj: Linear
    o_norm: Tensor
    o_proj: Linear


@dataclass(frozen=True)
class MLAWeights:
    """kv_a_proj makes the latent and the shared key part, kv_b_proj expands the latent to keys and values."""

    q_proj: Linear
    kv_a_proj: Linear
    kv_a_norm: Tensor
    kv_b_proj: Linear
    o_proj: Linear


@dataclass(frozen=True)
class MLPWeights:
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear


class MLPOp(Protocol):
    """A whole MLP that knows how to apply itself to x [..., C]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class ExpertsOp(Protocol):
    """All experts of a layer, the shared one included: x [T, C], weight [T, R] FP32, expert [T, R] int32 → [T, C]."""

    def __call__(self, x_TC: Tensor, weight_TR: Tensor, expert_TR: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class MoEWeights:
    """router [E, C] and router_bias [E] in FP32; experts' gate w1 and up w3 [E, I, C], down w2 [E, C, I]."""

    router: Tensor
    router_bias: Tensor
    w1: Tensor
    w3: Tensor
    w2: Tensor
    shared: MLPWeights


@dataclass(frozen=True)
class PackedMoE:
    """A layer of experts as the engine holds it. router [E, C] and router_bias [E] as in MoEWeights."""

    router: Tensor
    router_bias: Tensor
    experts: ExpertsOp


# Field → hub name behind `model.layers.L.`. `{}` is the expert: such a field is a stack over experts.
KDA_NAMES = {
    **{f"{x}_proj": f"self_attn.{x}_proj.weight" for x in "qkv"},
    **{f"{x}_conv": f"self_attn.{x}_conv1d.weight" for x in "qkv"},
    "A_log": "self_attn.A_log",
    "dt_bias": "self_attn.dt_bias",
    **{f"{x}_proj": f"self_attn.{x}_proj.weight" for x in ("f_a", "f_b", "g_a", "g_b", "b")},
    "o_norm": "self_attn.o_norm.weight",
    "o_proj": "self_attn.o_proj.weight",
}
MLA_NAMES = {
    "q_proj": "self_attn.q_proj.weight",
    "kv_a_proj": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b_proj": "self_attn.kv_b_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
}
DENSE_NAMES = {x: f"mlp.{x}.weight" for x in ("gate_proj", "up_proj", "down_proj")}
SHARED_NAMES = {x: f"block_sparse_moe.shared_experts.{x}.weight" for x in ("gate_proj", "up_proj", "down_proj")}
ROUTER_NAMES = {
    "router": "block_sparse_moe.gate.weight",
    "router_bias": "block_sparse_moe.gate.e_score_correction_bias",
}
EXPERT_NAMES = {x: f"block_sparse_moe.experts.{{}}.{x}.weight" for x in ("w1", "w3", "w2")}
NORM_NAMES = {"input_norm": "input_layernorm.weight", "post_norm": "post_attention_layernorm.weight"}
# Small, and their rounding error is not: never below FP32.
FP32_FIELDS = frozenset({"A_log", "dt_bias", "router", "router_bias"})


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: Tensor
    attn: KDAWeights | MLAWeights
    post_norm: Tensor
    mlp: MLPWeights | MLPOp | MoEWeights | PackedMoE

    @classmethod
    def load(cls, source: WeightSource, layer: int, dtype: torch.dtype, device: torch.device | str) -> "LayerWeights":
        """Read layer `layer` (0-based) whole, in `dtype` but for the FP32 fields."""

        def read(field: str, name: str) -> Tensor:
            wanted = torch.float32 if field in FP32_FIELDS else dtype
            return source.weight(f"model.layers.{layer}.{name}", wanted)

        def pick(names: Mapping[str, str]) -> dict[str, Tensor]:
            return {field: read(field, name).to(device) for field, name in names.items()}

        def stack(field: str) -> Tensor:
            name = EXPERT_NAMES[field]
            return torch.stack([read(field, name.format(e)).to(device) for e in range(config.num_experts)])

        config = source.config
        if config.is_mla(layer):
            attn = MLAWeights(**pick(MLA_NAMES))
        else:
            parts = pick(KDA_NAMES)
            convs = {name: parts[name].squeeze(1) for name in ("q_conv", "k_conv", "v_conv")}
            attn = KDAWeights(**parts | convs | {"A_log": parts["A_log"].flatten()})
        if config.is_moe(layer):
            shared = MLPWeights(**pick(SHARED_NAMES))
            mlp = MoEWeights(**pick(ROUTER_NAMES), **{f: stack(f) for f in EXPERT_NAMES}, shared=shared)
        else:
            mlp = MLPWeights(**pick(DENSE_NAMES))
        return cls(attn=attn, mlp=mlp, **pick(NORM_NAMES))
