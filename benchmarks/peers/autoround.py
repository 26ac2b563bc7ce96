"""AutoRound (0.15), on experts that llm-compressor takes apart."""

import click
import torch
from auto_round import AutoRound
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.peers.job import WINDOW, Job, peer

BATCH = 8


@click.option("--iters", default=200, help="Steps of signed gradient descent a layer.")
def run(job: Job, iters: int) -> dict[str, Tensor]:
    """AutoRound with its defaults (200 steps a layer, eight windows a step)."""
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend_causally(module, q, k, v, attention_mask, **rest):
        # AutoRound hands on a mask of ones, of integers, which MLA's attention does not take. No window is padded.
        return attend(module, q, k, v, None, **(rest | {"is_causal": True}))

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend_causally
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.bfloat16, device_map=job.device)
    linearize_moe(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".experts." in name:
            # llm-compressor's offloading keeps them on another device than AutoRound wants them.
            plain = nn.Linear(module.in_features, module.out_features, bias=False, dtype=torch.bfloat16)
            plain.weight.data.copy_(module.weight)
            model.set_submodule(name, plain.to(job.device))
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            spec = job.specs.get(name)
            bits, group = (spec.bits, spec.group_size) if spec else (16, 128)
            layers[name] = {"bits": bits, "group_size": group, "sym": True, "data_type": "int"}
    windows = DataLoader([{"input_ids": ids} for ids in job.ids_WS], batch_size=1)
    rounder = AutoRound(
        model, AutoTokenizer.from_pretrained(job.folder), bits=job.routed.bits, group_size=job.routed.group_size,
        sym=True, iters=iters, nsamples=len(job.ids_WS), seqlen=WINDOW, dataset=windows, layer_config=layers,
        batch_size=min(BATCH, len(job.ids_WS)), device_map=job.device, low_gpu_mem_usage=False,
        enable_torch_compile=False,
    )  # fmt: skip
    model, _ = rounder.quantize()
    done = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and hasattr(m, "scale"))
    return {name: m.weight.data for name, m in done}


if __name__ == "__main__":
    peer(run)()
