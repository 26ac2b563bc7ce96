"""Memory a model needs to run, by part and before anything is loaded: one planner for plan, report and engine.

Weights, latent cache and KDA state are exact; workspace and runtime are estimates and named so. Sizes in bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import place_of

GIB = 1 << 30
CONTEXTS = (8_192, 131_072, 1_048_576)
PREFILL_CHUNK = 4_096  # tokens prefilled at a time; longer chunks need more workspace and gain little speed
PAST_BLOCK = 4_096  # tokens before a chunk whose latents are expanded at a time: klquant.model.mla.LATENT_BLOCK
STAGING_MOST = GIB // 2  # room on a card to copy experts that lie on the host into, while a prompt is read
RUNTIME_ESTIMATE = 9 * GIB // 8  # a device: CUDA context, kernels, captured graphs, allocator slack

# Cards by what they are sold as → (how many, GiB each). GiB is about what PyTorch reports as a card's total capacity,
# less than its name says; the least of the usual cards of that class (3060, 4080, 3090/4090, 5090, L40S, H100).
CARDS: dict[str, tuple[int, float]] = {
    "12 GB": (1, 11.6),
    "16 GB": (1, 15.6),
    "24 GB": (1, 23.5),
    "2×24 GB": (2, 23.5),
    "32 GB": (1, 31.3),
    "48 GB": (1, 44.4),
    "80 GB": (1, 79.1),
}


@dataclass(frozen=True)
class WeightSizes:
    """Stored bytes of the embedding, of each layer, of final norm and head; and what of a layer is routed experts."""

    embedding: int
    layers: tuple[int, ...]
    final: int
    routed: tuple[int, ...]

    @classmethod
    def of(cls, nbytes: Mapping[str, int], num_layers: int) -> "WeightSizes":
        """From stored tensor name → bytes, packed or plain."""
        embedding, layers, final, routed = 0, [0] * num_layers, 0, [0] * num_layers
        for name, size in nbytes.items():
            place = place_of(name)
            if place.layer is not None:
                layers[place.layer] += size
                routed[place.layer] += size if place.routed else 0
            elif place.unit == "embedding":
                embedding += size
            else:
                final += size
        return cls(embedding, tuple(layers), final, tuple(routed))

    @property
    def total(self) -> int:
        return self.embedding + sum(self.layers) + self.final


@dataclass(frozen=True)
class Memory:
    """Predicted device memory for `sequences` sequences that hold `context` tokens together.

    `runtime` is per device; the other parts are over all devices, but for `workspace`, which each device needs.
    By layer: `stages`, its weights, cache and state; `reads`, what of that a token reads at batch 1 when the cache is
    full, its state twice, for it is written as well. The embedding (unless on the CPU) goes with the first layer, final
    norm and head with the last.
    """

    context: int
    sequences: int
    cache_bits: int
    embedding_on_cpu: bool
    weights: int
    latent_cache: int
    kda_state: int
    workspace: int
    runtime: int
    stages: tuple[int, ...]
    reads: tuple[int, ...]

    @property
    def total(self) -> int:
        """On a single device."""
        return self.weights + self.latent_cache + self.kda_state + self.workspace + self.runtime

    def needed(self, devices: int) -> int:
        """Bytes of the fullest of `devices` equal devices, layers split over them as evenly as they can be."""
        most = best_split(self.stages, self.stages, [self.total] * devices).cost
        return most + self.workspace + self.runtime

    def fits(self) -> list[str]:
        """The names in CARDS that hold it."""
        return [name for name, (count, gib) in CARDS.items() if self.needed(count) <= gib * GIB]


def experts_leaving(config: KimiLinearConfig, routed: Sequence[int], missing: int) -> int | None:
    """How many experts of each of these layers have to lie in the host's memory for a card to gain `missing` bytes.

    routed: bytes of the layers' experts, 0 for a layer that has none. None: more than can, for a layer keeps as many as
    a token needs.
    """
    if missing <= 0:
        return 0
    each = [r // config.num_experts for r in routed if r]
    missing += len(each) * expert_table_bytes(config)
    most = config.num_experts - config.top_k
    leave = -(-missing // sum(each)) if each else most + 1
    while leave <= most and leave * sum(each) < missing + staging_bytes(leave * max(each), len(each)):
        leave += 1
    return leave if leave <= most else None


def staging_bytes(largest: int, layers: int) -> int:
    """What a card holds so that experts that left come back for a prompt while the layer before is at work: twice the
    `largest` layer's of them, or nothing where that is much, or more than a quarter of all that left."""
    return 2 * largest if layers >= 8 and 2 * largest <= STAGING_MOST else 0


def expert_table_bytes(config: KimiLinearConfig) -> int:
    """What a card holds of a layer to know where its experts lie: `klquant.kernels.moe.offload.Offload`."""
    return config.num_experts * (4 + 8) + 3 * 8


