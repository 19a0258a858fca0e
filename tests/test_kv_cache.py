"""A cache of keys and values: at every step what the whole text at once would give, in as few slots as the graph asks.

The oracle is the model itself, run on the whole text without a cache, in float64.
"""

import copy

import pytest
import torch
from graphs import GRAPHS

from attngraph import (
    Batched,
    Causal,
    Chunks,
    Documents,
    EdgeList,
    Full,
    Identity,
    KVCache,
    PerHead,
    Prefix,
    Random,
    Strided,
    TopK,
    Tree,
    Window,
    analysis,
    from_function,
    record,
)
from attngraph.generation.schedule import Schedule
from attngraph.models import GPT, EncoderDecoder
from attngraph.nn import Transformer, TransformerConfig

VOCAB = 11
WINDOW = Causal() & (Window(5, 0) | Prefix(2))
FOUR = PerHead([Causal(), Causal() & Window(3, 0), Causal(), Causal() & Window(9, 0)])
SQUARE = [case for case in GRAPHS if case.n == case.m > 0]


def randomized(model):
    """In float64, with weights so large that every key counts."""
    torch.manual_seed(0)
    for parameter in model.double().eval().parameters():
        parameter.data.normal_(std=0.3)
    return model


def config(**options):
    return TransformerConfig(**{"embed_dim": 16, "num_layers": 2, "num_heads": 4, **options})


def gpt(graph, **options):
    return randomized(GPT(config(**options), VOCAB, graph))


def tokens(batch, n):
    return torch.randint(VOCAB, (batch, n), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def stepped(run, cache, text, prompt, at_once=1, **options):
    """The outputs of a prompt, and then of so many nodes at once."""
    first = run(text[:, :prompt], cache=cache, **options)
    starts = range(prompt, text.shape[1], at_once)
    rest = [run(text[:, start : start + at_once], cache=cache) for start in starts]
    assert cache.length == text.shape[1]
    return torch.cat([first, *rest], dim=1)


@torch.no_grad()
def check(model, text, prompt, at_once=1):
    cache = KVCache(model, max_length=text.shape[1])
    torch.testing.assert_close(stepped(model, cache, text, prompt, at_once), model(text), atol=1e-12, rtol=0)
    return cache


# ------------------------------------------------------------------------------------------------------ what it gives


@pytest.mark.parametrize("case", SQUARE, ids=lambda case: str(case.graph)[:60])
def test_each_step_is_that_of_the_whole_text(case):
    graph = case.graph & Causal()
    heads = graph.heads or 4
    model = gpt(graph, embed_dim=4 * heads, num_heads=heads)
    check(model, tokens(2, case.n), prompt=min(3, case.n))


GRAPHS_OF_ANY_SIZE = [
    Causal(),
    Causal(-1),
    Causal() & Window(4, 0),
    WINDOW,
    Causal() & (Strided(7) | Window(2, 0)),
    Causal() & (Random(3) | Identity()),
    FOUR,
    [Causal() & Window(4, 0), Causal()],
    Causal() & from_function(lambda q, k: (q * k) % 3 == 1),
]


@pytest.mark.parametrize(("prompt", "at_once"), [(1, 1), (1, 4), (7, 1), (7, 3), (40, 1)])
@pytest.mark.parametrize("graph", GRAPHS_OF_ANY_SIZE, ids=lambda graph: str(graph)[:60])
def test_prompts_and_steps_of_any_length(graph, prompt, at_once):
    check(gpt(graph), tokens(2, 40), prompt, at_once)


POSITIONS = ["none", "learned", "sinusoidal", "rotary", "alibi", "relative"]


@pytest.mark.parametrize("graph", [Causal(), WINDOW, FOUR], ids=str)
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("position", POSITIONS)
def test_positions_and_grouped_heads(position, kv_heads, graph):
    length = {"max_length": 30} if position == "learned" else {}
    check(gpt(graph, position=position, num_kv_heads=kv_heads, **length), tokens(2, 30), 3)
    check(gpt(graph, position=position, num_kv_heads=kv_heads, **length), tokens(1, 30), 3, at_once=5)


OTHERS = [{"score": "additive"}, {"qk_norm": True}, {"norm_order": "post"}, {"scale": 0.7}, {"norm": "none"}]
OTHERS += [{"normalize": name} for name in ("sigmoid", "none", "relu", "squared_relu")]
OTHERS += [{"normalize": name, "score": "additive"} for name in ("none", "relu")]


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_other_switches(options):
    check(gpt(WINDOW, **options), tokens(2, 20), 3)
    check(gpt(FOUR, **options), tokens(2, 20), 3)


@pytest.mark.slow
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("graph", GRAPHS_OF_ANY_SIZE, ids=lambda graph: str(graph)[:60])
def test_every_step_of_three_hundred(graph, position):
    check(gpt(graph, position=position, **({"max_length": 300} if position == "learned" else {})), tokens(2, 300), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_precisions(dtype):
    model = gpt(WINDOW).to(dtype)
    text = tokens(2, 30)
    with torch.no_grad():
        whole = model(text)
    found = stepped(model, KVCache(model, 30), text, 5)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, whole, **({"atol": 1e-5, "rtol": 0} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1})
    )


