"""transformers' own Kimi-Linear, on its plain torch path."""

import inspect
from pathlib import Path

import torch


def oracle(folder: Path, dtype: torch.dtype = torch.float32):
    """The checkpoint as `KimiLinearForCausalLM`. Where fla is installed transformers calls its Triton kernels even on
    a CPU, so the reference functions are put back in their place."""
    from transformers import AutoModelForCausalLM
    from transformers.models.kimi_linear import modeling_kimi_linear as modeling

    for name in (
        "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", "causal_conv1d_fn", "causal_conv1d_update",
    ):  # fmt: skip
        setattr(modeling, name, inspect.unwrap(getattr(modeling, name)))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
