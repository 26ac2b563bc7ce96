"""Tiny random Kimi-Linear checkpoints in hub format, made in a second, for tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import expected_tensors, parse_name


def tiny_config(**changes) -> dict:
    """A config.json: 4 layers (KDA dense, KDA MoE, KDA MoE, MLA MoE), hidden 64, 8 experts, 259 token ids in use."""
    raw = {
        "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "dtype": "bfloat16",
        "vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "hidden_size": 64,
        "num_hidden_layers": 4, "intermediate_size": 128, "moe_intermediate_size": 32, "num_experts": 8,
        "num_experts_per_token": 2, "num_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "num_expert_group": 1, "topk_group": 1, "use_grouped_topk": True, "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid", "routed_scaling_factor": 2.446, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "kv_lora_rank": 32,
        "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "mla_use_nope": True,
        "rope_scaling": None, "rope_theta": 10000.0, "initializer_range": 0.02, "model_max_length": 4096,
        "num_nextn_predict_layers": 0, "tie_word_embeddings": False, "use_cache": True,
        "linear_attn_config": {
            "full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 32, "num_heads": 2,
            "short_conv_kernel_size": 4,
        },
    }  # fmt: skip
    return raw | changes


def tiny_tensors(raw: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors at scales that keep activations sane, under hub names and dtypes."""
    config = KimiLinearConfig.from_dict(raw)
    gen = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        role = parse_name(name, config).role
        noise = torch.randn(shape, generator=gen)
        if "norm" in role:
            tensors[name] = (1 + 0.1 * noise).bfloat16()
        elif role == "A_log":
            tensors[name] = torch.rand(shape, generator=gen) * 2
        elif role in ("dt_bias", "e_score_correction_bias"):
            tensors[name] = noise * (1.0 if role == "dt_bias" else 0.05)
        elif role == "embed_tokens":
            tensors[name] = noise.bfloat16()
        else:
            tensors[name] = (noise / shape[-1] ** 0.5).bfloat16()
    return tensors


def write_checkpoint(folder: Path, raw: dict, tensors: dict[str, torch.Tensor], shards: int = 2) -> Path:
    """Write a hub-format folder: config, `shards` safetensors files and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"max_length": 4096}))
    names = list(tensors)
    weight_map = {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n].contiguous() for n in names[s * len(names) // shards : (s + 1) * len(names) // shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    write_tokenizer(folder, raw["vocab_size"])
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level tokenizer.json: three specials, then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["[BOS]", "[EOS]", "[PAD]", *alphabet])}
    assert len(vocab) <= vocab_size
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["[BOS]", "[EOS]", "[PAD]"])
    tok.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]",
        "model_max_length": 4096,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def tiny_checkpoint(folder: Path, seed: int = 0, shards: int = 2, **changes) -> Path:
    raw = tiny_config(**changes)
    return write_checkpoint(folder, raw, tiny_tensors(raw, seed), shards)
