"""The live view, the pace behind it, and how figures are spelt."""

import io
import re

import pytest
from rich.console import Console

from klquant.cli.live import Lines, View, watcher
from klquant.cli.pace import Pace, Work
from klquant.cli.spell import Size, about, duration, place
from klquant.core.units import percent, some
from klquant.pipeline.report import UnitDone


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def work(kind: str, weights: int, quantized: bool = True) -> Work:
    return Work(frozenset([kind]), weights * quantized, weights, 10 * quantized, weights)


def works() -> dict[str, Work]:
    """As of the 48B: a cheap copy, a small dense layer, large layers of two kinds, a middling head."""
    layers = {f"layer {i}": work("MLA" if i in (3, 7) else "KDA", 1800) for i in range(1, 8)}
    return {"embedding": work("copy", 370, False), "layer 0": work("dense", 100), **layers, "head": work("head", 370)}


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pace(clock):
    return Pace(works(), clock)


def do(pace, clock, unit: str, seconds: float) -> None:
    pace.enter(unit)
    clock.now += seconds
    assert pace.leave(unit) == seconds


def test_no_guess_before_a_unit_of_the_main_kind_is_done(pace, clock):
    assert pace.left is None and pace.share == 0
    do(pace, clock, "embedding", 1)
    do(pace, clock, "layer 0", 7)
    assert pace.left is None and 0 < pace.share < 0.02


def test_layers_of_a_kind_take_equally_long(pace, clock):
    do(pace, clock, "embedding", 1)
    do(pace, clock, "layer 0", 7)
    do(pace, clock, "layer 1", 100)
    head = (7 + 100) / (1.02 * (100 + 1800)) * 1.02 * 370  # of no known kind: by the weights of all
    assert pace.left == pytest.approx(6 * 100 + head)  # the MLA layers have as much to do as the others
    do(pace, clock, "layer 2", 120)
    do(pace, clock, "layer 3", 50)
    assert pace.left == pytest.approx(3 * 110 + 50 + head, rel=0.05)


def test_time_left_falls_while_a_unit_is_at_work_and_never_below_zero(pace, clock):
    do(pace, clock, "layer 1", 100)
    pace.enter("layer 2")
    before, share = pace.left, pace.share
    clock.now += 40
    assert pace.left == before - 40 and pace.share > share
    clock.now += 1000  # much longer than expected
    assert before - 100 < pace.left < before
    assert pace.share < (2 * 1800 + 100 + 370) / sum(w.weights for w in works().values())


def test_an_earlier_run_counts_as_done_but_not_in_time(pace, clock):
    pace.begin(8)
    assert pace.done == 8 and pace.left is None and pace.share > 0.8
    do(pace, clock, "layer 7", 60)
    assert pace.left is None  # a head is no layer
    do(pace, clock, "head", 9)
    assert (pace.left, pace.share, pace.gone) == (0, 1, 69)


def console(width: int = 80, terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, highlight=False)


def shown(out: Console, item) -> list[str]:
    with out.capture() as capture:
        out.print(item)
    return [line.rstrip() for line in capture.get().splitlines()]


