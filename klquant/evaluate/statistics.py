"""Windows' records → the figures of a result. Sums in float64; confidence by bootstrap over windows, not tokens.

Tokens of a window share their context and are not independent; windows nearly are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from klquant.evaluate.result import Interval, Kld, LayerDrift, PositionBin, Quality

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95
BINS = 16

Record = Mapping[str, Tensor]


def quality(groups: Mapping[str, Sequence[Record]]) -> Quality:
    """Figures over windows grouped by domain; resamples keep each domain's number of windows."""
    records = [r for group in groups.values() for r in group]
    sizes = [len(group) for group in groups.values()]
    nll = _means(records, "nll")
    perplexity = float(nll.mean().exp())
    common = {
        "windows": len(records),
        "positions": sum(len(r["nll"]) + 1 for r in records),
        "targets": sum(len(r["nll"]) for r in records),
        "perplexity": perplexity,
    }
    if "kld" not in records[0]:
        return Quality(**common)
    kld = torch.cat([r["kld"] for r in records])
    p50, p99, p999 = quantiles(kld, (0.5, 0.99, 0.999))
    reference_nll = _means(records, "reference_nll")
    return Quality(
        **common,
        kld=Kld(
            **interval(_means(records, "kld"), sizes).model_dump(),
            median=p50, p99=p99, p999=p999, max=float(kld.max()), store_error=_store_error(records),
        ),
        top1=interval(_means(records, "top1_same"), sizes),
        reference_perplexity=float(reference_nll.mean().exp()),
        perplexity_ratio=interval(nll - reference_nll, sizes, torch.exp),
    )  # fmt: skip


def quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """Linear between neighbours, as `torch.quantile`, which takes 2²⁴ values at most."""
    ordered = values.sort().values
    found = []
    for share in shares:
        at = share * (len(ordered) - 1)
        low, high = ordered[math.floor(at)].double(), ordered[math.ceil(at)].double()
        found.append(float(low + (high - low) * (at - math.floor(at))))
    return found


def interval(values_W: Tensor, sizes: Sequence[int], then: Callable[[Tensor], Tensor] = lambda x: x) -> Interval:
    """`then` of the mean over windows, and the range of LEVEL of it over resamples of the windows in each domain.

    `sizes`: windows of each domain, in order. Without two windows in every domain there is no range.
    """
    mean = float(then(values_W.mean()))
    if min(sizes) < 2:
        return Interval(mean=mean)
    generator = torch.Generator().manual_seed(SEED)
    total = torch.zeros(RESAMPLES, dtype=torch.float64)
    for part in values_W.split(list(sizes)):
        drawn = torch.randint(len(part), (RESAMPLES, len(part)), generator=generator)
        total += part[drawn].sum(-1)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(then(total / len(values_W)), tails).tolist()
    return Interval(mean=mean, low=low, high=high)


def by_position(records: Sequence[Record]) -> list[PositionBin]:
    """KLD by the position in the window, in BINS equal parts of it."""
    kld_WS = torch.stack([r["kld"] for r in records])
    edges = sorted({round(i * kld_WS.shape[1] / BINS) for i in range(BINS + 1)})
    return [
        PositionBin(start=a, stop=b, tokens=kld_WS[:, a:b].numel(), kld=float(kld_WS[:, a:b].mean()))
        for a, b in pairwise(edges)
    ]


def by_layer(records: Sequence[Record], kinds: Sequence[tuple[bool, bool]]) -> list[LayerDrift]:
    """Each layer's differences from the reference. `kinds`: (is MLA, is MoE) of every layer."""
    compared = "kld" in records[0]
    mla_before = moe_before = 0
    rows = []
    for layer, (is_mla, is_moe) in enumerate(kinds):
        kda, moe = layer - mla_before, moe_before
        rows.append(LayerDrift(
            layer=layer,
            attention="mla" if is_mla else "kda",
            stream_error=_relative(records, "stream", layer) if compared else None,
            state_error=_relative(records, "state", kda) if compared and not is_mla else None,
            router_overlap=float(torch.stack([r["router_overlap"][moe] for r in records]).mean())
            if compared and is_moe else None,
            expert_tokens=sum(r["expert_tokens"][moe].long() for r in records).tolist() if is_moe else None,
        ))  # fmt: skip
        mla_before += is_mla
        moe_before += is_moe
    return rows


def _means(records: Sequence[Record], name: str) -> Tensor:
    """Mean over each window's tokens, float64 [W]. Windows are equally long, so their mean is the tokens' mean."""
    return torch.stack([r[name].mean() for r in records])


def _relative(records: Sequence[Record], name: str, index: int) -> float:
    """√(Σ‖difference‖² / Σ‖reference‖²) over windows."""
    error, norm = (sum(float(r[f"{name}_{part}"][index]) for r in records) for part in ("error", "norm"))
    return (error / norm) ** 0.5 if norm else 0.0


def _store_error(records: Sequence[Record]) -> float:
    bias, variance = (torch.cat([r[f"kld_{part}"] for r in records]) for part in ("bias", "variance"))
    return float(bias.mean() + 1.96 * variance.sum().sqrt() / len(variance))
