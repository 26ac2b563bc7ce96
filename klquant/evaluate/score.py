"""From a trace to numbers: what is kept of a reference window, and how a model's window compares with it."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from klquant.checkpoint.reader import is_finite
from klquant.errors import UserError
from klquant.evaluate.options import StoreKind
from klquant.evaluate.store import divergence, keep
from klquant.evaluate.trace import Runner, Trace
from klquant.evaluate.windows import WindowFile

# Logits [N, V] worked on at once: enough for a GPU, little enough to stay clear of the memory of models.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
STORED = "store."


@torch.no_grad()
def reference_window(runner: Runner, trace: Trace, i: int, ids_S: Tensor, kind: StoreKind) -> dict[str, Tensor]:
    """Everything later runs are compared with, of window `i` of the batch.

    nll float64 [S − 1], top1 int32 [S], the store's tensors [S, …], stream [L, P, C], experts int16 [M, S, R] over MoE
    layers, states FP16 [K, H, D, D] over KDA layers.
    """
    generator = torch.Generator(runner.device).manual_seed(trace.windows[i])
    stored, top1, nll = [], [], []
    for start, logp_NV in _log_probs(runner, trace, i):
        stored.append(keep(kind, logp_NV, generator))
        top1.append(logp_NV.argmax(-1).int().cpu())
        nll.append(_nll(logp_NV, ids_S, start))
    parts = {f"{STORED}{name}": torch.cat([part[name] for part in stored]) for name in stored[0]}
    return parts | {"top1": torch.cat(top1), "nll": torch.cat(nll)} | _traced(trace, i)


@torch.no_grad()
def model_window(
    runner: Runner, trace: Trace, i: int, ids_S: Tensor, kind: StoreKind, reference: WindowFile | None
) -> dict[str, Tensor]:
    """How window `i` of the batch fared. All float64 where not said otherwise.

    nll [S − 1], expert_tokens int32 [M, E]; with a reference also kld, kld_bias, kld_variance, top1_same [S],
    reference_nll [S − 1]; sums of squares over the window stream_error, stream_norm [L], state_error, state_norm [K];
    and router_overlap [M], the mean share of a token's experts that the reference chose as well.
    """
    found, same, nll = [], [], []
    names = [] if reference is None else [name for name in reference.names() if name.startswith(STORED)]
    top1_S = None if reference is None else reference["top1"]
    for start, logq_NV in _log_probs(runner, trace, i):
        nll.append(_nll(logq_NV, ids_S, start))
        if reference is not None:
            stop = start + len(logq_NV)
            stored = {n.removeprefix(STORED): t for n, t in reference.rows(names, start, stop).items()}
            d = divergence(kind, stored, logq_NV)
            found.append(torch.stack(d).cpu())
            same.append((logq_NV.argmax(-1).int().cpu() == top1_S[start:stop]).double())
    traced = _traced(trace, i)
    record = {"nll": torch.cat(nll), "expert_tokens": _counts(traced["experts"], runner.config.num_experts)}
    if reference is None:
        return record
    kld, bias, variance = torch.cat(found, 1)
    record |= {"kld": kld, "kld_bias": bias, "kld_variance": variance, "top1_same": torch.cat(same)}
    return record | {"reference_nll": reference["nll"]} | _drift(traced, reference, runner.device)


def _log_probs(runner: Runner, trace: Trace, i: int) -> Iterator[tuple[int, Tensor]]:
    """(first position, log-probabilities [N, V] in at least FP32 on the device), bit by bit."""
    hidden_SC, head = trace.hidden[i], runner.head
    step = max(1, CHUNK_ELEMENTS[runner.device.type] // runner.config.vocab_size)
    for start in range(0, len(hidden_SC), step):
        logits_NV = head(runner.config, hidden_SC[None, start : start + step])[0].float()
        if not is_finite(logits_NV):
            raise UserError(
                f"{runner.source.name}: NaN or infinite logits (window {trace.windows[i]}), though every "
                "layer's output is finite; final norm or lm_head is not usable"
            )
        yield start, logits_NV.log_softmax(-1)


def _nll(logp_NV: Tensor, ids_S: Tensor, start: int) -> Tensor:
    """−log p of the token that follows each position, float64; the window's last position has none."""
    target_N = ids_S[start + 1 : start + 1 + len(logp_NV)].to(logp_NV.device)
    return -logp_NV[: len(target_N)].gather(-1, target_N[:, None])[:, 0].double().cpu()


def _traced(trace: Trace, i: int) -> dict[str, Tensor]:
    parts = {"stream": trace.stream, "experts": trace.experts, "states": trace.states}
    return {name: torch.stack([x[i] for x in part]) if part else torch.empty(0) for name, part in parts.items()}


def _counts(experts_MSR: Tensor, num_experts: int) -> Tensor:
    return torch.stack([torch.bincount(e.flatten().int(), minlength=num_experts) for e in experts_MSR]).int()


def _drift(traced: Mapping[str, Tensor], reference: WindowFile, device: torch.device) -> dict[str, Tensor]:
    sums = {}
    for name, part in (("stream", "stream"), ("state", "states")):
        ours, theirs = (x[part].to(device).flatten(1).double() for x in (traced, reference))
        sums[f"{name}_error"] = (ours - theirs).square().sum(-1).cpu()
        sums[f"{name}_norm"] = theirs.square().sum(-1).cpu()
    ours_MSR, theirs_MSR = traced["experts"], reference["experts"]
    shared = (ours_MSR[..., :, None] == theirs_MSR[..., None, :]).any(-1)
    return sums | {"router_overlap": shared.flatten(1).double().mean(-1)}
