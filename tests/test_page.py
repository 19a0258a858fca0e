"""The page of a stack of graphs: what it is told is what the graphs are; its server answers nobody else."""

import base64
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from graphs import GRAPHS

from attngraph import (
    Causal,
    Full,
    PerHead,
    Prefix,
    Random,
    TopK,
    Window,
    analysis,
    draw,
    from_function,
    parse,
    plan,
    record,
)
from attngraph.draw.encoding import encoded, packed
from attngraph.draw.evaluating import Evaluator, answered, toggled
from attngraph.draw.pages import SCRIPTS, asset, data_of
from attngraph.draw.server import Server
from attngraph.draw.tour import tour
from attngraph.hf import save
from attngraph.models import GPT, EncoderDecoder, ViT
from attngraph.nn import TransformerConfig

LOCAL = Causal() & (Window(64, 0) | Prefix(4))


def unpacked(text, delta=False):
    """The numbers of `packed`, read one byte after the other."""
    found, value, bits, last = [], 0, 0, 0
    for byte in base64.b64decode(text):
        value |= (byte & 127) << bits
        bits += 7
        if byte < 128:
            number = -(value + 1) // 2 if value % 2 else value // 2
            last = last + number if delta else number
            found.append(last)
            value = bits = 0
    return found


def edges_told(part, n, m):
    """The edges that a page is told of, as a mask."""
    found = torch.zeros(n, m, dtype=torch.bool)
    for top, bottom, left, right, low, high, residue, period in zip(*map(unpacked, part["cells"]), strict=True):
        for q in range(top, bottom):
            for k in range(max(left, q + low), min(right, q + high)):
                found[q, k] |= (k - q - residue) % period == 0
    counts, gaps, lengths = map(unpacked, part["runs"])
    runs = iter(zip(gaps, lengths, strict=True))
    for q, count in enumerate(counts):
        end = 0
        for _ in range(count):
            gap, length = next(runs)
            found[q, end + gap : end + gap + length + 1] = True
            end += gap + length + 1
    found[unpacked(part["less"][0], delta=True), unpacked(part["less"][1])] = False
    return found


@pytest.mark.parametrize("delta", [False, True])
def test_numbers_are_what_was_packed(delta):
    numbers = torch.tensor([0, 1, -1, 63, 64, -64, -65, 2**40, -(2**40), 7, 7])
    assert unpacked(packed(numbers, delta), delta) == numbers.tolist()
    assert packed(numbers[:0]) == ""


@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")
def test_a_page_is_told_the_edges_of_every_graph(case):
    heads = [case.graph.of_head(h) for h in range(case.graph.heads)] if case.graph.heads else [case.graph]
    masks = case.mask if case.graph.heads else case.mask[None]
    for head, mask in zip(heads, masks, strict=True):
        assert torch.equal(edges_told(encoded(head, case.n, case.m), case.n, case.m), mask)


def test_too_many_runs_are_shares():
    found = encoded(Causal() & Random(8), 5000, 5000, most=10_000)
    assert found["shape"] == [125, 125]
    assert len(base64.b64decode(found["shares"])) == 125 * 125
    assert "shares" in encoded(from_function(lambda q, k: (q * k) % 7 == 0), 2000, 2000, pairs=1 << 20)
    assert "cells" in encoded(from_function(lambda q, k: (q * k) % 7 == 0), 1000, 1000)


def test_what_a_page_says_is_what_analysis_and_plan_say():
    layers = [LOCAL] * 3 + [Causal()]
    found = draw.page(layers, 512, heads=4, head_dim=32)
    told, data = dict(found.data["facts"]), found.data
    assert told["receptive field"].endswith(", ".join(map(str, analysis.growth(layers, 511, 512))))
    assert [graph["edges"] for graph in data["graphs"]] == [[g.num_edges(512)] for g in (LOCAL, Causal())]
    made = plan(LOCAL, 512, heads=4, head_dim=32)
    assert data["graphs"][0]["chosen"] == list(made.chosen)
    assert {name for name, *_ in data["graphs"][0]["backends"]} == made.candidates.keys()
    assert made.costs.source in data["graphs"][0]["source"]
    assert data["layers"] == [0, 0, 0, 1]
    assert repr(found) == "Page('layers 0–2: Causal() & (Window(64, 0) | Prefix(4)); layer 3: Causal()', 512 × 512)"


