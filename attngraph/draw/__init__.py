"""Pictures of graphs and of attention: figures that a notebook shows and `save` writes, without pyplot."""

from attngraph.draw import notebook as _notebook  # noqa: F401  what a notebook shows of a graph
from attngraph.draw.pages import Page, page
from attngraph.draw.pictures import (
    BLUE,
    attention,
    connectivity,
    explanation,
    messages,
    receptive_field,
    save,
    set_title,
)

__all__ = [
    "BLUE",
    "Page",
    "attention",
    "connectivity",
    "explanation",
    "messages",
    "page",
    "receptive_field",
    "save",
    "set_title",
]
