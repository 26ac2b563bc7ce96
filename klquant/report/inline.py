"""An SVG file as matplotlib writes it → SVG to stand in a page: small, its ids unique, in the page's colours."""

import re
from collections.abc import Mapping
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_LONG = re.compile(r"-?\d+\.\d{3,}")
_FONT = re.compile(r"font: [^;]*?([\d.]+)px[^;]*")
_FAMILY = re.compile(r" *font-family: [^;]*;")


def inline(svg: bytes, name: str, alt: str, colours: Mapping[str, str], tips: Mapping[str, str]) -> str:
    """`name` makes ids unique on the page, `alt` is what a screen reader says. `colours`: what to write for each
    stand-in. `tips`: what to say of the elements whose ids are its keys."""
    root = ElementTree.fromstring(svg)
    used = {target for element in root.iter() for target in _targets(element)}
    for element in list(root.iter()):
        for child in [c for c in element if c.tag in (f"{_SVG}metadata", f"{_SVG}style")]:
            element.remove(child)
        tip = tips.get(element.get("id", ""))
        element.attrib = dict(_attributes(element, name, used, colours))
        element.tag = element.tag.removeprefix(_SVG)
        element.text, element.tail = (text if text and text.strip() else None for text in (element.text, element.tail))
        if tip is not None:
            title = Element("title")
            title.text = tip
            element.insert(0, title)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt}
    return ElementTree.tostring(root, encoding="unicode")


def _targets(element: Element) -> list[str]:
    """Ids that an element refers to."""
    return [m[1] for key, value in element.attrib.items() for m in re.finditer(r"(?:^|url\()#([\w-]+)", value)
            if key == _HREF or "url(" in value]  # fmt: skip


def _attributes(element: Element, name: str, used: set[str], colours: Mapping[str, str]):
    for key, value in element.attrib.items():
        if key == "id":
            if value in used:
                yield key, f"{name}-{value}"
        elif key == _HREF:
            yield "href", value.replace("#", f"#{name}-")
        elif key == "style":
            for stand_in, colour in colours.items():
                value = value.replace(stand_in, colour)
            yield key, _FAMILY.sub("", _FONT.sub(r"font-size: \1px", value)).replace("; ", ";").replace(": ", ":")
        elif not value.startswith("rotate(-0 "):
            yield key, _LONG.sub(lambda m: f"{float(m[0]):.2f}", value.replace("url(#", f"url(#{name}-")).strip()
