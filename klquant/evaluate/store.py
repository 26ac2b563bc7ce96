"""The reference's next-token distributions on disk, and the divergence of a model from them.

    KL(p ‖ q) = Σ p (log p − log q) − p + q,   p the reference, q the model, in nats

(the last two sum to zero, but written so a rounding of p or q that spoils their sum costs nothing of first order.)
Two kinds of store. `full` keeps every log p in FP16, rounded by δ with |δ| ≤ 2⁻¹¹ |log p|: that adds ½ Σ p δ² to the
divergence and Σ p (log p − log q) δ, whose sign is random. `topk` keeps the TOP most likely tokens, the log of the mass
of all others (the tail), and SAMPLES tokens drawn from the tail by their p. The divergence of the distribution (top
tokens, tail as one) from the model's is exact and never above the whole one; what it lacks,

    P · KL(p|tail ‖ q|tail) = P · E[r − 1 − log r],   r = q|tail ÷ p|tail,   over draws from p|tail,

is estimated from the samples: unbiased, never negative, with a known standard error.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from klquant.evaluate.options import StoreKind

TOP = 128
SAMPLES = 32
HALF_UNIT = 2.0**-11  # the largest relative error of rounding to FP16


class Divergence(NamedTuple):
    """Per position [N], float64: KL in nats, and of its error the part that adds up over positions (a bound) and the
    variance of the part that averages out."""

    kld: Tensor
    bias: Tensor
    variance: Tensor


def keep(kind: StoreKind, logp_NV: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """What is stored of log-probabilities [N, V] (FP32): tensors [N, …] on the CPU."""
    if kind == "full":
        return {"logp": logp_NV.half().cpu()}
    top_NK, ids_NK = logp_NV.topk(min(TOP, logp_NV.shape[-1] - 1))
    tail_NV, mass_N = _tail(logp_NV, ids_NK)
    drawn_NM = torch.multinomial((tail_NV - mass_N[:, None]).exp(), SAMPLES, True, generator=generator)
    stored = {
        "top": top_NK, "top_ids": ids_NK.int(), "tail": mass_N,
        "drawn": logp_NV.gather(-1, drawn_NM), "drawn_ids": drawn_NM.int(),
    }  # fmt: skip
    return {name: tensor.cpu() for name, tensor in stored.items()}


def divergence(kind: StoreKind, stored: Mapping[str, Tensor], logq_NV: Tensor) -> Divergence:
    """KL of the model's log-probabilities [N, V] (FP32) from what `keep` stored of the reference's."""
    stored = {name: tensor.to(logq_NV.device) for name, tensor in stored.items()}
    return _full(stored["logp"].float(), logq_NV) if kind == "full" else _topk(stored, logq_NV)


def _full(logp_NV: Tensor, logq_NV: Tensor) -> Divergence:
    p_NV, delta_NV = logp_NV.exp(), HALF_UNIT * logp_NV
    bias, variance = _sum(p_NV * delta_NV**2) / 2, _sum((p_NV * delta_NV * (logp_NV - logq_NV)) ** 2) / 3
    return Divergence(_kl(logp_NV, logq_NV), bias, variance)


def _topk(stored: Mapping[str, Tensor], logq_NV: Tensor) -> Divergence:
    top_NK, ids_NK, mass_N = stored["top"], stored["top_ids"].long(), stored["tail"]
    _, model_mass_N = _tail(logq_NV, ids_NK)
    coarse = _kl(top_NK, logq_NV.gather(-1, ids_NK)) + _kl(mass_N[:, None], model_mass_N[:, None])
    inside_q = logq_NV.gather(-1, stored["drawn_ids"].long()) - model_mass_N[:, None]
    log_r_NM = (inside_q - (stored["drawn"] - mass_N[:, None])).double()
    terms_NM, mass = log_r_NM.expm1() - log_r_NM, mass_N.double().exp()
    kld = coarse + mass * terms_NM.mean(-1)
    return Divergence(kld, torch.zeros_like(kld), mass**2 * terms_NM.var(-1) / SAMPLES)


def _kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    p_NV = logp_NV.exp()
    return _sum(p_NV * (logp_NV - logq_NV) - p_NV + logq_NV.exp())


def _tail(logp_NV: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities with those of `ids` struck out [N, V], and the log of their sum [N]."""
    tail_NV = logp_NV.scatter(-1, ids_NK, float("-inf"))
    return tail_NV, tail_NV.logsumexp(-1)


def _sum(x: Tensor) -> Tensor:
    return x.double().sum(-1)