# ------------------------------------------------------------------------------------------------- padding, and memory


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("graph", [WINDOW, WINDOW.sized(30, 30), FOUR, Causal() & (Random(3) | Identity())], ids=str)
def test_prompts_of_different_lengths(graph, position, at_once):
    model = gpt(graph, position=position, **({"max_length": 30} if position == "learned" else {}))
    text, mask = tokens(3, 30), torch.ones(3, 30, dtype=torch.bool)
    mask[0, :8] = mask[1, :5] = False
    cache = KVCache(model, 30)
    found = stepped(model, cache, text, 9, at_once, attention_mask=mask[:, :9])
    with torch.no_grad():
        whole = model(text, attention_mask=mask)
    torch.testing.assert_close(found[mask], whole[mask], atol=1e-12, rtol=0)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("memory_graph", [None, Window(3, 3)], ids=str)
@pytest.mark.parametrize(
    ("cross", "position"),
    [(True, "sinusoidal"), (True, "rotary"), (True, "relative"), (False, "rotary"), (False, "none")],
)
def test_a_memory_is_heard_as_the_first_call_gave_it(cross, position, memory_graph, is_padded):
    decoder = config(position=position, cross=cross)
    model = randomized(
        EncoderDecoder(config(position=position), decoder, VOCAB, decoder_graph=WINDOW, memory_graph=memory_graph)
    )
    source, target, mask = tokens(2, 12), tokens(2, 20), None
    if is_padded:
        mask = torch.ones(2, 12, dtype=torch.bool)
        mask[1, 7:] = False
    with torch.no_grad():
        memory = model.encode(source, attention_mask=mask)
        whole = model.decode(memory, target, attention_mask=mask)

    def run(text, cache):
        return model.decode(
            memory if not cache.length else torch.full_like(memory, torch.nan), text, attention_mask=mask, cache=cache
        )

    for prompt, at_once in ((1, 1), (4, 3)):
        found = stepped(run, KVCache(model, 20), target, prompt, at_once)
        torch.testing.assert_close(found, whole, atol=1e-12, rtol=0)


# -------------------------------------------------------------------------------------------------- what it forgets


@pytest.mark.parametrize("case", SQUARE, ids=lambda case: str(case.graph)[:60])
def test_slots_are_as_many_as_keys_are_heard_at_once(case):
    graph, n = (case.graph & Causal()).sized(case.n, case.n), case.n
    schedule, last = Schedule(graph, n, 0), analysis.last_reader(graph, n, n).tolist()
    alive = [[key for key in range(query + 1) if key == query or last[key] >= query] for query in range(n)]
    assert schedule.capacity == max(map(len, alive))
    for query, keys in enumerate(alive):
        slots = schedule.slots[keys].tolist()
        assert len(set(slots)) == len(keys)
        assert max(slots) < schedule.used[query] <= schedule.capacity


