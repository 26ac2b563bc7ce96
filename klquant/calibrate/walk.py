"""Quantize one layer against what its inputs really are: every earlier layer already quantized.

The order inside a layer is the order of the data: projections that read the attention norm, then the output projection
on what the quantized mixer really puts out, then the MLP's inputs, then its down projections. A second, undisturbed
stream of the BF16 model runs along when target corrections are on: it tells each weight what its input, and the
residual stream, should have been.
Shape suffixes: B = windows in a batch, S = tokens a window, T = tokens (B·S), C = hidden, E = experts, R = top-k.
"""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from klquant.calibrate import folding
from klquant.calibrate.activations import Activations, feed
from klquant.calibrate.experts import quantize_experts
from klquant.calibrate.fit import TensorRecord, fit_weight
from klquant.calibrate.folding import Seam
from klquant.calibrate.paths import get, is_stack, map_tensors, put, tensor_names
from klquant.calibrate.rescale import rescale
from klquant.calibrate.routes import routed_output
from klquant.calibrate.sharing import over_batches
from klquant.checkpoint.config import KimiLinearConfig
from klquant.core.grid import SCALE_DTYPE, Quantized
from klquant.core.memory import free_memory
from klquant.model.kda import kda_mix
from klquant.model.mla import mla_mix
from klquant.model.moe import activate, route
from klquant.model.norm import rms_norm
from klquant.model.weights import LayerWeights, MLAWeights, MoEWeights
from klquant.quantize.hessian import Moments
from klquant.recipe.decision import Decision
from klquant.recipe.plan import UNCALIBRATED_ROLES, Plan

# Share of the free memory that the inputs of a layer's last map may take between two passes.
KEPT_SHARE = 0.25
# Tokens mixed at once. A KDA mixer's temporaries are 35 times as wide as its inputs with kernels, a hundred in plain
# torch; a GPU is busy with fewer.
MIX_TOKENS = 16384

# A stage of a layer: the inputs [B, S, K] of its last linear map, and the stream [B, S, C] that the output is added to.
Stage = Callable[[LayerWeights, Tensor], tuple[Tensor, Tensor]]


@dataclass
class LayerResult:
    """What a layer leaves behind: grids (where they were made) and records by module name, kept tensors that a folding
    changed by tensor name, how many calibration tokens the router sent to each expert, and what went otherwise than
    planned."""

    quantized: dict[str, Quantized] = field(default_factory=dict)
    records: dict[str, TensorRecord] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    expert_tokens: list[int] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Streams:
    """The residual stream [W, S, C] of the quantized model so far, and of the BF16 model if corrections need it."""

    quantized: Activations
    reference: Activations | None


