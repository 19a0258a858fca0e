"""What connectivity that is computed from the data is worth: python -m benchmarks.dynamic, four minutes on two cores.

    python -m benchmarks.dynamic --section particles --seeds 1

particles: 64 particles in a square repel their neighbours; of their places and charges, a Transformer of two layers
predicts all accelerations. They are drawn anew for each batch, and the contestants differ in their graph alone: the 12
nearest, itself among them, as many at random, or all. What is unexplained is the mean square of the error over that of
the accelerations, of particles that were never trained on.

recall: 32 pairs of a key and a value, then 32 keys, whose values are asked for. A first layer tells each value its key;
the second one's graph is what the contestants differ in: the 8 keys that answer best, the 4 blocks of two that do, the
8 keys before, or all (multi-query associative recall, Arora et al. 2024).
"""

from __future__ import annotations

import io
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import torch
import training
from torch import Tensor, nn
from torch.nn import functional

from attngraph import BlockTopK, Causal, Full, Graph, TopK, Window, from_neighbors, knn_graph
from attngraph.nn import Transformer, TransformerConfig
from benchmarks.experiment import Goal, goals_experiment
from benchmarks.measure import Progress, isolated
from benchmarks.page import number

NAME = "dynamic"

# ------------------------------------------------------------------------------------------------------- particles

PARTICLES, NEIGHBOURS, REACH = 64, 12, 0.1
BATCH, TESTED, STEPS, OCTAVES = 16, 128, 600, 5


def drawn(batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Places (B, N, 2) in the unit square, charges (B, N, 1), accelerations (B, N, 2) by a force of Gaussian range."""
    place = torch.rand(batch, PARTICLES, 2, generator=generator)
    charge = torch.rand(batch, PARTICLES, 1, generator=generator) + 0.5
    apart = place[:, :, None] - place[:, None]
    distance = apart.norm(dim=-1, keepdim=True) + torch.eye(PARTICLES)[..., None]  # not 0 to itself
    force = charge[:, None] * apart / distance * torch.exp(-((distance / REACH) ** 2))
    return place, charge, force.sum(2)


def at_random(place: Tensor) -> Graph:
    """As many keys as the nearest are, itself among them."""
    chance = torch.rand(*place.shape[:2], PARTICLES)
    chance.diagonal(dim1=1, dim2=2).fill_(2.0)
    return from_neighbors(chance.topk(NEIGHBOURS).indices)


CONTESTANTS: dict[str, Callable[[Tensor], Graph]] = {
    "nearest": lambda place: knn_graph(place, NEIGHBOURS, loop=True),
    "random": at_random,
    "all": lambda place: Full(),
}


class Particles(nn.Module):
    """Places and charges → accelerations (B, N, 2)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.read = nn.Linear(4 * OCTAVES + 1, config.embed_dim)
        self.transformer = Transformer(config, Full())
        self.head = nn.Linear(config.embed_dim, 2)

    def forward(self, place: Tensor, charge: Tensor, graph: Graph) -> Tensor:
        """A place is told by its sines and cosines, from half a wave in the square on."""
        angles = (place[..., None] * torch.pi * 2.0 ** torch.arange(OCTAVES)).flatten(2)
        read = torch.cat([angles.sin(), angles.cos(), charge], -1)
        return self.head(self.transformer(self.read(read), graph))


def particles_trained(progress: Progress, name: str, seed: int, steps: int) -> dict:
    """The variance that is unexplained after a training, %, as its score."""
    torch.manual_seed(seed)
    graph_of, unit = CONTESTANTS[name], drawn(TESTED)[2].std()
    model = Particles(TransformerConfig(embed_dim=64, num_layers=2, num_heads=4, position="none"))

    def errors(batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The mean square of the error, and of what is to be predicted."""
        place, charge, wanted = drawn(batch, generator)
        found = model(place, charge, graph_of(place)) * unit
        return (found - wanted).square().mean(), wanted.square().mean()

    def unexplained() -> float:
        unseen = torch.Generator().manual_seed(0)
        error, variance = zip(*(errors(BATCH, unseen) for _ in range(TESTED // BATCH)), strict=True)
        return 100 * (sum(error) / sum(variance)).item()

    progress({}, 1800.0)
    return fitted(model, lambda step: errors(BATCH)[0] / unit**2, unexplained, seed, steps)


def particles(options: Namespace) -> Iterator[Goal]:
    found = {
        name: [isolated(particles_trained, name, seed, STEPS, seconds=60.0, gib=8.0) for seed in range(options.seeds)]
        for name in CONTESTANTS
    }
    reached = {name: mean(each) for name, each in found.items()}
    nearest, every, random = (reached[name] for name in ("nearest", "all", "random"))
    text = f"{PARTICLES} particles, the {NEIGHBOURS} nearest of each step"
    yield Goal(f"{text}: unexplained variance, %", 2.5, nearest, at_most=True, note=of_seeds(found))
    ratio = "not measured" if isinstance(nearest, str) or isinstance(every, str) else nearest / every
    yield Goal(f"{text}: unexplained variance over that of all {PARTICLES}", 1, ratio, at_most=True)
    yield Goal(f"{PARTICLES} particles, {NEIGHBOURS} at random: unexplained variance, %", 50, random)
    slowest = max((each.get("seconds", 0.0) for runs in found.values() for each in runs), default=0.0)
    yield Goal(f"{PARTICLES} particles: seconds of the slowest training", 180, slowest, at_most=True)


# ---------------------------------------------------------------------------------------------------------- recall

PAIRS, SYMBOLS, RECALL_STEPS = 32, 64, 600
TOKENS = 3 * PAIRS

RECALLING: dict[str, Graph] = {
    "TopK(8)": TopK(8) & Causal(),
    "BlockTopK(2, 4)": BlockTopK(2, 4),
    "window": Causal() & Window(7, 0),
    "all": Causal(),
}


def asked(batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Tokens (B, 3 · PAIRS) and the values of the last PAIRS of them (B, PAIRS)."""
    keys = torch.rand(batch, SYMBOLS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(SYMBOLS, (batch, PAIRS), generator=generator)
    which = torch.randint(PAIRS, (batch, PAIRS), generator=generator)
    pairs = torch.stack([keys, SYMBOLS + values], 2).flatten(1)
    return torch.cat([pairs, keys.gather(1, which)], 1), values.gather(1, which)


class Recall(nn.Module):
    """Tokens (B, N) → a logit of each symbol for each of the last (B, PAIRS, SYMBOLS)."""

    def __init__(self, graph: Graph):
        super().__init__()
        config = TransformerConfig(embed_dim=64, num_layers=1, num_heads=1, position="rotary", norm="rms", bias=())
        self.embed, self.head = nn.Embedding(2 * SYMBOLS, 64), nn.Linear(64, SYMBOLS)
        self.first = Transformer(config, Causal() & Window(1, 0))
        self.second = Transformer(replace(config, position="none"), graph)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embed(tokens)))[:, -PAIRS:])


