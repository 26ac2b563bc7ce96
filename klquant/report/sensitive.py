"""What each part of the model costs when only that part is quantized."""

from klquant.core.units import decimal
from klquant.evaluate.sensitivity_result import Entry, Sensitivity
from klquant.report.comparison import Comparison
from klquant.report.spell import decimals, times
from klquant.report.table import Cell, Row, Table
from klquant.report.tables import half_range, share
from klquant.report.where import spoken


def sensitivity_tables(c: Comparison) -> list[Table]:
    """One for each measurement."""
    return [_table(c, s) for s in c.sensitivities]


def _table(c: Comparison, s: Sensitivity) -> Table:
    most = max((e.overall.kld.mean for e in s.entries), default=0.0)
    places = decimals([c.noise or most / 100])
    unit = (10**9, "GB") if max(map(_saved, s.entries), default=0) >= 10**9 else (10**6, "MB")
    floor = ["÷ floor"] if c.floor is not None else []
    columns = ("KLD", *floor, "same top token", "grid", "weights", "saves", f"KLD a {unit[1]} saved")
    rows = _rows(c, s, places, unit[0])
    if c.floor is not None:
        q = c.floor.overall
        kld = Cell(f"{q.kld.mean:.{places}f}", half_range(q.kld, places))
        top1 = Cell(share(q.top1.mean, 1), half_range(q.top1, 1, 100))
        rows.append(Row(Cell("noise floor"), (kld, Cell("1"), top1, *(Cell(""),) * 4), "floor"))
    name = s.quantizer.recipe or s.quantizer.name
    how = "rounded" if s.quantizer.method == "rtn" else "as quantized"
    return Table(f"Sensitivity by {s.by}: {name}, {how}", columns, tuple(rows), _note(s, places), corner="part")


def _rows(c: Comparison, s: Sensitivity, places: int, unit: int) -> list[Row]:
    worst = max((e.overall.kld.mean for e in s.entries if not e.part.is_whole), default=0.0)
    rates = [e.overall.kld.mean * unit / _saved(e) if _saved(e) > 0 else 0.0 for e in s.ranked]
    digits = decimals([max(rates, default=0.0) / 10])
    rows = []
    for e, rate in zip(s.ranked, rates, strict=True):
        q, part = e.overall, e.part
        first, *others = part.scheme
        heat = None if part.is_whole or worst <= 0 else max(0.0, q.kld.mean) / worst
        cells = [
            Cell(f"{q.kld.mean:.{places}f}", half_range(q.kld, places), heat=heat),
            Cell(share(q.top1.mean, 1), half_range(q.top1, 1, 100)),
            Cell(first, "\n".join(others)),
            Cell(f"{part.weights / 1e6:,.1f} M"),
            Cell(decimal(_saved(e))),
            Cell(f"{rate:.{digits}f}" if rate > 0 else ""),
        ]
        if c.floor is not None:
            inside = c.inside_floor(q)
            cells.insert(1, Cell("inside" if inside else times(c.times_floor(q) or 0.0), quiet=inside))
        rows.append(Row(Cell(_spoken(e)), tuple(cells)))
    return rows


def _note(s: Sensitivity, places: int) -> str:
    how = {
        "rtn": f"rounded to nearest on the grids of {s.quantizer.name}, without calibration",
        "checkpoint": f"as in {s.quantizer.name}",
    }[s.quantizer.method]
    text = f"KLD when only this part is quantized, {how}, and all else is in 16 bits."
    if s.left_out:
        return f"{text} Not measured for want of time: {', '.join(s.left_out)}."
    whole, parts = (sum(e.overall.kld.mean for e in s.entries if e.part.is_whole == wanted) for wanted in (True, False))
    return f"{text} The parts add up to {parts:.{places}f}; together they cost {whole:.{places}f}."


def _spoken(e: Entry) -> str:
    if e.part.tensor_class is None:
        return e.part.name
    roles = " ".join(role.removesuffix("_proj") for role in e.part.roles)
    return f"{spoken(e.part.tensor_class)} {roles}".strip()


def _saved(e: Entry) -> int:
    return e.part.bytes_before - e.part.bytes_after
