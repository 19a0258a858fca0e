"""hf.connect: any model of transformers on any graph, as its own eager attention with a mask computes it."""

import copy
import inspect
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from families import DECODERS, FAMILIES, IMAGES, SEQUENCES, N, inputs, made
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GenerationMixin,
    GitConfig,
    GitForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import eager_mask

from attngraph import Causal, Full, Global, PerHead, Prefix, TopK, Window, from_edge_index, from_function
from attngraph.hf import attention_modules, connect, disconnect, load, perplexity, save
from attngraph.hf.connecting import implement
from attngraph.hf.modules import is_cross, require_all_known

EXAMPLES = Path(__file__).parent.parent / "examples"


def nodes_of(name):
    """How many queries and keys each kind of module has."""
    return 17 if name in IMAGES else N


def graphs_by_module(model, name, per_head=False):
    """A graph by chance for each module of attention, in its own sizes; every query hears somebody."""
    chance, found = torch.Generator().manual_seed(3), {}
    for number, (path, module) in enumerate(attention_modules(model).items()):
        decodes = name in SEQUENCES and (".decoder" in f".{path}")
        n = N // 2 if decodes else nodes_of(name)
        m = N if is_cross(path, module) else n
        some = from_edge_index(torch.randint(min(n, m), (2, 5 * n), generator=chance), size=(m, n))
        graph = some | Window(3, 3) if n == m else some | Prefix(2).sized(n, m)
        if per_head:
            graph = PerHead([graph, Window(2 + number, 1), Window(5, 5) | Prefix(1), graph | Prefix(2)])
        found[path] = graph
    return found


def by_hand(model, graphs, mode="intersect"):
    """An independent route: the model's own eager attention, with the graphs in its masks."""
    AttentionInterface.register("by_hand", eager_with_a_mask)
    AttentionMaskInterface.register("by_hand", eager_mask)
    modules = attention_modules(model)
    implement(model, modules, "by_hand")
    for path, graph in graphs.items():
        modules[path].by_hand = graph, mode
    return model


def eager_with_a_mask(module, q, k, v, attention_mask, **options):
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if hasattr(module, "by_hand"):
        graph, mode = module.by_hand
        n, m = q.shape[2], k.shape[2]
        edges = (graph if None not in graph.size else graph.sized(m, m)).mask()
        edges = edges[..., edges.shape[-2] - n :, :]
        least = torch.finfo(q.dtype).min
        ours = torch.zeros(edges.shape, dtype=q.dtype).masked_fill(~edges, least).view(1, -1, n, m)
        attention_mask = ours if attention_mask is None or mode == "replace" else attention_mask + ours
        attention_mask = attention_mask.clamp(min=least)
    return eager(module, q, k, v, attention_mask, **options)


@pytest.fixture(autouse=True)
def softmax_in_double_precision(monkeypatch):
    """Their eager attention takes float32 for it, whatever comes."""
    real = nn.functional.softmax
    monkeypatch.setattr(
        nn.functional,
        "softmax",
        lambda x, dim, dtype=None: real(x, dim, dtype=max((x.dtype, dtype or x.dtype), key=lambda d: d.itemsize)),
    )


def of_dtype(given, dtype):
    return {
        key: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in given.items()
    }


def logits(model, given):
    out = model(**given)
    return out.logits if hasattr(out, "logits") else out[0]


def close(found, expected, dtype=torch.float64):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1, float(expected.abs().max())))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_without_a_graph_a_model_is_what_it_was(name, dtype):
    given = of_dtype(inputs(name), dtype)
    model = made(name, dtype)
    expected = logits(model, given)
    assert connect(model, dict.fromkeys(attention_modules(model), Full())) is model
    close(logits(model, given), expected, dtype)
    assert disconnect(model) is model
    torch.testing.assert_close(logits(model, given), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["intersect", "replace"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_are_masks_of_eager_attention(name, per_head, mode):
    """Logits and gradients, of a graph for each module."""
    model, other, given = made(name), made(name), inputs(name)
    graphs = graphs_by_module(model, name, per_head)
    by_hand(other, graphs, mode)
    connect(model, graphs, mode=mode)
    found, expected = logits(model, given), logits(other, given)
    close(found, expected)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype)
    for one in (found, expected):
        (one * weights).sum().backward()
    for (path, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        if two.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=1e-6, msg=f"the gradient of {path}")


# ------------------------------------------------------------------------------------------- padding, packing, caches

LOCAL = Causal() & (Window(5, 0) | Prefix(2))


def connected(name, graph=LOCAL, **options):
    return connect(made(name), graph, **options)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*DECODERS, "bert", "modernbert"])