def offloaded(config: KimiLinearConfig, weights: WeightSizes, memory: Memory) -> dict[str, int]:
    """Of single cards that do not hold it: bytes of experts in the host's memory, beside the embedding, with which they
    do."""
    found, total = {}, memory.total - (0 if memory.embedding_on_cpu else weights.embedding)
    for name, (count, gib) in CARDS.items():
        leave = experts_leaving(config, weights.routed, total - int(gib * GIB)) if count == 1 else None
        if leave:
            found[name] = leave * (sum(weights.routed) // config.num_experts)
    return found


def contexts(config: KimiLinearConfig) -> list[int]:
    """The lengths to predict for: 8 k, 128 k and 1 M, or the model's own limit where that is shorter."""
    return [c for c in CONTEXTS if c <= config.max_context] or [config.max_context]


def predict_memory(
    config: KimiLinearConfig,
    weights: WeightSizes,
    context: int,
    *,
    sequences: int = 1,
    prefixes: int = 0,
    cache_bits: int = 16,
    activation_bytes: int = 2,
    embedding_on_cpu: bool = False,
) -> Memory:
    """Memory for `context` cached tokens in all over `sequences` sequences.

    `prefixes`: prompts besides whose KDA state is kept. `cache_bits`: 8, or 16 for latents as wide as activations, of
    which a value takes `activation_bytes`.
    """
    latent = context * latent_bytes(config, cache_bits, activation_bytes)
    own = kda_state_bytes(config, activation_bytes)
    state, kept = sequences * own, prefixes * own
    embedding = 0 if embedding_on_cpu else weights.embedding
    stages, reads = [], []
    for i, (size, routed) in enumerate(zip(weights.layers, weights.routed, strict=True)):
        used = size - routed + routed * config.top_k // config.num_experts
        stages.append(size + (latent if config.is_mla(i) else state + kept))
        reads.append(used + (latent if config.is_mla(i) else 2 * state))
    stages[0] += embedding
    stages[-1] += weights.final
    reads[-1] += weights.final
    kda_layers = config.num_layers - len(config.mla_layers)
    return Memory(
        context=context,
        sequences=sequences,
        cache_bits=cache_bits,
        embedding_on_cpu=embedding_on_cpu,
        weights=weights.total - weights.embedding + embedding,
        latent_cache=latent * len(config.mla_layers),
        kda_state=(state + kept) * kda_layers,
        workspace=workspace_estimate(config, context, sequences, activation_bytes),
        runtime=RUNTIME_ESTIMATE,
        stages=tuple(stages),
        reads=tuple(reads),
    )


def latent_bytes(config: KimiLinearConfig, bits: int, activation_bytes: int = 2) -> int:
    """Bytes one token adds to the cache of one MLA layer; at 8 bits with an FP32 scale."""
    return config.latent_dim + 4 if bits == 8 else config.latent_dim * activation_bytes


def kda_state_bytes(config: KimiLinearConfig, activation_bytes: int = 2) -> int:
    """Bytes one sequence keeps in one KDA layer: the FP32 state and the tail of the three convolutions."""
    recurrent = config.kda_heads * config.kda_dim**2 * 4
    return recurrent + 3 * config.kda_width * (config.conv_width - 1) * activation_bytes


def workspace_estimate(config: KimiLinearConfig, context: int, sequences: int, activation_bytes: int = 2) -> int:
    """Activations of a prefill chunk, the last one of `context` tokens in all, at their largest: an estimate.

    The residual stream stays; KDA, MLA and MLP follow one another, so the largest of the three counts. Graphs of short
    prompts and of decode steps take the same memory.
    """
    c, value, tokens = config, activation_bytes, min(context, PREFILL_CHUNK)
    past = min(context - tokens, PAST_BLOCK)
    residual = 3 * c.hidden_size * value
    # q, k, v twice, both gates, output and the chunk kernel's intermediates, g in FP32; a state every 64 tokens
    kda = tokens * (c.kda_width * (14 * value + 4) + c.kda_width * c.kda_dim * value // 64)
    # of several prompts in a chunk the states before and after, and each has a chunk of the kernel that is not full
    kda += (min(sequences, tokens) if sequences > 1 else 0) * c.kda_width * c.kda_dim * (8 + value)
    # keys and values as wide as they, of the chunk and of a block before it, and kv_b's output, of which they are made,
    # of one of them; queries, outputs, their sum
    expanded = c.num_heads * 2 * c.qk_dim * value
    made_of = c.num_heads * (c.qk_nope_dim + c.v_dim) * value
    mla = (tokens + past) * expanded + max(tokens, past) * made_of
    mla += tokens * c.num_heads * (3 * c.qk_dim * value + 2 * c.v_dim * 4)
    # hidden units and output of each of a token's experts; gate, up and hidden units of the dense MLP
    moe = tokens * c.top_k * (c.hidden_size + c.moe_intermediate_size) * value
    dense = tokens * 3 * c.intermediate_size * value
    # a weight unpacked for torch's product
    unpacked = max(3 * c.kda_width, 2 * c.intermediate_size) * c.hidden_size * value
    logits = sequences * c.vocab_size * 4 * 2
    return tokens * residual + max(kda, mla, moe, dense) + unpacked + logits


@dataclass(frozen=True)
class Split:
    """A row of stages cut into one run a device. `ends`: the stage after each run's last; `missing`: bytes that do not
    fit; `cost`: of the costliest run."""

    missing: int
    cost: int
    ends: tuple[int, ...]


def best_split(sizes: Sequence[int], costs: Sequence[int], rooms: Sequence[int]) -> Split:
    """The split of stages over devices with `rooms` bytes each, in order, that misses least and then costs least.

    A run may be empty, and then its device's room, which can be less than nothing, does not matter.
    """
    size, cost = ([0, *accumulate(x)] for x in (sizes, costs))
    count = len(sizes)

    def over(start: int, end: int, room: int) -> int:
        return max(0, size[end] - size[start] - room) if end > start else 0

    best = {0: (0, 0, ())}  # stages placed so far → what placing them on the devices so far comes to
    for room in rooms:
        best = {
            end: min(
                (missing + over(start, end, room), max(most, cost[end] - cost[start]), (*ends, end))
                for start, (missing, most, ends) in best.items()
                if start <= end
            )
            for end in range(count + 1)
        }
    return Split(*best[count])