def edges_of(graph: Graph) -> int:
    """How many a query and a key of each node choose, or all that it has."""
    return graph.resolve(*torch.randn(2, TOKENS, 8)).num_edges(TOKENS, TOKENS)


def recall_trained(progress: Progress, name: str, seed: int, steps: int) -> dict:
    """How many values are right after a training, %, as its score."""
    torch.manual_seed(seed)
    model = Recall(RECALLING[name])

    def loss(step: int) -> Tensor:
        tokens, values = asked(32)
        return functional.cross_entropy(model(tokens).flatten(0, 1), values.flatten())

    def right() -> float:
        tokens, values = asked(256, torch.Generator().manual_seed(0))
        return 100 * (model(tokens).argmax(-1) == values).float().mean().item()

    progress({}, 1800.0)
    return fitted(model, loss, right, seed, steps)


def recall(options: Namespace) -> Iterator[Goal]:
    seeds = range(max(options.seeds, 3))
    found = {
        name: [isolated(recall_trained, name, seed, RECALL_STEPS, seconds=60.0, gib=8.0) for seed in seeds]
        for name in RECALLING
    }
    every = edges_of(RECALLING["all"])
    for name in ("TopK(8)", "BlockTopK(2, 4)"):
        scores = [each.get("score", 0.0) for each in found[name]]
        text = f"recall of {PAIRS} values by {name}"
        yield Goal(f"{text}: right in the worst of {len(scores)} seeds, %", 99, min(scores), note=of_seeds(found))
        yield Goal(f"{text}: edges over those of all", 1 / 6, edges_of(RECALLING[name]) / every, at_most=True)


# -------------------------------------------------------------------------------------------------------------------


def fitted(
    model: nn.Module, loss: Callable[[int], Tensor], evaluate: Callable[[], float], seed: int, steps: int
) -> dict:
    """What is evaluated after a training by the recipe of the examples, `score`, and the `seconds` that it took."""
    parser = training.parser_of(__doc__, name="dynamic", steps=steps, evaluate_every=steps, dtype="float32", seed=seed)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        task = training.Task(model, loss, evaluate, torch.device("cpu"), identity={}, record={})
        score, metrics = training.fit(training.parsed(parser, ["--runs", folder]), task)
    return {"score": score, "seconds": metrics.seconds}


def mean(found: list[dict]) -> float | str:
    """The score of all seeds, or the failure of one."""
    failures = [each["failure"] for each in found if "failure" in each]
    return failures[0] if failures else statistics.mean(each["score"] for each in found)


def of_seeds(found: dict[str, list[dict]]) -> str:
    """Each contestant's scores, as a note."""
    return "; ".join(
        f"{contestant} {', '.join(number(each.get('score', 'failed'), '.1f') for each in runs)}"
        for contestant, runs in found.items()
    )


SECTIONS = {"particles": particles, "recall": recall}
OPTIONS: dict[str, dict] = {"seeds": {"type": int, "default": 2, "help": "trainings of each contestant"}}
EXPERIMENT = goals_experiment(NAME, __doc__, SECTIONS, options=OPTIONS)

if __name__ == "__main__":
    EXPERIMENT.main()