def test_padding_on_either_side_takes_no_place(name, side):
    """Each text as it is by itself."""
    model, lengths = connected(name), (N, 15, 7)
    tokens, mask = torch.zeros(3, N, dtype=torch.long), torch.zeros(3, N, dtype=torch.long)
    texts = [inputs(name, 1, length)["input_ids"][0] for length in lengths]
    for row, text in enumerate(texts):
        part = slice(N - len(text), N) if side == "left" else slice(len(text))
        tokens[row, part], mask[row, part] = text, 1
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if name not in ("modernbert",) else {}
    found = logits(model, {**inputs(name), "input_ids": tokens, "attention_mask": mask, **positions})
    for row, text in enumerate(texts):
        alone = logits(model, {**inputs(name), "input_ids": text[None]})[0]
        exact = torch.float32 if name == "modernbert" else torch.float64  # its positions turn in float32
        close(found[row][mask[row].bool()], alone, exact)


@pytest.mark.parametrize("name", sorted({*DECODERS} - {"gpt_oss"}))  # which does not tell its masks of positions
def test_packed_texts_are_as_by_themselves(name):
    model, lengths = connected(name), ((9, 4, 11), (13, 10, 1))
    texts = [[inputs(name, 1, length)["input_ids"][0] for length in row] for row in lengths]
    given = {
        "input_ids": torch.stack([torch.cat(row) for row in texts]),
        "position_ids": torch.stack([torch.cat([torch.arange(len(text)) for text in row]) for row in texts]),
    }
    found = logits(model, {**given, "use_cache": False})
    expected = [torch.cat([logits(model, {"input_ids": t[None], "use_cache": False})[0] for t in row]) for row in texts]
    close(found, torch.stack(expected))


CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.generate).parameters else "past_key_values"
KEPT = "cache" if "cache" in inspect.signature(T5ForConditionalGeneration.forward).parameters else CACHE
CACHES = ["dynamic", "static", "offloaded", "none"]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_gives_the_tokens_of_whole_texts(name, cache):
    """Greedy, of texts with padding in front; and by the independent route."""
    graph = {"*": Causal() & (Window(7, 0) | Prefix(1))}
    if cache == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloading needs a GPU")
    model = connected(name, graph)
    tokens = inputs(name)["input_ids"][:, :12].clone()
    mask = torch.ones_like(tokens)
    tokens[1, :5] = mask[1, :5] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = mask
    implementation = {} if cache in ("none", "dynamic") else {"cache_implementation": cache}
    found = model.generate(tokens, **options, **implementation, use_cache=cache != "none")
    expected = tokens
    for _ in range(12):
        now = torch.cat([mask, mask.new_ones(2, expected.shape[1] - 12)], 1)
        positions = (now.cumsum(-1) - 1).clamp(min=0)
        given = {"input_ids": expected, "attention_mask": now, "position_ids": positions, "use_cache": False}
        expected = torch.cat([expected, logits(model, given)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_beams_and_assistants(name):
    model, tokens = connected(name), inputs(name)["input_ids"][:1, :9]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    beams = [model.generate(tokens, num_beams=3, use_cache=use, **options) for use in (True, False)]
    assert torch.equal(*beams)
    alone = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, assistant_model=connected(name), **options), alone)
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=2, **options), alone)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("padded", [False, True])
def test_keys_that_nobody_hears_leave_the_cache(name, padded, monkeypatch):
    from attngraph.hf import forgetting

    monkeypatch.setattr(forgetting, "MOST_DEAD", 2)
    model, whole = connected(name, evict=True), connected(name)
    tokens = inputs(name)["input_ids"][:, :12].clone()
    mask = torch.ones_like(tokens)
    if padded:
        tokens[1, :5] = mask[1, :5] = 0
    options = {"do_sample": False, "attention_mask": mask, "pad_token_id": 0, "eos_token_id": None}
    cache = DynamicCache(config=model.config)
    found = model.generate(tokens, max_new_tokens=60, **{CACHE: cache}, **options)
    assert torch.equal(found, whole.generate(tokens, max_new_tokens=60, **options))
    assert max(layer.keys.shape[-2] for layer in cache.layers) <= 12 + 5 * padded
    assert cache.get_seq_length() == 71


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_decoder_hears_a_memory_by_a_graph(name):
    """With a cache as without; queries know how many came before."""
    model = made(name)
    sizes = {path: (is_cross(path, module)) for path, module in attention_modules(model).items()}
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(N), indexing="ij")
    near = from_edge_index(torch.stack([columns, rows])[:, (rows - columns).abs() <= 3], size=(N, 64)) | Prefix(1)
    graphs = {path: near if cross else LOCAL for path, cross in sizes.items() if "decoder" in path}
    connect(model, graphs)
    given = {key: x for key, x in inputs(name).items() if key in ("input_ids", "input_features")}
    tokens, cache, found = inputs(name)["decoder_input_ids"], None, []
    for step in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:5], tokens[:, 5:8]):
        out = model(**given, decoder_input_ids=step, use_cache=True, **({} if cache is None else {KEPT: cache}))
        cache = out[KEPT]
        found.append(out.logits)
    now = {path: near.rows(0, 8) if sizes[path] else graph for path, graph in graphs.items()}
    connect(model, now)
    close(torch.cat(found, 1), logits(model, {**given, "decoder_input_ids": tokens[:, :8], "use_cache": False}))


# ------------------------------------------------------------------------------------------- the rest of transformers


def test_models_keep_their_graphs_apart():
    given = inputs("llama")
    one, two = connected("llama"), connected("llama", Causal() & Window(2, 0))
    plain = made("llama")
    expected = [logits(model, given) for model in (one, two)]
    assert not torch.equal(*expected)
    again = copy.deepcopy(one)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda model: logits(model, given), [one, two, again, one] * 4))
    for number, each in enumerate(found):
        close(each, expected[number % 4 == 1])
    disconnect(one)
    close(logits(again, given), expected[0])
    forgets = connected("llama", evict=True)
    again = copy.deepcopy(forgets)
    disconnect(again)
    assert len(forgets._forward_pre_hooks) == 1
    assert not again._forward_pre_hooks
    config = made("llama").config
    first, second = (LlamaForCausalLM(config).double().eval() for _ in range(2))  # of one config
    connect(first, LOCAL)
    told = logits(first, given)
    connect(second, Causal() & Window(2, 0))
    disconnect(second)
    assert second.config.to_dict() == config.to_dict()
    close(logits(first, given), told)
    close(logits(one, given), logits(plain, given))


def test_graphs_travel_with_a_saved_model(tmp_path):
    model = connected("llama", {"*.0.*": Causal() & Window(4, 0), "*.1.*": Prefix(3) | Window(1, 0)}, evict=True)
    expected = logits(model, inputs("llama"))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert not torch.equal(logits(again, inputs("llama")), expected)  # until it is connected
    close(logits(connect(again), inputs("llama")), expected)
    assert again.config.attngraph["evict"]
    disconnect(again)
    with pytest.raises(ValueError, match="needs a graph, or a model whose config keeps one"):
        connect(again)