def test_a_window_takes_its_width_and_sinks_stay():
    cache = check(gpt(Causal() & Window(5, 0)), tokens(1, 40), 3)
    assert cache.nbytes == 2 * 2 * 4 * 6 * 4 * 8  # keys and values, layers, heads, slots, head_dim, bytes
    cache = check(gpt([WINDOW, Causal() & Window(2, 0)]), tokens(1, 40), 3)
    assert cache.nbytes == 2 * 4 * (8 + 3) * 4 * 8
    cache = check(gpt(FOUR), tokens(1, 40), 3)  # each head its own
    assert cache.nbytes == 2 * 2 * (40 + 4 + 40 + 10) * 4 * 8


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("graph", GRAPHS_OF_ANY_SIZE, ids=lambda graph: str(graph)[:60])
def test_cost_knows_the_bytes_before(graph, kv_heads):
    cache = check(gpt(graph, num_kv_heads=kv_heads), tokens(1, 30), 3)
    graphs = graph if isinstance(graph, list) else [graph] * 2
    known = analysis.cost(graphs, 30, dim=16, heads=4, kv_heads=kv_heads, dtype=torch.float64, cache=True)
    assert known.cache_bytes == cache.nbytes


def test_memory_stays_flat():
    model, sizes = gpt(WINDOW).float(), set()
    cache = KVCache(model, 2000)
    with torch.no_grad():
        model(tokens(1, 10), cache=cache)
        for token in tokens(1, 1990)[0]:
            model(token.view(1, 1), cache=cache)
            sizes.add(cache.nbytes)
    assert len(sizes) == 1


# ----------------------------------------------------------------------------------- trees, rows, files, kept positions


@pytest.mark.parametrize("graph", [Causal(), Causal() & Window(6, 0), WINDOW, Causal() & Strided(3), FOUR], ids=str)
@torch.no_grad()
def test_a_tree_is_several_texts_at_once(graph):
    model, text = gpt(graph), tokens(1, 40)
    nodes, tree = tokens(1, 46)[:, 40:], Tree([-1, -1, 0, 0, 2, 1])
    for accepted in ([], [1], [0, 2, 4], [0, 3]):
        cache = KVCache(model, 40)
        model(text[:, :10], cache=cache)
        found = model(nodes, cache=cache, tree=tree)
        for path in ([0, 2, 4], [0, 3], [1, 5]):
            whole = model(torch.cat([text[:, :10], nodes[:, path], text[:, 10 + len(path) :]], dim=1))
            torch.testing.assert_close(found[:, path], whole[:, 10 : 10 + len(path)], atol=1e-12, rtol=0)
        cache.accept(accepted)
        assert cache.length == 10 + len(accepted)
        after = torch.cat([text[:, :10], nodes[:, accepted], text[:, 10 + len(accepted) :]], dim=1)
        steps = [model(after[:, i : i + 1], cache=cache) for i in range(cache.length, 40)]
        torch.testing.assert_close(torch.cat(steps, 1), model(after)[:, 10 + len(accepted) :], atol=1e-12, rtol=0)