def test_a_page_is_one_small_file(tmp_path):
    written = draw.page([Window(256, 0) | Prefix(4) | Random(8)] * 6, 4096).save(tmp_path / "see.html")
    text = written.read_text()
    assert written == tmp_path / "see.html"
    assert len(text.encode()) <= 300_000
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://""", text)
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    with pytest.raises(FileNotFoundError, match="there is no"):
        draw.page(Causal(), 8).save(tmp_path / "none" / "see.html")
    with pytest.raises(ValueError, match="that of a file"):
        draw.page(Causal(), 8).save(tmp_path)


def test_text_in_a_page_is_text():
    bad = ["</script><script>alert(1)</script>", "<!--", '"', "&amp;", "{{data}}", "\u2028", "x", "y"]
    made = draw.page(Causal(), 8, labels=bad)
    data = re.search('<script type="application/json" id="data">(.*?)</script>', made.html, re.DOTALL)[1]
    assert json.loads(data)["labels"] == bad
    assert made.html.count("<script") == 1 + len(SCRIPTS)
    frame = made._repr_html_()
    assert frame.count("<") == frame.count(">") == 4  # of the frame and of the text in it
    assert 'sandbox="allow-scripts"' in frame
    for name in SCRIPTS:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", asset(name))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: draw.page([], 8), ValueError, "one for each layer"),
        (lambda: draw.page(None), ValueError, "where nothing was recorded"),
        (lambda: draw.page(Causal()), ValueError, "give the number of nodes"),
        (lambda: draw.page(Causal(), 8, heads=0), ValueError, "heads must be"),
        (lambda: draw.page(Causal(), 8, labels=["a"]), ValueError, "must name each of 8"),
        (lambda: draw.page(recorded=heard(top=4), n=30), ValueError, "n must be as many nodes as were recorded, 20"),
        (lambda: draw.page(Causal(), 8, image=torch.rand(2, 3, 3, 3)), ValueError, "image must have shape"),
        (lambda: draw.page(Causal(), 8, image=torch.rand(4, 4)), ValueError, "grid must be the rows and columns"),
        (lambda: draw.page(Causal(), 8, image=torch.full((4, 4), torch.nan), grid=(2, 2)), ValueError, "finite"),
        (lambda: draw.page(Causal(), 8, recorded=3), TypeError, "must be what attngraph.record"),
        (lambda: draw.page([Causal(), Full()], recorded=heard(top=4)), ValueError, "one for each recorded layer"),
        (lambda: heard(top=0), ValueError, "top must be 1 or more"),
        (lambda: heard(top=2, gradients=True), ValueError, "gradients=False"),
        (lambda: heard(TopK(2), top=2), ValueError, "known before the data"),
    ],
)
def test_wrong_pages_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call()


# -------------------------------------------------------------------------------------------------- recorded weights


def heard(graph=Causal(), n=20, **options):  # noqa: B008
    torch.manual_seed(0)
    config = TransformerConfig(embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, position="rotary")
    model = GPT(config, 65, graph).double().eval()
    with torch.no_grad(), record(model, **options) as found:
        model(torch.randint(65, (2, n)))
    return found


def models():
    """Models, and what calls them."""
    torch.manual_seed(0)
    tokens, mask = torch.randint(65, (2, 20)), torch.ones(2, 20, dtype=torch.bool)
    before = mask.clone()
    before[0, :6] = False
    graph = Causal() & (Window(5, 0) | Prefix(2))
    for position in ("rotary", "none", "alibi", "relative"):
        config = TransformerConfig(embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, position=position)
        for seen in (mask, before, mask.flip(1) & before.flip(1)):
            yield position, GPT(config, 65, graph), (tokens,), {"attention_mask": seen}
    config = TransformerConfig(embed_dim=32, num_layers=2, num_heads=4)
    yield "heads", GPT(config, 65, PerHead([Causal(), graph, Window(3, 0), Causal()])), (tokens,), {}
    both = EncoderDecoder(config, replace(config, cross=True), vocab_size=65)
    yield "both", both, (tokens, tokens[:, :13]), {}
    yield "image", ViT(config, image_size=8, patch_size=2, channels=1, num_classes=3), (torch.randn(2, 1, 8, 8),), {}


