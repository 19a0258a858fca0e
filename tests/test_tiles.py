"""Boxes, tiles and strips: what a graph tells of a box is true, and a layout rebuilds the mask."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from graphs import GRAPHS
from hypothesis import given
from test_properties import sized_graphs

from attngraph import Causal, Documents, EdgeList, Neighborhood, Prefix, Window, from_function, parse
from attngraph.graph.base import at_size
from attngraph.graph.boxes import FULL, Boxes, occupied_tiles, row_ids
from attngraph.planning.layouts.tiles import Tiles, pack, tabulate, tabulate_edges, union, unpack

TILES = [(1, 32), (2, 32), (4, 64), (64, 64)]


def cases():
    """Every graph without heads, and each head of the others: bound, with its size and its mask by the oracle."""
    for case in GRAPHS:
        for h in range(case.graph.heads or 1):
            graph, n, m = at_size(case.graph._head(h), case.n, case.m)
            yield pytest.param(
                graph, n, m, case.mask[h] if case.graph.heads else case.mask, id=f"{str(graph)[:60]}-{h}"
            )


every = pytest.mark.parametrize(("graph", "n", "m", "mask"), list(cases()))


def boxes_of(n, m, size):
    row, column = (
        torch.cartesian_prod(torch.arange(0, n, size[0]), torch.arange(0, m, size[1])).reshape(-1, 2).unbind(1)
    )
    return Boxes(row, row + size[0], column, column + size[1]).clipped(n, m)


def inside(mask, boxes):
    return [mask[a:b, c:d] for a, b, c, d in zip(*(side.tolist() for side in boxes), strict=True)]


@every
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 2), (4, 4), (64, 64)])
def test_the_class_of_a_box_is_true(graph, n, m, mask, size):
    boxes = boxes_of(n, m, size)
    for kind, part in zip(graph._classify_boxes(boxes).tolist(), inside(mask, boxes), strict=True):
        assert kind == 1 or part.any() == part.all() == (kind == FULL)


@every
@pytest.mark.parametrize("size", [(2, 2), (3, 2), (64, 64)])
def test_boxes_of_one_pattern_have_the_same_edges(graph, n, m, mask, size):
    boxes = boxes_of(n, m, size)
    if not len(boxes.top):
        return
    shape = [boxes.bottom - boxes.top, boxes.right - boxes.left]
    first = {}
    for number, part in zip(row_ids([*shape, *graph._box_pattern(boxes)]).tolist(), inside(mask, boxes), strict=True):
        # An EMPTY or FULL box needs no pattern: a graph may look at its boxes before it asks for one.
        if part.any() and not part.all():
            assert torch.equal(first.setdefault(number, part), part)


@every
def test_edge_lists_know_each_box_exactly(graph, n, m, mask):
    listed = EdgeList(graph.edge_index(n, m), (n, m))
    boxes = boxes_of(n, m, (3, 2))
    for kind, part in zip(listed._classify_boxes(boxes).tolist(), inside(mask, boxes), strict=True):
        assert kind == (2 if part.all() else int(part.any()))


@every
def test_nobody_is_heard_outside_of_the_spans(graph, n, m, mask):
    for start in range(n):
        outside = torch.ones(m, dtype=torch.bool)
        spans = graph.spans(start, min(n, start + 3), n, m)
        assert all(a[1] < b[0] for a, b in pairwise(spans))
        for first, stop in spans:
            outside[first:stop] = False
        assert not mask[start : start + 3, outside].any()


@every
@pytest.mark.parametrize("tile", TILES)
def test_tiles_rebuild_the_mask(graph, n, m, mask, tile):
    found = Tiles(n, m, tabulate(graph, n, m, tile))
    assert torch.equal(found.mask(), mask)
    listed = Tiles(n, m, tabulate_edges(*mask.nonzero().unbind(1), tile))
    assert torch.equal(listed.mask(), mask)
    for side in ("row", "column", "words"):
        if side != "words" or len(found.table.words) == 0:
            assert torch.equal(getattr(found.table, side), getattr(listed.table, side))
    assert len(torch.unique(found.table.words, dim=0)) == len(found.table.words)
    assert int(found.table.edges.sum()) == int(mask.sum())
    edges = torch.stack(found.table.list_edges(n, m))
    assert torch.equal(edges[:, (edges[0] * m + edges[1]).argsort()], mask.nonzero().T)


@every
@pytest.mark.parametrize("tile", TILES)
def test_block_csr_and_its_transpose_list_the_same_tiles(graph, n, m, mask, tile):
    layout = Tiles(n, m, tabulate(graph, n, m, tile))
    tile_m, tile_n = tile
    for rows, whole in ((layout.by_query, mask), (layout.by_key, mask.T)):
        size = (tile_m, tile_n) if whole is mask else (tile_n, tile_m)
        again = torch.zeros(len(rows.full) * size[0], (layout.grid[1] if whole is mask else layout.grid[0]) * size[1])
        for r in range(len(rows.full)):
            for e in range(rows.start[r], rows.start[r + 1]):
                number = int(rows.mask[e])
                assert (number < 0) == (e >= rows.full[r])
                bits = torch.ones(tile_m, tile_n) if number < 0 else unpack(layout.table.words)[number].float()
                column = int(rows.column[e])
                part = again[r * size[0] : (r + 1) * size[0], column * size[1] : (column + 1) * size[1]]
                part += bits if whole is mask else bits.T
        assert torch.equal(again[: whole.shape[0], : whole.shape[1]], whole.float())


@every
def test_the_union_of_tiles_is_the_union_of_edges(graph, n, m, mask):
    for tile in TILES:
        one, other = tabulate(graph, n, m, tile), tabulate(at_size(Causal(), n, m)[0], n, m, tile)
        assert torch.equal(Tiles(n, m, union(one, other)).mask(), mask | Causal().mask(n, m))


@every
def test_tiles_know_the_number_of_each_edge(graph, n, m, mask):
    layout = Tiles(n, m, tabulate(graph, n, m, (4, 32)))
    number = mask.flatten().cumsum(0).view(n, m) - mask.long()  # how many edges come before a pair
    for t, (r, c) in enumerate(zip(layout.table.row.tolist(), layout.table.column.tolist(), strict=True)):
        rows = number[r * 4 : (r + 1) * 4, c * 32]
        assert torch.equal(layout.first_edge[t, : len(rows)], rows)


@pytest.mark.parametrize("text", ["Causal()", "Window(300, 0) | Prefix(4)", "Random(9).sized(700, 700)", "Full()"])
def test_strips_hold_every_tile_once_where_it_belongs(text):
    graph, n, m = at_size(parse(text), 700, 700)
    layout = Tiles(n, m, tabulate(graph, n, m, (2, 32)))  # rows of 22 tiles
    found = torch.zeros(len(layout.table.row), dtype=torch.int64)
    for strip in layout.strips:
        row = strip.rows.tiles.expand_as(strip.tile)
        column = strip.keys.tiles
        held = strip.tile >= 0
        found.index_add_(0, strip.tile[held], torch.ones_like(strip.tile[held]))
        assert torch.equal(layout.table.row[strip.tile[held]], row[held])
        assert torch.equal(layout.table.column[strip.tile[held]], column[held])
        masks = layout.masks[strip.mask.expand_as(strip.tile)]
        assert torch.equal(masks[held], layout.masks[layout.table.mask[strip.tile[held]].where(
            layout.table.mask[strip.tile[held]] >= 0, torch.tensor(len(layout.masks) - 2))])  # fmt: skip
        assert not masks[~held].any()
        assert bool(masks.any(1).any(2).all()) or strip.has_empty_rows or held.all()
    assert (found == 1).all()


def test_packing_is_undone_by_unpacking():
    masks = torch.rand(5, 3, 96) < 0.5
    assert torch.equal(unpack(pack(masks)), masks)
    assert pack(masks).dtype == torch.int32


def test_a_million_nodes_in_a_window_are_two_masks():
    graph, n, m = at_size(Window(256, 0), 1_000_000, 1_000_000)
    table = tabulate(graph, n, m, (64, 64))
    assert len(table.words) == 2
    assert int(table.edges.sum()) == graph.num_edges(n, m)
    assert len(Tiles(n, m, table).strips) <= 6


@pytest.mark.parametrize("graph", [Causal() & (Window(256, 0) | Prefix(4)), Neighborhood((300, 300), 3)], ids=str)
def test_masks_of_an_invariant_graph_do_not_grow_with_it(graph):
    graph, n, m = at_size(graph, 90_000, 90_000)
    table = tabulate(graph, n, m, (64, 64))
    assert len(table.words) < 500
    assert int(table.edges.sum()) == graph.num_edges(n, m)


def test_planning_cost_grows_with_the_occupied_tiles(monkeypatch):
    """Twice the nodes of a window are about twice the boxes looked at, not four times."""
    looked = []
    classify = Window._classify_boxes
    monkeypatch.setattr(
        Window, "_classify_boxes", lambda self, boxes: (looked.append(len(boxes.top)), classify(self, boxes))[1]
    )
    totals = []
    for n in (1 << 16, 1 << 17):
        looked.clear()
        occupied_tiles(Window(256, 0), n, n, (64, 64))
        totals.append(sum(looked))
    assert totals[1] < 2.1 * totals[0]
    assert totals[1] < 20 * (1 << 17) // 64


@given(sized_graphs())
def test_tiles_rebuild_the_mask_of_any_expression(case):
    graph, n, m = case
    bound, n, m = at_size(graph, n, m)
    mask = graph.mask(n, m)
    assert torch.equal(Tiles(n, m, tabulate(bound, n, m, (2, 32))).mask(), mask)
    boxes = boxes_of(n, m, (3, 2))
    for kind, part in zip(bound._classify_boxes(boxes).tolist(), inside(mask, boxes), strict=True):
        assert kind == 1 or part.any() == part.all() == (kind == FULL)


def test_a_graph_that_needs_more_memory_than_there_is_says_how_much(monkeypatch):
    with pytest.raises(MemoryError, match=r"GiB of memory are required to plan .* and .* GiB are available; use"):
        tabulate(Causal(), 100_000_000, 100_000_000, (64, 64))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 29))
    with pytest.raises(MemoryError, match="required to find the edges of"):
        tabulate(from_function(lambda q, k: q * k % 3 == 1), 10_000_000, 10_000_000, (64, 64))


def test_documents_have_tiles_for_their_edges_alone():
    graph = Documents([700] * 100)
    table = tabulate(graph, *graph.size, (64, 64))
    assert len(table.row) <= 100 * 13 * 13
