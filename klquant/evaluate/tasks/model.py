"""A checkpoint that answers: log-likelihoods of continuations, in memory or layer by layer like the text passes.

Short questions are padded on the right to rows of one width: every layer is causal, so what comes after changes
nothing. A context whose continuations do not fit one batch passes each layer once, bit by bit, and the continuations
go on from the state it leaves.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import expected_tensors
from klquant.checkpoint.reader import is_finite
from klquant.core.memory import free_memory
from klquant.core.units import decimal
from klquant.errors import UserError
from klquant.evaluate.score import CHUNK_ELEMENTS
from klquant.evaluate.trace import BATCH_TOKENS, Runner
from klquant.model.block import State, attend, block, feed, new_state
from klquant.model.forward import EMBEDDING
from klquant.model.kda import KDAState
from klquant.model.weights import LayerWeights

# Of the free memory, what a model that answers may take: beside it lie states and logits, no other model.
RESIDENT_SHARE = 0.8
# Tokens that share one reading of a model that does not stay; no traces are kept here, so more than for text.
ROUND_TOKENS = 262_144


@dataclass(frozen=True)
class Query:
    """Token ids: continuations to score after a context of at least one token."""

    context: list[int]
    continuations: list[list[int]]


class Answer(NamedTuple):
    """log p of a continuation in nats, and whether greedy decoding would write just that."""

    logprob: float
    greedy: bool


@dataclass
class _Row:
    """`first`: the position that predicts the first token of `targets`, which share all tokens but the last."""

    query: int
    ids: list[int]
    first: int
    targets: list[int]


@dataclass
class _Batch:
    """Rows [B, S] that pass the layers together, after `trunk` [1, T] if there is one."""

    rows: list[_Row]
    trunk: list[int] = field(default_factory=list)
    rows_BSC: Tensor | None = None
    trunk_1TC: Tensor | None = None

    @property
    def tokens(self) -> int:
        return len(self.rows) * max(len(r.ids) for r in self.rows) + len(self.trunk)


def fits(runner: Runner) -> bool:
    """Whether all weights find room on the device."""
    return _nbytes(runner) <= RESIDENT_SHARE * free_memory(runner.device)


def require_resident(runner: Runner, task: str) -> None:
    """Raises UserError, with figures, where the model would not stay on the device."""
    if not (runner.resident or fits(runner)):
        raise UserError(
            f"task {task} has the model write text, which needs all of it on the device: "
            f"{decimal(_nbytes(runner))}, {decimal(free_memory(runner.device))} are free; leave the task out "
            "or take a larger device"
        )


def _nbytes(runner: Runner) -> int:
    shapes = expected_tensors(runner.config).values()
    return sum(torch.Size(shape).numel() for shape in shapes) * runner.dtype.itemsize


class TaskModel:
    """`name` is for messages."""

    def __init__(self, runner: Runner, name: str) -> None:
        self.runner, self.name, self.config = runner, name, runner.config
        if runner.device.type == "cuda":
            torch.cuda.empty_cache()  # what an earlier pass has let go is not free yet
        runner.resident = runner.resident or fits(runner)
        self.chunk = BATCH_TOKENS[runner.device.type]
        self._embedding = runner.source.weight(EMBEDDING, runner.dtype).cpu()

    def plan(self, queries: Sequence[Query]) -> list[_Batch]:
        """Batches in the order they are computed: long contexts, then rows from long to short."""
        trunks, short = [], []
        for i, query in enumerate(queries):
            prefix, rows = query.context[:-1], _rows(i, query)
            if len(rows) * len(query.context) <= self.chunk:
                short += [_Row(i, prefix + r.ids, len(prefix), r.targets) for r in rows]
            else:
                trunks.append(_Batch(rows, prefix))
        return trunks + list(self._pack(short))

    def work(self, batches: Sequence[_Batch]) -> int:
        """What `answer` tells `step` in all."""
        return sum(b.tokens for b in batches) * self.config.num_layers

    @torch.no_grad()
    def answer(
        self, queries: Sequence[Query], batches: Sequence[_Batch], step: Callable[[int], None] = lambda tokens: None
    ) -> list[list[Answer]]:
        """An answer for every continuation of every query. `step` hears of every batch that passed a layer."""
        answers: list[list[Answer | None]] = [[None] * len(q.continuations) for q in queries]
        for group in self._rounds(batches):
            for batch in group:
                batch.rows_BSC = self.embed([r.ids for r in batch.rows])
                batch.trunk_1TC = self.embed([batch.trunk]) if batch.trunk else None
            self.runner.each_layer(partial(self._pass_all, group, step))
            for batch in group:
                for row, hidden_SC in zip(batch.rows, batch.rows_BSC, strict=True):
                    for k in row.targets:
                        answers[row.query][k] = self._read(hidden_SC, row, queries[row.query].continuations[k])
                batch.rows_BSC = batch.trunk_1TC = None
        return answers

    def _pass_all(self, group: list[_Batch], step: Callable[[int], None], layer: int, w: LayerWeights) -> None:
        for batch in group:
            self._pass(layer, w, batch)
            step(batch.tokens)

    def embed(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Rows of ids → [B, S, C], the shorter ones padded on the right."""
        width = max(map(len, ids))
        ids_BS = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids], dtype=torch.int64)
        return F.embedding(ids_BS, self._embedding).to(self.home)

    @property
    def home(self) -> torch.device:
        """Where activations wait between layers."""
        return self.runner.device if self.runner.resident else torch.device("cpu")

    def through(self, layer: int, w: LayerWeights, h_1SC: Tensor, state: State) -> Tensor:
        """A sequence through a layer in bits of `chunk` tokens, on from `state`."""
        bits = h_1SC.to(self.runner.device).split(self.chunk, 1)
        return self.checked(layer, torch.cat([block(self.config, w, bit, state) for bit in bits], 1))

    def new_state(self, layer: int) -> State:
        return new_state(self.config, layer, 1, self.runner.dtype, self.runner.device)

    def logits(self, h_NC: Tensor) -> Tensor:
        """[N, V] in FP32."""
        logits_NV = self.runner.head(self.config, h_NC[None].to(self.runner.device))[0].float()
        if not is_finite(logits_NV):
            raise UserError(f"{self.name}: NaN or infinite logits in a task, though every layer's output is finite")
        return logits_NV

    def checked(self, layer: int, h: Tensor) -> Tensor:
        if not is_finite(h):
            raise UserError(f"{self.name}: NaN or infinite values in a task, first in the output of layer {layer}")
        return h

    def _pack(self, rows: list[_Row]) -> Iterator[_Batch]:
        pack: list[_Row] = []
        for row in sorted(rows, key=lambda r: -len(r.ids)):
            if pack and (len(pack) + 1) * len(pack[0].ids) > self.chunk:
                yield _Batch(pack)
                pack = []
            pack.append(row)
        if pack:
            yield _Batch(pack)

    def _rounds(self, batches: Sequence[_Batch]) -> Iterator[list[_Batch]]:
        """Batches that pass a layer one after another before the next layer is read."""
        if self.runner.resident:
            yield from ([b] for b in batches)
            return
        group: list[_Batch] = []
        for batch in batches:
            if group and sum(b.tokens for b in group) + batch.tokens > ROUND_TOKENS:
                yield group
                group = []
            group.append(batch)
        if group:
            yield group

    def _pass(self, layer: int, w: LayerWeights, batch: _Batch) -> None:
        rows_BSC = batch.rows_BSC.to(self.runner.device)
        if batch.trunk:
            state = self.new_state(layer)
            batch.trunk_1TC = self.through(layer, w, batch.trunk_1TC, state).to(self.home)
            rows_BSC = branch(self.config, w, rows_BSC, state)
        elif rows_BSC.shape[1] > self.chunk:
            rows_BSC = self.through(layer, w, rows_BSC, self.new_state(layer))
        else:
            rows_BSC = block(self.config, w, rows_BSC)
        batch.rows_BSC = self.checked(layer, rows_BSC).to(self.home)

    def _read(self, hidden_SC: Tensor, row: _Row, targets: list[int]) -> Answer:
        logprob, greedy = 0.0, True
        wanted = torch.tensor(targets, device=self.runner.device)
        hidden_NC = hidden_SC[row.first : row.first + len(targets)]
        step = max(1, CHUNK_ELEMENTS[self.runner.device.type] // self.config.vocab_size)
        for h, target in zip(hidden_NC.split(step), wanted.split(step), strict=True):
            logp_NV = self.logits(h).log_softmax(-1)
            logprob += float(logp_NV.gather(-1, target[:, None]).double().sum())
            greedy = greedy and bool((logp_NV.argmax(-1) == target).all())
        return Answer(logprob, greedy)


def branch(cfg: KimiLinearConfig, w: LayerWeights, h_BSC: Tensor, state: State) -> Tensor:
    """A layer's output for rows that each go on from the state of one sequence."""
    if isinstance(state, KDAState):
        B = len(h_BSC)
        return block(cfg, w, h_BSC, KDAState(state.conv.repeat(B, 1, 1), state.s.repeat(B, 1, 1, 1)))
    length, rows = state.length, []
    for row_1SC in h_BSC.split(1):
        rows.append(attend(cfg, w, row_1SC, state))
        state.length = length  # the next row overwrites this one's latents
    return feed(cfg, w, torch.cat(rows))


def _rows(i: int, query: Query) -> list[_Row]:
    """The context's last token and what follows; continuations that differ in their last token only share a row."""
    rows: dict[tuple[int, ...], _Row] = {}
    for k, ids in enumerate(query.continuations):
        row = rows.setdefault(tuple(ids[:-1]), _Row(i, [query.context[-1], *ids[:-1]], 0, []))
        row.targets.append(k)
    return list(rows.values())
