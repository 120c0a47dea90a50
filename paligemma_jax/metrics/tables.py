"""Metrics of tables as HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from paligemma_jax.metrics.packages import load_package
from paligemma_jax.metrics.scores import Metric, References, Scores, Texts, mean

NAME = "TEDS"


@dataclass
class _Node:
    """A node of a table, as `apted` takes it. Cells (`td`) have no children, but text."""

    tag: str
    spans: tuple[int, int] = (1, 1)  # columns, rows
    text: list[str] = field(default_factory=list)  # characters and tags
    children: list[_Node] = field(default_factory=list)


class _Costs:
    """What an edit costs: 1 for another node, for a cell the share of its text that differs."""

    valuecls = float  # which apted reads

    def __init__(self):
        self.levenshtein = load_package("rapidfuzz.distance", NAME).Levenshtein

    def delete(self, node: _Node) -> float:
        return 1.0

    insert = delete

    def rename(self, a: _Node, b: _Node) -> float:
        if (a.tag, a.spans) != (b.tag, b.spans):
            return 1.0
        return self.levenshtein.normalized_distance(a.text, b.text)

    def children(self, node: _Node) -> list[_Node]:
        return node.children


@partial(Metric, title="TEDS")
def teds(predictions: Texts, references: References) -> Scores:
    """Tree edit distance similarity of tables (PubTabNet, arXiv:1911.10683): 1 minus the edits from
    the tree of one table to that of the other, over the nodes of the larger one.

    As published (ibm-aur-nlp/PubTabNet, src/metric.py at afcdefd). Texts are HTML with a table as
    the child of the body; a text without one scores 0. Of several references, the best counts.
    """
    return _teds(predictions, references, structure=False)


@partial(Metric, title="TEDS of structure")
def s_teds(predictions: Texts, references: References) -> Scores:
    """`teds` of the tables without the texts of their cells."""
    return _teds(predictions, references, structure=True)


def _teds(predictions: Texts, references: References, structure: bool) -> Scores:
    return mean(
        max(_similarity(prediction, reference, structure) for reference in texts)
        for prediction, texts in zip(predictions, references, strict=True)
    )


def _similarity(prediction: str, reference: str, structure: bool) -> float:
    apted = load_package("apted", NAME)
    tables = [_parse(text) for text in (prediction, reference)]
    if any(table is None for table in tables):
        return 0.0
    a, b = (_tree(table, structure) for table in tables)
    distance = apted.APTED(a, b, _Costs()).compute_edit_distance()
    # All elements count, those inside of cells, too.
    nodes = max(len(table.xpath(".//*")) for table in tables)
    return 1.0 - distance / nodes if nodes else 1.0


def _parse(text: str) -> Any:  # an element of lxml, which is not always installed
    """The first table of a page, or None."""
    html = load_package("lxml.html", NAME)
    if not text.strip():
        return None
    parser = html.HTMLParser(remove_comments=True, encoding="utf-8")
    try:
        page = html.fromstring(text.encode("utf-8"), parser=parser)
    except (ValueError, load_package("lxml.etree", NAME).LxmlError):
        return None
    tables = page.xpath("body/table")
    return tables[0] if tables else None


def _tree(element: Any, structure: bool) -> _Node:
    if element.tag != "td":
        children = [_tree(child, structure) for child in element]
        return _Node(str(element.tag), children=children)
    text = [] if structure else _tokens(element)[1:-1]
    return _Node("td", (_span(element, "colspan"), _span(element, "rowspan")), text)


def _span(element: Any, name: str) -> int:
    """A span of a cell; 1 if it is not a number."""
    value = element.get(name, "1")
    return int(value) if value.strip().isdecimal() else 1


def _tokens(element: Any) -> list[str]:
    """The tags and characters of an element."""
    tokens = [f"<{element.tag}>", *(element.text or "")]
    for child in element:
        tokens += _tokens(child)
    if element.tag != "unk":
        tokens.append(f"</{element.tag}>")
    if element.tag != "td":
        tokens += element.tail or ""
    return tokens
