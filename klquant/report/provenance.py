"""Enough to repeat what the page shows: hashes, versions, devices, command lines."""

import shlex

from klquant.core.units import decimal
from klquant.report.comparison import Comparison, Variant
from klquant.report.table import Cell, Row, Table


def common_table(c: Comparison) -> Table:
    """What all variants share."""
    data, reference = c.first.data, c.reference
    pairs = [
        ("reference", f"{reference.checkpoint.name}, {decimal(reference.checkpoint.size.tensors)}"),
        ("its weights", f"sha256 {reference.checkpoint.fingerprint}"),
        ("arithmetic", f"{reference.arithmetic.dtype} on {reference.arithmetic.device}, "
                       f"KDA by {reference.arithmetic.kda}"),
        ("its distributions", f"kept {'whole' if reference.store == 'full' else 'as top tokens and samples'}"),
        ("noise floor", c.floor.what if c.floor is not None else "not measured; klquant eval --floor does"),
        ("text", data.spec),
        ("token ids", f"sha256 {data.sha256}"),
        *((f"domain {d.name}", f"{d.windows} windows of {data.window:,} tokens, from {d.origin}")
          for d in data.domains),
    ]  # fmt: skip
    rows = tuple(Row(Cell(name), (Cell(value),)) for name, value in pairs)
    return Table("Reference and text", ("",), rows, text=True)


def variant_table(variant: Variant) -> Table:
    result = variant.result
    made, p = result.quantization, result.provenance
    baseline = result.model.baseline
    recipe = "not known" if made is None else f"{made.recipe}, for {made.target}"
    pairs = [
        ("checkpoint", result.model.name),
        ("its weights", f"sha256 {result.model.fingerprint}"),
        ("matrices", ", ".join(f"{count:,} {scheme}" for scheme, count in result.model.scheme.items())),
        ("recipe", recipe if baseline is None else f"{baseline.recipe}, by {baseline.title} instead"),
        ("evaluated by", shlex.join(p.command)),
        ("versions", ", ".join(f"{name} {version}" for name, version in p.versions.items())),
        ("device", f"{p.device}, {p.threads} thread{'s' * (p.threads > 1)}"),
        ("pace", f"{p.tokens:,} tokens in {p.seconds:.1f} s" if p.tokens else "read from finished windows"),
    ]
    rows = tuple(Row(Cell(name), (Cell(value),)) for name, value in pairs)
    return Table("Made and measured", ("",), rows, text=True)