@pytest.mark.parametrize("case", list(models()), ids=lambda case: case[0])
def test_the_heaviest_weights_are_those_of_all(case, monkeypatch):
    monkeypatch.setattr("attngraph.nn.heaviest.QUERIES", 7)
    _, model, inputs, options = case
    model, inputs = model.double().eval(), [each.double() if each.is_floating_point() else each for each in inputs]
    with torch.no_grad():
        with record(model) as every:
            model(*inputs, **options)
        with record(model, top=5) as heaviest:
            model(*inputs, **options)
    assert list(every) == list(heaviest)
    for all_of, some in ((every[name], heaviest[name]) for name in every):
        again = all_of.heaviest(5)
        for head in all_of.heads:
            for entry in range(len(all_of.weights)):
                (key, query), weights = all_of.of(head, entry)
                whole = weights.new_zeros(all_of.num_queries, all_of.num_keys)
                whole[query, key] = weights
                top = whole.topk(min(5, whole.shape[1]), -1).values
                positions = torch.arange(whole.shape[0])[:, None], torch.arange(whole.shape[1])
                for found in (some, again):
                    (key, query), weights = found.of(head, entry)
                    torch.testing.assert_close(whole[query, key], weights)
                    torch.testing.assert_close(found.weights[entry, head, :, : top.shape[1]], top)
                    torch.testing.assert_close(found.rest[entry, head], whole.sum(-1) - top.sum(-1), atol=1e-9, rtol=0)
                    entropy = torch.special.entr(whole).sum(-1) / torch.tensor(2.0).log()
                    torch.testing.assert_close(found.entropy[entry, head], entropy, atol=1e-6, rtol=0)
                    if "attention_mask" not in options:
                        far = (whole * (positions[0] - positions[1]).abs()).sum(-1)
                        torch.testing.assert_close(found.distance[entry, head], far)


def test_a_page_is_told_weights_within_a_byte():
    found = heard(top=4)
    for recorded in (found, heard(), list(found.values())):
        data = draw.page(recorded=recorded).data
        for layer, told in enumerate(data["recorded"]):
            for at, head in enumerate(told["heads"]):
                weights = torch.frombuffer(bytearray(base64.b64decode(head["weights"])), dtype=torch.uint8) / 255.0
                expected = found[layer].weights[0, at].flatten()
                if told["top"] == 4:
                    assert (weights - expected).abs().max() <= 1 / 255
                    assert unpacked(head["keys"]) == found[layer].keys[0, at].flatten().tolist()
    assert data["n"] == 20
    assert data["heads"] == 4


def test_long_texts_are_recorded_some_queries_at_a_time():
    model = GPT(TransformerConfig(embed_dim=16, num_layers=1, num_heads=2, position="rotary"), 65, Causal()).eval()
    widths = []
    forward = model.transformer.layers[0].attention.forward

    def noting(x, *inputs, **options):
        widths.append((x.shape[-2], options.get("return_weights", False)))
        return forward(x, *inputs, **options)

    model.transformer.layers[0].attention.forward = noting
    with torch.no_grad(), record(model, top=16) as found:
        model(torch.randint(65, (1, 1000)))
    assert found[0].keys.shape == (1, 2, 1000, 16)
    assert sorted(widths) == [(232, True), (256, True), (256, True), (256, True), (1000, False)]


# ------------------------------------------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def server():
    with Server(data_of([LOCAL] * 4, 256), evaluator=Evaluator(seconds=4)) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        made.evaluator.start()
        yield made
        made.shutdown()