def begun(view, clock) -> None:
    view.pace = Pace(works(), clock)
    view.begin(list(works()), 1)
    view.phase("layer 0", "attention inputs", 0.5)
    clock.now += 8
    view.done(UnitDone("layer 0", 100, 2e-5, 3e-5, "model.layers.0.mlp.up_proj", []))
    view.phase("layer 1", "experts 0–63: w1, w3", 0.1)
    clock.now += 200
    view.done(UnitDone("layer 1", 1800, 0.005, 0.012, "model.layers.1.block_sparse_moe.experts.7.w2", ["a: b", "c: d"]))
    view.phase("layer 2", "experts 0–63: w2", 0.25)
    clock.now += 50


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_view_fits_the_terminal(width, clock, monkeypatch):
    monkeypatch.setattr("klquant.cli.live.resident_memory", lambda: 14_200_000_000)
    monkeypatch.setattr("klquant.cli.live.cuda_peak", lambda: 31_000_000_000)
    out = console(width)
    view = View(out, works())
    view.phase("calibration", "probing the router", 0.4)
    lines = shown(out, view)
    assert lines[1].startswith("calibration  ") and "before the" in lines[1] and lines[2].endswith("40 %")
    begun(view, clock)
    lines = shown(out, view)
    assert max(map(len, lines)) <= width and len(lines) == 5
    assert lines[1].startswith("layer 2  experts") and lines[1].endswith("3 of 10 units") and lines[2].endswith(" %")
    if width >= 80:
        assert lines[3] == "4 min gone · about 20 min left · 14.2 GB RAM · 31.0 GB CUDA at most"
        assert lines[4] == "2.27 kB written · mean error 0.251 % · 2 fallbacks"
    rows = out.file.getvalue().splitlines()
    assert max(map(len, rows)) <= width
    if width >= 80:
        assert rows[1] == "unit              time      error      worst    memory  in"
        assert rows[2] == "layer 0          8.0 s  0.00200 %  0.00300 %   14.2 GB  mlp.up_proj"
        assert rows[3] == "layer 1     3 min 20 s    0.500 %     1.20 %   14.2 GB  experts.7.w2"
        assert rows[4] == "  fallback: a: b (and 1 more)"


def test_what_comes_after_the_last_unit_is_called_finishing(clock):
    out = console()
    view = View(out, works())
    view.pace = Pace(works(), clock)
    view.begin(list(works()), 9)
    view.phase("head", "writing", 1)
    clock.now += 1
    view.done(UnitDone("head", 370, None, None, None, []))
    lines = shown(out, view)
    assert lines[1].startswith("finishing") and lines[2].endswith("100 %") and "done soon" in lines[3]


def test_lines_on_a_pipe_are_not_broken_and_carry_no_escapes(clock):
    out = console(60, terminal=False)
    lines = Lines(out, works())
    lines.phase("calibration", "probing the router", 0)
    lines.phase("calibration", "probing the router", 0.5)
    lines.note("a note that is very much longer than sixty characters, and stays on one line all the same")
    begun(lines, clock)
    text = out.file.getvalue()
    assert "\x1b" not in text and text.count("probing the router") == 1
    assert re.search(r"^note: a note .* all the same$", text, re.M)
    assert "going on: 1 of 10 units are done already" in text


def test_a_terminal_gets_the_view_and_all_else_lines():
    assert type(watcher(console(), works())) is View
    assert type(watcher(console(terminal=False), works())) is Lines


def test_durations_and_guesses():
    assert [duration(s) for s in (0.04, 12.34, 99.9, 100, 242, 3599.7, 4800, 400_000)] == [
        "0.0 s", "12.3 s", "99.9 s", "1 min 40 s", "4 min 02 s", "1 h 00 min", "1 h 20 min", "111 h 06 min",
    ]  # fmt: skip
    assert [about(s) for s in (0, 12, 94, 100, 3500, 4800)] == ["5 s", "10 s", "95 s", "2 min", "58 min", "1 h 20 min"]


def test_errors_places_and_lists():
    assert [percent(e) for e in (0, 1e-8, 7.36e-6, 2.13e-5, 0.00523, 0.0394, 0.5, 1.5)] == [
        "0 %", "<0.00001 %", "0.00074 %", "0.00213 %", "0.523 %", "3.94 %", "50.0 %", "150 %",
    ]  # fmt: skip
    assert place("model.layers.3.block_sparse_moe.experts.5.w2") == ("layer 3", "experts.5.w2")
    assert place("model.layers.11.self_attn.o_proj") == ("layer 11", "o_proj")
    assert place("lm_head") == ("", "lm_head")
    assert some(["a", "b", "c"], 2) == "a, b and 1 more" and some(["a"]) == "a"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("500 mb", 500_000_000),
        ("2GiB", 2 << 30),
        ("1.5k", 1500),
        ("7 B", 7),
        ("1000000", 10**6),
        ("3 KiB", 3072),
    ],
)
def test_sizes(text, size):
    assert Size().convert(text, None, None) == size
