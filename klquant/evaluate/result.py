"""The result file of `klquant eval`: strict, versioned, and read back with every doubt spelled out."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, Protocol, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from klquant.errors import UserError
from klquant.evaluate.options import BaselineMethod, DtypeName, StoreKind
from klquant.evaluate.part import Part
from klquant.evaluate.tasks.record import TaskScore, other_items

# A section that comes with a default leaves this as it is: files without it are read as before, and an older klquant
# refuses files with it, naming the key. What changes the meaning of a key, or takes one away, counts up.
SCHEMA = 1


class Interval(Part):
    """A mean over windows and its 95 % bootstrap range, None where a domain has a single window."""

    mean: float
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _has_both_ends(self) -> Self:
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high come together")
        return self


class Kld(Interval):
    """KL(reference ‖ model), nats a token, over positions. `store_error`: how far the mean may be off, with 95 %
    confidence, because of how the reference is stored."""

    median: float
    p99: float
    p999: float
    max: float
    store_error: float


class Quality(Part):
    """`positions` were compared, `targets` next tokens scored: a window's last position has none. KLD, top-1 agreement
    and the ratio of perplexities (model ÷ reference) are None without a reference."""

    windows: int
    positions: int
    targets: int
    perplexity: float
    kld: Kld | None = None
    top1: Interval | None = None
    reference_perplexity: float | None = None
    perplexity_ratio: Interval | None = None


def _compared(q: Quality) -> Quality:
    if None in (q.kld, q.top1, q.reference_perplexity, q.perplexity_ratio):
        raise ValueError("kld, top1, reference_perplexity and perplexity_ratio belong to a comparison")
    return q


Compared = Annotated[Quality, AfterValidator(_compared)]


class PositionBin(Part):
    """Mean KLD at positions [start, stop) of the windows."""

    start: int
    stop: int
    tokens: int
    kld: float


class LayerDrift(Part):
    """A layer against the reference's: relative Frobenius difference of its output (every 32nd position) and of the KDA
    state at a window's end (kept in FP16), and the mean share of a token's experts that the reference chose too.

    `expert_tokens`: tokens each expert of the model got."""

    layer: int
    attention: Literal["kda", "mla"]
    stream_error: float | None
    state_error: float | None
    router_overlap: float | None
    expert_tokens: list[int] | None


class Bits(Part):
    """Stored bits a weight, scales and padding included. Always active: all but routed experts and embedding."""

    routed_experts: float
    always_active: float
    whole: float


class MemoryAt(Part):
    """Predicted bytes to run one sequence of `context` tokens, and the cards that have them."""

    context: int
    cache_bits: int
    embedding_on_cpu: bool
    weights: int
    latent_cache: int
    kda_state: int
    workspace_estimate: int
    runtime_estimate: int
    total: int
    fits: list[str]


class Size(Part):
    """`disk`: bytes of the safetensors files, or of the tensors of a baseline, which has no files; `weights`: how many
    there are."""

    disk: int = Field(ge=1)
    weights: int
    bits: Bits
    memory: list[MemoryAt]

    @property
    def tensors(self) -> int:
        """Bytes of the tensors, without headers of files: what checkpoints and baselines have in common."""
        return max(1, round(self.bits.whole * self.weights / 8))


class Baseline(Part):
    """Another method on the tensors that `recipe` quantizes, for comparison only (klquant/evaluate/baselines.py).
    `title`: its short name."""

    method: BaselineMethod
    title: str
    recipe: str
    library: str | None


class Checkpoint(Part):
    """`name` as given on the command line; `scheme`: grid → matrices stored so, "kept" for those in 16 bits. A
    baseline is no checkpoint on a disk: its size is counted from what its method stores."""

    name: str
    fingerprint: str
    scheme: dict[str, int]
    size: Size
    baseline: Baseline | None = None


class Arithmetic(Part):
    """What a pass was computed in, and by which path the KDA layers went."""

    dtype: DtypeName
    device: Literal["cpu", "cuda"]
    kda: str


class Reference(Part):
    """What the model is compared with. `store`: how its distributions are kept (klquant/evaluate/store.py)."""

    checkpoint: Checkpoint
    arithmetic: Arithmetic
    store: StoreKind


class DomainText(Part):
    name: str
    origin: str
    documents: int
    tokens: int
    windows: int


class Data(Part):
    """`sha256` covers the token ids of all windows, and so text and tokenizer."""

    spec: str
    window: int
    sha256: str
    domains: list[DomainText] = Field(min_length=1)


class Floor(Part):
    """The reference's own weights in another precision, scored by the same code against the same reference: what the
    arithmetic alone does. Differences of this size say nothing about a quantization."""

    what: str
    arithmetic: Arithmetic
    overall: Compared
    domains: dict[str, Compared]
    positions: list[PositionBin]
    layers: list[LayerDrift]


class ErrorRow(Part):
    """Tensors of one class in one layer (None: outside the layers), and their relative squared error at quantization:
    of the outputs over the calibration text, or of the weights where nothing was calibrated."""

    tensor_class: str
    layer: int | None
    measured: Literal["outputs", "weights"]
    tensors: int = Field(ge=1)
    mean_error: float
    max_error: float


class Quantization(Part):
    """What `klquant quantize` noted in the model's klquant.json."""

    recipe: str
    target: str
    errors: list[ErrorRow]
    expert_tokens: dict[int, list[int]]
    fallbacks: list[str]


