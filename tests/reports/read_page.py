"""A report read back with the standard library: its elements, its tables, its figures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "input", "br", "hr"}
# All that a page is made of; anything else in it got there through a hole.
KNOWN = VOID | set(
    "html head title style body a nav ul li main header h1 h2 h3 p noscript section details summary small dl dt dd div "
    "button pre code figure figcaption b script span table caption thead tbody tr th td bdi svg image path "
    "select option label output".split()
)


@dataclass
class Element:
    """An element with its attributes, and its children: elements and strings."""

    name: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, name: str) -> list[Element]:
        found = []
        for child in self.children:
            if isinstance(child, Element):
                found += [child] * (child.name == name) + child.all(name)
        return found


class _Reader(HTMLParser):
    """Builds the tree; an end tag that does not fit, or one that is missing, is an error."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("page", {})]
        self.every: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice: {attrs}"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        self.every.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:60]}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"an instruction: {data[:60]}")


@dataclass
class Page:
    """A page that was read."""

    root: Element
    every: list[Element]

    def tables(self) -> dict[str, dict[str, list[Element]]]:
        """Caption -> name of a column in the file -> its cells."""
        found = {}
        for table in self.root.all("table"):
            names = [th.attributes["data-name"] for th in table.all("thead")[0].all("th")]
            rows = [[c for c in tr.children if isinstance(c, Element)] for tr in table.all("tbody")[0].all("tr")]
            assert all(len(row) == len(names) for row in rows)
            columns = {str(name): [row[i] for row in rows] for i, name in enumerate(names)}
            caption = table.all("caption")[0].text
            assert caption not in found, f"two tables are called {caption!r}"
            found[caption] = columns
        return found

    def table(self, start: str) -> dict[str, list[Element]]:
        """The columns of the only table whose caption begins so."""
        (found,) = [columns for caption, columns in self.tables().items() if caption.startswith(start)]
        return found

    def figures(self) -> dict[str, dict[str, Any]]:
        """Caption -> data, layout and height of every figure but pictures."""
        given = {}
        for figure in self.root.all("figure"):
            if figure.all("svg"):
                continue
            script = figure.all("script")[0]
            assert script.attributes["type"] == "application/json" and "<" not in script.text
            given[figure.all("figcaption")[0].text] = json.loads(script.text)
        return given


def read(html: str) -> Page:
    """Parse a page.

    Raises:
        AssertionError: tags do not match, or there is an element that no page has.
    """
    assert html.startswith("<!DOCTYPE html>\n")
    reader = _Reader()
    reader.feed(html.removeprefix("<!DOCTYPE html>\n"))
    reader.close()
    assert len(reader.open) == 1, [e.name for e in reader.open]
    assert {e.name for e in reader.every} <= KNOWN, {e.name for e in reader.every} - KNOWN
    return Page(reader.open[0], reader.every)


def check(page: Page) -> None:
    """What holds for every page: nothing is fetched, nothing runs but its own scripts, and it can be used by all."""
    ids = [e.attributes["id"] for e in page.every if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    (html,) = page.root.all("html")
    assert html.attributes["lang"] == "en" and len(page.root.all("h1")) == 1 and page.root.all("title")[0].text
    for element in page.every:
        for name, value in element.attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "data", "action", "formaction"), name
            assert name != "style" or element.attributes.get("class") == "plot"
            if name == "href" and element.name == "image":
                assert str(value).startswith("data:image/jpeg;base64,")
            elif name == "href":
                assert element.name == "a", element.name
                inside = str(value).startswith("#") and str(value)[1:] in ids
                assert inside or str(value).startswith("https://arxiv.org/abs/"), value
    plain = [s for s in page.root.all("script") if "type" not in s.attributes]
    assert len(plain) == 1 + bool(page.root.all("figure"))
    if page.root.all("figure"):
        assert "plotly.js v" in plain[0].text[:200] and "plotly.js v" not in plain[1].text
    policy = next(m.attributes["content"] for m in page.root.all("meta") if "http-equiv" in m.attributes)
    assert str(policy).startswith("default-src 'none'") and "http" not in str(policy)
    style = page.root.all("style")[0].text
    assert "url(" not in style and "@import" not in style
    for table in page.root.all("table"):
        for head in table.all("thead")[0].all("th"):
            assert head.attributes["scope"] == "col" and head.attributes["aria-sort"] == "none"
            assert head.all("button")[0].attributes["title"]
        assert all(row.all("th")[0].attributes["scope"] == "row" for row in table.all("tbody")[0].all("tr"))
        assert all(c.text for row in table.all("tbody")[0].all("tr") for c in row.children)  # type: ignore[union-attr]
    for plot in (e for e in page.every if e.attributes.get("class") == "plot"):
        assert plot.attributes["role"] == "img" and plot.attributes["aria-label"]
