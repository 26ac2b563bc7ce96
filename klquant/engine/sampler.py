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
from klquant.kernels.sample.dispatch import draw, perturb

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
            self.seen[slot, torch.tensor(tokens, dtype=torch.int64, device=self.seen.device)] = True


def sample(logits_BV: Tensor, state: SamplingState, slot_B: Tensor, position_B: Tensor, mode: Mode) -> Chosen:
    """One token a row, for the positions [B] that they will have. Modes "narrow" and "full" update `state.seen`."""
    if mode in ("greedy", "plain"):
        temperature_N = None if mode == "greedy" else state.temperature
        return Chosen(draw(logits_BV, temperature_N, state.seed, slot_B, position_B))
    token_B = _draw_narrowed(logits_BV, state, slot_B, position_B)
    best_B = logits_BV.max(-1).values  # NaN wins
    chosen_B = torch.where(best_B.isfinite(), token_B, -1)
    if mode == "narrow":
        return Chosen(chosen_B)
    logp_BV = logits_BV.float().log_softmax(-1)
    top = logp_BV.topk(min(MAX_LOGPROBS, logp_BV.shape[1]), -1)
    return Chosen(chosen_B, logp_BV.gather(-1, token_B[:, None])[:, 0], top.indices, top.values)


def _draw_narrowed(logits_BV: Tensor, state: SamplingState, slot_B: Tensor, position_B: Tensor) -> Tensor:
    """A token a row, which counts as seen from now on."""
    z_BV = logits_BV.float()
    seen_BV, penalty_B1 = state.seen[slot_B], state.penalty[slot_B, None]
    z_BV = torch.where(seen_BV, torch.where(z_BV > 0, z_BV / penalty_B1, z_BV * penalty_B1), z_BV)
    z_BV, order_BV = z_BV.sort(dim=-1, descending=True, stable=True)
    z_BV = _narrow(z_BV, state, slot_B)
    row_B = state.temperature[slot_B], state.seed[slot_B], position_B
    rank_B1 = perturb(z_BV, *row_B, order_BV).argmax(-1, keepdim=True)
    token_B = order_BV.gather(-1, rank_B1)[:, 0]
    state.seen[slot_B, token_B] = torch.ones_like(token_B, dtype=torch.bool)
    return token_B


def _narrow(z_BV: Tensor, state: SamplingState, slot_B: Tensor) -> Tensor:
    """Sorted logits, those that top-k, top-p or min-p exclude at −∞. The first always stays."""
    rank_V = torch.arange(z_BV.shape[1], device=z_BV.device)
    z_BV = z_BV.masked_fill(rank_V >= state.top_k[slot_B, None], float("-inf"))
    t_B1 = state.temperature[slot_B, None]
    p_BV = (z_BV / torch.where(t_B1 > 0, t_B1, 1)).softmax(-1)
    before_BV = p_BV.cumsum(-1) - p_BV
    out_BV = (before_BV >= state.top_p[slot_B, None]) | (p_BV < state.min_p[slot_B, None] * p_BV[:, :1])
    return z_BV.masked_fill(out_BV & (rank_V > 0), float("-inf"))