def test_a_graph_that_is_no_text_is_not_kept():
    with pytest.warns(UserWarning, match="keeps no graph that can't be written"):
        connected("llama", from_function(lambda i, j: i - j < 3))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = connected("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.get_input_embeddings().requires_grad_()
        mask = torch.ones(2, N, dtype=torch.long)
        mask[1, :9] = 0
        model(**inputs("llama"), attention_mask=mask, labels=inputs("llama")["input_ids"]).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_weights_are_given_when_they_are_asked_for(name):
    model, other = made(name), made(name)
    graphs = graphs_by_module(model, name)
    by_hand(other, graphs)
    connect(model, graphs)
    given = {**inputs(name), "output_attentions": True}
    found, expected = model(**given), other(**given)
    for key in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        if expected.get(key):
            for one, two in zip(found[key], expected[key], strict=True):
                close(one, two)


@pytest.mark.parametrize("padded", [False, True])
def test_a_compiled_model(padded):
    model = connected("llama")
    given = inputs("llama")
    mask = torch.ones(2, N, dtype=torch.long)
    if padded:
        mask[1, :6] = 0
    given |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    expected = logits(model, given)
    run = torch.compile(model, backend="aot_eager")
    close(logits(run, given)[mask.bool()], expected[mask.bool()])
    assert set(attention_modules(run)) == set(attention_modules(model))


def test_dropout_in_training():
    torch.manual_seed(0)
    model = connect(FAMILIES["llama"]().train(), LOCAL)
    model.config.attention_dropout = 0.5
    for module in attention_modules(model).values():
        module.attention_dropout = 0.5
    one, two = (logits(model, inputs("llama")) for _ in range(2))
    assert not torch.equal(one, two)


# ------------------------------------------------------------------------------------------------- what is an error


def test_what_cannot_be_is_told():
    small = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    for model in (BloomForCausalLM(BloomConfig(**small)), FalconForCausalLM(FalconConfig(**small))):
        with pytest.raises(ValueError, match="ForCausalLM computes its attention by itself"):
            connect(model, LOCAL)
    with pytest.raises(TypeError, match="must be one of transformers"):
        connect(nn.Linear(2, 2), LOCAL)
    model = made("llama")
    with pytest.raises(ValueError, match=r"'\*.7.\*' must match a module of attention: model.layers.0.self_attn"):
        connect(model, {"*.7.*": LOCAL})
    with pytest.raises(TypeError, match=r"the graph of model.layers.0.self_attn must be a Graph \(got 3\)"):
        connect(model, lambda module: 3)
    with pytest.raises(ValueError, match="at least one module"):
        connect(model, lambda module: None)
    assert model.config._attn_implementation == "eager"  # nothing was half changed
    given = inputs("llama")
    connect(model, Full().sized(9, 9))
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn: .*9"):
        model(**given)
    connect(model, PerHead([LOCAL] * 3))
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn: .*heads"):
        model(**given)


def test_a_cache_needs_a_causal_graph():
    model = connected("llama", Window(3, 3), mode="replace")
    tokens = inputs("llama")["input_ids"]
    model(tokens, use_cache=False)
    with pytest.raises(ValueError, match=r"a graph must be causal.*use_cache=False, mode='intersect'"):
        model.generate(tokens, max_new_tokens=3, do_sample=False)
    connect(model, Window(3, 3))
    model.generate(tokens, max_new_tokens=3, do_sample=False)


def test_keys_that_a_sliding_cache_dropped_are_missed():
    model = connected("mistral", Causal() & Window(9, 0), mode="replace")
    tokens = inputs("mistral")["input_ids"]
    model(tokens, use_cache=False)
    with pytest.raises(ValueError, match="sliding cache has dropped keys"):
        model.generate(tokens, max_new_tokens=3, do_sample=False)
    connect(model, Causal() & Window(4, 0), mode="replace")
    model.generate(tokens, max_new_tokens=3, do_sample=False)


# ---------------------------------------------------------------------------------------------- what a graph costs


def test_what_a_graph_costs(tmp_path, capsys):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.save_pretrained(tmp_path / "model")
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 6, encoding="utf-8")
    given = [str(tmp_path / "model"), "--text", str(text), "--bytes", "--out", str(tmp_path / "out"), "--sweep"]
    perplexity.main([*given, "--graph", "Window(3, 0)", "--graph", "Full(), Window(3, 0)", "--tokens", "200"])
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "costs.json").read_text())
    names = [each["name"] for each in found]
    graph = "Window(3, 0)"
    assert names == ["as it is", graph, f"{graph} in layer 0", f"{graph} in layer 1", f"Full(), {graph}"]
    assert all(name in told for name in names)
    assert found[3]["loss"] == pytest.approx(found[4]["loss"])
    kept = (Causal() & Window(3, 0)).num_edges(64, 64) / Causal().num_edges(64, 64)
    assert found[1]["kept"] == pytest.approx(kept)
    assert found[2]["kept"] == pytest.approx((1 + kept) / 2)
    assert len({round(each["loss"], 6) for each in found}) == 4
    tokens = torch.tensor(list(text.read_bytes()))[:200]
    by_hand = [
        nn.functional.cross_entropy(model(piece[None]).logits[0, :-1], piece[1:], reduction="sum")
        for piece in tokens.split(64)
    ]
    assert found[0]["loss"] == pytest.approx(float(sum(by_hand)) / (200 - 4), rel=1e-5)
    assert (tmp_path / "out" / "costs.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        perplexity.main([*given, "--graph", "Window(3"])
    assert "Window(3" in capsys.readouterr().err
    with pytest.raises(ValueError, match="one, or one for each of 2 layers"):
        perplexity.costs(model, tokens, [[Full()] * 3])
    with pytest.raises(ValueError, match="disconnect"):
        perplexity.costs(connect(model, LOCAL), tokens, [[Full()]])


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
@pytest.mark.parametrize("given", ["padded", "packed", "plain"])
def test_compiled_models_of_every_kind(name, given):
    """Whatever becomes of the mask: numbers, or pairs."""
    model, call, mask = connected(name), dict(inputs(name)), torch.ones(2, N, dtype=torch.long)
    if given == "padded":
        mask[1, :6] = 0
        call |= {"attention_mask": mask}
    if given == "packed":
        if name == "bert":
            pytest.skip("BERT packs nothing")
        call |= {"position_ids": torch.cat([torch.arange(9), torch.arange(15)]).expand(2, -1)}
    expected = logits(model, call)
    found = logits(torch.compile(model, backend="aot_eager"), call)
    close(found[mask.bool()], expected[mask.bool()])


def test_a_mask_of_pairs():
    model, n = made("llama"), N
    given = inputs("llama")
    some = torch.rand(2, 1, n, n, generator=torch.Generator().manual_seed(0)) < 0.5
    some = (some | torch.eye(n, dtype=torch.bool) | torch.eye(n, dtype=torch.bool).roll(1, 0)).tril()
    expected = logits(made("llama", attention="sdpa"), {**given, "attention_mask": some & LOCAL.mask(n, n)})
    connect(model, LOCAL)
    close(logits(model, {**given, "attention_mask": some}), expected)
    least = torch.finfo(torch.float64).min
    close(
        logits(model, {**given, "attention_mask": torch.zeros(some.shape).double().masked_fill(~some, least)}), expected
    )
    connect(model, LOCAL, mode="replace")
    with pytest.raises(ValueError, match="a mask of pairs does not say which tokens are padding"):
        logits(model, {**given, "attention_mask": some})


def test_chosen_edges_have_no_cache():
    model, given = connected("llama", TopK(4)), inputs("llama")
    logits(model, given)
    with pytest.raises(ValueError, match="which queries and keys choose, needs all of them: use_cache=False"):
        model.generate(given["input_ids"], max_new_tokens=3, do_sample=False)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"hf.connect needs transformers 5\.17 or newer: pip install"):
        connect(nn.Linear(2, 2), LOCAL)
    code = "import sys; sys.modules['transformers'] = None; import attngraph.hf; attngraph.hf.connect"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------- what a new user found to go wrong


def small(kind, config, **options):
    """A model whose attention can be told from another's."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = kind(config(**{**sizes, "vocab_size": 97, **options})).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.double()


def llama(**options):
    return small(LlamaForCausalLM, LlamaConfig, num_key_value_heads=2, max_position_embeddings=4096, **options)


TOKENS = torch.arange(48).reshape(2, 24) * 29 % 90 + 3
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.slow
@pytest.mark.parametrize("graph", [Full(), Window(5, 0)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_layers_that_are_compiled_by_themselves(graph, packed):
    """They get a mask that was made before: what it says of the model's own pattern holds."""
    model = connect(small(MistralForCausalLM, MistralConfig, num_key_value_heads=2, sliding_window=4), graph)
    options = {"use_cache": False}
    if packed:
        options["position_ids"] = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    expected = model(TOKENS, **options).logits
    for layer in model.model.layers:
        layer.compile(backend="eager")
    torch.testing.assert_close(model(TOKENS, **options).logits, expected)


def test_cross_attention_by_any_name_is_left_alone():
    """BERT's stands in `crossattention.self`."""
    model = small(BertLMHeadModel, BertConfig, is_decoder=True, add_cross_attention=True)
    names = [name for name, module in attention_modules(model).items() if is_cross(name, module)]
    assert len(names) == 2
    assert all("crossattention" in name for name in names)
    memory = torch.randn(2, 24, 32, dtype=torch.float64)
    graph = Window(3, 3) | Prefix(1)
    alone = connect(copy.deepcopy(model), {"*.attention.self": graph})(TOKENS, encoder_hidden_states=memory).logits
    assert torch.equal(connect(model, graph)(TOKENS, encoder_hidden_states=memory).logits, alone)


def test_models_that_a_graph_would_miss_are_told():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    git = GitForCausalLM(GitConfig(vocab_size=97, vision_config={**sizes, "image_size": 16, "patch_size": 4}, **sizes))
    with pytest.raises(ValueError, match="some of its attention by itself"):
        connect(git, {"*image_encoder*": Full()})

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = llama(), llama()

    with pytest.raises(ValueError, match=r"got a and b\): connect each by itself"):
        connect(Two(), Full())

    class Chosen(nn.Module):
        def forward(self, q, k, v, attention_interface, ALL_ATTENTION_FUNCTIONS=None):
            return attention_interface(self, q, k, v, None, scaling=1.0, block_indices=None)

    with pytest.raises(ValueError, match="with block_indices, which a graph does not know"):
        require_all_known(git, {"layer": Chosen()})


def test_a_graph_that_stops_to_be_causal_is_told_when_it_does():
    graph = (Causal() & Window(3, 0)) | Global([30])
    model = connect(llama(), graph, mode="replace")
    with pytest.raises(ValueError, match="must be causal"):
        model.generate(TOKENS, max_new_tokens=16, **GREEDY)
    assert model.generate(TOKENS, max_new_tokens=4, **GREEDY).shape == (2, 28)


def test_keys_of_far_queries_are_not_let_go():
    graph = Causal() & (Window(8, 0) | Global([1100]))
    tokens = [
        connect(llama(), graph, evict=evict).generate(TOKENS[:1], max_new_tokens=1100, **GREEDY)
        for evict in (True, False)
    ]
    assert torch.equal(*tokens)
    short = connect(llama(), graph, evict=True)
    short.config.max_position_embeddings = 64
    with pytest.raises(ValueError, match="that were let go"):
        short.generate(TOKENS[:1], max_new_tokens=1100, **GREEDY)


def test_a_cache_that_let_keys_go_is_for_one_graph():
    model = connect(llama(), Window(4, 0), evict=True)
    tokens = torch.cat([TOKENS] * 4, 1)
    cache = DynamicCache()
    model(tokens, past_key_values=cache)
    model(tokens[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="by which it has let keys go"):
        connect(model, Window(40, 0))(tokens[:, :1], past_key_values=cache)


def test_sliding_layers_let_keys_go_too():
    model = small(MistralForCausalLM, MistralConfig, num_key_value_heads=2, sliding_window=64)
    given = {"max_new_tokens": 150, "return_dict_in_generate": True, **GREEDY}
    kept, others = (
        connect(copy.deepcopy(model), Window(5, 0), evict=e).generate(TOKENS, **given) for e in (True, False)
    )
    assert torch.equal(kept.sequences, others.sequences)
    assert kept.past_key_values.layers[0].keys.shape[-2] < 48


def test_padding_in_front_takes_no_place_in_a_memory():
    model = small(
        T5ForConditionalGeneration, T5Config, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    connect(model, {"*EncDec*": Window(3, 3) | Prefix(1)})
    texts = TOKENS[:, :10]
    expected = model(input_ids=TOKENS, decoder_input_ids=texts).logits
    padded = torch.cat([torch.zeros_like(TOKENS[:, :5]), TOKENS], 1)
    seen = (padded > 0).long()
    torch.testing.assert_close(
        model(input_ids=padded, attention_mask=seen, decoder_input_ids=texts).logits, expected, atol=1e-9, rtol=1e-9
    )
    with pytest.raises(ValueError, match="pad on the right"):
        model(input_ids=TOKENS, decoder_input_ids=padded, decoder_attention_mask=seen)


def test_packed_texts_that_transformers_does_not_see_are_told():
    places = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    model = connect(llama(), Window(5, 0))
    with pytest.raises(ValueError, match="use_cache=False"):
        model(TOKENS, position_ids=places)
    model(TOKENS, position_ids=places, use_cache=False)


def test_edges_kept_are_those_of_the_model_itself():
    model = small(MistralForCausalLM, MistralConfig, num_key_value_heads=2, sliding_window=8)
    found = perplexity.costs(model, TOKENS.flatten() % 97, [[Full()], [Window(4, 0)]], context=48)
    own = Causal() & Window(7, 0)
    assert found[1].kept == 1.0
    assert found[2].kept == (own & Window(4, 0)).num_edges(48, 48) / own.num_edges(48, 48)


def test_a_mask_of_numbers_is_one_of_pairs():
    model, pairs = connect(llama(), Window(5, 0)), torch.ones(24, 24, dtype=torch.int64).tril().expand(2, 1, -1, -1)
    expected = model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(model(TOKENS, attention_mask=pairs, use_cache=False).logits, expected)


def test_each_way_to_keep_graphs_is_read_by_its_own(tmp_path):
    model = connect(llama().float(), Window(5, 0))
    model.save_pretrained(tmp_path / "connected")
    with pytest.raises(ValueError, match=r"was written by hf\.connect"):
        load(tmp_path / "connected")
    disconnect(model).save_pretrained(tmp_path / "own")
    made = load(tmp_path / "own")
    made.transformer.graphs = Causal() & Window(5, 0)
    save(made, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"attngraph\.hf\.load reads them"):
        connect(LlamaForCausalLM.from_pretrained(tmp_path / "saved"))


def test_a_pretrained_model_completes_a_prompt(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["the", "cat", "sat", "on", "a", "mat"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="the"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    small(LlamaForCausalLM, LlamaConfig, vocab_size=6, num_key_value_heads=2).float().save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    command = [sys.executable, str(EXAMPLES / "chat.py"), str(tmp_path), "--tokens", "4", "--temperature", "0"]

    def told(*options, **given):
        return subprocess.run([*command, *options], capture_output=True, text=True, **given)

    whole = told("--prompt", "the cat sat on")
    assert whole.stdout.startswith("the cat sat on ")
    assert len(whole.stdout.split()) == 8
    assert told(input="the cat sat on\n").stdout == whole.stdout
    assert told("--prompt", "the cat sat on", "--graph", "Identity()").stdout != whole.stdout
    assert "not part of a graph expression" in told("--prompt", "the", "--graph", "Causl()").stderr
    assert (
        "config.json" in subprocess.run([*command[:2], str(tmp_path / "none")], capture_output=True, text=True).stderr
    )
