"""Other ways to quantize the tensors of a recipe, for comparison: rounded as they are read, nothing is written.

- `rtn`: the recipe's own grids, rounded to nearest as `klquant quantize` does it, without calibration.
- `nf4`: bitsandbytes' 4-bit normal floats, 64 weights of the flattened matrix to an FP32 absmax; `nf4-double` quantizes
  the absmax too (8 bits, an FP32 absmax for 256 of them). Single is what transformers' `load_in_4bit` does by default.
- `int8`: the weights of bitsandbytes' LLM.int8, one FP32 scale a row. At run time it also rounds activations to 8 bits,
  but for columns with outliers; that is not modelled, so the real thing errs more.

Values are those that bitsandbytes' own functions give back.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.checkpoint.layout import packed_parts
from klquant.checkpoint.quantized import QuantizedReader
from klquant.core.spec import WeightSpec
from klquant.errors import UserError
from klquant.evaluate.options import BaselineMethod
from klquant.evaluate.result import Baseline, Checkpoint
from klquant.evaluate.size import KEPT, size_of
from klquant.evaluate.source import DeviceSource, Mixed, Rounded, Rounding, Source
from klquant.quantize.rtn import rtn
from klquant.recipe.plan import Plan, make_plan
from klquant.recipe.schema import Recipe

BLOCK, NESTED_BLOCK = 64, 256  # weights that share an absmax, and absmaxes that share theirs
TITLES: dict[BaselineMethod, str] = {
    "rtn": "RTN", "nf4": "NF4 (bnb)", "nf4-double": "NF4 double (bnb)", "int8": "LLM.int8 (bnb)",
}  # fmt: skip
SCHEMES = {"nf4": "NF4 b64", "nf4-double": "NF4 b64, absmax in 8 bits", "int8": "INT8 row"}
NOTES = {"int8": "only the rounding of weights is modelled, not that of activations at run time"}


def plan_for(reader: QuantizedReader, recipe: Recipe) -> Plan:
    """What `recipe` makes of a checkpoint. Raises UserError where that one is quantized already."""
    reader.files.require_16_bits()
    reader.check_complete()
    tensors = {name: (info.dtype, info.shape) for name, info in reader.files.tensors.items()}
    return make_plan(recipe, reader.config, tensors)


@dataclass(frozen=True)
class BaselineModel:
    """The tensors that `plan` quantizes, quantized by `method` instead; the others as `reader` has them."""

    reader: QuantizedReader
    plan: Plan
    method: BaselineMethod

    @property
    def title(self) -> str:
        return f"RTN of {self.plan.recipe.name}" if self.method == "rtn" else TITLES[self.method]

    @property
    def name(self) -> str:
        of = "grids" if self.method == "rtn" else "tensors"
        return f"{TITLES[self.method]} of {self.reader.files.folder}, {of} of {self.plan.recipe.name}"

    @property
    def notes(self) -> list[str]:
        return [NOTES[self.method]] if self.method in NOTES else []

    @cached_property
    def specs(self) -> dict[str, WeightSpec]:
        return {module: spec for module, spec in self.plan.specs().items() if spec is not None}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the values depend on."""
        grids = [(module, str(spec) if self.method == "rtn" else "") for module, spec in self.specs.items()]
        return hashlib.sha256(
            repr((self.reader.files.fingerprint(), self.method, library(self.method), grids)).encode()
        ).hexdigest()

    def checkpoint(self) -> Checkpoint:
        schemes = [SCHEMES.get(self.method, str(spec)) for spec in self.plan.specs().values() if spec is not None]
        kept = len(self.plan.specs()) - len(schemes)
        stored = {
            d.key.name: d.bytes_before if d.spec is None else stored_bytes(self.method, d.shape, d.spec)
            for d in self.plan.decisions
        }
        return Checkpoint(
            name=self.name,
            fingerprint=self.fingerprint,
            scheme={s: schemes.count(s) for s in sorted(set(schemes))} | ({KEPT: kept} if kept else {}),
            size=size_of(self.plan.config, stored, disk=sum(stored.values())),
            baseline=Baseline(method=self.method, title=self.title, recipe=self.plan.recipe.name,
                              library=library(self.method)),
        )  # fmt: skip

    def source(self, device: torch.device) -> Source:
        rounded = Rounded(self.reader, rounding(self.method, self.specs), device, self.name)
        names = {f"{module}.weight" for module in self.specs}
        return Mixed(DeviceSource(self.reader, device), rounded, names, self.name)


