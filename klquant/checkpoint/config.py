"""The model's shape, read once from `config.json` and checked there.

The hub's layer lists are 1-based; this file is the only place that knows it. Everything else counts layers from 0.
"""

from dataclasses import dataclass

from klquant.errors import UserError

# No Kimi-Linear comes near it, and a damaged config must not fill the memory with names.
MAX_COUNT = 4096


@dataclass(frozen=True)
class KimiLinearConfig:
    """Sizes of a Kimi-Linear model. Layers are 0-based here."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    intermediate_size: int
    rms_eps: float
    max_context: int
    bos_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    # mixture of experts
    first_dense: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    num_shared_experts: int
    routed_scaling: float
    renormalize: bool
    num_groups: int
    topk_group: int
    # MLA
    mla_layers: frozenset[int]
    num_heads: int
    qk_nope_dim: int
    qk_rope_dim: int
    v_dim: int
    kv_rank: int
    # KDA
    kda_heads: int
    kda_dim: int
    conv_width: int

    @property
    def kda_width(self) -> int:
        """Channels of q, k or v over all KDA heads."""
        return self.kda_heads * self.kda_dim

    @property
    def qk_dim(self) -> int:
        """Channels of one MLA query head."""
        return self.qk_nope_dim + self.qk_rope_dim

    @property
    def latent_dim(self) -> int:
        """Values a token adds to the latent cache of one MLA layer."""
        return self.kv_rank + self.qk_rope_dim

    @property
    def shared_size(self) -> int:
        return self.moe_intermediate_size * self.num_shared_experts

    def is_mla(self, layer: int) -> bool:
        return layer in self.mla_layers

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_dense

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config.json") -> "KimiLinearConfig":
        """Read the hub's `config.json`. Raises UserError naming `where` and the key that is missing or does not fit."""
        if not isinstance(raw, dict):
            raise UserError(f"{where}: not a JSON object")
        if raw.get("model_type") != "kimi_linear":
            raise UserError(
                f"{where}: model_type is {raw.get('model_type')!r}, not 'kimi_linear'; klquant reads Kimi-Linear only"
            )
        read = _Reader(raw, where)
        attn = read.section("linear_attn_config")
        num_layers = read.count("num_hidden_layers", most=MAX_COUNT)
        mla, kda = attn.layers("full_attn_layers", num_layers), attn.layers("kda_layers", num_layers)
        if mla & kda or len(mla | kda) != num_layers:
            raise UserError(
                f"{where}: linear_attn_config.full_attn_layers and kda_layers must name each of the layers "
                f"1 to {num_layers} exactly once"
            )
        if raw.get("q_lora_rank") is not None:
            raise UserError(f"{where}: q_lora_rank {raw['q_lora_rank']!r} is not supported; Kimi-Linear has null")
        for key, want in (
            ("mla_use_nope", True), ("tie_word_embeddings", False), ("moe_layer_freq", 1), ("hidden_act", "silu"),
            ("moe_router_activation_func", "sigmoid"), ("num_nextn_predict_layers", 0), ("attention_bias", False),
        ):  # fmt: skip
            if raw.get(key, want) != want:
                raise UserError(f"{where}: {key} is {raw[key]!r}; klquant supports {want!r}, as Kimi-Linear has it")
        config = cls(
            vocab_size=read.count("vocab_size"),
            hidden_size=read.count("hidden_size"),
            num_layers=num_layers,
            intermediate_size=read.count("intermediate_size"),
            rms_eps=read.number("rms_norm_eps"),
            max_context=read.count("model_max_length", "max_position_embeddings"),
            bos_id=read.token("bos_token_id"),
            eos_ids=read.tokens("eos_token_id"),
            pad_id=read.token("pad_token_id"),
            first_dense=read.count("first_k_dense_replace", least=0),
            num_experts=read.count("num_experts", most=MAX_COUNT),
            top_k=read.count("num_experts_per_token", "num_experts_per_tok"),
            moe_intermediate_size=read.count("moe_intermediate_size"),
            num_shared_experts=read.count("num_shared_experts"),
            routed_scaling=read.number("routed_scaling_factor"),
            renormalize=bool(raw.get("moe_renormalize", True)),
            num_groups=read.count("num_expert_group"),
            topk_group=read.count("topk_group"),
            mla_layers=frozenset(mla),
            num_heads=read.count("num_attention_heads"),
            qk_nope_dim=read.count("qk_nope_head_dim"),
            qk_rope_dim=read.count("qk_rope_head_dim"),
            v_dim=read.count("v_head_dim"),
            kv_rank=read.count("kv_lora_rank"),
            kda_heads=attn.count("num_heads"),
            kda_dim=attn.count("head_dim"),
            conv_width=attn.count("short_conv_kernel_size"),
        )
        if raw.get("num_key_value_heads", config.num_heads) not in (None, config.num_heads):
            raise UserError(f"{where}: num_key_value_heads must equal num_attention_heads ({config.num_heads})")
        _require_consistent(config, where)
        return config


