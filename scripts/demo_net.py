"""The demo model as plain trainable torch modules, one for each tensor of the hub's checkpoint.

Kimi-Linear, arXiv 2510.26692. Attribute names are the hub's, so that a state dict needs only its stacked experts taken
apart to be a checkpoint. Written for training: experts are computed densely (every expert sees every token, and the
router's weights pick), which at 8 experts is quicker than sorting tokens. klquant's own model is `klquant/model`.

Shape suffixes: B = sequences, T = tokens, H = heads, D = channels of a head, N = chunks, C = tokens of a chunk,
E = experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG = {
    "architectures": ["KimiLinearForCausalLM"],
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "head_dim": 48,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "kv_lora_rank": 64,
    "linear_attn_config": {
        "full_attn_layers": [4],  # 1-based, as on the hub
        "kda_layers": [1, 2, 3, 5],
        "head_dim": 64,
        "num_heads": 2,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 4096,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 2,
    "num_expert_group": 1,
    "num_experts": 8,
    "num_experts_per_token": 2,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "pad_token_id": 2,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 64,
    "vocab_size": 1536,
}
CHUNK = {"cpu": 16, "cuda": 32}  # less arithmetic, or fewer steps


def linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class ShortConv(nn.Module):
    """Causal depthwise convolution and SiLU. Weight [channels, 1, width]; the last tap is the present token."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))

    def forward(self, x_BTF: Tensor) -> Tensor:
        width, n_tokens = self.weight.shape[-1], x_BTF.shape[1]
        padded = F.pad(x_BTF, (0, 0, width - 1, 0))
        return F.silu(sum(padded[:, i : i + n_tokens] * self.weight[:, 0, i] for i in range(width)))


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule in chunks, FP32. q, k, v, g: [B, T, H, D], g = log of the decay; beta: [B, T, H, 1].

    S_t = Diag(e^g_t) S_{t−1}; S_t += β_t k_t (v_t − k_tᵀ S_t)ᵀ; o_t = q_tᵀ S_t / √D.
    """
    n_tokens, chunk = q.shape[1], CHUNK[q.device.type]
    padded = (F.pad(x.float(), (0, 0, 0, 0, 0, -n_tokens % chunk)) for x in (q, k, v, g, beta))
    q, k, v, g, beta = (x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4) for x in padded)  # [B, H, N, C, D]
    q = q / ((q * q).sum(-1, keepdim=True) + 1e-6).sqrt() * q.shape[-1] ** -0.5
    k = k / ((k * k).sum(-1, keepdim=True) + 1e-6).sqrt()

    g = g.cumsum(-2)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    decay = (g.unsqueeze(-2) - g.unsqueeze(-3)).masked_fill(later[:, :, None], float("-inf")).exp()
    seen_by = decay * k.unsqueeze(-3)  # [..., C_i, C_j, D]: k_j as token i finds it in the state
    pair = seen_by @ torch.stack([q, k * beta], -1)
    read_CC, write_CC = pair[..., 0], pair[..., 1]
    # Tokens of a chunk overwrite each other's values: solve (I + lower triangle) x = β v, and the same for β k e^g.
    rhs = torch.cat([v * beta, k * beta * g.exp()], -1)
    unit = write_CC.tril(-1) + torch.eye(chunk, device=q.device)
    v, w = torch.linalg.solve_triangular(unit, rhs, upper=False, unitriangular=True).chunk(2, -1)

    q, left = q * g.exp(), g[..., -1:, :]
    k, left = (k * (left - g).exp()).transpose(-1, -2), left.exp().transpose(-1, -2)
    state = q.new_zeros(*q.shape[:2], q.shape[-1], q.shape[-1])
    out = []
    for n in range(q.shape[2]):
        value = v[:, :, n] - w[:, :, n] @ state
        out.append(q[:, :, n] @ state + read_CC[:, :, n] @ value)
        state = left[:, :, n] * state + k[:, :, n] @ value
    return torch.stack(out, 2).flatten(2, 3).transpose(1, 2)[:, :n_tokens]


class KDA(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        attn, hidden = c["linear_attn_config"], c["hidden_size"]
        self.heads, self.dim = attn["num_heads"], attn["head_dim"]
        wide = self.heads * self.dim
        for x in "qkv":
            setattr(self, f"{x}_proj", linear(hidden, wide))
            setattr(self, f"{x}_conv1d", ShortConv(wide, attn["short_conv_kernel_size"]))
        # As flash-linear-attention starts them: decay rates 1 to 16, time steps 0.001 to 0.1 through a softplus.
        self.A_log = nn.Parameter(torch.empty(1, 1, self.heads, 1).uniform_(1, 16).log())
        step = torch.empty(wide).uniform_(-6.9, -2.3).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.f_a_proj, self.f_b_proj = linear(hidden, self.dim), linear(self.dim, wide)
        self.g_a_proj, self.g_b_proj = linear(hidden, self.dim), linear(self.dim, wide)
        self.b_proj = linear(hidden, self.heads)
        self.o_norm = RMSNorm(self.dim, c["rms_norm_eps"])
        self.o_proj = linear(wide, hidden)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, self.dim))

        q, k, v = (heads(getattr(self, f"{n}_conv1d")(getattr(self, f"{n}_proj")(x))) for n in "qkv")
        g = -self.A_log.exp() * F.softplus(heads(self.f_b_proj(self.f_a_proj(x)).float() + self.dt_bias))
        beta = self.b_proj(x).sigmoid().unsqueeze(-1)
        with torch.autocast(x.device.type, enabled=False):
            o = delta_rule(q, k, v, g, beta)
        gate = heads(self.g_b_proj(self.g_a_proj(x))).float().sigmoid()
        return self.o_proj((self.o_norm(o) * gate).flatten(-2))


class MLA(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        hidden, self.heads = c["hidden_size"], c["num_attention_heads"]
        self.nope, self.rope, self.v_dim = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        self.rank = c["kv_lora_rank"]
        self.q_proj = linear(hidden, self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(hidden, self.rank + self.rope)
        self.kv_a_layernorm = RMSNorm(self.rank, 1e-6)
        self.kv_b_proj = linear(self.rank, self.heads * (self.nope + self.v_dim))
        self.o_proj = linear(self.heads * self.v_dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        latent, shared = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = kv.split([self.nope, self.v_dim], -1)
        k = torch.cat([k, shared.unsqueeze(1).expand(-1, self.heads, -1, -1)], -1)
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(hidden, wide), linear(hidden, wide), linear(wide, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Sigmoid router: the correction bias chooses, the scores weigh. `load` [E] counts the choices of the last pass."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        self.top_k, self.scaling = c["num_experts_per_token"], c["routed_scaling_factor"]
        self.weight = nn.Parameter(torch.empty(c["num_experts"], c["hidden_size"]))
        self.register_buffer("e_score_correction_bias", torch.zeros(c["num_experts"]))
        self.register_buffer("load", torch.zeros(c["num_experts"]), persistent=False)

    def forward(self, x_TF: Tensor) -> Tensor:
        """Every expert's weight for every token [T, E], zero where it was not chosen."""
        with torch.autocast(x_TF.device.type, enabled=False):
            scores = F.linear(x_TF.float(), self.weight.float()).sigmoid()
        chosen = (scores + self.e_score_correction_bias).topk(self.top_k, -1).indices
        mask = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        self.load = mask.sum(0)
        weight = scores * mask
        return weight / weight.sum(-1, keepdim=True) * self.scaling


