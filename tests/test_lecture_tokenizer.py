"""examples/tokenizer.py: any bytes come back, tokens are those of `tokenizers`, merges those of counting anew."""

import io
import json
import sys
from collections import Counter
from itertools import pairwise

import gpt
import numpy as np
import pytest
import tokenizer
import torch
from hypothesis import given, strategies
from tokenizer import BytePairs, blocks, cut_of, learned, merged, pieces_of

TEXT = (
    "The quick brown fox doesn't jump; over 1234 lazy dogs' tails, it's said.\n\n  \tOnce upon a time there were 17 fo"
    "xes: Füchse, 狐狸, 🦊🦊!\r\nThey're quick, they'll jump and jump and jump over the dogs. \x00\x7f\n" * 3
)
LEARNED = BytePairs(learned(TEXT.encode(), 400)[0])
TRICKY = strategies.text(strategies.sampled_from("ab '\n\t\r\x0b\x1c\xa0\u3000sdtlvre1٣½ü狐🦊_-[`{\x7f\x00A@Zz"))
TEXTS = strategies.text() | TRICKY | strategies.lists(strategies.sampled_from(TEXT.split(" "))).map(" ".join)


@given(strategies.binary() | TEXTS.map(str.encode))
def test_any_bytes_come_back(given):
    pieces = pieces_of(given)
    assert b"".join(pieces) == given
    assert all(pieces)
    tokens = LEARNED.encode(given)
    assert LEARNED.decode_bytes(tokens) == given
    assert all(0 <= token < len(LEARNED) for token in tokens)


@pytest.mark.parametrize("token", [-1, len(LEARNED)])
def test_tokens_that_it_has_not_are_told(token):
    with pytest.raises(ValueError, match=rf"tokens must be from 0 to {len(LEARNED) - 1} \(got \[{token}\]\)"):
        LEARNED.decode([65, token])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(LEARNED.as_json()))
    return gpt.Subwords(str(path))


@given(text=TEXTS)
def test_tokens_are_those_of_the_library(theirs, text):
    tokens = LEARNED.encode(text)
    assert tokens == theirs.encode(text)
    assert theirs.decode(tokens) == LEARNED.decode(tokens) == text


def test_the_library_has_as_many_tokens(theirs):
    assert len(theirs) == len(LEARNED) > 330


@pytest.mark.parametrize("text", [TEXT.encode(), b"aaaa aaaa baab abc ab bc abc", bytes(range(256)) * 2, b"", b"x"])
def test_merges_are_those_of_counting_anew(text):
    """The lecture's loop: count all pairs, merge the most frequent; of equals, that of the smallest tokens."""
    merges, lengths = learned(text, 300)
    words, bytes_of = [list(piece) for piece in pieces_of(text)], BytePairs(merges).bytes_of
    for number, pair in enumerate(merges):
        known = set(bytes_of[: 256 + number])
        counts = Counter(each for word in words for each in pairwise(word))
        counts = {each: count for each, count in counts.items() if bytes_of[each[0]] + bytes_of[each[1]] not in known}
        assert pair == min(counts, key=lambda each: (-counts[each], each))
        words = [merged(word, pair, 256 + number) for word in words]
        assert lengths[number + 1] == sum(map(len, words))
    assert lengths[0] == len(text)
    left = {bytes_of[one] + bytes_of[other] for word in words for one, other in pairwise(word)}
    assert len(merges) == 44 or left <= set(bytes_of)
    assert len(set(bytes_of)) == len(bytes_of)


def test_merges_are_made_from_the_left():
    assert merged([1, 1, 1, 2, 1, 1], (1, 1), 9) == [9, 1, 2, 9]


def test_a_text_read_in_blocks_has_the_same_tokens(monkeypatch):
    whole = TEXT.encode() * 4
    for size in (1, 7, 50, 10_000):
        monkeypatch.setattr(tokenizer, "BLOCK", size)
        found = list(blocks(io.BytesIO(whole), 5, len(whole) - 3))
        assert b"".join(found) == whole[5:-3]
        assert [token for block in found for token in LEARNED.encode(block)] == LEARNED.encode(whole[5:-3])


def run(tmp_path, *more):
    arguments = ["--runs", str(tmp_path / "runs"), *map(str, more)]
    return tokenizer.main(tokenizer.settings(arguments)), tmp_path / "runs" / "tokenizer"