def _require_consistent(c: KimiLinearConfig, where: str) -> None:
    """Raises UserError, naming `where` and the key, for figures that do not go together."""
    if c.top_k > c.num_experts:
        raise UserError(f"{where}: num_experts_per_token {c.top_k} exceeds num_experts {c.num_experts}")
    if c.num_experts % c.num_groups:
        raise UserError(f"{where}: num_expert_group {c.num_groups} does not divide num_experts")
    if c.topk_group > c.num_groups:
        raise UserError(f"{where}: topk_group {c.topk_group} exceeds num_expert_group {c.num_groups}")
    size = c.num_experts // c.num_groups
    if c.num_groups > 1 and size < 2:
        raise UserError(f"{where}: num_expert_group {c.num_groups} leaves groups of a single expert")
    if c.top_k > c.topk_group * size:
        raise UserError(
            f"{where}: topk_group {c.topk_group}, groups of {size} experts, is too few for "
            f"num_experts_per_token {c.top_k}"
        )
    bad = [i for i in (c.bos_id, c.pad_id, *c.eos_ids) if not 0 <= i < c.vocab_size]
    if bad:
        raise UserError(f"{where}: special token id {bad[0]!r} is outside the vocabulary of {c.vocab_size}")


class _Reader:
    """Typed look-ups in one JSON object; every failure names the file and the key."""

    def __init__(self, raw: dict, where: str, prefix: str = "") -> None:
        self.raw, self.where, self.prefix = raw, where, prefix

    def _get(self, *names: str):
        for name in names:
            if self.raw.get(name) is not None:
                return self.raw[name]
        raise UserError(f"{self.where}: {self.prefix}{names[0]} is missing")

    def _bad(self, name: str, value, want: str) -> UserError:
        return UserError(f"{self.where}: {self.prefix}{name} is {value!r}, expected {want}")

    def count(self, *names: str, least: int = 1, most: int = (1 << 31) - 1) -> int:
        value = self._get(*names)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._bad(names[0], value, f"a whole number from {least} to {most}")
        return value

    def token(self, name: str) -> int:
        return self.count(name, least=0)

    def tokens(self, name: str) -> tuple[int, ...]:
        """One token id, or a list of them."""
        value = self._get(name)
        ids = value if isinstance(value, list) and value else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise self._bad(name, value, "a token id or a list of them")
        return tuple(ids)

    def number(self, name: str) -> float:
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._bad(name, value, "a positive number")
        return float(value)

    def section(self, name: str) -> "_Reader":
        value = self._get(name)
        if not isinstance(value, dict):
            raise self._bad(name, value, "an object")
        return _Reader(value, self.where, f"{name}.")

    def layers(self, name: str, num_layers: int) -> set[int]:
        """A list of 1-based layer numbers → a set of 0-based ones."""
        value = self.raw.get(name)
        ok = isinstance(value, list) and all(type(i) is int and 1 <= i <= num_layers for i in value)
        if not ok or len(set(value)) != len(value):
            raise self._bad(name, value, f"a list of distinct layer numbers from 1 to {num_layers}")
        return {i - 1 for i in value}