class MoE(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        n, wide, hidden = c["num_experts"], c["moe_intermediate_size"], c["hidden_size"]
        self.gate = Gate(c)
        self.experts = nn.ParameterDict(
            {
                "w1": nn.Parameter(torch.empty(n, wide, hidden)),
                "w2": nn.Parameter(torch.empty(n, hidden, wide)),
                "w3": nn.Parameter(torch.empty(n, wide, hidden)),
            }
        )
        self.shared_experts = MLP(hidden, wide * c["num_shared_experts"])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        w1, w2, w3 = (self.experts[w] for w in ("w1", "w2", "w3"))
        up = F.silu(torch.einsum("tk,eik->tei", flat, w1)) * torch.einsum("tk,eik->tei", flat, w3)
        out = torch.einsum("tei,eki->tk", up * self.gate(flat).unsqueeze(-1), w2)
        return out.view_as(x) + self.shared_experts(x)


class Block(nn.Module):
    def __init__(self, c: dict, layer: int) -> None:
        super().__init__()
        mla = layer + 1 in c["linear_attn_config"]["full_attn_layers"]
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = MLA(c) if mla else KDA(c)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.dense = layer < c["first_k_dense_replace"]
        if self.dense:
            self.mlp = MLP(c["hidden_size"], c["intermediate_size"])
        else:
            self.block_sparse_moe = MoE(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        ffn = self.mlp if self.dense else self.block_sparse_moe
        return x + ffn(self.post_attention_layernorm(x))


class DemoNet(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.model.layers = nn.ModuleList(Block(c, layer) for layer in range(c["num_hidden_layers"]))
        self.model.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.lm_head = linear(c["hidden_size"], c["vocab_size"])
        self._start(c["num_hidden_layers"])

    @torch.no_grad()
    def _start(self, num_layers: int) -> None:
        """Normal weights of deviation 1/√K; what writes to the residual stream starts smaller by √(2 layers)."""
        for name, p in self.named_parameters():
            if p.dim() < 2 or name.endswith("A_log"):
                continue
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "w2"))
            std = p.shape[-1] ** -0.5 * ((2 * num_layers) ** -0.5 if writes else 1.0)
            p.normal_(0.0, 0.1 if "embed_tokens" in name else std)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits [B, T, vocabulary]."""
        h = self.model.embed_tokens(ids_BT)
        for layer in self.model.layers:
            h = layer(h)
        return self.lm_head(self.model.norm(h))

    def gates(self) -> list[Gate]:
        return [layer.block_sparse_moe.gate for layer in self.model.layers if not layer.dense]


def hub_tensors(net: DemoNet) -> dict[str, Tensor]:
    """The state dict under hub names, BF16, but for the tensors that the hub's checkpoint keeps in FP32."""
    tensors = {}
    for name, t in net.state_dict().items():
        keep = name.endswith(("A_log", "dt_bias", "e_score_correction_bias"))
        t = t.detach().to("cpu", torch.float32 if keep else torch.bfloat16).contiguous()
        if ".experts." in name:
            prefix, role = name.rsplit(".", 1)
            tensors |= {f"{prefix}.{e}.{role}.weight": t[e].clone() for e in range(len(t))}
        else:
            tensors[name] = t
    return tensors