def ask(server, question, method="POST", path="/graphs", **changes):
    """A request as the page makes it, but for some headers; its status and what came."""
    headers = {"Content-Type": "application/json", "X-Token": server.token, "Origin": f"http://{server.name}"}
    headers = {name: value for name, value in {**headers, **changes}.items() if value is not None}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    body = question if isinstance(question, bytes) else json.dumps(question).encode()
    connection.request(method, path, body if method == "POST" else None, headers)
    reply = connection.getresponse()
    return reply.status, reply.read().decode(), dict(reply.getheaders())


def about(text, n=256, layers=4, **more):
    return {"texts": [text] * layers, "n": n, "heads": 8, "head_dim": 64, **more}


def test_the_server_gives_the_page_and_answers_it(server):
    status, page, headers = ask(server, b"", "GET", "/")
    assert status == 200
    assert "Window(64" not in page  # only who has the token sees what it shows
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    status, text, _ = ask(server, {})
    assert status == 200
    assert json.loads(text)["graphs"][0]["text"] == str(LOCAL)
    status, text, _ = ask(server, about("Window(3, 0)"))
    assert status == 200
    assert json.loads(text)["graphs"][0]["edges"] == [Window(3, 0).num_edges(256)]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"Host": "localhost.evil.com"}, 421),
        ({"Host": "evil.com"}, 421),
        ({"Origin": "http://evil.com"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": None}, 403),
        ({"X-Token": None}, 403),
        ({"X-Token": "é".encode("latin-1")}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": None}, 415),
    ],
    ids=str,
)
def test_nobody_else_is_answered(server, changes, status):
    found, text, _ = ask(server, {}, **changes)
    assert found == status
    assert "Window" not in text
    assert set(json.loads(text)) == {"error"}


@pytest.mark.parametrize(
    ("question", "status", "message"),
    [
        (b"x" * 70_000, 413, "at most 65,536 bytes"),
        (b"[" * 60_000, 400, "must be JSON"),
        (b"[]", 400, "must be an object"),
        (about("Causl()"), 422, "not part of a graph expression"),
        (about("Causal() |" + " " * 5000 + "Full()", layers=1), 422, "at most 4,096 characters"),
        (about("Causal()", n=0), 422, "n must be an integer from 1"),
        (about("Causal()", n=True), 422, "n must be an integer"),
        (about("Causal()", n=10**12), 422, "n must be an integer"),
        ({"texts": []}, 422, "texts must be expressions"),
        (about("Random(9000)", n=1 << 14), 422, "memory"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_questions_are_told(server, question, status, message):
    found, text, _ = ask(server, question)
    assert found == status
    assert message in json.loads(text)["error"]
    assert ask(server, about("Causal()"))[0] == 200  # it goes on


SLOW = "Causal() & (Chunks(4) | ChunkEnds(4, 2))"  # its edges are found by many looks


def test_what_takes_too_long_is_ended(server):
    began = time.monotonic()
    status, text, _ = ask(server, about(SLOW, n=10**7))
    assert status == 422
    assert "after 4 seconds" in json.loads(text)["error"]
    assert time.monotonic() - began < 11
    assert ask(server, about("Causal()"))[0] == 200


def test_a_newer_question_ends_an_older_one(server):
    old = []
    thread = threading.Thread(target=lambda: old.append(ask(server, about(SLOW, n=10**7))))
    thread.start()
    time.sleep(1)
    began = time.monotonic()
    assert ask(server, about("Causal()"))[0] == 200
    assert time.monotonic() - began < 3
    thread.join()
    assert old[0][0] == 409


def test_a_port_that_is_taken_is_told(server, capfd):
    with pytest.raises(OSError, match="in use"):
        Server({}, server.server_address[1])
    assert ask(server, {}, **{"Content-Length": "9" * 5000})[0] == 413
    assert "Traceback" not in capfd.readouterr().err


def test_labels_are_those_that_were_given(tmp_path):
    labels = ["猫", "ш", "👍", "é"]
    assert draw.page(Causal(), 4, labels=labels).data["labels"] == labels
    assert draw.page(Causal(), 2, labels=["a\ud800", "b"]).save(tmp_path / "see.html").read_text()


def test_a_large_image_is_made_smaller():
    found = draw.page(Full(), 5, image=torch.rand(3, 2000, 1000), grid=(2, 2)).data["image"]
    assert (found["height"], found["width"], found["before"]) == (500, 250, 1)
    assert len(base64.b64decode(found["rgb"])) == 500 * 250 * 3


def test_an_edge_is_added_and_removed():
    graph = toggled(toggled(Causal(), 0, 3, 8), 5, 1, 8)
    assert str(graph) == "Causal() ^ EdgeList([[3, 1], [0, 5]], size=(8, 8))"
    assert (graph.mask(8, 8) != Causal().mask(8, 8)).nonzero().tolist() == [[0, 3], [5, 1]]
    assert toggled(toggled(graph, 5, 1, 8), 0, 3, 8) == Causal()
    question = about("Causal()", n=8, layers=3, toggle={"query": 0, "key": 3, "first": 1, "last": 1})
    found = answered(question)
    assert found["layers"] == [0, 1, 0]
    assert parse(found["graphs"][1]["text"]) == toggled(Causal(), 0, 3, 8)


def test_the_tour_has_eight_steps():
    steps = tour()
    assert [step["title"][:2] for step in steps] == [f"{number}." for number in range(1, 9)]
    assert len(json.dumps(steps)) < 100_000


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_show_serves_until_it_is_interrupted(how):
    command = [sys.executable, "-m", "attngraph", "show", "Causal()", "--size", "16"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        while not lines or not lines[-1].startswith("page: "):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        port, token = re.search(r"http://127\.0\.0\.1:(\d+)/#(\S+)", lines[-1]).groups()
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
        headers = {"Content-Type": "application/json", "X-Token": token, "Origin": f"http://127.0.0.1:{port}"}
        connection.request("POST", "/graphs", "{}", headers)
        assert json.loads(connection.getresponse().read())["title"] == "Causal()"
        connection.close()
        process.send_signal(how)
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()
        assert "Traceback" not in process.stderr.read()


def test_show_saves_what_a_model_hears(tmp_path):
    torch.manual_seed(0)
    config = TransformerConfig(
        embed_dim=16, num_layers=2, num_heads=2, position="learned", max_length=64, activation="gelu_tanh"
    )
    save(GPT(config, vocab_size=256), tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    command = [sys.executable, "-m", "attngraph", "show"]

    def run(*options):
        return subprocess.run([*command, *map(str, options)], capture_output=True, text=True)

    found = run("--model", tmp_path / "model", "--text", tmp_path / "text.txt", "--save", tmp_path / "see.html")
    assert found.returncode == 0, found.stderr
    data = json.loads(re.search('id="data">(.*?)</script>', (tmp_path / "see.html").read_text(), re.DOTALL)[1])
    assert data["labels"] == list("the cat sat on the mat")
    assert len(data["recorded"]) == 2
    GPT(config, vocab_size=256).save(tmp_path / "own")
    local = ("--model", tmp_path / "own", "--text", tmp_path / "text.txt", "--facts")
    assert "Causal" not in run(*local).stderr
    assert "of all layers" in run("Causal() & Window(2, 0)", *local).stdout
    assert "--size must be 1 or more" in run(*local, "--size", "-5").stderr
    assert "the model's own" in run(*local, "--layers", "3").stderr
    assert "leave out --save" in run("Causal()", "--size", "8", "--facts", "--save", "x.html").stderr
    assert "from 0 to 65535" in run("Causal()", "--size", "8", "--port", "80000").stderr
    (tmp_path / "empty.txt").write_text("")
    assert "must have a token" in run("--model", tmp_path / "own", "--text", tmp_path / "empty.txt").stderr
    assert "--model and --text belong together" in run("--model", tmp_path / "model").stderr
    assert run("--save", tmp_path / "tour.html").returncode == 0
    assert "8. Local" in (tmp_path / "tour.html").read_text()
    assert "there is no" in run("Causal()", "--size", "8", "--save", tmp_path / "none" / "see.html").stderr
