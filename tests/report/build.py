"""Invented results: figures chosen, schema real."""

import hashlib
import math
from collections.abc import Sequence

from klquant.evaluate.result import (
    Arithmetic,
    Baseline,
    Bits,
    Checkpoint,
    Data,
    DomainText,
    ErrorRow,
    Floor,
    Interval,
    Kld,
    LayerDrift,
    MemoryAt,
    PositionBin,
    Provenance,
    Quality,
    Quantization,
    Reference,
    Result,
    Size,
)
from klquant.evaluate.sensitivity_result import Entry, Quantizer, SensitivePart, Sensitivity
from klquant.evaluate.tasks.record import TaskResult, TaskScore
from klquant.evaluate.tasks.scores import compare, task_value
from klquant.recipe.memory import CARDS, GIB

DOMAINS = ("book", "code", "chinese", "technical")
CONTEXTS = (8_192, 131_072, 1_048_576)
FP32, BF16 = (Arithmetic(dtype=dtype, device="cpu", kda="chunk") for dtype in ("float32", "bfloat16"))
FLOOR = 0.001


def quality(kld: float, windows: int = 8, spread: float = 0.1) -> Quality:
    """A mean KLD of `kld`, ranges ± `spread` of it, and other figures that go with it."""
    top1, ratio = math.exp(-3 * math.sqrt(max(kld, 0))), math.exp(0.3 * kld)
    step = spread * kld if windows > 1 else None

    def interval(mean: float, half: float) -> dict:
        return {"mean": mean} if step is None else {"mean": mean, "low": mean - half, "high": mean + half}

    return Quality(
        windows=windows, positions=windows * 2048, targets=windows * 2047, perplexity=8 * ratio,
        kld=Kld(**interval(kld, step or 0), median=kld / 3, p99=kld * 9, p999=kld * 25, max=kld * 60, store_error=0.0),
        top1=Interval(**interval(top1, 0.004)), reference_perplexity=8.0,
        perplexity_ratio=Interval(**interval(ratio, 0.002)),
    )  # fmt: skip


