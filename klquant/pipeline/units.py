"""The work of one unit (embedding, a layer, final norm and head): BF16 tensors in, stored tensors and records out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from klquant.calibrate.fit import TensorRecord, fit_weight
from klquant.calibrate.metric import StreamMetric
from klquant.calibrate.walk import LayerResult, LayerWalk, Streams, WalkSettings
from klquant.checkpoint.dtypes import DTYPES
from klquant.checkpoint.names import place_of
from klquant.checkpoint.quantized import compress
from klquant.checkpoint.reader import CheckpointReader
from klquant.checkpoint.writer import Shard, plan_shards
from klquant.model.forward import FINAL_NORM, HEAD
from klquant.model.norm import rms_norm
from klquant.model.weights import LayerWeights
from klquant.pipeline.ahead import Ahead
from klquant.pipeline.landing import Landing, room
from klquant.quantize.hessian import Moments
from klquant.recipe.decision import Decision, stored_tensors
from klquant.recipe.plan import Plan

# Weights quantized in one go where nothing but their own values counts.
RTN_ELEMENTS = 1 << 26

Progress = Callable[[str, float], None]


def names_read(plan: Plan, name: str, decisions: list[Decision]) -> list[str]:
    """The tensors that the work of a unit (of `units_of`) asks for."""
    if not plan.needs_calibration or name == "embedding":
        return [d.key.name for d in decisions if d.spec is not None]
    if name == "head":
        return [] if plan[HEAD].spec is None else [FINAL_NORM, HEAD]
    return [d.key.name for d in decisions]


def packed_bytes(decisions: list[Decision]) -> int:
    """Room for the packed weights of a unit."""
    return room(part.nbytes for d in decisions if d.spec is not None for part in stored_tensors(d))


def units_of(plan: Plan) -> dict[str, list[Decision]]:
    """What is worked on in one go and is whole or not there at all: embedding, each layer, final norm and head."""
    units: dict[str, list[Decision]] = {}
    for d in plan.decisions:
        units.setdefault(place_of(d.key.name).unit, []).append(d)
    return units


def shards_of(plan: Plan, most: int) -> list[Shard]:
    """The output's files, each of one unit and, where it has more than one tensor, of at most so many bytes."""
    stored = [[s for d in decisions for s in stored_tensors(d)] for decisions in units_of(plan).values()]
    return plan_shards([[(s.name, s.nbytes) for s in unit] for unit in stored], most)


@dataclass
class UnitResult:
    """Stored tensors of a unit, by name, how its weights fared, and fallbacks that concern no weight's value."""

    tensors: dict[str, Tensor]
    records: dict[str, TensorRecord] = field(default_factory=dict)
    expert_tokens: list[int] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Units:
    """Works on the units of one plan, in turn. `settings` says where; `reader` is the BF16 checkpoint, `ahead` has read
    what a unit asks for (`names_read`), and its packed weights arrive in `landing`, with room for `packed_bytes`."""

    reader: CheckpointReader
    ahead: Ahead
    landing: Landing
    plan: Plan
    settings: WalkSettings

    def plain(self, decisions: list[Decision], progress: Progress) -> UnitResult:
        """Without calibration: keep, or round to nearest."""
        result = LayerResult()
        wanted = [d for d in decisions if d.spec is not None]
        done = 0
        for _, run in groupby(sorted(wanted, key=_alike), key=_alike):
            same = list(run)
            size = max(1, RTN_ELEMENTS // same[0].weights)
            for start in range(0, len(same), size):
                progress("rounding", done / len(wanted))
                part = same[start : start + size]
                w = torch.stack([self._matrix(d.key.name) for d in part]).float()
                (fit,) = fit_weight(w, part[0], None, self.plan.recipe, [w.shape[-2]])
                for i, d in enumerate(part):
                    result.quantized[d.key.module] = fit.quantized[i]
                    result.records[d.key.module] = fit.records[i]
                done += len(part)
        self.ahead.advance()
        return self._pack(decisions, result)

    def layer(self, layer: int, decisions: list[Decision], streams: Streams, progress: Progress) -> UnitResult:
        """A decoder layer against its calibration inputs; moves `streams` past it."""
        progress("reading", 0.0)
        weights = LayerWeights.load(self.ahead, layer, self.settings.dtype, self.settings.device)
        self.ahead.advance()
        share = self.plan.recipe.gptq.router_share
        metrics = StreamMetric(self.reader, share, self.settings.device).after(layer) if share else (None, None)
        walk = LayerWalk(self.reader.config, layer, weights, self.plan, self.settings, streams, progress, metrics)
        result = walk.run()
        del walk, weights
        progress("packing", 1.0)
        return self._pack(decisions, result)

    def head(self, decisions: list[Decision], streams: Streams, progress: Progress) -> UnitResult:
        """Final norm and head. The head is fitted some rows at a time; they share the final norm's moments."""
        result, decision = LayerResult(), self.plan[HEAD]
        if decision.spec is not None:
            moments = self._final_moments(streams, progress)
            progress("head", 0.0)
            w = self._matrix(HEAD).float()[None]
            (fit,) = fit_weight(w, decision, moments, self.plan.recipe, [w.shape[-2]])
            result.quantized[decision.key.module] = fit.quantized[0]
            result.records[decision.key.module] = fit.records[0]
        self.ahead.advance()
        return self._pack(decisions, result)

    def _final_moments(self, streams: Streams, progress: Progress) -> Moments:
        settings, config = self.settings, self.reader.config
        norm = self.ahead.weight(FINAL_NORM, settings.dtype).to(settings.device)
        star = streams.reference
        moments = Moments.zeros(config.hidden_size, device=settings.device, drift=star is not None)
        for start in range(0, len(streams.quantized), settings.batch):
            progress("head inputs", start / len(streams.quantized))
            stop = min(start + settings.batch, len(streams.quantized))
            x, x_star = (
                None if s is None
                else rms_norm(s.read(start, stop).to(settings.device), norm, config.rms_eps).flatten(0, 1)
                for s in (streams.quantized, star)
            )  # fmt: skip
            moments.add(x, reference_TK=x_star)
        return moments.mean()

    def _matrix(self, name: str) -> Tensor:
        """A weight on the device, in the 16 or 32 bits that it is stored in."""
        return self.ahead.weight(name, DTYPES[self.reader.info(name).dtype]).to(self.settings.device)

    def _pack(self, decisions: list[Decision], result: LayerResult) -> UnitResult:
        """Stored tensors of a unit: packed where a grid was made, else as they were or as a folding left them."""
        tensors: dict[str, Tensor] = {}
        self.landing.turn()
        for d in decisions:
            name = d.key.name
            if d.spec is not None:
                packed = compress(d.key.module, result.quantized.pop(d.key.module))
                tensors |= {part: self.landing.bring(tensor) for part, tensor in packed.items()}
            elif name in result.changed:
                # Scales are powers of two, so going back to the stored dtype loses nothing.
                tensors[name] = result.changed[name].to("cpu", DTYPES[d.dtype]).view(d.shape)
            else:
                tensors[name] = self.reader.read(name)
                self.reader.require_finite(name, tensors[name])
        self.landing.settle()
        planned = {s.name: s.nbytes for d in decisions for s in stored_tensors(d)}
        assert {name: t.nbytes for name, t in tensors.items()} == planned, "output differs from the plan"
        return UnitResult(tensors, result.records, result.expert_tokens, result.fallbacks)


def _alike(d: Decision) -> tuple:
    return (*d.shape, str(d.spec))
