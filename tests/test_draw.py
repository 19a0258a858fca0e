"""Pictures show what there is: every edge and no other, names that can be read, in sensible proportions."""

import io
import sys
import warnings

import numpy as np
import pytest
import torch
from graphs import GRAPHS
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch_geometric.explain import Explanation, HeteroExplanation

from attngraph import (
    Causal,
    Documents,
    EdgeList,
    Empty,
    Full,
    Global,
    Identity,
    PerHead,
    Prefix,
    Random,
    Strided,
    Window,
    attend,
    draw,
    from_function,
    record,
)
from attngraph.draw.cells import MOST, Cells, shares
from attngraph.draw.pictures import weights_sheet
from attngraph.models import GPT
from attngraph.nn import TransformerConfig

GRAPH = Causal() & (Window(4, 0) | Prefix(2))
every = pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")


def shown(figure, panel=0):
    """The numbers of a picture; NaN is white."""
    return torch.from_numpy(figure.axes[panel].images[0].get_array().filled(torch.nan))


def pixels(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    file.seek(0)
    return imread(file)


@every
def test_a_picture_is_the_mask(case):
    if not case.n * case.m:
        return
    mask = case.mask.double()
    share = mask.mean(0) if mask.ndim == 3 else mask
    picture = shown(draw.connectivity(case.graph, case.n, case.m))
    torch.testing.assert_close(picture.nan_to_num().double(), share)
    assert picture.isnan().equal(share == 0)  # no edge is white


@every
def test_shares_of_cells_are_those_of_the_mask(case):
    """Cells of 3 × 2 pairs, found by looking at all pairs, and by lists, boxes and lines."""
    cells = Cells(case.n, case.m, 3, 2)
    if not case.n * case.m:
        return
    mask = case.mask.double()
    mask = mask.mean(0) if mask.ndim == 3 else mask
    expected = torch.stack(
        [mask[top:bottom, left:right].mean() for top, bottom, left, right in zip(*cells.boxes, strict=True)]
    ).view(cells.shape)
    for pairs in (case.n * case.m, case.n * case.m - 1):
        found = shares(case.graph, cells, pairs)
        if found.is_exact:
            torch.testing.assert_close(found.values, expected)
    few = shares(case.graph, cells, 1).values
    assert ((few > 0) <= (expected > 0)).all()  # a sample finds no edges that are not there


@pytest.mark.share(5)
@pytest.mark.parametrize("stride", [2, 3, 4, 5, 7, 16])
@pytest.mark.parametrize("n", [200, 300, 512, 1000])
def test_a_periodic_graph_is_not_aliased(stride, n):
    """Each cell is as dark as its share of edges: nowhere emptier or fuller than the period makes it."""
    figure = draw.connectivity(Strided(stride), n)
    cells = Cells.of(n, n)
    assert max(cells.shape) <= MOST
    mask = Strided(stride).mask(n, n).double()
    expected = [mask[top:bottom, left:right].mean() for top, bottom, left, right in zip(*cells.boxes, strict=True)]
    torch.testing.assert_close(shown(figure).nan_to_num().double(), torch.stack(expected).view(cells.shape))
    assert f"share of edges in cells of {cells.height} × {cells.width}" in figure.axes[1].get_ylabel()


@pytest.mark.parametrize(
    "graph",
    [
        Identity(),
        Global([70_000]),
        Causal() & (Window(300, 0) | Strided(10)),
        Documents([50_000] * 2),
        EdgeList([[7, 99_999], [99_998, 5]], 100_000),
        EdgeList([[7], [99_998]], 100_000) | Window(1, 1),
        PerHead([Identity(), Full()]),
    ],
    ids=str,
)
def test_the_edges_of_a_large_graph_are_all_seen(graph):
    n = 100_000
    values = shares(graph, Cells.of(n, n), 1 << 22).values
    key, query = EdgeList([[7, 99_999], [99_998, 5]], n).edge_index(n, n)
    whole = sum(Cells.of(n, n).areas.double().flatten() * values.flatten())
    counts = [graph._head(h).num_edges(n, n) for h in range(graph.heads)] if graph.heads else [graph.num_edges(n, n)]
    assert whole == pytest.approx(sum(counts) / len(counts), rel=0.05)
    cell = Cells.of(n, n)
    for q, k in zip(query.tolist(), key.tolist(), strict=True):
        if bool(graph.contains(torch.tensor(q), torch.tensor(k)).any()):
            assert values[q // cell.height, k // cell.width] > 0


@pytest.mark.parametrize(
    ("graph", "n"),
    [
        (Window(5, 0) | Prefix(1), 10**9),
        (Causal() & (Window(64, 0) | Prefix(4)), 10**6),
        (Strided(1000), 10**6),
        (Strided(64), 1 << 16),
        (Causal() & Documents([30_000, 70_000]) & Strided(7) | EdgeList([[99_999], [0]], 100_000), 100_000),
    ],
    ids=str,
)
def test_edges_of_huge_graphs_are_counted(graph, n):
    """Exactly, by the lines of the graph: no cell is emptier or fuller than it is, and none with an edge is white."""
    cells = Cells.of(n, n)
    values, is_empty, is_exact = shares(graph, cells)
    assert is_exact
    assert int((values * cells.areas).round().long().sum()) == graph.num_edges(n, n)
    assert torch.equal(is_empty, values == 0)
    for row, column in ((0, 0), (1, 0), (5, 5), (5, 4), (-1, 0), (3, 9)):
        row %= cells.shape[0]
        top, left = row * cells.height, column * cells.width
        bottom, right = min(top + cells.height, n), min(left + cells.width, n)
        count = sum(  # of a box, by inclusion and exclusion
            sign * graph.sized(n, n).rows(0, i).T.rows(0, j).num_edges() if i and j else 0
            for i, j, sign in ((bottom, right, 1), (top, right, -1), (bottom, left, -1), (top, left, 1))
        )
        assert round(float(values[row, column]) * (bottom - top) * (right - left)) == count


def test_what_a_sample_has_not_found_is_not_white():
    rare = from_function(lambda q, k: q * 30_000 + k == 7)
    picture = shown(draw.connectivity(rare, 30_000))
    assert not picture.isnan().any()
    picture = shown(draw.connectivity(rare & Causal(), 30_000))
    assert picture.isnan().equal(torch.ones(picture.shape).triu(1).bool())  # Causal() proves these to be empty


def test_a_predicate_of_any_size_is_sampled_and_said_to_be():
    figure = draw.connectivity(from_function(lambda q, k: (q + k) % 2 == 0), 20_000)
    assert figure.axes[1].get_ylabel().endswith(", sampled")
    picture = shown(figure).double()
    torch.testing.assert_close(picture, torch.full_like(picture, 0.5), atol=0.25, rtol=0)


def test_every_function_gives_a_figure_that_can_be_saved(tmp_path):
    weights = torch.rand(GRAPH.num_edges(8, 8))
    for number, figure in enumerate(
        (
            draw.connectivity(GRAPH, 16),
            draw.connectivity([GRAPH, Causal()], 16),
            draw.connectivity(PerHead([Causal(), Full()]), 40, 30),
            draw.connectivity(Empty(), 0),
            draw.messages(GRAPH, 12, node=3),
            draw.attention(weights, GRAPH, 8),
            draw.receptive_field([GRAPH] * 3, 12, 16),
        )
    ):
        assert isinstance(figure, Figure)
        assert figure._repr_png_().startswith(b"\x89PNG")
        draw.save(figure, tmp_path / f"{number}.png")
    draw.save(figure.axes[0], tmp_path / "axes.pdf")
    assert len(list(tmp_path.iterdir())) == 8
    given = Figure().subplots()
    assert draw.connectivity(GRAPH, 16, ax=given) is given.figure


def test_pictures_leave_pyplot_alone(monkeypatch):
    """Neither its figures nor its backend are touched: a notebook without one shows them."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert draw.connectivity(GRAPH, 16)._repr_png_()
    assert draw.messages(GRAPH, 6)._repr_png_()


def test_weights_are_a_cell_each_and_no_edge_is_white():
    weights = torch.arange(GRAPH.num_edges(8, 8)).float()
    picture = shown(draw.attention(weights, GRAPH, 8)).float()
    key, query = GRAPH.edge_index(8, 8)
    assert torch.equal(picture[query, key], weights)  # 0 among them, which is no white
    assert torch.equal(~picture.isnan(), GRAPH.mask(8, 8))
    image = pixels(draw.attention(torch.zeros(1), EdgeList([[0], [0]], 2), 2))
    assert (image[..., :3].sum(-1) < 1.0).mean() > 0.05  # dark, the cell of weight 0
    n = 300  # cells of 3 × 3: the mean of their edges
    picture = shown(draw.attention(torch.ones(GRAPH.num_edges(n, n)), GRAPH, n))
    assert picture.shape == (100, 100)
    assert set(picture[~picture.isnan()].tolist()) == {1.0}


def test_weights_of_a_graph_that_differs_by_head():
    graph = PerHead([Causal(), Identity()])
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    weights = attend(q, k, v, graph, return_weights=True)[1]
    picture = shown(draw.attention(weights[0, 1], graph, 6, head=1))
    assert torch.equal(~picture.isnan(), Identity().mask(6, 6))
    with pytest.raises(ValueError, match=r"head must say which of the graph's 2 heads"):
        draw.attention(weights[0, 1], graph, 6)
    with pytest.raises(ValueError, match=r"head must be from 0 to 1 \(got 2\)"):
        draw.attention(weights[0, 1], graph, 6, head=2)
    with pytest.raises(ValueError, match=r"head must be None: all heads have the same edges of Causal\(\)"):
        draw.attention(torch.ones(21), Causal(), 6, head=7)


def test_the_size_may_be_the_graphs_own():
    assert shown(draw.connectivity(Documents([3, 4]))).shape == (7, 7)
    assert shown(draw.connectivity(Full().sized(None, 3), 5)).shape == (5, 3)
    with pytest.raises(ValueError, match=r"give the number of nodes to draw, n: Causal\(\) fits any"):
        draw.connectivity(Causal())
    with pytest.raises(ValueError, match="same number of query nodes"):
        draw.connectivity(Documents([3, 4]), 8)


@pytest.mark.parametrize("layers", [1, 3, 12, 48])
def test_layers_are_a_sheet_of_sensible_proportions(layers):
    graphs = [Causal() & Window(layer, 0) for layer in range(layers)]
    figure = draw.connectivity(graphs, 64)
    assert len(figure.axes) == layers
    width, height = figure.get_size_inches()
    assert max(width, height) <= 14.5
    assert max(width, height) <= 4 * min(width, height)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[-1].replace("\n", " ") == f"layer {layers - 1}: {graphs[-1]}"


def test_layers_that_are_alike_are_one_picture():
    figure = draw.connectivity([Causal()] * 3 + [Full()], 16)
    assert [ax.get_title() for ax in figure.axes] == ["layers 0–2: Causal()", "layer 3: Full()"]
    with pytest.raises(TypeError, match="graph must be a graph, or one for each layer"):
        draw.connectivity([Causal(), 3], 16)
    with pytest.raises(ValueError, match="empty list"):
        draw.connectivity([], 16)


@pytest.mark.parametrize(("n", "m"), [(1000, 3), (3, 1000), (1, 1), (5000, 5000)])
def test_no_shape_makes_a_strip(n, m):
    figure = draw.connectivity(Full(), n, m)
    width, height = figure.get_size_inches()
    assert 0.3 < width / height < 3.5


def overlaps(figure, texts):
    """Whether any two of these texts, as they are drawn, lie on each other."""
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    return any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.share(2)
@pytest.mark.parametrize("n", [8, 34, 400])
@pytest.mark.parametrize("name", ["x{}", "a name of more than forty characters, number {}"])
def test_names_do_not_overlap(n, name):
    names = [name.format(i) for i in range(n)]
    for figure in (draw.connectivity(Full(), n, labels=names), draw.receptive_field([Full()], 0, n, labels=names)):
        ax = figure.axes[0]
        assert not overlaps(figure, ax.get_xticklabels())
        assert not overlaps(figure, ax.get_yticklabels())
        assert sum(bool(label.get_text()) for label in ax.get_xticklabels()) >= 8
    if n <= 34:
        figure = draw.messages(Identity(), n, labels=names)
        assert not overlaps(figure, [*figure.axes[0].texts, figure.axes[0].title])


def test_nodes_have_the_names_that_are_given():
    figure = draw.connectivity(Full(), 3, labels=["Ann", ("b", 1), 7])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["Ann", "('b', 1)", "7"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["Ann", "('b', 1)", "7"]
    figure = draw.attention(torch.ones(6), Full(), 2, 3, labels=["a", "b"], key_labels=list("cde"))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == list("cde")
    tokens = draw.attention(torch.rand(GRAPH.num_edges(8, 8)), GRAPH, 8, labels=list("to be or"))
    assert [label.get_text() for label in tokens.axes[0].get_xticklabels()] == list("to␣be␣or")
    field = draw.receptive_field([Causal()], 1, 3, labels=list("abc"))
    assert field.axes[0].get_title() == "receptive field of node b (1)"
    texts = [text.get_text() for text in draw.messages(Full(), 2, labels=["source", "sink"]).axes[0].texts]
    assert texts == ["source", "sink", "keys", "source", "sink", "queries"]
    with pytest.raises(ValueError, match="labels must name each of 8 nodes"):
        draw.attention(torch.ones(36), Causal(), 8, labels=list("to be"))
    with pytest.raises(ValueError, match="key_labels must name each of 4 nodes"):
        draw.connectivity(Full(), 2, 4, key_labels=list("ab"))
    with pytest.raises(ValueError, match="one of 12 queries"):
        draw.messages(GRAPH, 12, node=12)
    with pytest.raises(ValueError, match="one for each edge"):
        draw.attention(torch.ones(2), GRAPH, 8)


def test_a_message_is_as_strong_as_its_weight():
    graph, names = Causal() & Window(2, 0), ["a", "b", "c", ("d", 1)]
    key, query = graph.edge_index(4, 4)
    weights = (torch.randperm(len(key)) + 1.0) / len(key)
    for figure, heard in (
        (draw.messages(graph, 4, weights=weights), key >= 0),
        (draw.messages(graph, 4, weights=weights, node="c", labels=names), query == 2),
        (draw.messages(graph, 4, weights=weights, node=("d", 1), labels=names), query == 3),
        (draw.messages(graph, 4, weights=weights, node=torch.tensor(3), labels=names), query == 3),
    ):
        rest, lines = figure.axes[0].collections[:2]
        assert len(rest.get_segments()) == int((~heard).sum())
        ends = torch.tensor([each[:, 0].tolist() for each in lines.get_segments()])
        assert torch.equal(ends.T.long(), graph.edge_index(4, 4)[:, heard])
        torch.testing.assert_close(torch.from_numpy(lines.get_array().data), weights[heard])
        figure.draw_without_rendering()
        shades = torch.from_numpy(lines.get_edgecolor()).sum(1)
        for strength in (torch.tensor(lines.get_linewidth()), -shades):
            assert strength.argsort().equal(weights[heard].argsort())
        assert figure.axes[1].get_ylabel() == "weight"
    for node, error in ((4, ValueError), ("x", ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"node must be .*\(got"):
            draw.messages(graph, 4, node=node, labels=names)
    with pytest.raises(ValueError, match="node must be one node, and 'a' names 2"):
        draw.messages(graph, 2, node="a", labels=["a", "a"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_without_a_colour_are_an_error(value):
    weights = torch.tensor([1.0, value, 1.0])
    for picture in (draw.attention, lambda weights, graph, n: draw.messages(graph, n, weights=weights)):
        with pytest.raises(ValueError, match=r"weights must be finite \(got 1 of 3 that are NaN or infinite\)"):
            picture(weights, Causal(), 2)


def test_negative_weights_have_colours_of_their_own():
    for weights, limits in (([-3.0, 1.0, 2.0], (-3, 3)), ([-2.0, -1.0, -7e-5], (-2, 2)), ([0.0, 1.0, 2.0], (0, 2))):
        image = draw.attention(torch.tensor(weights), Causal(), 2).axes[0].images[0]
        assert image.get_clim() == limits
        assert (image.get_cmap().name == "coolwarm") == (min(weights) < 0)


def test_a_receptive_field_takes_what_analysis_takes():
    graph = EdgeList([[0, 1], [1, 2]], 3)
    picture = shown(draw.receptive_field(graph, 2))
    assert picture.isnan().logical_not().tolist() == [[False, False, True], [False, True, True]]
    assert draw.receptive_field([graph], "b", labels=list("abc")).axes[0].get_title() == "receptive field of node b (1)"
    with pytest.raises(ValueError, match="give the number of nodes, n"):
        draw.receptive_field(Causal(), 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name", [pytest.param("ab", marks=pytest.mark.slow), "a name of more than forty characters, number {}"]
)
def test_every_picture_has_room_for_its_names(name):
    names = [name.format(i) for i in range(8)]
    panel = ("0.0", torch.tensor([[0], [1]]), torch.ones(1), 8, 8)
    for figure in (
        *(draw.receptive_field([Causal()] * layers, 3, 8, labels=names) for layers in (1, 2, 5)),
        draw.connectivity([Causal() & Window(layer, 0) for layer in range(48)], 8, labels=names),
        draw.connectivity(Full(), 1, 8, labels=names[:1], key_labels=names),
        draw.messages(Identity(), 8, labels=names, weights=torch.ones(8)),
        weights_sheet([[panel] * 4] * 16, "weights", names),
        weights_sheet([[panel] * 2] * 60, "weights"),
    ):
        figure.draw_without_rendering()
        if len(figure.axes) == 1:
            assert not overlaps(figure, figure.axes[0].get_yticklabels())


def test_a_name_without_glyphs_is_told_once():
    names = ["\u6f22", "\u5b57", "a", "\U0001f980"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        figure = draw.connectivity(Full(), 4, labels=names)
        assert figure._repr_png_()
    assert len(told) == 1
    assert "no installed font that matplotlib can use has" in str(told[0].message)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["□", "□", "a", "□"]


@pytest.mark.filterwarnings("error")
def test_glyphs_are_of_another_font_where_one_has_them():
    figure = draw.connectivity(Full(), 1, labels=["\u05d0"])  # of DejaVu Sans, not of its monospaced font
    assert figure._repr_png_()
    assert figure.axes[0].get_yticklabels()[0].get_text() == "\u05d0"


def test_labels_may_be_any_sequence():
    for labels in (np.array(["a", "b"]), torch.tensor([7, 8]), ("a", "b"), range(2)):
        figure = draw.connectivity(Full(), 2, labels=labels)
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [
            str(each) for each in (labels.tolist() if hasattr(labels, "tolist") else labels)
        ]
    with pytest.raises(ValueError, match="labels must have one dimension"):
        draw.connectivity(Full(), 2, labels=torch.zeros(2, 2))


def test_a_title_tells_how_many_edges_are_listed():
    graph = EdgeList([range(30), [0] * 30], 30)
    assert draw.connectivity(graph | Identity()).axes[0].get_title() == "30 edges | Identity()"


def test_what_can_not_be_saved_is_told(tmp_path):
    picture = draw.connectivity(Causal(), 2)
    with pytest.raises(TypeError, match=r"picture must be a figure or axes.* \(got a Causal\)"):
        draw.save(Causal(), tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"path must be in a folder that exists: there is no .*nodir"):
        draw.save(picture, tmp_path / "nodir" / "x.png")
    for path in (tmp_path, tmp_path / ".png"):
        with pytest.raises(ValueError, match="path must be that of a file"):
            draw.save(picture, path)
    assert not list(tmp_path.iterdir())


def test_labels_and_titles_are_no_mathematics(tmp_path):
    labels = ["$^$", "\\a", "_", "^"]
    draw.save(draw.attention(torch.ones(10), Causal(), 4, labels=labels, title="$x^$"), tmp_path / "labels.png")


@pytest.mark.parametrize(
    "graph", [Causal(), PerHead([GRAPH] * 16), Documents(range(1, 400)), GRAPH | Random(2)], ids=type
)
def test_titles_fit(graph):
    for figure in (
        draw.connectivity(graph, graph.size[0] or 64),
        draw.connectivity([graph, Full(), graph], graph.size[0] or 64),
    ):
        figure.draw_without_rendering()
        titles = [ax.title for ax in figure.axes if ax.get_title()]
        assert not overlaps(figure, titles)
        for title in titles:
            box = title.get_window_extent()
            assert box.x0 >= -1
            assert box.x1 <= figure.bbox.x1 + 1


def test_what_was_recorded_draws_itself():
    model = GPT(TransformerConfig(embed_dim=16, num_layers=2, num_heads=2, position="rotary"), 7, [Causal(), GRAPH])
    with record(model) as recorded:
        model(torch.randint(7, (2, 8)))
    figure = recorded[1].draw(head=1, batch=1, labels=list("abcdefgh"))
    assert figure.axes[0].get_title().replace("\n", "") == "transformer.layers.1.attention, head 1"
    picture = shown(figure).float()
    key, query = GRAPH.edge_index(8, 8)
    torch.testing.assert_close(picture[query, key], recorded[1].weights[1, 1])
    assert torch.equal(~picture.isnan(), GRAPH.mask(8, 8))
    sheet = recorded.draw()
    assert [ax.get_title() for ax in sheet.axes] == ["0.0", "0.1", "1.0", "1.1"]
    assert [ax.get_title() for ax in recorded[1].draw().axes] == ["1.0", "1.1"]


def test_an_explanation_of_pyg_has_its_mask_at_query_and_key():
    edge_index, mask = torch.tensor([[3, 0, 1], [0, 1, 2]]), torch.tensor([0.5, 0.25, 1.0])
    found = draw.explanation(Explanation(edge_index=edge_index, edge_mask=mask, num_nodes=4))
    expected = torch.full((4, 4), torch.nan, dtype=torch.float64)
    expected[edge_index[1], edge_index[0]] = mask.double()
    torch.testing.assert_close(shown(found), expected, equal_nan=True)
    with pytest.raises(TypeError, match='edge_mask_type="object"'):
        draw.explanation(Explanation(edge_index=edge_index))
    typed = HeteroExplanation()
    typed["author"].num_nodes, typed["paper"].num_nodes = 4, 3
    typed["author", "writes", "paper"].update({"edge_index": edge_index, "edge_mask": mask})
    found = draw.explanation(typed["author", "writes", "paper"], labels=list("abc"))
    torch.testing.assert_close(shown(found), expected[:3], equal_nan=True)
