"""Where a channel scale can be moved from a weight's inputs into what makes them, leaving the function unchanged.

A seam names the producer, whose output channel c is divided by s_c, and *every* consumer, whose input column c is
multiplied by s_c. A forgotten consumer is the classical way to ruin a model here (routers and gates read the same norm
as the projections), so the table is data and a test proves each row. Scales are powers of two: on BF16 tensors the
folding is then exact, and a grid that is already chosen takes it into its scales.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from klquant.calibrate.paths import get, put
from klquant.checkpoint.config import KimiLinearConfig
from klquant.model.weights import LayerWeights


@dataclass(frozen=True)
class Seam:
    """Paths into LayerWeights. `kind` says how the producer carries the scale: a norm's `elements` [K]; a norm of one
    head's channels, `tiled` over the heads; `rows` of a weight; `value_rows`, the value half of MLA's kv_b."""

    kind: str
    producer: str
    consumers: tuple[str, ...]


KDA_INPUT = Seam("elements", "input_norm", tuple(f"attn.{x}_proj" for x in ("q", "k", "v", "f_a", "g_a", "b")))
KDA_OUTPUT = Seam("tiled", "attn.o_norm", ("attn.o_proj",))
MLA_INPUT = Seam("elements", "input_norm", ("attn.q_proj", "attn.kv_a_proj"))
MLA_OUTPUT = Seam("value_rows", "attn.kv_b_proj", ("attn.o_proj",))
DENSE_INPUT = Seam("elements", "post_norm", ("mlp.gate_proj", "mlp.up_proj"))
DENSE_OUTPUT = Seam("rows", "mlp.up_proj", ("mlp.down_proj",))
MOE_INPUT = Seam(
    "elements", "post_norm", ("mlp.router", "mlp.w1", "mlp.w3", "mlp.shared.gate_proj", "mlp.shared.up_proj")
)
EXPERT_OUTPUT = Seam("rows", "mlp.w3", ("mlp.w2",))
SHARED_OUTPUT = Seam("rows", "mlp.shared.up_proj", ("mlp.shared.down_proj",))


def fold(config: KimiLinearConfig, weights: LayerWeights, seam: Seam, s: Tensor) -> LayerWeights:
    """The same layer with scale `s` [K] moved through the seam; [E, K] between an expert's w3 and w2."""
    producer = get(weights, seam.producer)
    weights = put(weights, seam.producer, producer / producer_scale(config, seam, s).to(producer.dtype))
    for path in seam.consumers:
        w = get(weights, path)
        weights = put(weights, path, w * consumer_scale(config, seam, s).unsqueeze(-2).to(w.dtype))
    return weights


def fold_experts(config: KimiLinearConfig, weights: LayerWeights, seam: Seam, s: Tensor, experts: slice) -> None:
    """`fold` for some experts of a seam between stacks, with their scales [E, K], in place."""
    paths = (seam.producer, *seam.consumers)
    part = weights
    for path in paths:
        part = put(part, path, get(weights, path)[experts])
    part = fold(config, part, seam, s)
    for path in paths:
        get(weights, path)[experts] = get(part, path)


def producer_scale(config: KimiLinearConfig, seam: Seam, s: Tensor) -> Tensor:
    """What the producer is divided by, in a shape that broadcasts to it."""
    match seam.kind:
        case "elements" | "tiled":
            return s
        case "rows":
            return s.unsqueeze(-1)
        case "value_rows":
            keys = torch.ones(config.num_heads, config.qk_nope_dim, device=s.device, dtype=s.dtype)
            return torch.cat((keys, s.view(config.num_heads, config.v_dim)), dim=1).view(-1, 1)
    raise AssertionError(seam.kind)


def consumer_scale(config: KimiLinearConfig, seam: Seam, s: Tensor) -> Tensor:
    """What the consumers' input columns are multiplied by, [K] or [E, K]."""
    return s.repeat(config.kda_heads) if seam.kind == "tiled" else s
