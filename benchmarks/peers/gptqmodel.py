"""GPTQModel (7.7). It has no definition of Kimi-Linear: one is registered here, after those it has of its relatives."""

import os
from typing import ClassVar

# Its pool of threads needs two workers, whatever the machine has.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import click
import torch
from defuser.model_registry import MODEL_CONFIG
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.models import auto
from gptqmodel.models.base import BaseQModel
from gptqmodel.models.moe_lifecycle import GateUpDownMoELifecycleHooks
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from torch import Tensor

from benchmarks.peers.job import Job, peer

MLP = "gate_proj:0:in=x", "up_proj:0:in=x", "down_proj:1"
MIXER = "q_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa"


class KimiLinear(BaseQModel):
    """KDA or MLA, then a dense MLP or experts: modules that a layer has not are left out."""

    layer_modules_strict = False
    dynamic_expert_index = "num_experts"
    pre_lm_head_norm_module = "model.norm"
    moe_lifecycle_hooks = GateUpDownMoELifecycleHooks()
    shared_input_verified_model_types = frozenset({"kimi_linear"})
    module_tree: ClassVar = [
        "model", "layers", "#",
        {
            "input_layernorm": ("input_layernorm:!",),
            "self_attn": (*(f"{name}:0:in=h" for name in MIXER), "kv_b_proj:!", "o_norm:!", "o_proj:1"),
            "post_attention_layernorm": ("post_attention_layernorm:!",),
            "mlp:moe": {"": MLP, "gate": ("gate:!",), "experts": {"#": MLP}, "shared_experts:0": MLP},
        },
    ]  # fmt: skip

    def prepare_layer_replay_kwargs(self, layer, layer_input, additional_inputs, target_device):
        # Caught before layer 0, which is KDA and takes another mask than MLA; no window is padded, so none is needed.
        additional_inputs["attention_mask"] = None
        return additional_inputs


@click.option("--mse", default=0.0, help="Power of the error in its search for scales; 0: no search.")
def run(job: Job, mse: float) -> dict[str, Tensor]:
    """GPTQModel's GPTQ with its defaults (activation-aware groups, damping 0.05, routed tokens)."""
    MODEL_CONFIG.setdefault("kimi_linear", {"min_transformers_version": "5.3.0"})
    auto.MODEL_MAP["kimi_linear"] = KimiLinear
    auto.SUPPORTED_MODELS.append("kimi_linear")
    rules = {_exactly("-", job.kept): {}}
    for spec in set(job.specs.values()) - {job.routed}:
        names = [name for name, wanted in job.specs.items() if wanted == spec]
        rules[_exactly("+", names)] = {"bits": spec.bits, "group_size": spec.group_size}
    if head := job.specs.get("lm_head"):
        # A rule of its own, or it gets groups of 32.
        grid = {"bits": head.bits, "group_size": head.group_size, "sym": True}
        rules["lm_head"] = grid | {"desc_act": False, "mse": mse}
    config = QuantizeConfig(
        bits=job.routed.bits, group_size=job.routed.group_size, sym=True, mse=mse, device=job.device,
        offload_to_disk=False, lm_head=head is not None, dynamic=rules,
    )  # fmt: skip
    model = GPTQModel.load(job.folder, config)
    windows = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in job.ids_WS]
    model.quantize(windows, batch_size=1)
    return {name: _values(m) for name, m in model.model.named_modules() if isinstance(m, BaseQuantLinear)}


def _exactly(sign: str, names: list[str]) -> str:
    """A key of `dynamic`: modules that get settings of their own (+) or none (-)."""
    return "{}:^({})$".format(sign, "|".join(name.replace(".", r"\.") for name in names))


def _values(m: BaseQuantLinear) -> Tensor:
    """(code − zero) · scale [N, K] of what it packed, K × N."""
    codes, zeros = _fields(m.qweight.T, m.bits).T, _fields(m.qzeros, m.bits) + 1
    group = m.g_idx.long()
    return ((codes - zeros[group]).float() * m.scales.float()[group]).T


def _fields(words: Tensor, bits: int) -> Tensor:
    """Fields of `bits` bits, one after the other in rows of 32-bit words."""
    stream = (words.cpu().unsqueeze(-1) >> torch.arange(32)) & 1
    return (stream.flatten(-2).unflatten(-1, (-1, bits)) << torch.arange(bits)).sum(-1)


if __name__ == "__main__":
    peer(run)()
