import json
import re
from html.parser import HTMLParser

import pytest

from klquant.evaluate.result import Result
from klquant.report.comparison import Comparison
from klquant.report.page import html
from klquant.report.text import as_json, as_markdown
from tests.report.build import CONTEXTS, DOMAINS, baseline, result, sensitivity

EVIL = "<script>alert(1)</script>\"'&$x_1$ {{ 7 * 7 }} | `code`"
VOID = {"meta", "link", "br", "!doctype"}


class Page(HTMLParser):
    """Collects tags, ids, links and text; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.ids, self.links, self.open, self.said = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("href", "src", "xlink:href"):
                self.links.append(value)
            assert not key.startswith("on")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def compare(*results) -> Comparison:
    return Comparison.of([(f"{i}.json", r) for i, r in enumerate(results)])


def few(*args, **named) -> Result:
    """A result that is quick to draw."""
    return result(*args, **{"domains": DOMAINS[:2], **named})


@pytest.fixture(scope="module")
def three() -> Comparison:
    return compare(result("int8", 0.0008, 50), result("int4", 0.0125, 27), result("int3", 0.06, 21))


@pytest.fixture(scope="module")
def text(three) -> str:
    return html(three)


def test_it_is_one_well_formed_file_that_fetches_nothing(text):
    page = Page(text)
    assert not {"script", "img", "iframe", "object"} & set(page.tags)
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert not re.findall(r"@import|url\((?!#)", text)
    assert len(text.encode()) < 400_000


def test_every_reference_inside_the_page_has_its_one_target(text):
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    wanted = {link[1:] for link in page.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted <= set(page.ids)


def test_colours_and_fonts_are_the_pages(text):
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert not re.findall(r"#[0-9a-f]{6}\b", svg) and "font-family" not in svg
    variables = set(re.findall(r"var\((--\w+)\)", text)) - {"--heat"}
    for scheme in re.findall(r":root \{(.*?)\}", text, re.S):
        assert variables <= set(re.findall(r"(--\w+):", scheme))


def test_it_says_what_a_user_decides_from(text, three):
    said = " ".join(Page(text).said)
    for word in ("int8", "int4", "int3", "24 GB", "128 k", "noise floor", "bits a weight", "inside", "technical"):
        assert word in said
    for heading in ("Accuracy against disk", "Accuracy against memory at 128 k tokens", "KLD by position",
                    "Drift of the residual stream", "Drift of the KDA state", "Experts chosen alike",
                    "Error by class", "Error by layer and class", "Tokens an expert", "Provenance"):  # fmt: skip
        assert f"<h3>{heading}" in text or f"<h2>{heading}" in text
    for v in three.variants:
        assert v.result.model.fingerprint in said


def test_the_same_results_give_the_same_bytes(three, text):
    assert html(three) == text


def test_what_users_named_is_text_and_nothing_else():
    evil = result(EVIL, 0.01, domains=[EVIL, "code"], recipe=EVIL, notes=[EVIL])
    evil = evil.model_copy(update={
        "quantization": evil.quantization.model_copy(update={"fallbacks": [EVIL]}),
        "provenance": evil.provenance.model_copy(update={"command": ["klquant", EVIL]}),
    })  # fmt: skip
    page = Page(html(compare(evil)))
    assert "script" not in page.tags and "49" not in "".join(page.said).split()
    assert sum(EVIL in said for said in page.said) > 5
    markdown = as_markdown(compare(evil))
    assert "<script>" not in markdown.replace("\\<", "")
    for line in markdown.splitlines():
        if line.startswith("| ") and EVIL[:7] in line:
            assert "\\|" in line


@pytest.mark.parametrize(
    "results",
    [
        [few()],
        [few(floor=False)],
        [few(windows=1)],
        [result(domains=["one"])],
        [few("same", 0.0, 98), few("int4", 0.01)],
        [few("less", -1e-7, 98), few("int4", 0.01)],
        [few(quantization=None)],
        [few(quantization=None), few("int4", 0.02, 20)],
        [few(contexts=[4096], gigabytes=0.003)],
        [few(f"variant-{i}", 0.002 * 1.5**i, 50 - i) for i in range(9)],
        [few("a" * 200)],
        [baseline(domains=DOMAINS[:2])],
    ],
    ids=["one", "no floor", "single windows", "one domain", "zero", "negative", "not ours", "partly ours", "tiny",
         "many", "long name", "only a baseline"],
)  # fmt: skip
def test_unusual_results_make_a_page_too(results):
    c = compare(*results)
    Page(html(c))
    as_markdown(c)
    json.dumps(as_json(c), allow_nan=False)


def test_legends_explain_what_is_there_and_nothing_else():
    """Of one window there is no range."""
    with_ranges, without = html(compare(few())), html(compare(few(windows=1, domains=DOMAINS[:1])))
    assert "± is half the 95 % range" in with_ranges and "Mean KLD and 95 % range of each" in with_ranges
    assert "Mean KLD and its 95 % range. The dashed line is the noise floor, the band its range." in with_ranges
    assert "Mean KLD. The dashed line is the noise floor.<" in without and "Mean KLD of each variant" in without
    assert not any(sign in without for sign in ("±", "≈: a change", "Mean KLD and")) and "in 1 window." in without
    assert ">Mean KLD and its 95 % range.<" in html(compare(few(floor=False)))


def test_what_a_result_lacks_is_said():
    without = html(compare(few(quantization=None)))
    assert "Error by class and layer: none of the results has it" in without
    assert "made by another tool" in without
    assert "No noise floor was measured" in html(compare(few(floor=False)))


def test_markdown_has_the_tables(three):
    text = as_markdown(three)
    assert "| int4 |" in text and "## Quality against the reference" in text and "| 2×24 GB |" in text
    widths = [line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")]
    assert min(widths) >= 3


def test_json_holds_conclusions_and_results(three):
    said = as_json(three)
    assert said["contexts"] == list(CONTEXTS)
    assert [v["name"] for v in said["variants"]] == ["int8", "int4", "int3"]
    assert [v["inside_floor"] for v in said["variants"]] == [True, False, False]
    assert said["choices"]["80 GB"][0]["variant"] == "int8" and said["choices"]["12 GB"][0]["variant"] is None
    assert said["variants"][1]["result"] == three.variants[1].result.model_dump(mode="json")


def test_sensitivity_is_a_table_of_parts():
    beside = few()
    rounded = sensitivity(0.01, 0.0301, beside=beside)
    layers = sensitivity(0.02, by="layer", left_out=["layer 1", "head"], beside=beside)
    c = Comparison.of([("r", beside)], [("a", rounded), ("b", layers)])
    text = html(c)
    assert "<h3>Sensitivity by class: int4, rounded</h3>" in text and "<h3>Sensitivity by layer" in text
    said = " ".join(Page(text).said)
    assert "The parts add up to 0.0401; together they cost 0.0361." in said
    assert "Not measured for want of time: layer 1, head." in said
    row = next(line for line in as_markdown(c).splitlines() if line.startswith("| KDA proj"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["KDA proj", "0.0301 (± 0.0030)", "30 ×"] and cells[4:] == [
        "INT4 g128", "1,000.0 M", "1.50 GB", "0.0201"]  # fmt: skip
    assert as_json(c)["sensitivities"] == [s.model_dump(mode="json") for s in (rounded, layers)]


def test_what_users_named_in_a_sensitivity_is_text_and_nothing_else():
    s = sensitivity(0.01, beside=few(), left_out=[EVIL])
    s = s.model_copy(update={"quantizer": s.quantizer.model_copy(update={"name": EVIL, "recipe": EVIL})})
    page = Page(html(Comparison.of([("r", few())], [("s", s)])))
    assert "script" not in page.tags and sum(EVIL in said for said in page.said) >= 2


def test_baselines_are_marked_as_such():
    text = html(compare(few("int4", 0.0125, 27), baseline(domains=DOMAINS[:2])))
    assert "NF4 (bnb)<small>baseline</small>" in text and "Crosses: baselines." in text
    said = " ".join(Page(text).said)
    assert "1 variant and 1 baseline of a model" in said and "A baseline, for comparison only" in said
    assert "Crosses: baselines." not in html(compare(few()))