def test_a_run_leaves_a_tokenizer_and_shards(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    shards = tmp_path / "shards"
    told, folder = run(tmp_path, "--text", text, "--tokens", 330, "--shards", shards, "--shard-size", 1000)
    files = {"tokenizer.json", "merges.txt", "tokens.png", "length.png", "outcome.json"}
    assert {path.name for path in folder.iterdir()} == files
    assert told["figure"] > 1.5 > told["baselines"]["bytes"] == 1
    assert abs(told["baselines"]["the library tokenizers"] / told["figure"] - 1) < 0.1
    assert "330, of 74 merges" in capsys.readouterr().out
    ours = gpt.Subwords(str(folder / "tokenizer.json"))
    whole = text.read_bytes()
    said = json.loads((shards / "shards.json").read_text())
    assert said["vocab_size"] == 330
    for part, expected in (("training", whole[: cut_of(len(whole))]), ("validation", whole[cut_of(len(whole)) :])):
        arrays = [np.load(shards / name, mmap_mode="r") for name in said[part]["files"]]
        assert all(isinstance(each, np.memmap) and each.dtype == np.uint16 for each in arrays)
        assert all(len(each) == 1000 for each in arrays[:-1])
        tokens = np.concatenate(arrays).tolist()
        assert len(tokens) == said[part]["tokens"]
        assert ours.decode(tokens) == expected.decode(errors="replace")


TINY = "--layers 1 --heads 2 --width 16 --context 16 --batch 4 --steps 4 --evaluate-every 2 --sample 5 --dtype float32"


def test_a_gpt_learns_from_shards_as_from_the_text(tmp_path):
    """The same tokens; it resumes; and it is told of a folder that holds none."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    shards = tmp_path / "shards"
    run(tmp_path, "--text", text, "--tokens", 300, "--shards", shards, "--shard-size", 1000)
    said = gpt.Shards(shards, 16)
    whole = json.loads((shards / "shards.json").read_text())
    assert int(said.begins[-1]) == sum(len(file) - 16 for file in said.files) <= whole["training"]["tokens"]
    assert len(said.validation) == whole["validation"]["tokens"]
    inputs, targets = said.batch(500, torch.Generator().manual_seed(3))
    assert inputs.shape == targets.shape == (500, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    known = said.training.unfold(0, 17, 1)
    rows = torch.cat([inputs, targets[:, -1:]], 1)
    assert (rows[:, None] == known[None]).all(-1).any(1).all()
    given = [*TINY.split(), "--shards", str(shards), "--runs", str(tmp_path / "runs")]
    figures = gpt.train(gpt.settings(given))
    assert figures["source"] == str(shards)
    assert 0 < figures["validation_loss"] < 7
    again = gpt.train(gpt.settings(["--runs", str(tmp_path / "runs"), "--resume", "--steps", "6"]))
    assert again["validation_loss"] < figures["validation_loss"]
    with pytest.raises(SystemExit, match=r"--shards must be a folder that tokenizer.py --shards has made \(got "):
        gpt.train(gpt.settings([*TINY.split(), "--shards", str(tmp_path), "--runs", str(tmp_path / "runs")]))


def test_shards_are_of_their_own_text_and_tokens(capsys):
    for more in (["--text", "a"], ["--tokenizer", "byte"]):
        with pytest.raises(SystemExit):
            gpt.settings(["--shards", "shards", *more])
        assert "give neither --text nor --tokenizer with them" in capsys.readouterr().err


def test_a_file_of_no_text_is_learned_too(tmp_path):
    path = tmp_path / "binary"
    path.write_bytes(bytes(range(256)) * 40)
    told, _ = run(tmp_path, "--text", path, "--tokens", 300)
    assert told["figure"] > 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tokens", 255], "--tokens must be 256 or more (got 255)"),
        (["--tokens", 65537], "--tokens must be 65536 or less, so that a token is two bytes (got 65537)"),
        (["--text", "nowhere"], "nowhere can't be read: No such file"),
    ],
)
def test_what_can_not_be_is_told(tmp_path, capsys, given, message):
    with pytest.raises(SystemExit) as error:
        run(tmp_path, *given)
    assert message in str(error.value) + capsys.readouterr().err


@pytest.mark.slow
def test_five_hundred_tokens_of_shakespeare_take_seconds(tmp_path):
    told, _ = run(tmp_path)
    assert told["seconds"] < 11
    assert told["figure"] > 1.5 or sys.platform == "win32"
