"""The model's steps on its devices: chunks of prompts, or a token for every running sequence.

Layers lie on devices in order, a run of them is a stage. The stream goes from stage to stage; on GPUs each stage's
decode step is a CUDA graph per batch size. Which token a sequence has to be fed next stays on the device, under its
slot: a step can be launched before the host has seen the last one's tokens.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby

import torch
from torch import Tensor

from klquant.engine.decode import decode_layer, embed
from klquant.engine.graphs import Graphs, Outputs, on
from klquant.engine.prefill import ChunkRows, Span, numbers, prefill_layer
from klquant.engine.request import SamplingParams
from klquant.engine.sampler import Chosen, Mode, SamplingState, sample
from klquant.engine.state import DeviceState, upload
from klquant.engine.weights import EngineWeights
from klquant.kernels.moe.dispatch import added_up
from klquant.kernels.norm.dispatch import add_rms_norm
from klquant.kernels.step.dispatch import embed_next
from klquant.model.delta import delta_path
from klquant.model.weights import wide_linear

# Batch sizes that graphs are captured for; a smaller batch is padded. Beyond the last: multiples of 64.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
# Rows that prompts are padded to for graphs: the host takes longer to launch their kernels than the GPU to run them.
GRAPHED = (32, 64, 128, 192, 256, 384, 512, 768, 1_024, 1_536, 2_048)
# Graphs of what lies behind other tokens: rows times the latents that each of them reads by itself. On an H100 a graph
# is as slow as the host with two to three times as many.
ROWS_TIMES_LATENTS = 3 << 22
# Prompts of a size that run without one first: making a graph takes two more runs and a capture.
BEFORE_GRAPH = 4
# Shorter ones take little longer than a copy of what they left and a place among the prefixes are worth.
LEAST_PREFIX = 512


def bucket(rows: int) -> int:
    """The batch size that serves `rows` sequences."""
    return BUCKETS[bisect_left(BUCKETS, rows)] if rows <= BUCKETS[-1] else -(-rows // 64) * 64


@dataclass(frozen=True)
class Stage:
    device: torch.device
    layers: range
    state: DeviceState


class Runner:
    """Weights with room for `slots` sequences and `pages` of latents. Slots and pages are numbers its caller owns."""

    def __init__(
        self, weights: EngineWeights, *, slots: int, pages: int, max_context: int, cache_bits: int = 16
    ) -> None:
        self.weights, self.cfg = weights, weights.cfg
        sizes = {"slots": slots, "pages": pages, "max_context": max_context, "cache_bits": cache_bits}
        self.stages = [
            Stage(device, layers, DeviceState.empty(self.cfg, layers, **sizes, dtype=weights.dtype, device=device))
            for device, layers in _stages(weights)
        ]
        head = self.stages[-1].device
        self.sampling = SamplingState.empty(slots + 1, self.cfg.vocab_size, head)
        # The stream behind the last prompt of each slot, from which its first token was chosen.
        self.ends_NC = torch.zeros(slots + 1, self.cfg.hidden_size, device=head)
        # The token each slot is fed next, beside the embedding that reads it.
        self.next_token = torch.zeros(slots + 1, dtype=torch.int64, device=weights.embedding_VC.device)
        self._graphs = {s.device: Graphs(s.device) for s in self.stages if s.device.type == "cuda"}
        self._slots: tuple[tuple[int, ...], dict[torch.device, Tensor]] = ((), {})
        paths = {delta_path(s.device, weights.dtype, GRAPHED[0]) for s in self.stages}
        # Rows of the graphs that prompts may have here, and how often each was asked for.
        self._graphed, self._met = GRAPHED if paths == {"chunk_fla"} else (), Counter()

    def bind(self, slot: int, pages: Sequence[int], params: SamplingParams, tokens: Sequence[int], fresh: bool) -> None:
        """Give a slot to a request: its pages, its parameters (with a seed), the tokens of its prompt.

        `fresh`: a sequence begins; otherwise the one in the slot goes on.
        """
        for stage in self.stages:
            stage.state.bind(slot, pages)
            if fresh:
                stage.state.clear(slot)
        self.sampling.set(slot, params, tokens)

    @torch.no_grad()
    def copy(self, source: int, target: int, pages: tuple[int, int] | None = None) -> None:
        """Let slot `target` remember of a prompt that was read what `source` does, but for latents: of these the first
        page is copied to the second."""
        for stage in self.stages:
            stage.state.copy(source, target, pages)
        self.ends_NC[target] = self.ends_NC[source]

    @torch.no_grad()
    def prefill(self, spans: Sequence[Span], after_layer: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Spans of sequences in different slots → residual stream after the last layer [S, C], one behind the other.

        `after_layer` is called with (layer, stream after it), and before the first with (−1, embedded ids). On a GPU
        the result may be overwritten by the next call.
        """
        table, ids = self.weights.embedding_VC, [i for span in spans for i in span.ids]
        graphed = 0 if after_layer else self._graphed_rows(spans)
        padding = [0] * (graphed - len(ids))
        h_SC = embed(upload(torch.tensor(ids + padding), table.device), table)
        if after_layer:
            after_layer(-1, h_SC)
        for number, stage in enumerate(self.stages):
            with on(stage.device):
                h_SC = h_SC.to(stage.device)
                if graphed:
                    h_SC = self._run_prompt(number, h_SC, spans[0], spans[0].start > 0)
                    stage.state.length[spans[0].slot] = spans[0].stop
                else:
                    with self._beside(stage.device):
                        chunk = ChunkRows.of(stage.state, spans)
                        h_SC = self._layers(stage, h_SC, chunk, after_layer)
                        stage.state.length[chunk.slot_N] = chunk.length_N.int()
        return h_SC[: len(ids)]

    @torch.no_grad()
    def first_tokens(self, h_SC: Tensor | None, spans: Sequence[Span], mode: Mode) -> Chosen:
        """The token right behind each span: a row each.

        h: the stream of the spans, and what may follow them. None: the spans are empty, and their slots have read the
        prompts that end there before.
        """
        ends = accumulate(len(span.ids) for span in spans)
        rows = torch.tensor([[end - 1, span.slot, span.stop] for end, span in zip(ends, spans, strict=True)])
        device = self.ends_NC.device
        with on(device):
            last_B, slot_B, position_B = upload(rows.T.contiguous(), device)
            if h_SC is not None:
                self.ends_NC[slot_B] = h_SC[last_B].to(self.ends_NC.dtype)
            logits_BV = self.weights.head(self.cfg, self.ends_NC[slot_B])
            chosen = sample(logits_BV, self.sampling, slot_B, position_B, mode)
            self.next_token[slot_B.to(self.next_token.device)] = chosen.token.to(self.next_token.device)
        return chosen

    @torch.no_grad()
    def decode(self, slots: Sequence[int], mode: Mode) -> Chosen:
        """Feed every slot its next token and choose the one behind it: a row a slot, then padding.

        On a GPU the result is overwritten by the next call: copy it first.
        """
        slot_B = self._slot_tensors(tuple(slots))
        inputs: tuple[Tensor, ...] = ()
        # −1 is the last row of next_token, that of padding.
        row_B = slot_B[self.next_token.device]
        if not self._embeds_in_stage:
            inputs = (embed(self.next_token[row_B], self.weights.embedding_VC),)
        for number, stage in enumerate(self.stages):
            inputs = tuple(x.to(stage.device, non_blocking=True) for x in inputs)
            with on(stage.device):
                inputs = self._run(number, mode, slot_B[stage.device], *inputs)
        chosen = Chosen(*inputs)
        if self.next_token.device != self.stages[-1].device:
            self.next_token[row_B] = chosen.token.to(self.next_token.device)
        return chosen

    def find_bad_layer(self, tokens: Sequence[int], slot: int, pages: Sequence[int], chunk: int) -> str | None:
        """Run a slot's tokens again from the start, on pages of its own, and name what first makes values that are not
        numbers.

        None when nothing does, so that the decode step must have. What the slot remembers is lost.
        """

        class Found(Exception):
            pass

        def check(layer: int, h: Tensor) -> None:
            if not h.isfinite().all():
                raise Found(f"model.layers.{layer}" if layer >= 0 else "model.embed_tokens")

        for stage in self.stages:
            stage.state.bind(slot, pages)
            stage.state.clear(slot)
        try:
            for start in range(0, len(tokens), chunk):
                h_SC = self.prefill([Span(tokens[start : start + chunk], slot, start)], check)
        except Found as found:
            return str(found)
        with torch.no_grad(), on(h_SC.device):
            logits = self.weights.head(self.cfg, h_SC[-1:])
        return None if logits.isfinite().all() else "lm_head"

    def runs_before_its_best(self, tokens: int) -> int:
        """How often a prompt of so many tokens runs before it runs as fast as it can."""
        return 2 + BEFORE_GRAPH if self._rows_for(tokens) else 1

    @torch.no_grad()
    def capture_prompts(self, longest: int) -> None:
        """Make the graphs of prompts of up to `longest` tokens, and of what lies behind others. The largest first: in
        its memory the others have room."""
        for rows in reversed(self._graphed[: bisect_left(self._graphed, longest) + 1]):
            for behind in (False, True):
                self._met[rows, behind] = BEFORE_GRAPH
                for number, stage in enumerate(self.stages):
                    with on(stage.device):
                        h_SC = torch.zeros(rows, self.cfg.hidden_size, device=stage.device)
                        self._run_prompt(number, h_SC, Span((), 0, 0), behind)

    @property
    def least_prefix(self) -> int:
        """Of how many tokens a prompt is worth to go on from."""
        return LEAST_PREFIX if self._graphed else 1

    def _beside(self, device: torch.device) -> AbstractContextManager:
        """A chunk takes the memory of graphs, which is as large as the largest of both."""
        return self._graphs[device].beside() if device in self._graphs else nullcontext()

    def _layers(
        self, stage: Stage, h_SC: Tensor, chunk: ChunkRows, after_layer: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """A stage's layers for the rows of a chunk: the stream behind them."""
        delta_SC = None
        try:
            for layer in stage.layers:
                w = self.weights.layers[layer]
                h_SC, delta_SC = prefill_layer(self.cfg, layer, w, (h_SC, delta_SC), stage.state, chunk)
                if after_layer:
                    after_layer(layer, h_SC + added_up(delta_SC, h_SC.dtype))
        except BaseException:
            # The next layer's experts may be on their way (`Staging`), and a graph would not wait for them.
            if stage.device.type == "cuda":
                with suppress(RuntimeError):
                    torch.cuda.synchronize(stage.device)
            raise
        return h_SC + added_up(delta_SC, h_SC.dtype)

    def _rows_for(self, tokens: int) -> int:
        """The rows of the graph that prompts of so many tokens may become; 0: they do not."""
        at = bisect_left(self._graphed, tokens)
        return self._graphed[at] if tokens > 1 and at < len(self._graphed) else 0

    def _graphed_rows(self, spans: Sequence[Span]) -> int:
        """The rows of the graph that runs spans; 0: none does, or none yet."""
        rows, behind = self._rows_for(len(spans[0].ids)), spans[0].start > 0
        if not rows or not self._graphs or len(spans) > 1:
            return 0
        if behind and rows * spans[0].stop > ROWS_TIMES_LATENTS:
            return 0
        self._met[rows, behind] += 1
        return rows if self._met[rows, behind] > BEFORE_GRAPH else 0

    def _run_prompt(self, number: int, h_SC: Tensor, span: Span, behind: bool) -> Tensor:
        """A stage's layers for one span padded to the rows of h, in a graph: one of prompts from their beginning, or of
        what lies `behind` other tokens."""
        stage, rows = self.stages[number], len(h_SC)

        def run(on_device: Tensor, h_SC: Tensor) -> Outputs:
            return (self._layers(stage, h_SC, ChunkRows.padded(stage.state, on_device, behind=behind)),)

        def no_prompt() -> tuple[Tensor, ...]:
            # Nothing but padding leaves slot 0 as it is.
            return upload(numbers([Span((), 0, 0)], rows), stage.device), torch.zeros_like(h_SC)

        inputs = upload(numbers([span], rows), stage.device), h_SC
        (h_SC,) = self._graphs[stage.device].run(("prompt", number, rows, behind), run, inputs, no_prompt)
        return h_SC

    @property
    def _embeds_in_stage(self) -> bool:
        return self.next_token.device == self.stages[0].device

    def _slot_tensors(self, slots: tuple[int, ...]) -> dict[torch.device, Tensor]:
        """Slot numbers on every stage's device and next_token's, padded to a bucket where there are graphs; kept while
        they repeat: copying them to a device waits for all it was given to do."""
        if self._slots[0] != slots:
            padded = [*slots, *[-1] * (bucket(len(slots)) - len(slots))] if self._graphs else slots
            slot_B = torch.tensor(padded, dtype=torch.int32)
            devices = {self.next_token.device, *(stage.device for stage in self.stages)}
            self._slots = slots, {device: slot_B.to(device) for device in devices}
        return self._slots[1]

    def _run(self, number: int, mode: Mode, slot_B: Tensor, *stream: Tensor) -> Outputs:
        device = self.stages[number].device
        if device not in self._graphs:
            return self._stage(number, mode, slot_B, *stream)

        def padding() -> tuple[Tensor, ...]:
            return torch.full_like(slot_B, -1), *(torch.zeros_like(x) for x in stream)

        key = (number, len(slot_B), mode)
        return self._graphs[device].run(key, partial(self._stage, number, mode), (slot_B, *stream), padding)

    def _stage(self, number: int, mode: Mode, slot_B: Tensor, *stream: Tensor) -> Outputs:
        """A stage's layers for one token a row: the stream [B, C] behind them, or for the last stage the tokens."""
        stage = self.stages[number]
        rows = stage.state.advance(slot_B)
        if not stream:
            stream = (embed_next(self.next_token, rows.index_B, self.weights.embedding_VC),)
        h_BC, delta_BC = stream[0], None
        for layer in stage.layers:
            h_BC, delta_BC = decode_layer(
                self.cfg, layer, self.weights.layers[layer], (h_BC, delta_BC), stage.state, rows
            )
        if number < len(self.stages) - 1:
            return (h_BC + added_up(delta_BC, h_BC.dtype),)
        head = self.weights.head
        _, x_BC = add_rms_norm(h_BC, delta_BC, head.norm, self.cfg.rms_eps)
        chosen = sample(wide_linear(x_BC, head.proj), self.sampling, rows.index_B, rows.length_B, mode)
        if self.next_token.device == stage.device:
            self.next_token[rows.index_B] = chosen.token
        return chosen.tensors()


def _stages(weights: EngineWeights) -> list[tuple[torch.device, range]]:
    """Runs of consecutive layers on one device."""
    found = []
    for device, run in groupby(range(weights.cfg.num_layers), key=lambda i: weights.layers[i].device):
        layers = list(run)
        found.append((device, range(layers[0], layers[-1] + 1)))
    return found