def baseline_of(model: Path, recipe: Recipe, method: BaselineMethod) -> BaselineModel:
    """The checkpoint `model` with the tensors of `recipe` quantized by `method`."""
    reader = QuantizedReader.open(model)
    return BaselineModel(reader, plan_for(reader, recipe), method)


def baselines(reader: QuantizedReader, plans: Sequence[Plan], methods: Sequence[BaselineMethod]) -> list[BaselineModel]:
    """Of each method what differs: `rtn` by the grids of calibrated recipes, the others by the tensors quantized."""
    uncalibrated = [plan.specs() for plan in plans if not plan.needs_calibration]
    models: dict[str, BaselineModel] = {}
    for method in methods:
        for plan in plans:
            if method != "rtn" or plan.specs() not in uncalibrated:
                model = BaselineModel(reader, plan, method)
                models.setdefault(model.fingerprint, model)
    return list(models.values())


def rounding(method: BaselineMethod, specs: dict[str, WeightSpec]) -> Rounding:
    """`specs`: module → its grid in the recipe, which only `rtn` heeds."""
    if method == "rtn":
        return lambda name, w_NK: _rtn(w_NK, specs[name.removesuffix(".weight")])
    functions = bitsandbytes()
    if method == "int8":
        return lambda name, w_NK: _int8(functions, w_NK)
    return lambda name, w_NK: _nf4(functions, w_NK, method == "nf4-double")


def stored_bytes(method: BaselineMethod, shape_NK: tuple[int, int], spec: WeightSpec) -> int:
    """Bytes of the tensors that a weight is stored as; bitsandbytes' JSON of shape and names (0.2 kB) is left out."""
    n, k = shape_NK
    if method == "int8":
        return n * k + 4 * n
    if method == "rtn":
        return sum(part.nbytes for part in packed_parts(shape_NK, spec))
    blocks = -(-n * k // BLOCK)
    codes = -(-n * k // 2) + 4 * 16  # with the table of 16 values
    if method == "nf4":
        return codes + 4 * blocks
    return codes + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 * 256


def library(method: BaselineMethod) -> str | None:
    return None if method == "rtn" else f"bitsandbytes {version('bitsandbytes')}"


def require_library(method: BaselineMethod) -> None:
    """Raises UserError where what `method` takes is not installed."""
    if method != "rtn":
        bitsandbytes()


def bitsandbytes():
    """Its functions. Raises UserError where it is not installed."""
    # It warns of a fast product that it lacks on CPUs, which is not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except ImportError:
        raise UserError("NF4 and LLM.int8 need bitsandbytes: pip install 'klquant[bnb]'") from None
    return functional


def _rtn(w_NK: Tensor, spec: WeightSpec) -> Tensor:
    return rtn(w_NK, spec).values()


def _nf4(functions, w_NK: Tensor, double: bool) -> Tensor:
    """Blocks run over the flattened matrix. It is given as rows of one block, zeros after the last weight: on CPUs,
    bitsandbytes 0.50 decodes rows that are not whole blocks with their neighbours' absmax."""
    rows = F.pad(w_NK.flatten(), (0, -w_NK.numel() % BLOCK)).view(-1, BLOCK)
    codes, state = functions.quantize_4bit(rows, blocksize=BLOCK, compress_statistics=double, quant_type="nf4")
    return functions.dequantize_4bit(codes, state).flatten()[: w_NK.numel()].view_as(w_NK)


def _int8(functions, w_NK: Tensor) -> Tensor:
    """FP32. Linear8bitLt quantizes from FP16."""
    codes, absmax, _ = functions.int8_vectorwise_quant(w_NK.half())
    return functions.int8_vectorwise_dequant(codes, absmax)
