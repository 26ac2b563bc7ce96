"""Integer grids: encode to codes, decode to values, on scales that others choose.

Shape suffixes: N = out features, K = in features, G = groups; leading dimensions (experts) are batch.
Scales are rounded to the dtype they are stored in before any code is chosen, so that every error measured here is the
error of what is written to disk.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klquant.core.spec import WHOLE_ROW, WeightSpec

SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Quantized:
    """A weight on its grid: codes int8 [..., N, K], scale [..., N, G] as stored, zero int8 [..., N, G] or None."""

    spec: WeightSpec
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return decode(self.codes, self.scale, self.zero, self.spec, dtype)

    def values(self) -> Tensor:
        """As compressed-tensors unpacks a weight: rounded to the dtype of its scale."""
        return self.decode(self.scale.dtype)

    def to(self, device: torch.device | str) -> "Quantized":
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), zero=zero)

    @staticmethod
    def cat(parts: "list[Quantized]", dim: int) -> "Quantized":
        """Parts of one weight (−2: output features) or of one batch (0: experts) put together."""
        first = parts[0]
        zero = None if first.zero is None else torch.cat([p.zero for p in parts], dim)
        return replace(
            first, codes=torch.cat([p.codes for p in parts], dim), scale=torch.cat([p.scale for p in parts], dim),
            zero=zero,
        )  # fmt: skip

    def split(self, sizes: list[int], dim: int) -> "list[Quantized]":
        """The inverse of `cat`."""
        zeros = [None] * len(sizes) if self.zero is None else self.zero.split(sizes, dim)
        rows = zip(self.codes.split(sizes, dim), self.scale.split(sizes, dim), zeros, strict=True)
        return [replace(self, codes=codes, scale=scale, zero=zero) for codes, scale, zero in rows]

    def rows(self, order_N: Tensor) -> "Quantized":
        """Output features in the order given."""
        zero = None if self.zero is None else self.zero[..., order_N, :]
        return replace(self, codes=self.codes[..., order_N, :], scale=self.scale[..., order_N, :], zero=zero)

    def on(self, spec: WeightSpec) -> "Quantized":
        """The same values on a grid that holds them: at least as many bits, groups that divide these, zero points."""
        if spec == self.spec:
            return self
        k, groups = self.codes.shape[-1], spec.groups(self.codes.shape[-1])
        repeats = groups // self.scale.shape[-1]
        zero = self.zero
        if zero is None and not spec.symmetric:
            zero = torch.zeros_like(self.scale, dtype=torch.int8)
        assert spec.bits >= self.spec.bits and self.spec.width(k) % spec.width(k) == 0, (self.spec, spec)
        assert zero is None or not spec.symmetric, (self.spec, spec)
        scale, zero = (None if t is None else t.repeat_interleave(repeats, -1) for t in (self.scale, zero))
        return Quantized(spec, self.codes, scale, zero)

    def __getitem__(self, i: int | slice) -> "Quantized":
        """Part of the first dimension, a view."""
        return replace(self, codes=self.codes[i], scale=self.scale[i], zero=None if self.zero is None else self.zero[i])


def common_grid(specs: Iterable[WeightSpec]) -> WeightSpec:
    """The smallest grid that holds the values of every one of `specs` (`Quantized.on`)."""
    specs = list(specs)
    sizes = [s.group_size for s in specs if s.group_size != WHOLE_ROW]
    return WeightSpec(
        bits=max(s.bits for s in specs), group_size=min(sizes, default=WHOLE_ROW),
        symmetric=all(s.symmetric for s in specs),
    )  # fmt: skip


def encode(w_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, spec: WeightSpec) -> Tensor:
    """Nearest codes, int8 [..., N, K]: clamp(round(w / scale) + zero, qmin, qmax)."""
    steps = _grouped(w_NK.float(), spec) / scale_NG.float().unsqueeze(-1)
    codes = steps.round_()
    if zero_NG is not None:
        codes = codes + zero_NG.unsqueeze(-1)
    return codes.clamp_(spec.qmin, spec.qmax).to(torch.int8).flatten(-2)


def decode(
    codes_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    spec: WeightSpec,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values [..., N, K]: (code − zero) · scale, multiplied in FP32 and then rounded to `dtype`."""
    steps = _grouped(codes_NK, spec).float()
    if zero_NG is not None:
        steps = steps - zero_NG.unsqueeze(-1)
    return (steps * scale_NG.float().unsqueeze(-1)).flatten(-2).to(dtype)


def _grouped(x_NK: Tensor, spec: WeightSpec) -> Tensor:
    """[..., N, K] → [..., N, G, width]."""
    k = x_NK.shape[-1]
    return x_NK.unflatten(-1, (spec.groups(k), spec.width(k)))
