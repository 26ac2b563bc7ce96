"""Result files in which something is not as klquant writes it: a report comes of them, or one line with the file."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from klquant.errors import UserError
from klquant.report.comparison import Comparison
from klquant.report.text import as_json, as_markdown
from tests.report.build import result, sensitivity, tasks

ODD = (None, True, -1, 0, 1.5, 10**30, "", "x", [], [None], {}, {"x": 1})


@cache
def written() -> dict[str, str]:
    """A small result and a sensitivity, as text."""
    one = result(domains=("book", "code"), contexts=(8192,), tasks=tasks(3))
    parts = sensitivity(0.01, 0.02, beside=one)
    return {"result.json": one.model_dump_json(), "sensitivity.json": parts.model_dump_json()}


def places(value, path=()):
    """Where something stands in a JSON value; of a list, in its first and last item."""
    yield path
    ends = sorted({0, len(value) - 1}) if isinstance(value, list) and value else ()
    for key in value if isinstance(value, dict) else ends:
        yield from places(value[key], (*path, key))


@cache
def places_of(name: str) -> list[tuple]:
    return [path for path in places(json.loads(written()[name])) if path]


def report(folder: Path) -> str:
    comparison = Comparison.load([folder / name for name in written()])
    return as_markdown(comparison) + json.dumps(as_json(comparison))


@given(st.data())
def test_one_value_changed_or_gone(data):
    name = data.draw(st.sampled_from(sorted(written())))
    path = data.draw(st.sampled_from(places_of(name)))
    raw = place = json.loads(written()[name])
    for key in path[:-1]:
        place = place[key]
    if data.draw(st.booleans()):
        place[path[-1]] = data.draw(st.sampled_from(ODD))
    else:
        del place[path[-1]]
    with TemporaryDirectory() as folder:
        for file, text in (written() | {name: json.dumps(raw)}).items():
            (Path(folder) / file).write_text(text)
        try:
            assert report(Path(folder)).startswith("#")
        except UserError as error:
            assert f"{folder}/" in str(error) and "\n" not in str(error)
