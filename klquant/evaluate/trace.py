"""Push windows through a model layer by layer and note what each layer leaves behind.

A model that fits the device stays there, and windows pass one batch after the other. A larger one is read once a round
of windows, one layer in memory at a time, or two where a GPU has room: 98 GB run on a 24 GB card.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.calibrate.footprint import widest_layer
from klquant.calibrate.routes import routed_output
from klquant.checkpoint.names import expected_tensors
from klquant.checkpoint.reader import is_finite
from klquant.core.memory import free_memory
from klquant.errors import UserError
from klquant.evaluate.ahead import one_ahead
from klquant.evaluate.source import Source
from klquant.model.block import attend, mlp_inputs
from klquant.model.forward import EMBEDDING, Head
from klquant.model.kda import KDAState
from klquant.model.moe import experts, mlp, route
from klquant.model.weights import LayerWeights, MoEWeights

# A model stays in memory when its weights take no more than this share of what is free, and two layers of it are there
# at once when they do.
RESIDENT_SHARE = 0.4
# Tokens on the device at once. Fixed for a kind of device, so that a resumed run computes what an unbroken one does.
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
# Tokens that share one reading of a model that does not stay. Of the 48B they leave 2 GB of traces for every 131,072
# on the host, and 0.6 GB of residual stream on the device.
ROUND_TOKENS = {"cpu": 65_536, "cuda": 262_144}
# Every how many positions the residual stream is kept for comparison.
STRIDE = 32


@dataclass
class Trace:
    """A batch of windows after the last layer.

    hidden [B, S, C]: the residual stream, on the device from layer to layer; all others are on the CPU. stream: a
    layer's output at `sampled_positions`, [B, P, C] each. experts: a MoE layer's choices, int16 [B, S, R] each. states:
    a KDA layer's state after the window, FP16 [B, H, D, D] each.
    """

    windows: list[int]
    hidden: Tensor
    stream: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)


def sampled_positions(length: int) -> slice:
    """Every STRIDE-th position of a window, the last one among them."""
    return slice((length - 1) % STRIDE, length, STRIDE)


class Runner:
    """Runs the weights of one source in `dtype` on `device`."""

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        self.config = source.config
        weights = sum(torch.Size(shape).numel() for shape in expected_tensors(self.config).values())
        room = RESIDENT_SHARE * free_memory(device)
        self.resident = weights * dtype.itemsize <= room
        self.reads_ahead = device.type == "cuda" and 2 * widest_layer(self.config) * dtype.itemsize <= room
        self._layers: dict[int, LayerWeights] = {}
        self._head: Head | None = None
        self._embedding: Tensor | None = None

    @property
    def head(self) -> Head:
        if self._head is None:
            self._head = Head.load(self.source, self.dtype, self.device)
        return self._head

    def layer(self, layer: int) -> LayerWeights:
        if layer in self._layers:
            return self._layers[layer]
        w = LayerWeights.load(self.source, layer, self.dtype, self.device)
        if self.resident:
            self._layers[layer] = w
        return w

    def each_layer(self, work: Callable[[int, LayerWeights], None]) -> None:
        """`work` with every layer in turn; it keeps none. A model that does not stay is read meanwhile."""
        count = self.config.num_layers
        ahead = self.reads_ahead and not self.resident
        layers = one_ahead(self.layer, count, self.device) if ahead else map(self.layer, range(count))
        for layer in range(count):  # `enumerate` would hold a layer while the next is made
            work(layer, next(layers))

    def batches(self, ids_WS: Tensor) -> list[list[int]]:
        """All windows in the groups that are always computed together."""
        size = max(1, BATCH_TOKENS[self.device.type] // ids_WS.shape[1])
        return [list(range(s, min(s + size, len(ids_WS)))) for s in range(0, len(ids_WS), size)]

    @torch.no_grad()
    def run(
        self, ids_WS: Tensor, batches: Sequence[list[int]], step: Callable[[int], None] = lambda tokens: None
    ) -> Iterator[Trace]:
        """A trace for each of `batches`. `step` hears of every batch that passed a layer, with its tokens.

        Raises UserError naming the layer behind which a value is NaN or infinite for the first time.
        """
        a_round = 1 if self.resident else max(1, ROUND_TOKENS[self.device.type] // (len(batches[0]) * ids_WS.shape[1]))
        for start in range(0, len(batches), a_round):
            traces = [Trace(b, self._embed(ids_WS[b])) for b in batches[start : start + a_round]]
            self.each_layer(partial(self._pass_all, traces, step))
            yield from traces

    def _pass_all(self, traces: list[Trace], step: Callable[[int], None], layer: int, w: LayerWeights) -> None:
        for trace in traces:
            self._pass(w, layer, trace)
            step(trace.hidden.shape[0] * trace.hidden.shape[1])

    def _embed(self, ids_BS: Tensor) -> Tensor:
        if self._embedding is None:
            self._embedding = self.source.weight(EMBEDDING, self.dtype).cpu()
        return F.embedding(ids_BS, self._embedding).to(self.device)

    def _pass(self, w: LayerWeights, layer: int, trace: Trace) -> None:
        """One batch through one layer."""
        cfg, h = self.config, trace.hidden
        state = None if cfg.is_mla(layer) else KDAState.zeros(cfg, h.shape[0], self.dtype, self.device)
        h = attend(cfg, w, h, state)
        x_TC = mlp_inputs(cfg, w, h)
        if isinstance(w.mlp, MoEWeights):
            weight_TR, expert_TR = route(cfg, w.mlp, x_TC)
            # The kernels are for BF16; on a CPU both are one.
            routed = routed_output if self.dtype == torch.bfloat16 else experts
            y_TC = routed(cfg, w.mlp, x_TC, weight_TR, expert_TR) + mlp(w.mlp.shared, x_TC)
            trace.experts.append(expert_TR.to("cpu", torch.int16).unflatten(0, h.shape[:2]))
        else:
            y_TC = mlp(w.mlp, x_TC)
        h = h + y_TC.view_as(h)
        if not is_finite(h):
            raise UserError(
                f"{self.source.name}: NaN or infinite values first appear in the output of layer {layer} "
                f"({'MLA' if cfg.is_mla(layer) else 'KDA'}, counted from 0; {_where(h, trace.windows)}); "
                "the weights of this layer or of one before it are not usable"
            )
        if state is not None:
            trace.states.append(state.s.to("cpu", torch.float16))
        trace.hidden = h
        trace.stream.append(h[:, sampled_positions(h.shape[1])].to("cpu", copy=True))


def _where(h_BSC: Tensor, windows: list[int]) -> str:
    bad = (~torch.isfinite(h_BSC)).any(-1).nonzero()[0].tolist()
    return f"window {windows[bad[0]]}, position {bad[1]}"
