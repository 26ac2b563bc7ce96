"""Logits → tokens, as tensor operations only, so that it can be part of a captured graph.

Randomness has no state: the noise of a token is a hash of (seed, position, token). A request therefore draws the same
tokens whoever shares its batch, however its prompt was cut, and in whichever graph it runs.
Shape suffixes: B = rows, V = vocabulary, N = slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from klquant.engine.request import MAX_LOGPROBS, SamplingParams
from klquant.engine.state import upload
from klquant.kernels.sample.dispatch import draw, draw_narrowed

# greedy: the likeliest token. plain: temperature only. narrow: top-k, top-p, min-p and penalty. full: logprobs as well.
Mode = Literal["greedy", "plain", "narrow", "full"]


def mode_of(params: Sequence[SamplingParams]) -> Mode:
    """The cheapest mode that serves all rows."""
    if any(p.logprobs is not None for p in params):
        return "full"
    if any(p.top_k or p.top_p < 1 or p.min_p or p.repetition_penalty != 1 for p in params):
        return "narrow"
    return "greedy" if all(p.greedy for p in params) else "plain"


@dataclass(frozen=True)
class Chosen:
    """token [B] int64, −1 where the logits are not numbers; logprob [B]; the likeliest top_token, top_logprob [B, 20].

    The last three are None but in mode "full". FP32, of the model's own distribution.
    """

    token: Tensor
    logprob: Tensor | None = None
    top_token: Tensor | None = None
    top_logprob: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.token, self.logprob, self.top_token, self.top_logprob) if t is not None)


@dataclass(frozen=True)
class SamplingState:
    """Parameters of each slot's request, [N], and the tokens it has seen, [N, V] bool."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor
    seed: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, slots: int, vocab: int, device: torch.device | str) -> "SamplingState":
        floats = [torch.zeros(slots, device=device) for _ in range(4)]
        temperature, top_p, min_p, penalty = floats
        top_k, seed = (torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(2))
        seen = torch.zeros(slots, vocab, dtype=torch.bool, device=device)
        return cls(temperature, top_k, top_p, min_p, penalty, seed, seen)

    def set(self, slot: int, params: SamplingParams, tokens: Sequence[int]) -> None:
        """Give the slot to a request that begins with `tokens`. Its seed must be set."""
        vocab = self.seen.shape[1]
        for field, value in (
            (self.temperature, params.temperature), (self.top_k, params.top_k or vocab), (self.top_p, params.top_p),
            (self.min_p, params.min_p), (self.penalty, params.repetition_penalty), (self.seed, params.seed),
        ):  # fmt: skip
            field[slot] = value
        self.seen[slot] = False
        if params.repetition_penalty != 1:
            self.seen[slot, upload(torch.tensor(tokens, dtype=torch.int64), self.seen.device)] = True


def sample(logits_BV: Tensor, state: SamplingState, slot_B: Tensor, position_B: Tensor, mode: Mode) -> Chosen:
    """One token a row, for the positions [B] that they will have. Modes "narrow" and "full" update `state.seen`."""
    if mode in ("greedy", "plain"):
        temperature_N = None if mode == "greedy" else state.temperature
        return Chosen(draw(logits_BV, temperature_N, state.seed, slot_B, position_B))
    token_B = draw_narrowed(
        logits_BV, state.seen, state.temperature, state.top_k, state.top_p, state.min_p, state.penalty, state.seed,
        slot_B, position_B,
    )  # fmt: skip
    if mode == "narrow":
        return Chosen(token_B)
    logp_BV = logits_BV.float().log_softmax(-1)
    top = logp_BV.topk(min(MAX_LOGPROBS, logp_BV.shape[1]), -1)
    return Chosen(token_B, logp_BV.gather(-1, token_B[:, None].clamp_min(0))[:, 0], top.indices, top.values)
