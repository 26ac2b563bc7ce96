"""Greedy text of a model in memory: several sequences at once, each at its own length.

A prompt passes alone and leaves its states. From there sequences step together: KDA states are stacked, while every
sequence keeps latents of its own, so nothing is padded and none sees another.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klquant.evaluate.tasks.model import TaskModel
from klquant.model.block import attend, block, feed
from klquant.model.kda import KDAState
from klquant.model.mla import LatentCache
from klquant.model.weights import LayerWeights

SEQUENCES = 16  # that step together


@dataclass(frozen=True)
class Prompt:
    """Token ids, how many new ones there may be, and whether those written so far are the end."""

    ids: list[int]
    most: int
    ended: Callable[[list[int]], bool]


# A layer's memory of the sequences under way.
Memory = KDAState | list[LatentCache]


@torch.no_grad()
def generate(
    model: TaskModel, prompts: Sequence[Prompt], step: Callable[[int], None] = lambda done: None
) -> list[list[int]]:
    """The new ids of each prompt, in order. The model must be resident. `step` hears of every prompt that is done."""
    written: list[list[int]] = [[] for _ in prompts]
    waiting, active = deque(range(len(prompts))), []
    memory: list[Memory] = []
    while waiting or active:
        while waiting and len(active) < SEQUENCES:
            i = waiting.popleft()
            fresh, first = _prefill(model, prompts[i].ids)
            memory = [_join(a, b) for a, b in zip(memory, fresh, strict=True)] if active else fresh
            active.append(i)
            written[i].append(first)
        going = [row for row, i in enumerate(active) if not _done(prompts[i], written[i])]
        if len(going) < len(active):
            step(len(active) - len(going))
            memory = [_keep(m, going) for m in memory]
            active = [active[row] for row in going]
            continue
        for i, token in zip(active, _step(model, [written[i][-1] for i in active], memory), strict=True):
            written[i].append(token)
    return written


def _done(prompt: Prompt, written: list[int]) -> bool:
    return len(written) >= prompt.most or prompt.ended(written)


def _prefill(model: TaskModel, ids: list[int]) -> tuple[list[Memory], int]:
    h_1SC, memory = model.embed([ids]), []
    for layer in range(model.config.num_layers):
        state = model.new_state(layer)
        h_1SC = model.through(layer, model.runner.layer(layer), h_1SC, state)
        memory.append([state] if isinstance(state, LatentCache) else state)
    return memory, int(model.logits(h_1SC[0, -1:]).argmax())


def _step(model: TaskModel, ids: list[int], memory: list[Memory]) -> list[int]:
    h_B1C = model.embed([[token] for token in ids])
    for layer, m in enumerate(memory):
        h_B1C = _go_on(model, model.runner.layer(layer), h_B1C, m)
    return model.logits(h_B1C[:, 0]).argmax(-1).tolist()


def _go_on(model: TaskModel, w: LayerWeights, h_B1C: Tensor, memory: Memory) -> Tensor:
    if isinstance(memory, KDAState):
        return block(model.config, w, h_B1C, memory)
    rows = [attend(model.config, w, row, cache) for row, cache in zip(h_B1C.split(1), memory, strict=True)]
    return feed(model.config, w, torch.cat(rows))


def _join(a: Memory, b: Memory) -> Memory:
    if isinstance(a, KDAState):
        return KDAState(torch.cat([a.conv, b.conv]), torch.cat([a.s, b.s]))
    return a + b


def _keep(m: Memory, rows: list[int]) -> Memory:
    return KDAState(m.conv[rows], m.s[rows]) if isinstance(m, KDAState) else [m[row] for row in rows]
