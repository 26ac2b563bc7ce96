"""llm-compressor's GPTQ (0.14). It has no mapping for Kimi-Linear: its own `linearize_moe` takes the experts apart."""

import click
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from benchmarks.peers.job import Job, peer


@click.option("--routed", is_flag=True, help="An expert sees the tokens routed to it; by default it sees all.")
@click.option("--mse", is_flag=True, help="Scales of least squared error; by default of the largest weight.")
def run(job: Job, routed: bool, mse: bool) -> dict[str, Tensor]:
    """llm-compressor's GPTQ with its defaults (static activation order, damping 0.01)."""
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.bfloat16, device_map=job.device)
    linearize_moe(model)
    observer = "memoryless_mse" if mse else "memoryless_minmax"
    groups = {}
    for spec in set(job.specs.values()):
        grid = QuantizationArgs(
            num_bits=spec.bits,
            symmetric=spec.symmetric,
            strategy="group",
            group_size=spec.group_size,
            observer=observer,
        )
        targets = [name for name, wanted in job.specs.items() if wanted == spec]
        groups[f"bits_{spec.bits}_group_{spec.group_size}"] = QuantizationScheme(targets=targets, weights=grid)
    # Text as tokens already: the loader goes through as it is.
    windows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in job.ids_WS]
    oneshot(
        model=model, dataset=DataLoader(windows, batch_size=1), recipe=[GPTQModifier(config_groups=groups)],
        num_calibration_samples=len(windows), moe_calibrate_all_experts=not routed,
    )  # fmt: skip
    return {name: _values(module) for name, module in model.named_modules() if hasattr(module, "weight_scale")}


def _values(module: nn.Linear) -> Tensor:
    """Its weight is rounded to BF16 once more; a checkpoint has codes and scales, and so has this."""
    grid = module.quantization_scheme.weights
    half = 2 ** (grid.num_bits - 1)
    scale = module.weight_scale.float().repeat_interleave(grid.group_size, dim=1)
    return (module.weight.float() / scale).round().clamp(-half, half - 1) * scale


if __name__ == "__main__":
    peer(run)()