class Provenance(Part):
    """Enough to repeat it. `seconds` is the model's own pass in this run, `tokens` what it covered (windows that an
    earlier, interrupted run had finished are not in it)."""

    command: list[str]
    versions: dict[str, str]
    device: str
    threads: int
    seconds: float
    tokens: int


class Result(Part):
    """`klquant eval`'s output."""

    schema_version: Literal[1] = SCHEMA
    kind: Literal["klquant-eval"] = "klquant-eval"
    model: Checkpoint
    arithmetic: Arithmetic
    reference: Reference | None
    data: Data
    overall: Quality
    domains: dict[str, Quality]
    positions: list[PositionBin]
    layers: list[LayerDrift]
    floor: Floor | None
    quantization: Quantization | None
    tasks: list[TaskScore] = Field(default_factory=list)
    notes: list[str]
    provenance: Provenance

    @model_validator(mode="after")
    def _is_compared(self) -> Self:
        for quality in (self.overall, *self.domains.values()) if self.reference is not None else ():
            _compared(quality)
        return self


class Comparable(Protocol):
    """What decides whether figures may stand beside others."""

    arithmetic: Arithmetic
    reference: Reference | None
    data: Data


def require_output(path: Path, model: type[Part]) -> None:
    """Raises UserError where no result can be written: there is no folder, or something else than one of `model`."""
    kind = model.model_fields["kind"].default
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path}: not a file in a folder that exists; choose another output")
    if path.exists() and not _is_empty(path) and _kind(path) != kind:
        raise UserError(f"{path}: is there already and no result of {kind.replace('-', ' ', 1)}; choose another output")


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.stat().st_size


def _kind(path: Path) -> object:
    """Of a result file, of whatever schema; None of any other file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return raw.get("kind") if isinstance(raw, dict) else None


def load_result(path: Path) -> Result:
    """Read a result file. Raises UserError, naming the file, when it is missing, cut off, or of another schema."""
    return load(path, Result)


def load(path: Path, *models: type[Part]) -> Part:
    """Read a file of one of `models`, which tell apart by `kind`. Raises UserError as `load_result` does."""
    kinds = {model.model_fields["kind"].default: model for model in models}
    writers = " or ".join(kind.replace("-", " ", 1) for kind in kinds)
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {writers} writes it") from None
    except ValueError:
        raise UserError(f"{path}: not whole JSON, perhaps cut off; run {writers} again") from None
    kind = raw.get("kind") if isinstance(raw, dict) else None
    model = kinds.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise UserError(f"{path}: not a result of {writers}")
    again, version = f"run {kind.replace('-', ' ', 1)} again", model.model_fields["schema_version"].default
    if raw.get("schema_version") != version:
        raise UserError(f"{path}: result schema {raw.get('schema_version')!r}, this klquant reads {version}; {again}")
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}; {again}") from None


def check_comparable(results: Sequence[tuple[str, Comparable]]) -> None:
    """Raises UserError unless the (named) results may stand in one table: same windows, reference and arithmetic."""
    (first_name, first), *others = results
    for name, other in others:
        reason = difference(first, other)
        if reason is not None:
            raise UserError(f"{first_name} and {name} cannot be compared: {reason}")
    scored = [(name, result.tasks) for name, result in results if isinstance(result, Result)]
    for (name, a), (other_name, b) in combinations(scored, 2):  # the first one may lack a task that others have
        reason = other_items(a, b)
        if reason is not None:
            raise UserError(f"{name} and {other_name} cannot be compared: {reason}")


def difference(a: Comparable, b: Comparable) -> str | None:
    """Why two results cannot be compared, None where they can."""
    if a.data.window != b.data.window:
        return f"windows of {a.data.window} and {b.data.window} tokens"
    windows = [[(d.name, d.windows) for d in r.data.domains] for r in (a, b)]
    if windows[0] != windows[1]:
        ours, theirs = (", ".join(f"{name} × {n}" for name, n in w) for w in windows)
        return f"other windows: {ours} against {theirs}"
    if a.data.sha256 != b.data.sha256:
        return "other text or another tokenizer (the windows' token ids differ)"
    if (a.reference is None) != (b.reference is None):
        return "one has a reference, the other has none"
    if a.reference is not None:
        ours, theirs = a.reference.checkpoint, b.reference.checkpoint
        if ours.fingerprint != theirs.fingerprint:
            return f"other references: {ours.name} and {theirs.name} differ in weights"
        if a.reference.arithmetic != b.reference.arithmetic:
            return f"references computed in {_spell(a.reference.arithmetic)} and in {_spell(b.reference.arithmetic)}"
    if a.arithmetic != b.arithmetic:
        return f"computed in {_spell(a.arithmetic)} and in {_spell(b.arithmetic)}"
    return None


def _spell(x: Arithmetic) -> str:
    return f"{x.dtype} on {x.device} ({x.kda})"
