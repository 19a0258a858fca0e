"""A model as a file: its weights, and in the header what it is made of. Nothing in a file is ever run."""

from __future__ import annotations

import glob
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attngraph.arguments import checked, shown
from attngraph.graph.base import Graph
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.text import read, write
from attngraph.nn.computed import OneGraph
from attngraph.nn.embedding import AudioEmbedding, PatchEmbedding, TokenEmbedding
from attngraph.nn.told import short
from attngraph.nn.transformer import Transformer, TransformerConfig
from attngraph.planning.planner import Plan

WEIGHTS = "model.safetensors"
HEADER = "attngraph"  # its name in the file's metadata
INDEX = f"{WEIGHTS}.index.json"  # of a checkpoint of Hugging Face that is in shards
PARTIAL = ".partial-"  # how the names of files begin that are not whole yet
FORMAT = 1  # of the header: files of a later one are refused
EDGES = "edges:"  # the tensors edges:0, edges:1, … are edge_index; no parameter's name has a colon


class Model(nn.Module):
    """A model that can be kept: `save` writes it to a directory, and `load` makes it again, in any process."""

    def _arguments(self) -> dict[str, Any]:
        """What makes this model again: its constructor's arguments by name, the graphs of its Transformers aside.

        A subclass whose constructor takes others says so here.
        """
        raise NotImplementedError(f"{type(self).__name__} must define _arguments(), so that it can be saved")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("graph", "graphs"):  # which would do nothing
            named = ", ".join(f"model.{part}.graphs" for part in transformers(self))
            raise AttributeError(f"a {type(self).__name__} has no {name!r}: set {named}")
        super().__setattr__(name, value)

    @checked
    def save(self, path: str | os.PathLike, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write the model to a directory, as one file, model.safetensors, which `load` reads again.

        Weights keep their dtype, and what is tied stays tied. The header of the file has the class, its arguments, and
        each layer's graph as text; lists of edges are tensors. A file that was there stays until the new one is whole.

        >>> import tempfile
        >>> from attngraph.models import GPT
        >>> from attngraph.nn import TransformerConfig
        >>> config = TransformerConfig(embed_dim=64, num_layers=2, num_heads=4, position="rotary")
        >>> model = GPT(config, vocab_size=65, graph=[Causal() & Window(8, 0), Causal()])
        >>> with tempfile.TemporaryDirectory() as path:
        ...     model.save(path)
        ...     GPT.load(path).transformer.graphs
        (Causal() & Window(8, 0), Causal())

        Args:
            path: the directory; it is made if it isn't there.
            metadata: strings by name that stand in the file's header too, such as the step of a training.

        Raises ValueError, before anything is written, for what can't be read again: the graph of a function, or of a
        class of your own; a module that the library doesn't know; parameters that the constructor doesn't make.
        FileExistsError for the directory of a checkpoint of Hugging Face, which would be destroyed.
        """
        from safetensors.torch import save_file

        more = dict(metadata or {})
        if any(not isinstance(word, str) for word in (*more, *more.values())) or HEADER in more:
            raise ValueError(f"metadata must be strings by name, none of them {HEADER!r} (got {more})")
        tensors, header = _written(self)
        folder = Path(path)
        weights = (folder / WEIGHTS).exists() or (folder / INDEX).exists()
        if weights and not is_ours(folder) and (hint := _hint(folder)):
            raise FileExistsError(f"{folder} must not hold another model{hint}: save to another directory")
        folder.mkdir(parents=True, exist_ok=True)
        more = {"format": "pt", **more, HEADER: json.dumps(header)}
        write_whole(folder / WEIGHTS, lambda new: save_file(tensors, new, more))

    @classmethod
    @checked
    def load(
        cls, path: str | os.PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Self:
        """The model that `save` wrote to a directory, in eval mode. `Model.load` takes a model of any class.

        On a CPU, and without a `dtype`, the weights stay in the file until they are needed.

        Args:
            path: the directory.
            dtype: convert to it; by default as in the file.
            device: where to.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a model of another class; a file that `save` did not write, or a later version did; tensors that
                are missing, left over or of another shape, by name.
        """
        from safetensors import SafetensorError, safe_open

        require_floating(dtype)
        file = Path(path) / WEIGHTS
        hint = _hint(file.parent)
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist: load takes a directory that save wrote{hint}")
        try:
            with safe_open(file, framework="pt") as opened:
                header = (opened.metadata() or {}).get(HEADER)
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no dict
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} can't be read: {error}") from None
        if header is None:
            raise ValueError(f"{file} was not written by save{hint}")
        try:
            model = _made(cls, json.loads(header), tensors, dtype, torch.device(device))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file}: its header makes no model ({type(error).__name__}: {error})") from None
        assert isinstance(model, cls)
        return model


def _hint(folder: Path) -> str:
    """What else a directory may hold."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    theirs = isinstance(config, dict) and "model_type" in config
    return "; it is a checkpoint of Hugging Face, which attngraph.hf.load reads" if theirs else ""


def is_ours(folder: Path) -> bool:
    """Whether a directory holds a model that `save` wrote."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as opened:
            return HEADER in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def require_floating(dtype: torch.dtype | None) -> None:
    """Raise unless parameters can be of this dtype, or None."""
    if not (dtype is None or dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, such as torch.bfloat16, or None (got {dtype!r})")


# ---------------------------------------------------------------------------------------------------------- writing


def _written(model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the file, and its header; ValueError for what could not be read again."""
    listed: list[EdgeList] = []
    name = type(model).__name__
    arguments = {key: _plain(f"{name}.{key}", value, listed) for key, value in model._arguments().items()}
    graphs = {part: _texts(each.graphs, listed) for part, each in transformers(model).items()}
    edges = [graph.given for graph in listed]
    ours = _tensors(model)
    try:
        again = _empty(type(model), arguments, edges)
    except TypeError as error:
        raise ValueError(f"a {name} can't be saved: its _arguments() must be its constructor's ({error})") from None
    if unlike := differences(ours, _tensors(again)):
        raise ValueError(f"a {name} that was changed can't be saved: its constructor makes others, {unlike}")
    tensors = ours | {f"{EDGES}{number}": each for number, each in enumerate(edges)}
    header = {"format": FORMAT, "model": name, "arguments": arguments, "graphs": graphs}
    return {key: each.detach().cpu().contiguous() for key, each in tensors.items()}, header


def _plain(name: str, value: Any, listed: list[EdgeList]) -> Any:
    """An argument as JSON has it; of what JSON lacks, one entry {what it is: what it is made of}."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(name, part, listed) for part in value]
    if isinstance(value, Graph):
        return {"Graph": _text(value, listed)}
    kind = "dict" if isinstance(value, Mapping) else type(value).__name__
    if kind not in PARTS or not (kind == "dict" or type(value) is PARTS[kind].kind):
        known = ", ".join(PARTS)
        raise ValueError(
            f"{name} can't be saved: it must be a number, text, a list, a graph, or one of {known} (got {shown(value)})"
        )
    made_of = PARTS[kind].arguments(value)
    return {kind: {key: _plain(f"{name}.{key}", part, listed) for key, part in made_of.items()}}


class Part(NamedTuple):
    """What an argument of a model may be, and how its own arguments are found again."""

    kind: Callable[..., Any]
    arguments: Callable[[Any], Mapping[str, Any]]


PARTS = {
    "dict": Part(dict, dict),
    "TransformerConfig": Part(TransformerConfig, lambda each: {f.name: getattr(each, f.name) for f in fields(each)}),
    "TokenEmbedding": Part(TokenEmbedding, lambda each: {
        "num_embeddings": each.num_embeddings, "embed_dim": each.embedding_dim, "what": each.what,
    }),
    "PatchEmbedding": Part(PatchEmbedding, lambda each: {
        "image_size": each.image_size, "patch_size": each.patch_size, "channels": each.channels,
        "embed_dim": each.project.out_channels,
    }),
    "AudioEmbedding": Part(AudioEmbedding, lambda each: {
        "channels": each.first.in_channels, "embed_dim": each.first.out_channels,
    }),
}  # fmt: skip


def _texts(graphs: Sequence[OneGraph], listed: list[EdgeList]) -> list[str]:
    """Of each layer; what several share is looked at once."""
    texts = {number: _text(graph, listed) for number, graph in {id(graph): graph for graph in graphs}.items()}
    return [texts[id(graph)] for graph in graphs]


def _text(graph: OneGraph, listed: list[EdgeList]) -> str:
    """A graph as text, in which the edges of those that are listed are numbers."""
    graph = no_function(graph)
    text = write(graph, listed)
    return readable(graph, text, lambda text: read(text, [each.given for each in listed]))


def no_function(graph: OneGraph) -> Graph:
    """The graph, or that of a plan; ValueError for a function that makes graphs."""
    if isinstance(graph, Graph | Plan):
        return graph if isinstance(graph, Graph) else graph.graph
    raise ValueError(
        f"{short(graph)} can't be saved, as it is no graph: keep model.state_dict(), and load it into a model that is "
        f"made with the same function"
    )


def readable(graph: Graph, text: str, read: Callable[[str], Graph]) -> str:
    """The text of a graph, which is read again as the same one; else ValueError."""
    with suppress(ValueError):
        if read(text) == graph:
            return text
    edges = "EdgeList(graph.edge_index(n, m), size=(n, m))"
    if graph.heads:
        heads = f"for head in map(graph.of_head, range({graph.heads}))"
        edges = f"PerHead([{edges.replace('graph', 'head')} {heads}])"
    raise ValueError(
        f"{short(graph)} can't be saved, as it can't be made again from text; save it as its edges, {edges}"
    )


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file aside, sync it, then rename it: whoever reads the path finds the old file or the new one, whole.

    Several may write at once. What a killed process has left is removed an hour later by the next that writes the file.
    """
    for left in path.parent.glob(f"{PARTIAL}*{glob.escape(path.name)}"):
        with suppress(OSError):  # another removes it too
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    own = f"{PARTIAL}{secrets.token_hex(8)}-{path.name}"  # with its ending, by which pictures know their format
    aside = path.with_name(own)
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------------------------------------------- reading


def _made(
    cls: type[Model], header: Any, tensors: dict[str, Tensor], dtype: torch.dtype | None, device: torch.device
) -> Model:
    """The model that a header describes, with its tensors."""
    if header["format"] > FORMAT:
        raise ValueError(
            f"its format is {header['format']}, and this version of attngraph reads {FORMAT} at most: take a newer one"
        )
    name, known = header["model"], {kind.__name__: kind for kind in _subclasses(Model)}
    kind = known.get(name) if cls is Model else cls
    if kind is None:
        raise ValueError(f"it holds a {name}, a class that is not imported (known are {', '.join(sorted(known))})")
    if kind.__name__ != name:
        raise ValueError(f"it holds a {name}, not a {kind.__name__}: {name}.load reads it")
    edges = [tensors.pop(key) for key in sorted(tensors, key=lambda key: (len(key), key)) if key.startswith(EDGES)]
    model = _empty(kind, header["arguments"], edges)
    wanted = _tensors(model)
    if unlike := differences(tensors, wanted):
        raise ValueError(f"its tensors are not those of a {name} of its arguments, {unlike}")
    texts, parts = header["graphs"], transformers(model)
    if texts.keys() != parts.keys():
        raise ValueError(f"it must have graphs for {', '.join(parts)} (got some for {', '.join(texts)})")
    for part, found in parts.items():
        graphs = {text: read(text, edges) for text in dict.fromkeys(texts[part])}
        found.graphs = [graphs[text] for text in texts[part]]
    given = {key: each.to(device, dtype if each.is_floating_point() else None) for key, each in tensors.items()}
    model.load_state_dict(given, strict=False, assign=True)  # not strict: what is tied is there once
    return model.eval()


def _empty(kind: type[Model], arguments: Mapping[str, Any], edges: Sequence[Tensor]) -> Model:
    """A model of arguments as `_plain` wrote them, without memory for its parameters."""
    with torch.device("meta"), NoInitialization():
        return kind(**{name: _value(argument, edges) for name, argument in arguments.items()})


def _value(plain: Any, edges: Sequence[Tensor]) -> Any:
    """The inverse of `_plain`."""
    if isinstance(plain, list):
        return [_value(part, edges) for part in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, made_of),) = plain.items()
    if kind == "Graph":
        return read(made_of, edges)
    return PARTS[kind].kind(**{name: _value(part, edges) for name, part in made_of.items()})


def _subclasses(kind: type[Model]) -> list[type[Model]]:
    return [each for own in kind.__subclasses__() for each in (own, *_subclasses(own))]


def transformers(model: nn.Module) -> dict[str, Transformer]:
    """The Transformers of a model, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Transformer)}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; of those that are tied, the first."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}


def differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What tells tensors from those that there should be, in words."""
    both = [name for name in wanted if name in found]
    shapes = [
        f"{name} of shape {tuple(found[name].shape)} where {tuple(wanted[name].shape)} belongs"
        for name in both
        if found[name].shape != wanted[name].shape
    ]
    kinds = [name for name in both if found[name].is_floating_point() != wanted[name].is_floating_point()]
    told = {
        "missing": sorted(wanted.keys() - found.keys()),
        "left over": sorted(found.keys() - wanted.keys()),
        "other": shapes,
        "whole numbers for fractions or the other way": kinds,
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in told.items() if names)


class NoInitialization(TorchFunctionMode):
    """Parameters are not initialised: for tensors without memory, PyTorch would first import its compiler."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return args[0] if func in (Tensor.normal_, Tensor.uniform_) else func(*args, **kwargs)
