"""Chosen tokens on their way to the host, without making it wait before it asks."""

from dataclasses import dataclass

import torch

from klquant.engine.request import TokenLogprob
from klquant.engine.sampler import Chosen


@dataclass(frozen=True)
class Reply:
    """The first rows of a step's Chosen, being copied; `ready` is set on a GPU."""

    rows: Chosen
    ready: torch.cuda.Event | None

    @classmethod
    def begin(cls, chosen: Chosen, rows: int) -> "Reply":
        """Start copying; what the tensors hold may be overwritten by launches after this one."""
        parts = [t[:rows] for t in chosen.tensors()]
        if not chosen.token.is_cuda:
            return cls(Chosen(*(t.clone() for t in parts)), None)
        host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in parts]
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(chosen.token.device))
        return cls(Chosen(*host), ready)

    def tokens(self) -> list[int]:
        """Waits for the step. −1: its logits were not numbers."""
        if self.ready:
            self.ready.synchronize()
        return self.rows.token.tolist()

    def logprob(self, row: int, top: int) -> TokenLogprob:
        """What the model thought of a row's token, and its `top` likeliest ones. After `tokens`, in mode "full"."""
        best = zip(self.rows.top_token[row, :top].tolist(), self.rows.top_logprob[row, :top].tolist(), strict=True)
        return TokenLogprob(self.rows.token[row].item(), self.rows.logprob[row].item(), tuple(best))