def memory(weights: int, contexts: Sequence[int] = CONTEXTS) -> list[MemoryAt]:
    rows = []
    for bits, embedding in ((16, 0), (8, weights // 40)):
        for context in contexts:
            latent = context * 7 * 576 * bits // 8
            total = weights - embedding + latent + GIB
            rows.append(MemoryAt(
                context=context, cache_bits=bits, embedding_on_cpu=bits == 8, weights=weights - embedding,
                latent_cache=latent, kda_state=0, workspace_estimate=0, runtime_estimate=GIB, total=total,
                fits=[card for card, (count, gib) in CARDS.items() if total <= count * gib * GIB],
            ))  # fmt: skip
    return rows


def checkpoint(name: str, gigabytes: float, contexts: Sequence[int] = CONTEXTS) -> Checkpoint:
    nbytes = int(gigabytes * 1e9)
    bits = nbytes * 8 / 49e9
    return Checkpoint(
        name=name, fingerprint=hashlib.sha256(name.encode()).hexdigest(), scheme={"INT4 g128": 20_000, "kept": 900},
        size=Size(disk=nbytes, weights=49_000_000_000, memory=memory(nbytes, contexts),
                  bits=Bits(routed_experts=bits * 0.95, always_active=8.2, whole=bits)),
    )  # fmt: skip


def layers(kld: float, count: int = 8, experts: int = 16) -> list[LayerDrift]:
    """Every fourth layer is MLA, the first one dense."""
    drift = 2 * math.sqrt(max(kld, 0))
    return [
        LayerDrift(
            layer=i, attention="mla" if i % 4 == 3 else "kda", stream_error=drift * (i + 1) / count,
            state_error=None if i % 4 == 3 else drift * (0.5 + i / count),
            router_overlap=1 - drift * i / count / 4 if i else None,
            expert_tokens=[(e * 7919 + i * 104_729) % 900 for e in range(experts)] if i else None,
        )
        for i in range(count)
    ]  # fmt: skip


def quantization(recipe: str, error: float, count: int = 8) -> Quantization:
    rows = [
        ErrorRow(tensor_class=cls, layer=layer, measured="outputs", tensors=4, mean_error=error * factor * (1 + layer),
                 max_error=error * factor * 9)
        for cls, factor in (("kda_proj", 0.02), ("routed_experts", 1.0), ("shared_experts", 0.1))
        for layer in range(count)
    ]  # fmt: skip
    rows.append(
        ErrorRow(tensor_class="head", layer=None, measured="weights", tensors=1, mean_error=error, max_error=error)
    )
    return Quantization(recipe=recipe, target="klquant", errors=rows, fallbacks=[],
                        expert_tokens={i: [300 + 10 * e for e in range(16)] for i in range(1, count)})  # fmt: skip


def task(
    name: str, lost: int, parts: dict[str, int], metric: str = "acc", chance: float | None = 0.25, **changes: object
) -> TaskScore:
    """A task where the reference has a quarter of the items wrong, and the model `lost` more."""

    def taken(missed: int) -> TaskResult:
        right = iter([0.0] * missed + [1.0] * (sum(parts.values()) - missed))
        scores = {part: [next(right) for _ in range(n)] for part, n in parts.items()}
        return TaskResult(**dict(task_value(scores, "items")), **{
            "task": name, "metric": metric, "higher_is_better": True, "chance": chance, "weighted_by": "items",
            "items": sum(parts.values()), "cut": 0, "few_shot": 5, "limit": None, "seed": 0, "chat": False,
            "version": "lm-eval 0.4.13, task 1.0", "sha256": "ef" * 32, **changes,
        })  # fmt: skip

    missed = sum(parts.values()) // 4
    return compare(taken(missed + lost), taken(missed))


def tasks(lost: int) -> list[TaskScore]:
    """Three kinds: many parts, one part, lengths."""
    subjects = {f"subject {i}": 40 for i in range(12)}
    return [
        task("mmlu", lost, subjects),
        task("gsm8k", lost, {"gsm8k": 200}, "exact_match, strict-match", None),
        task("needle_multikey", 0, {"1,024 tokens": 20, "65,536 tokens": 20}, chance=0.125, few_shot=0),
    ]


def result(
    name: str = "int4", kld: float = 0.012, gigabytes: float = 26.0, *, floor: bool = True, recipe: str | None = None,
    domains: Sequence[str] = DOMAINS, contexts: Sequence[int] = CONTEXTS, windows: int = 8, **changes: object,
) -> Result:  # fmt: skip
    """A variant; `changes` are fields of Result."""

    def parts(mean: float) -> dict:
        return {
            "overall": quality(mean, windows * len(domains)),
            "domains": {d: quality(mean * (0.7 + 0.2 * i), windows) for i, d in enumerate(domains)},
            "positions": [
                PositionBin(start=128 * i, stop=128 * (i + 1), tokens=4096, kld=mean * (1 + 0.4 * math.sin(i)))
                for i in range(16)
            ],
            "layers": layers(mean),
        }

    return Result(**{
        "model": checkpoint(name, gigabytes, contexts),
        "arithmetic": FP32,
        "reference": Reference(checkpoint=checkpoint("owner/base", 98.2, contexts), arithmetic=FP32, store="full"),
        "data": Data(spec="default", window=2048, sha256="ab" * 32, domains=[
            DomainText(name=d, origin=f"{d}.jsonl", documents=9, tokens=70_000, windows=windows) for d in domains]),
        **parts(kld),
        "floor": Floor(what="the reference's weights computed in bfloat16 instead of float32", arithmetic=BF16,
                       **parts(FLOOR)) if floor else None,
        "quantization": quantization(recipe or name, kld / 4),
        "notes": [],
        "provenance": Provenance(command=["klquant", "eval", name], versions={"klquant": "0.1.0"},
                                 device="CPU, 2 cores", threads=2, seconds=12.5, tokens=65_536),
        **changes,
    })  # fmt: skip


def baseline(title: str = "NF4 (bnb)", kld: float = 0.03, gigabytes: float = 28.0, **changes: object) -> Result:
    made = Baseline(method="nf4", title=title, recipe="int4", library="bitsandbytes 0.50.2")
    model = checkpoint(f"{title} of owner/base", gigabytes).model_copy(update={"baseline": made})
    return result(title, kld, gigabytes, model=model, quantization=None, **changes)


def sensitivity(
    *klds: float, by: str = "class", left_out: Sequence[str] = (), beside: Result | None = None, **changes: object
) -> Sensitivity:
    """Everything, then a part for each of `klds`, over the windows of `beside`."""
    beside = beside or result()

    def part(i: int, kld: float) -> Entry:
        layer = i if by == "layer" else None
        cls = ("routed_experts", "kda_proj", "head")[i % 3] if by == "class" else None
        return Entry(
            part=SensitivePart(name=f"layer {i}" if layer is not None else cls, tensor_class=cls, roles=[], layer=layer,
                               scheme={"INT4 g128": 4}, weights=10**9, bytes_before=2 * 10**9, bytes_after=10**9 // 2),
            overall=quality(kld), domains={d: quality(kld) for d in beside.domains}, seconds=9.5,
        )  # fmt: skip

    entries = [part(i, kld) for i, kld in enumerate(klds)]
    whole = SensitivePart(
        name="everything", tensor_class=None, roles=[], layer=None, scheme={"INT4 g128": 4, "INT8 g128": 8},
        weights=3 * 10**9, bytes_before=6 * 10**9, bytes_after=2 * 10**9,
    )  # fmt: skip
    every = Entry(part=whole, overall=quality(sum(klds) * 0.9), domains={}, seconds=9.5)
    return Sensitivity(**{
        "by": by, "quantizer": Quantizer(method="rtn", name="recipe int4", recipe="int4", fingerprint="ef" * 32),
        "arithmetic": beside.arithmetic, "reference": beside.reference, "data": beside.data, "floor": None,
        "entries": [every, *entries], "left_out": list(left_out), "notes": [], "provenance": beside.provenance,
        **changes,
    })  # fmt: skip
