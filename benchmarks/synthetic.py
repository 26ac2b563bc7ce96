"""Full-width Kimi-Linear-48B layers and calibration streams made of noise on the device that works on them."""

import torch
from torch import Tensor

from klquant.calibrate.activations import Activations
from klquant.calibrate.walk import Streams
from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import expected_tensors
from klquant.model.weights import DictSource, LayerWeights
from klquant.recipe.plan import Plan, make_plan
from klquant.recipe.schema import load_recipe

# The sizes in the hub's config.json of Kimi-Linear-48B-A3B.
KIMI_48B = {
    "model_type": "kimi_linear", "vocab_size": 163840, "hidden_size": 2304, "num_hidden_layers": 27,
    "intermediate_size": 9216, "moe_intermediate_size": 1024, "num_experts": 256, "num_experts_per_token": 8,
    "num_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid", "routed_scaling_factor": 2.446, "num_expert_group": 1, "topk_group": 1,
    "use_grouped_topk": True, "hidden_act": "silu", "rms_norm_eps": 1e-5, "head_dim": 72, "num_attention_heads": 32,
    "num_key_value_heads": 32, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "mla_use_nope": True, "rope_scaling": None, "rope_theta": 10000.0,
    "model_max_length": 1048576, "bos_token_id": 163584, "eos_token_id": 163586, "pad_token_id": 163839,
    "num_nextn_predict_layers": 0, "tie_word_embeddings": False, "use_cache": True, "initializer_range": 0.02,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [x for x in range(1, 27) if x % 4],
        "head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4,
    },
}  # fmt: skip


def make_config(small: bool = False) -> KimiLinearConfig:
    """The 48B's shape; `small` has narrow layers and few experts, to try the benchmark out."""
    sizes = {
        "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_experts": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "linear_attn_config": KIMI_48B["linear_attn_config"] | {"num_heads": 2},
    }  # fmt: skip
    return KimiLinearConfig.from_dict(KIMI_48B | (sizes if small else {}), "synthetic")


def layer_of(config: KimiLinearConfig, kind: str) -> int:
    """The first layer of a kind: dense (KDA with a dense MLP), kda or mla (with experts)."""
    return next(l for l in range(config.num_layers) if kind_of(config, l) == kind)


def kind_of(config: KimiLinearConfig, layer: int) -> str:
    return "mla" if config.is_mla(layer) else "kda" if config.is_moe(layer) else "dense"


def synthetic_plan(config: KimiLinearConfig, recipe: str) -> Plan:
    return make_plan(load_recipe(recipe), config, {n: ("BF16", s) for n, s in expected_tensors(config).items()})


def synthetic_layer(
    config: KimiLinearConfig, layer: int, dtype: torch.dtype, device: torch.device, gen: torch.Generator
) -> LayerWeights:
    """Random weights at scales that keep activations sane; matrices with a few heavy input channels, as real ones."""
    tensors, prefix = {}, f"model.layers.{layer}."
    for name, shape in expected_tensors(config).items():
        if not name.startswith(prefix):
            continue
        role = name.removesuffix(".weight").rpartition(".")[2]
        if "norm" in role:
            value = 1 + 0.1 * _noise(shape, device, gen)
        elif role in ("A_log", "dt_bias", "e_score_correction_bias"):
            value = _noise(shape, device, gen) * (0.05 if role == "e_score_correction_bias" else 0.5)
        else:
            value = _noise(shape, device, gen) / shape[-1] ** 0.5
        tensors[name] = value.to(torch.float32 if value.ndim == 1 else dtype)
    return LayerWeights.load(DictSource(config, tensors), layer, dtype, device)


def synthetic_streams(
    config: KimiLinearConfig, windows: int, length: int, dtype: torch.dtype, device: torch.device, gen: torch.Generator
) -> Streams:
    """Two streams whose channels are correlated and of unequal size; the quantized one is off by a hundredth."""
    c = config.hidden_size
    mix = _noise((c, c), device, gen) / c**0.5 + torch.eye(c, device=device)
    mix *= torch.logspace(-0.5, 0.5, c, device=device)[torch.randperm(c, generator=gen, device=device)]
    quantized, reference = (Activations(windows, length, c, dtype) for _ in range(2))
    for start in range(0, windows, 4):
        h = _noise((min(4, windows - start), length, c), device, gen) @ mix
        reference.write(start, h)
        quantized.write(start, h + 0.01 * h.roll(1, -1))
    return Streams(quantized, reference)


def synthetic_metric(config: KimiLinearConfig, share: float, device: torch.device, gen: torch.Generator) -> Tensor:
    """What `StreamMetric` makes of one router of noise: [C, C]."""
    router_EC = _noise((config.num_experts, config.hidden_size), device, gen)
    reads = router_EC.mT @ router_EC
    return (1 - share) * torch.eye(config.hidden_size, device=device) + share * reads / reads.diagonal().mean()


def _noise(shape: tuple[int, ...], device: torch.device, gen: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=gen, device=device)
