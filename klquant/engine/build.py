"""Weights from a source → what the engine holds: packed, fused, each on its device. Nothing is held twice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.core.grid import Quantized, common_grid
from klquant.core.memory import locked_pages
from klquant.core.spec import WeightSpec
from klquant.engine.weights import EngineLayer, EngineWeights, FusedKDA, FusedMLA, Stacked
from klquant.kernels.linear.dispatch import QuantLinear, QuantMLP, Weight, pack_mlp, pack_weight
from klquant.kernels.linear.layout import CODES_AT_ONCE, ROW_MULTIPLE, Packed
from klquant.kernels.moe.dispatch import QuantExperts
from klquant.kernels.moe.offload import Offload, Staging
from klquant.model.first_prompt import import_fla
from klquant.model.forward import EMBEDDING, FINAL_NORM, HEAD, Head
from klquant.model.weights import (
    DENSE_NAMES,
    EXPERT_NAMES,
    FP32_FIELDS,
    KDA_NAMES,
    MLA_NAMES,
    NORM_NAMES,
    ROUTER_NAMES,
    SHARED_NAMES,
    KDAWeights,
    LayerWeights,
    Linear,
    MLAWeights,
    MLPWeights,
    MoEWeights,
    PackedMoE,
)  # fmt: skip
from klquant.recipe.memory import staging_bytes

MLP_ROLES = ("gate_proj", "up_proj", "down_proj")


class Source(Protocol):
    """Where weights come from. A module is a hub name without `.weight`."""

    @property
    def config(self) -> KimiLinearConfig: ...

    def spec(self, module: str) -> WeightSpec | None:
        """The module's grid, or None where it has none."""

    def stack(self, modules: Sequence[str], device: torch.device) -> Quantized | Tensor:
        """Weights [len(modules), N, K] that share shape and grid, on `device`."""

    def tensor(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Any tensor by its full name, in `dtype`, dequantized where needed."""


class Places(Protocol):
    """Which device holds what (`klquant.engine.placement.Placement`)."""

    packed: bool

    @property
    def embedding(self) -> torch.device: ...

    @property
    def layers(self) -> tuple[torch.device, ...]: ...

    @property
    def head(self) -> torch.device: ...

    @property
    def far(self) -> tuple[int, ...]:
        """Experts of each layer that lie in the host's memory."""


@dataclass(frozen=True)
class OneDevice:
    """Everything on one device, but for `leaving` experts of each layer."""

    device: torch.device
    num_layers: int
    packed: bool = True
    leaving: int = 0

    @property
    def embedding(self) -> torch.device:
        return self.device

    @property
    def layers(self) -> tuple[torch.device, ...]:
        return (self.device,) * self.num_layers

    @property
    def head(self) -> torch.device:
        return self.device

    @property
    def far(self) -> tuple[int, ...]:
        return (self.leaving,) * self.num_layers


def build_weights(source: Source, places: Places, dtype: torch.dtype) -> EngineWeights:
    """A whole model. The head comes first: of all weights it needs the most room beside itself while it is packed."""
    import_fla(places.head, dtype)
    build = Builder(source, dtype, places.packed)
    head = build.head(places.head)
    embedding_VC = source.tensor(EMBEDDING, dtype, places.embedding)
    if places.embedding.type == "cpu" and places.head.type == "cuda":
        embedding_VC = embedding_VC.pin_memory()
    layers = tuple(build.layer(i, *place) for i, place in enumerate(zip(places.layers, places.far, strict=True)))
    if places.head.type == "cuda":
        torch.cuda.empty_cache()  # what packing needed is now room for caches
    for staging, offloads in build.offloads.values():
        largest = max(sum(w.nbytes for w in offload.far) for offload in offloads)
        if staging_bytes(largest, len(offloads)):
            staging.open(offloads, largest)
    return EngineWeights(source.config, embedding_VC, layers, head, tuple(build.notes))


@dataclass(frozen=True)
class Builder:
    """Layers for activations of `dtype`. Not `packed`: every weight is a plain tensor, of the reader's values.

    `notes` collects what had to be held otherwise than it is stored; `offloads`, by device, where experts lie.
    """

    source: Source
    dtype: torch.dtype
    packed: bool
    notes: list[str] = field(default_factory=list)
    offloads: dict[torch.device, tuple[Staging, list[Offload]]] = field(default_factory=dict)

    def head(self, device: torch.device) -> Head:
        return Head(self.source.tensor(FINAL_NORM, self.dtype, device), _linear(self._weight(HEAD, device)))

    def layer(self, layer: int, device: torch.device, far: int) -> EngineLayer:
        """Layer `layer`, 0-based, on `device` but for the last `far` of its experts."""
        cfg, prefix = self.source.config, f"model.layers.{layer}."

        def plain(field: str, name: str) -> Tensor:
            wanted = torch.float32 if field in FP32_FIELDS else self.dtype
            spec = self.source.spec((prefix + name).removesuffix(".weight"))
            if self.packed and spec is not None:
                self.notes.append(f"{prefix}{name} is {spec}: kernels read it plain, it is held in {wanted}")
            return self.source.tensor(prefix + name, wanted, device)

        def weight(name: str) -> Weight:
            return self._weight(prefix + name, device)

        attn, fused = (self._mla if cfg.is_mla(layer) else self._kda)(plain, weight)
        moe = cfg.is_moe(layer)
        mlp = self._moe(prefix, plain, weight, device, far) if moe else self._mlp(prefix, DENSE_NAMES, weight)
        norms = {field: plain(field, name) for field, name in NORM_NAMES.items()}
        return EngineLayer(LayerWeights(attn=attn, mlp=mlp, **norms), fused)

    def _weight(self, name: str, device: torch.device) -> Weight:
        w = self.source.stack([name.removesuffix(".weight")], device)
        return self._held(w)[0]

    def _held(self, w: Weight) -> Weight:
        """On its grid if weights are packed, else its values."""
        if isinstance(w, Tensor):
            return w.to(self.dtype)
        return w if self.packed else w.values().to(self.dtype)

    def _kda(self, plain: Callable, weight: Callable) -> tuple[KDAWeights, FusedKDA]:
        n = KDA_NAMES
        qkv, (q, k, v) = fuse([weight(n[f"{x}_proj"]) for x in "qkv"])
        low, (f_a, g_a, b) = fuse([weight(n[x]) for x in ("f_a_proj", "g_a_proj", "b_proj")])
        f_b, g_b = (plain(x, n[x]) for x in ("f_b_proj", "g_b_proj"))
        o = _linear(weight(n["o_proj"]))
        taps_FW, convs = fuse([plain(f"{x}_conv", n[f"{x}_conv"]).squeeze(1) for x in "qkv"])
        A_log, dt_bias, o_norm = (plain(x, n[x]).flatten() for x in ("A_log", "dt_bias", "o_norm"))
        attn = KDAWeights(q, k, v, *convs, A_log, dt_bias, f_a, f_b, g_a, g_b, b, o_norm, o)
        return attn, FusedKDA(qkv, low, taps_FW, A_log, dt_bias, f_b, g_b, o_norm, o)

    def _mla(self, plain: Callable, weight: Callable) -> tuple[MLAWeights, FusedMLA]:
        n = MLA_NAMES
        q_kv_a, (q, kv_a) = fuse([weight(n["q_proj"]), weight(n["kv_a_proj"])])
        kv_b, o = plain("kv_b_proj", n["kv_b_proj"]), _linear(weight(n["o_proj"]))
        norm = plain("kv_a_norm", n["kv_a_norm"])
        return MLAWeights(q, kv_a, norm, kv_b, o), FusedMLA(q_kv_a, norm, kv_b, o)

    def _mlp(self, prefix: str, names: dict[str, str], weight: Callable) -> QuantMLP | MLPWeights:
        gate, up, down = (weight(names[role]) for role in MLP_ROLES)
        if not self.packed:
            return MLPWeights(gate, up, down)
        spec = self._joint(prefix, [names["gate_proj"], names["up_proj"]])
        return QuantMLP.of(_on(gate, spec), _on(up, spec), down)

    def _moe(
        self, prefix: str, plain: Callable, weight: Callable, device: torch.device, far: int
    ) -> PackedMoE | MoEWeights:  # fmt: skip
        router = {field: plain(field, name) for field, name in ROUTER_NAMES.items()}
        shared = self._mlp(prefix, SHARED_NAMES, weight)
        count = range(self.source.config.num_experts)
        names = {role: [name.format(e) for e in count] for role, name in EXPERT_NAMES.items()}
        specs = {"w2": self._joint(prefix, names["w2"]), "w1": self._joint(prefix, names["w1"] + names["w3"])}
        specs["w3"] = specs["w1"]

        def some(role: str, first: int, last: int) -> Weight:
            modules = [prefix + name.removesuffix(".weight") for name in names[role][first:last]]
            if len({self.source.spec(m) for m in modules}) == 1:
                return _on(self._held(self.source.stack(modules, device)), specs[role])
            return _cat([_on(self._held(self.source.stack([m], device)), specs[role]) for m in modules])

        if not self.packed:
            return MoEWeights(**router, **{role: some(role, 0, len(count)) for role in names}, shared=shared)
        near = len(count) - far
        packed = self._experts(some, 0, near, lambda t, count: t.new_empty(count, *t.shape[1:]))
        offload = None
        if far:
            staging, others = self.offloads.setdefault(device, (Staging(), []))
            offload = Offload.of(near, self._experts(some, near, len(count), _locked), device, staging)
            others.append(offload)
        return PackedMoE(**router, experts=QuantExperts(*packed, shared, offload))

    def _experts(self, some: Callable, start: int, stop: int, room: Callable) -> tuple[Packed, Packed]:
        """Gate and up, and down, of experts start … stop − 1 in what `room` makes; packed a few at a time, for codes
        take room."""
        cfg, whole = self.source.config, ()
        step = max(1, CODES_AT_ONCE // (cfg.moe_intermediate_size * cfg.hidden_size))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            parts = pack_mlp(*(some(role, first, last) for role in ("w1", "w3", "w2")))
            whole = whole or tuple(p.map(lambda t: room(t, stop - start)) for p in parts)
            for into, part in zip(whole, parts, strict=True):
                for t, new in zip(into.tensors, part.tensors, strict=True):
                    if t is not None:
                        t[first - start : last - start] = new
        return whole

    def _joint(self, prefix: str, names: list[str]) -> WeightSpec | None:
        """The grid on which weights are held that share a kernel; None: 16 bits."""
        specs = {name: self.source.spec(prefix + name.removesuffix(".weight")) for name in names}
        found = set(specs.values())
        joint = None if None in found else common_grid(found)
        if self.packed and len(found) > 1:
            other = next(name for name, spec in specs.items() if spec != joint)
            self.notes.append(
                f"{prefix}{other} is {specs[other] or 'in 16 bits'}, others of its kernel are not: "
                f"all are held {'in 16 bits' if joint is None else f'as {joint}'}"
            )
        return joint


def fuse(parts: list[Weight]) -> tuple[Linear, list[Linear]]:
    """One linear map with the outputs of all `parts` [N_i, K], and each part as a view of it."""
    sizes = [(p if isinstance(p, Tensor) else p.codes).shape[0] for p in parts]
    if all(isinstance(p, Tensor) for p in parts):
        whole = torch.cat(parts)
        return whole, list(whole.split(sizes))
    ends = [0, *accumulate(sizes)]
    aligned = all(end % ROW_MULTIPLE == 0 for end in ends[:-1])
    if aligned and all(isinstance(p, Quantized) and p.spec == parts[0].spec for p in parts):
        packed = pack_weight(Quantized.cat(parts, -2))
        return QuantLinear(packed), [QuantLinear(packed.rows(*ends)) for ends in pairwise(ends)]
    linears = [_linear(p) for p in parts]
    return Stacked(tuple(linears)), linears


def _linear(w: Weight) -> Linear:
    return w if isinstance(w, Tensor) else QuantLinear.of(w)


def _on(w: Weight, spec: WeightSpec | None) -> Weight:
    """A weight on a grid that holds it, or its values."""
    if isinstance(w, Tensor):
        return w
    return w.on(spec) if spec is not None else w.values()


def _locked(like: Tensor, count: int) -> Tensor:
    """Room for `count` experts in the host's memory, where a GPU reads and writes them."""
    shape = count, *like.shape[1:]
    return locked_pages(prod(shape) * like.itemsize).view(like.dtype).view(shape)


def _cat(parts: list[Weight]) -> Weight:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else Quantized.cat(parts, 0)