@pytest.mark.parametrize("is_padded", [False, True])
@torch.no_grad()
def test_rows_are_chosen_anew(is_padded):
    model, text = gpt(WINDOW), tokens(3, 20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[0, :3] = not is_padded
    cache, rows = KVCache(model, 20), torch.tensor([2, 0, 0])
    model(text[:, :8], cache=cache, attention_mask=mask[:, :8])
    cache.reorder(rows)
    text, mask = torch.cat([text[rows, :8], text[:, 8:]], dim=1), mask[rows]
    found = torch.cat([model(text[:, i : i + 1], cache=cache) for i in range(8, 20)], dim=1)
    torch.testing.assert_close(found, model(text, attention_mask=mask)[:, 8:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("is_padded", [False, True])
@torch.no_grad()
def test_saved_and_restored(tmp_path, is_padded):
    model, text, mask = gpt([WINDOW, FOUR]), tokens(2, 30), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = not is_padded
    cache = KVCache(model, 30)
    model(text[:, :9], cache=cache, attention_mask=mask)
    cache.save(tmp_path / "cache.safetensors")
    again = KVCache.load(tmp_path / "cache.safetensors", model)
    assert (again.length, again.nbytes, again.max_length) == (9, cache.nbytes, 30)
    for start in range(9, 30, 3):
        wanted = model(text[:, start : start + 3], cache=cache)
        assert torch.equal(model(text[:, start : start + 3], cache=again), wanted)
    with pytest.raises(ValueError, match="same config, dtype and graphs"):
        KVCache.load(tmp_path / "cache.safetensors", gpt(WINDOW))
    (tmp_path / "other").write_bytes(b"x")
    with pytest.raises(ValueError, match="can't be read"):
        KVCache.load(tmp_path / "other", model)
    with pytest.raises(FileNotFoundError):
        KVCache.load(tmp_path / "none", model)


@torch.no_grad()
def test_positions_among_the_keys_that_are_kept():
    """Beside a loop that holds, for each query, its keys as they are, and turns them by their places among them."""
    model = gpt(Causal() & (Window(5, 0) | Prefix(2)), num_layers=1)
    layer, rotary, text = model.transformer.layers[0], model.transformer.position, tokens(1, 30)
    cache = KVCache(model, 30, rotary="kept")
    found = stepped(model, cache, text, 12)
    x = model.embedding(text)
    h = layer.attention_norm(x)
    q, (k, v) = layer.attention.queries(h), layer.attention.keys_and_values(h)
    from attngraph.nn.positions import rotate

    outs = []
    for query in range(30):
        kept = sorted({0, 1} & set(range(query + 1)) | set(range(max(0, query - 5), query + 1)))
        cos, sin = rotary(torch.arange(len(kept)), torch.float64)
        keys = rotate(k[:, :, kept], cos, sin)
        scores = rotate(q[:, :, query : query + 1], cos[-1:], sin[-1:]) @ keys.mT / 2  # √head_dim
        outs.append(scores.softmax(-1) @ v[:, :, kept])
    x = x + layer.attention.out(torch.cat(outs, dim=2).transpose(1, 2).flatten(2))
    x = x + layer.feedforward(layer.feedforward_norm(x))
    torch.testing.assert_close(found, model.head(model.transformer.final_norm(x)), atol=1e-12, rtol=0)


@torch.no_grad()
def test_kept_positions_of_heads_with_graphs_of_their_own():
    model, text = gpt(PerHead([Causal(), WINDOW, WINDOW, WINDOW])), tokens(1, 30)
    one, two = KVCache(model, 30, rotary="kept"), KVCache(model, 30, rotary="kept")
    torch.testing.assert_close(model(text, cache=one), stepped(model, two, text, 1), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="a tree can't be given with rotary='kept'"):
        model(text[:, :2], cache=one, tree=Tree([-1, -1]))
    cache = KVCache(model, 20, rotary="kept")
    with pytest.raises(ValueError, match="room for max_length=20 nodes"):
        model(text, cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_by_length_within_what_was_trained(kind):
    scaling = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 300}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}
    check(gpt(Causal(), rotary_scaling=scaling), tokens(1, 290), 10)


@pytest.mark.parametrize("graph", [Causal() & Chunks(5), Documents([13, 17]) & Causal(), WINDOW], ids=str)
@torch.no_grad()
def test_trees_of_one_node(graph):
    model, text = gpt(graph), tokens(1, 30)
    cache, whole = KVCache(model, 30), model(text)
    model(text[:, :9], cache=cache)
    for place in range(9, 30):
        found = model(text[:, place : place + 1], cache=cache, tree=Tree([-1]))
        torch.testing.assert_close(found, whole[:, place : place + 1], atol=1e-12, rtol=0)
        cache.accept([0])


@pytest.mark.parametrize("cross", [True, False])
@torch.no_grad()
def test_a_tree_hears_a_memory(cross):
    decoder = config(cross=cross)
    model = randomized(EncoderDecoder(config(), decoder, VOCAB, decoder_graph=WINDOW, memory_graph=Window(4, 4)))
    text, nodes = tokens(1, 8), tokens(1, 14)[:, 8:]
    memory, cache = model.encode(tokens(1, 12)), KVCache(model, 20)
    model.decode(memory, text, cache=cache)
    found = model.decode(memory, nodes, cache=cache, tree=Tree([-1, -1, 0, 0, 2, 1]))
    for path in ([0, 2, 4], [0, 3], [1, 5]):
        whole = model.decode(memory, torch.cat([text, nodes[:, path]], dim=1))
        torch.testing.assert_close(found[:, path], whole[:, 8:], atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_copy_goes_on_by_itself():
    model, text = gpt([WINDOW, FOUR]), tokens(2, 20)
    cache = KVCache(model, 20)
    model(text[:, :8], cache=cache)
    other, rest = copy.deepcopy(cache), tokens(2, 32)[:, 20:]
    found = stepped_on(model, cache, text[:, 8:])
    torch.testing.assert_close(found, model(text)[:, 8:], atol=1e-12, rtol=0)
    whole = model(torch.cat([text[:, :8], rest], dim=1))
    torch.testing.assert_close(stepped_on(model, other, rest), whole[:, 8:], atol=1e-12, rtol=0)


def stepped_on(model, cache, text):
    return torch.cat([model(text[:, i : i + 1], cache=cache) for i in range(text.shape[1])], dim=1)


@torch.no_grad()
def test_a_file_of_another_dtype_or_kind_is_refused(tmp_path):
    model = gpt(WINDOW)
    cache = KVCache(model, 20)
    model(tokens(2, 8), cache=cache)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="same config, dtype and graphs"):
        KVCache.load(tmp_path / "cache", gpt(WINDOW).float())
    model.save(tmp_path)
    for path in (tmp_path / "model.safetensors", tmp_path):
        with pytest.raises(ValueError, match=r"was not written by|can't be read"):
            KVCache.load(path, model)
    own = randomized(Transformer(config(cross=True), Causal()))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    cache = KVCache(own, 9)
    own(x[:, :4], memory=x, memory_graph=Prefix(2), cache=cache)
    cache.save(tmp_path / "own")
    again = KVCache.load(tmp_path / "own", own)
    assert torch.equal(own(x[:, 4:], cache=again), own(x[:, 4:], cache=cache))


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KVCache(gpt(Causal()), 0), "max_length must be 1 or more"),
        (lambda: KVCache(gpt(Full()), 5), "layer 0 must be causal.*query 0 hears key 1"),
        (lambda: KVCache(gpt([Causal(), Causal() | Prefix(3)]), 5), "layer 1 must be causal.*query 0 hears key 1"),
        (lambda: KVCache(gpt(TopK(3) & Causal()), 5), "chosen by queries and keys.*use_cache=False"),
        (lambda: KVCache(gpt(lambda x: Causal()), 5), "a function of what the layer reads.*use_cache=False"),
        (lambda: KVCache(gpt(Causal() & Documents([3, 3])), 7), r"at least max_length=7 nodes.*\(6, 6\)"),
        (lambda: KVCache(gpt(Causal(), position="learned", max_length=4), 5), "at most 4, the model's learned"),
        (lambda: KVCache(gpt(Causal()), 5, rotary="near"), "rotary must be one of 'absolute', 'kept'"),
        (lambda: KVCache(gpt(Causal(), position="none"), 5, rotary="kept"), "rotary='kept' is of rotary positions"),
        (
            lambda: KVCache(
                gpt(
                    Causal(),
                    rotary_scaling={"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8},
                ),
                9,
            ),
            "change with the length of texts of more than 8 nodes",
        ),
        (lambda: KVCache(gpt(Batched([Causal().sized(9, 9), WINDOW.sized(9, 9)])), 9), "one for all rows of a batch"),
        (lambda: KVCache(torch.nn.Linear(2, 2), 5), "must be a Transformer, or have one"),
    ],
)
def test_what_no_cache_can_be_of(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@torch.no_grad()
def test_a_refused_call_leaves_the_cache_as_it_was():
    model, text = gpt(WINDOW), tokens(2, 12)
    cache = KVCache(model, 12)
    none = torch.zeros(2, 0, dtype=torch.int64)
    for call, message in [
        (lambda: model(none, cache=cache), "at least one new node"),
        (lambda: model(tokens(2, 13), cache=cache), "room for max_length=12 nodes, of which 0 are taken"),
        (lambda: gpt(WINDOW)(text, cache=cache), "one of this model"),
        (lambda: model(text[:1, :2], cache=cache, tree=Tree([-1, 0])), "give the cache its prompt first"),
        (lambda: cache.save("nowhere"), "after its prompt"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
    model(text[:, :5], cache=cache)
    for call, message in [
        (lambda: model(none, cache=cache), "at least one new node"),
        (lambda: model(tokens(2, 8), cache=cache), "room for max_length=12 nodes, of which 5 are taken"),
        (lambda: model(text[:1, :1], cache=cache), "of a batch of 2"),
        (lambda: model(text[:, 5:6], Causal(), cache=cache), "can't be given"),
        (lambda: model(text[:, 5:6], cache=cache, attention_mask=torch.ones(2, 1).bool()), "of the prompt alone"),
        (lambda: model(text[:, 5:6] + VOCAB, cache=cache), "tokens must be from 0 to 10"),
        (lambda: model(text[:, 5:7], cache=cache, tree=Tree([-1, 0])), "a tree continues one text"),
        (lambda: cache.accept([0]), "goes on from a call with tree="),
        (lambda: cache.reorder(torch.tensor([True, False])), "numbers of rows"),
        (lambda: cache.reorder(torch.tensor([[0, 1]])), "numbers of rows"),
        (lambda: cache.reorder(torch.tensor(0)), "numbers of rows"),
        (lambda: cache.reorder(torch.tensor([0, -1])), "rows must be from 0 to 1"),
        (lambda: cache.reorder(torch.tensor([0, 2])), "rows must be from 0 to 1"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
    model.transformer.layers[1].register_forward_pre_hook(lambda *_: 1 / 0 if model.fails else None)
    model.fails = True
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(text[:, 6:7], cache=cache)
        with pytest.raises(ZeroDivisionError):
            model(text[:, 6:9], cache=cache)
    model.fails = False
    found = torch.cat([model(text[:, i : i + 1], cache=cache) for i in range(5, 12)], dim=1)
    torch.testing.assert_close(found, model(text)[:, 5:], atol=1e-12, rtol=0)


def test_gradients_dropout_and_weights_are_refused():
    model = gpt(Causal(), dropout=0.1)
    with (
        torch.no_grad(),
        record(model),
        pytest.raises(ValueError, match="weights are not known in a call with a cache"),
    ):
        model(tokens(2, 3), cache=KVCache(model, 3))
    with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
        model(tokens(1, 3), cache=KVCache(model, 3))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"model.eval\(\)"):
        model.train()(tokens(1, 3), cache=KVCache(model, 3))


@torch.no_grad()
def test_graphs_that_changed_are_noticed():
    model, text = gpt(WINDOW), tokens(1, 8)
    cache = KVCache(model, 8)
    model(text[:, :3], cache=cache)
    model.transformer.graphs = WINDOW  # the same
    model(text[:, 3:4], cache=cache)
    model.transformer.graphs = Causal()
    with pytest.raises(RuntimeError, match="graphs have changed"):
        model(text[:, 4:5], cache=cache)


def test_a_tree_waits_to_be_accepted():
    model, text = gpt(Causal()), tokens(1, 8)
    cache = KVCache(model, 8)
    with torch.no_grad():
        model(text[:, :3], cache=cache)
        model(text[:, 3:6], cache=cache, tree=Tree([-1, 0, 0]))
        with pytest.raises(RuntimeError, match="waits to be accepted"):
            model(text[:, 3:4], cache=cache)
        for path in ([1], [0, 0], [3], [-1]):
            with pytest.raises(ValueError, match="from a root on"):
                cache.accept(path)
        cache.accept([0, 2])
    assert cache.length == 5


def test_under_inference_mode_and_alone():
    model = randomized(Transformer(config(), EdgeList([[0, 0, 1], [0, 1, 2]], 4) | Identity()))
    x, cache = torch.randn(2, 4, 16, dtype=torch.float64), KVCache(model, 4)
    with torch.inference_mode():
        first = model(x[:, :2], cache=cache)
    with torch.no_grad():
        rest = model(x[:, 2:], cache=cache)
        torch.testing.assert_close(torch.cat([first, rest], dim=1), model(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("is_compiled", [False, True])
@torch.no_grad()
def test_a_compiled_model_takes_one(is_compiled):
    """Its steps run as they are: a program would write the numbers of each into itself."""
    torch._dynamo.reset()
    model, text = gpt(WINDOW), tokens(2, 12)
    compiled = torch.compile(model, backend="eager") if is_compiled else model
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        found = stepped(compiled, KVCache(compiled, 12), text, 3)
    torch.testing.assert_close(found, model(text), atol=1e-12, rtol=0)