@dataclass(frozen=True)
class WalkSettings:
    """Where a layer is worked on. `batch` is in windows; `others` are devices that share the experts with `device`;
    `host_limit`: most bytes of host memory. Results depend on `dtype`, `batch` and `core.device.hardware` only."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    others: tuple[torch.device, ...] = ()
    host_limit: int | None = None

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return (self.device, *self.others)


class LayerWalk:
    """One layer's way from BF16 weights to grids. `run` is the whole of it; the methods are its stages, in order."""

    def __init__(
        self,
        config: KimiLinearConfig,
        layer: int,
        weights: LayerWeights,
        plan: Plan,
        settings: WalkSettings,
        streams: Streams,
        progress: Callable[[str, float], None] = lambda phase, fraction: None,
        metrics: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        """`metrics` [C, C]: how errors count that the attention's and the MLP's outputs bring into the stream."""
        self.config, self.plan, self.recipe, self.settings = config, plan, plan.recipe, settings
        self.streams, self.progress, self.metrics = streams, progress, metrics
        self.prefix = f"model.layers.{layer}."
        self.exact, self.now = weights, weights
        self.result = LayerResult()
        # Device → id of a tensor → the tensor (which keeps the id its own) and its copy there.
        self._copies: dict[torch.device, dict[int, tuple[Tensor, Tensor]]] = {}

    def run(self) -> LayerResult:
        """Quantize the layer and move both streams past it, in place. Once a walk.

        On a GPU that runs out of memory fewer experts are held at once, which is a line of the result's `fallbacks`;
        torch.OutOfMemoryError where one block of experts is too much.
        """
        # Before all else: whatever is calibrated behind them reads what they put out.
        self.fit(tuple(f"attn.{role}" for role in UNCALIBRATED_ROLES if hasattr(self.exact.attn, role)), None)
        self._attention()
        if isinstance(self.exact.mlp, MoEWeights):
            self._moe()
        else:
            self._dense()
        return self.result

    def on(self, device: torch.device) -> "LayerWalk":
        """A walk through the same layer as it is now, on another device and with a result of its own.

        A tensor that was there at the last call is not copied again.
        """
        here: list[Tensor] = [m for m in self.metrics if m is not None]
        for weights in (self.exact, self.now):
            map_tensors(weights, lambda x: here.append(x) or x)
        held = self._copies.pop(device, {})
        copies = self._copies[device] = {id(x): held[id(x)] for x in here if id(x) in held}
        del held  # what is no longer part of the layer makes room before its successor comes

        def there(x: Tensor) -> Tensor:
            if id(x) not in copies:
                copies[id(x)] = x, x.to(device, copy=True)
            return copies[id(x)][1]

        other = copy(self)
        other.settings = replace(self.settings, device=device, others=())
        other.exact, other.now = map_tensors(self.exact, there), map_tensors(self.now, there)
        other.metrics = tuple(None if m is None else there(m) for m in self.metrics)
        other.result, other.progress = LayerResult(), lambda phase, fraction: None
        return other

    def _attention(self) -> None:
        mla = isinstance(self.exact.attn, MLAWeights)
        seam, mix = (folding.MLA_INPUT, mla_mix) if mla else (folding.KDA_INPUT, kda_mix)
        moments = self.input_moments("attention inputs", seam)
        moments, _ = rescale(self, seam, moments)
        self.fit(seam.consumers, moments)

        def stage(w: LayerWeights, h: Tensor) -> tuple[Tensor, Tensor]:
            parts = h.split(max(1, MIX_TOKENS // h.shape[1]))
            mixed = [mix(self.config, w.attn, self.norm(part, w.input_norm)) for part in parts]
            return mixed[0] if len(mixed) == 1 else torch.cat(mixed), h

        # Mixing twice costs a GPU less than moving the output back and forth, and a CPU a quarter less memory.
        seam = folding.MLA_OUTPUT if mla else folding.KDA_OUTPUT
        self._output("attention output", seam, stage, self.metrics[0], keep=False)

    def _dense(self) -> None:
        moments = self.input_moments("MLP inputs", folding.DENSE_INPUT)
        moments, _ = rescale(self, folding.DENSE_INPUT, moments)
        self.fit(folding.DENSE_INPUT.consumers, moments)

        def stage(w: LayerWeights, h: Tensor) -> tuple[Tensor, Tensor]:
            return activate(w.mlp, self.norm(h, w.post_norm)), h

        # The inputs are several times as wide as the stream: computing them twice beats keeping them.
        self._output("MLP output", folding.DENSE_OUTPUT, stage, self.metrics[1], keep=False)

    def _moe(self) -> None:
        moments = self.input_moments("MLP inputs", folding.MOE_INPUT)
        moments, _ = rescale(self, folding.MOE_INPUT, moments)
        self.fit(("mlp.router", "mlp.shared.gate_proj", "mlp.shared.up_proj"), moments)
        quantize_experts(self, moments)

        def stage(w: LayerWeights, h: Tensor) -> tuple[Tensor, Tensor]:
            x = self.norm(h, w.post_norm)
            flat = x.flatten(0, 1)
            routed = routed_output(self.config, w.mlp, flat, *route(self.config, w.mlp, flat))
            return activate(w.mlp.shared, x), h + routed.view_as(h).to(h.dtype)

        # The shared expert sees every token and comes last, so it can make up for some of what the experts lost.
        self._output("MLP output", folding.SHARED_OUTPUT, stage, self.metrics[1])

    # What the stages are made of.

    def norm(self, h_BSC: Tensor, weight_C: Tensor) -> Tensor:
        return rms_norm(h_BSC, weight_C, self.config.rms_eps)

    def decision(self, path: str) -> Decision:
        """What becomes of a field. Experts of a layer are alike, so the first one answers for all."""
        return self.plan[self.prefix + tensor_names(self.exact, path)[0]]

    def batches(self, phase: str) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """First window, quantized stream and reference stream (or None) [B, S, C] of one batch after the other."""
        sources = [self.streams.quantized, self.streams.reference]
        starts = range(0, len(self.streams.quantized), self.settings.batch)
        for start, (h, h_star) in feed(sources, starts, self.settings.batch, self.settings.device):
            self.progress(phase, start / len(self.streams.quantized))
            yield start, h, h_star

    def moments(self, k: int, *lead: int, n: int = 0) -> Moments:
        """Empty sums for inputs of size `k`, with what target corrections need when they are on."""
        corrects = self.streams.reference is not None
        return Moments.zeros(k, *lead, device=self.settings.device, drift=corrects, n=n if corrects else 0)

    def input_moments(self, phase: str, seam: Seam) -> Moments | None:
        """Mean moments of the norm's output over all tokens; None if nothing that reads it is quantized."""
        if all(self.decision(path).spec is None for path in seam.consumers):
            return None

        def visit(walk: LayerWalk, start: int, h: Tensor, reference: Tensor | None, sums: Moments) -> None:
            x = self.norm(h, get(walk.now, seam.producer)).flatten(0, 1)
            x_star = None if reference is None else self.norm(reference, get(walk.exact, seam.producer)).flatten(0, 1)
            sums.add(x, reference_TK=x_star)

        moments = self.moments(self.config.hidden_size)
        over_batches(self, phase, visit, moments)
        return moments.mean()

    def fit(
        self, paths: tuple[str, ...], moments: Moments | None, experts: slice | None = None,
        metric_NN: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Quantize the fields `paths` that read the same inputs, for the experts given where they are stacks.

        Fields with one decision share a Hessian and are quantized as one: rows do not interact but by the metric.
        `now` has the results.
        """
        jobs: dict[tuple, list[str]] = {}
        for path in paths:
            if (decision := self.decision(path)).spec is not None:
                jobs.setdefault((decision.spec, decision.algorithm), []).append(path)
        for same in jobs.values():
            self.progress(f"fitting {', '.join(path.rpartition('.')[2] for path in same)}", 1.0)
            parts = [get(self.exact, path)[experts] if is_stack(path) else get(self.exact, path)[None] for path in same]
            sizes = [w.shape[-2] for w in parts]
            fits = fit_weight(torch.cat(parts, dim=-2), self.decision(same[0]), moments, self.recipe, sizes, metric_NN)
            for path, fit in zip(same, fits, strict=True):
                values = fit.quantized.decode(SCALE_DTYPE).to(get(self.exact, path).dtype)
                names = tensor_names(self.exact, path)
                if is_stack(path):
                    get(self.now, path)[experts] = values
                    names = names[experts]
                else:
                    self.now = put(self.now, path, values[0])
                for e, name in enumerate(names):
                    module = (self.prefix + name).removesuffix(".weight")
                    self.result.quantized[module] = fit.quantized[e]
                    self.result.records[module] = fit.records[e]

    def _output(self, phase: str, seam: Seam, stage: Stage, metric_CC: Tensor | None, *, keep: bool = True) -> None:
        """Quantize the linear map that ends a half layer, the seam's only consumer, and move both streams past it.

        `keep`: hold the map's inputs on the device between the two passes, where they fit, rather than make them again.
        """
        (path,) = seam.consumers
        streams, size = self.streams, self.settings.batch
        n, k = get(self.exact, path).shape
        wanted = self.decision(path).spec is not None
        tokens = streams.quantized.shape[0] * streams.quantized.shape[1]
        keep = keep and tokens * k * self.settings.dtype.itemsize < KEPT_SHARE * free_memory(self.settings.device)

        def before(walk: LayerWalk, start: int, h: Tensor, reference: Tensor | None, sums: Moments) -> Tensor | None:
            x, base = stage(walk.now, h)
            x_star = gap = None
            if reference is not None:
                x_star, base_star = stage(walk.exact, reference)
                gap = (base_star - base).flatten(0, 1)
                streams.reference.write(start, base_star + x_star @ get(walk.exact, path).T)
                x_star = x_star.flatten(0, 1)
            if wanted:
                sums.add(x.flatten(0, 1), reference_TK=x_star, missing_TN=gap)
            if not keep:
                return None
            streams.quantized.write(start, base)
            return x

        moments, scale = self.moments(k, n=n), None
        kept = over_batches(self, phase, before, moments)
        if wanted:
            mean, scale = rescale(self, seam, moments.mean())
            self.fit(seam.consumers, mean, metric_NN=metric_CC)

        def after(walk: LayerWalk, start: int, base: Tensor, _: None, sums: None) -> None:
            x, kept[start // size] = kept[start // size], None
            if x is None:
                x, base = stage(walk.now, base)  # made with the scale already folded in
            elif scale is not None:
                x = x / scale.to(x)
            streams.quantized.write(start, base + x @ get(walk.now, path).T)

        over_batches(self, phase, after, reference=False)
