"""From a directory with config.json and safetensors to a model, and back. What families there are: `families`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from attngraph.arguments import checked, shown
from attngraph.graph.text import parse, parse_list, written
from attngraph.hf.families import FAMILIES
from attngraph.hf.family import TRANSPOSED, Family, Form
from attngraph.hf.made import as_family
from attngraph.hf.settings import Settings, WrongSetting
from attngraph.models import EncoderDecoder
from attngraph.models.saved import (
    INDEX,
    WEIGHTS,
    Model,
    NoInitialization,
    differences,
    is_ours,
    no_function,
    readable,
    require_floating,
    transformers,
    write_whole,
)
from attngraph.nn.computed import OneGraph

CONFIG = "config.json"
OURS = (
    "a model that attngraph saved is read by its class, as attngraph.models.GPT.load, or by attngraph.models.Model.load"
)
LAYER = r"\.(\d+)\."  # its number in a name
OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


@checked
def load(path: str | os.PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """A pretrained model from a local directory: GPT-2, Llama, Mistral, Qwen 2 and 3, Phi-3, BERT, RoBERTa, DistilBERT,
    T5, BART, Whisper, ViT, Decision Transformer.

    The directory is what `hf download openai-community/gpt2 --local-dir path/of/gpt2`, or
    `save_pretrained` of `transformers`, makes; a name such as "gpt2" alone is none. What comes is an ordinary module of
    `attngraph.models`, in eval mode, whose graph may be changed:

        model = load("path/of/gpt2")
        logits = model(tokens)
        model.transformer.graphs = Causal() & (Window(256, 0) | Prefix(4))

    On a CPU, and without a `dtype`, the weights stay in the file until they are needed, and the file must stay as it is
    while the model lives (`save` to the same directory puts a new one in its place). Nothing is downloaded, and
    `transformers` is not needed.

    Args:
        path: a directory with config.json and model.safetensors, or its shards and model.safetensors.index.json.
        dtype: convert to it; by default as in the file.
        device: where to.

    Raises:
        FileNotFoundError: no such files.
        ValueError: a model, a setting or a tensor that is not known, or missing, by name.
    """
    require_floating(dtype)
    folder = Path(path)
    given = _config(folder)
    family = _family(folder / CONFIG, given)
    with ExitStack() as stack:
        try:
            found = _Tensors(folder, family, stack)
            settings = Settings(given, found.layers)
            if not given.get("architectures"):
                settings.used["architectures"] = f"architectures={family.architectures[0]} by default"
            model, places = _built(settings, family, found, dtype, torch.device(device))
            _set_graphs(model, given.get("attngraph", {}))
        except ValueError as error:
            hint = f"; {OURS}, and {WEIGHTS} is of one" if is_ours(folder) else ""
            raise ValueError(f"{folder}: {error}{hint}") from None
    cast(Any, model).pretrained = Pretrained(dict(given), places)  # typed for modules and tensors alone
    return model.eval()


@checked
def save(model: nn.Module, path: str | os.PathLike, *, family: str | None = None) -> None:
    """Write a model to a directory as config.json and model.safetensors, which `load` and `transformers` read.

    A model that `load` made is written as it was; one that was made here, as one of a family that has all its switches:

        config = TransformerConfig(embed_dim=64, num_layers=2, num_heads=4, position="learned", max_length=128,
                                   activation="gelu_tanh")
        hf.save(GPT(config, vocab_size=65), "runs/as-gpt2")          # GPT2LMHeadModel.from_pretrained reads it

    `transformers` knows nothing of another graph than the family's own: that stands under "attngraph". What has no
    family is kept by the model's own `save`.

    Args:
        model: of `attngraph.models`, compiled or not.
        path: the directory; it is made if it isn't there.
        family: of a model made here: gpt2, llama, qwen2, bert, vit, t5, whisper or decision_transformer; by default the
            first that can carry it.

    Raises, before anything is written, ValueError for a switch that no family has, by name, and for graphs that can't
    be written down; FileExistsError for the directory of a model that its own `save` wrote, which would be destroyed.
    """
    from safetensors.torch import save_file

    model = getattr(model, "_orig_mod", model)  # of a compiled one
    pretrained = getattr(model, "pretrained", None)
    if not isinstance(pretrained, Pretrained) or family is not None:
        pretrained = _made_here(model, family)
    given, places = pretrained
    named = dict(model.named_parameters())
    if unknown := sorted(named.keys() ^ places.keys()):
        raise ValueError(f"the model's parameters are not those that load made: {', '.join(unknown)}")
    graphs = {name: ", ".join(map(_text, part.graphs)) for name, part in transformers(model).items()}
    if isinstance(model, EncoderDecoder) and model.memory_graph is not None:
        graphs["memory"] = _text(model.memory_graph)
    for text in graphs.values():
        parse_list(text)  # what is too long together is an error now
    tensors = _as_in_files(named, places)
    folder = Path(path)
    if is_ours(folder):
        raise FileExistsError(
            f"{folder} must not hold another model; {OURS}, and {WEIGHTS} is of one: save to another directory"
        )
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(named.values())).dtype).removeprefix("torch.")
    changes = {"torch_dtype" if "torch_dtype" in given else "dtype": dtype, "attngraph": graphs}
    config = json.dumps({**given, **changes}, indent=2) + "\n"
    write_whole(folder / WEIGHTS, lambda new: save_file(tensors, new, metadata={"format": "pt"}))
    write_whole(folder / CONFIG, lambda new: new.write_text(config, encoding="utf-8"))


def _text(graph: OneGraph) -> str:
    """A graph as text that is read again as the same one."""
    graph = no_function(graph)
    return readable(graph, written(graph), parse)


def _made_here(model: nn.Module, name: str | None) -> Pretrained:
    """What a model is written with that `load` did not make."""
    if not isinstance(model, Model):
        raise TypeError(f"model must be one of attngraph.models (got {shown(model)})")
    given, family, again = as_family(model, name)
    if unlike := differences(dict(model.named_parameters()), dict(again.named_parameters())):
        raise ValueError(f"the model's parameters are not those that its config makes, {unlike}")
    places = {name: next(_places(family, name)) for name, _ in again.named_parameters()}
    return Pretrained(given, {name: place._replace(file=family.full(place.file)) for name, place in places.items()})


def _family(path: Path, given: Mapping[str, Any]) -> Family:
    """By what config.json says of its kind."""
    kind = given.get("model_type")
    families = FAMILIES.get(kind, ()) if isinstance(kind, str) else ()
    if not families:
        known = ", ".join(FAMILIES)
        ours = isinstance(given.get("settings"), dict)  # an example's run
        hint = f"; {OURS}" if ours else ""
        raise ValueError(f"{path}: model_type must be one of {known} (got {kind!r}){hint}")
    named = given.get("architectures") or []
    for family in families:
        if isinstance(named, list) and all(each in family.architectures for each in named):
            return family
    known = " or ".join(each for family in families for each in family.architectures)
    raise ValueError(f"{path}: architectures must be a list of {known} (got {named!r})")


def _built(
    settings: Settings, family: Family, found: _Tensors, dtype: torch.dtype | None, device: torch.device
) -> tuple[nn.Module, dict[str, Place]]:
    """A model with its tensors, and where they were."""
    try:
        tied = found.tied(family.ties(settings))
        with torch.device("meta"), NoInitialization():
            model = family.build(settings, tied)
        if unknown := settings.unknown():
            raise WrongSetting(f"unknown settings: {', '.join(unknown)}")
        return model, _fill(model, family, found, dtype, device)
    except WrongSetting:
        raise
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # what does not fit together
        raise ValueError(f"{error}; the settings are {', '.join(settings.used.values())}") from None


# ------------------------------------------------------------------------------------------------------------ files


def _config(folder: Path) -> dict:
    if not folder.is_dir():
        what = "the file" if folder.exists() else "what is not there:"
        raise FileNotFoundError(
            f"load takes a local directory with {CONFIG} and {WEIGHTS}, as `hf download NAME --local-dir "
            f"DIRECTORY` makes it (got {what} {folder})"
        )
    path = folder / CONFIG
    if not path.exists():
        hint = f"; {OURS}" if (folder / WEIGHTS).exists() else ""
        raise FileNotFoundError(f"{path} does not exist: load takes a directory with {CONFIG} and {WEIGHTS}{hint}")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON ({error})") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold the settings of a model by name (got a {type(given).__name__})")
    return given


class _Tensors:
    """The tensors of a checkpoint, by the family's own names for them."""

    def __init__(self, folder: Path, family: Family, stack: ExitStack):
        from safetensors import SafetensorError, safe_open

        self.family = family
        index, whole = folder / INDEX, folder / WEIGHTS
        if whole.exists():
            files = [WEIGHTS]
        elif index.exists():
            files = _shards(index)
        else:
            other = ", ".join(sorted(each.name for each in folder.glob("*.bin")))
            hint = f"; {other} is of another format, which transformers' save_pretrained converts" if other else ""
            raise FileNotFoundError(f"{folder} has no {WEIGHTS} and no {index.name}{hint}")
        self.where: dict[str, tuple[Any, str]] = {}  # by plain name: the open file, and the name there
        for file in files:
            if not (folder / file).exists():
                raise FileNotFoundError(f"{folder / file} does not exist, and {index.name} names it")
            try:
                opened = stack.enter_context(safe_open(folder / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} can't be read: {error}") from None
            for name in opened.keys():  # noqa: SIM118  it is no dict
                plain = self._plain(name)
                if plain in self.where:
                    raise ValueError(f"two tensors of one name: {self.where[plain][1]} and {name}")
                self.where[plain] = (opened, name)

    def _plain(self, name: str) -> str:
        """Without prefix, and the newer of two names."""
        for old, new in OLD_NAMES:
            name = name.replace(old, new)
        return name.removeprefix(self.family.prefix)

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def __getitem__(self, name: str) -> Tensor:
        opened, full = self.where[name]
        return opened.get_tensor(full)

    @property
    def layers(self) -> int:
        """How many there are, at most."""
        numbers = (int(number) for name in self.where for number in re.findall(LAYER, name))
        return max(numbers, default=-1) + 1

    def tied(self, wanted: bool) -> bool:
        """Whether the head is the embedding: where the settings say so, and no other head is there."""
        head, embedding = self.family.head
        if not wanted or head not in self or embedding not in self:
            return wanted
        return torch.equal(self[head], self[embedding])


def _shards(index: Path) -> list[str]:
    """The files that an index names, beside it."""
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(file).name != file for file in files):
            raise ValueError("files elsewhere")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index.name} must be JSON with a weight_map from tensors to files beside it ({error})"
        ) from None
    return files


# ---------------------------------------------------------------------------------------------------------- tensors


class Place(NamedTuple):
    """Where a parameter is in a checkpoint."""

    file: str  # the name of its tensor there
    together: tuple[str, ...]  # the parameters that have it in common, in their order
    form: Form


def _places(family: Family, name: str) -> Iterator[Place]:
    """Where a parameter may be: under one name, or under those of older and newer models of the family."""
    layer = re.search(LAYER, name)
    number = layer.groups() if layer else ()
    plain = f"{name[: layer.start()]}.{{}}.{name[layer.end() :]}" if layer else name
    for rule in family.names:
        modules = (rule.here,) if isinstance(rule.here, str) else rule.here
        for module in modules:
            if plain == module or plain.rpartition(".")[0] == module:
                leaf = plain.removeprefix(module)
                yield Place(
                    (rule.file + leaf).format(*number),
                    tuple((each + leaf).format(*number) for each in modules),
                    rule.form,
                )


class Pretrained(NamedTuple):
    """What a model that `load` made is written with again."""

    config: dict[str, Any]
    places: dict[str, Place]  # by the name of the parameter


def _as_in_files(named: Mapping[str, nn.Parameter], places: Mapping[str, Place]) -> dict[str, Tensor]:
    """The tensors of a checkpoint: parameters as files have them, those that are one tensor there joined."""
    parts: dict[str, list[Tensor]] = {}
    axis: dict[str, int] = {}
    for name, parameter in named.items():
        file, _, form = places[name]
        parts.setdefault(file, []).append(form.write(parameter.detach()))
        axis[file] = -1 if form is TRANSPOSED else 0
    return {file: torch.cat(tensors, dim=axis[file]).contiguous().cpu() for file, tensors in parts.items()}


def _fill(
    model: nn.Module, family: Family, found: _Tensors, dtype: torch.dtype | None, device: torch.device
) -> dict[str, Place]:
    """Give every parameter of a model that has none yet its tensor, and say where it was."""
    named = dict(model.named_parameters())
    places: dict[str, Place] = {}
    for name in named:
        candidates = list(_places(family, name))
        places[name] = next((each for each in candidates if each.file in found), candidates[0])
    missing = sorted({found.family.full(place.file) for place in places.values() if place.file not in found})
    if missing:
        raise ValueError(f"missing tensors: {', '.join(missing)}")
    read = {place.file for place in places.values()}
    unread = [re.compile(each) for each in (*family.unread, *map(re.escape, family.head))]
    if full := [name for name in family.zeros if name in found and found[name].any()]:
        raise ValueError(f"tensors that must be 0, as nothing here adds them: {', '.join(full)}")
    unread += map(re.compile, map(re.escape, family.zeros))
    left = [name for name in found.where if name not in read and not any(each.fullmatch(name) for each in unread)]
    if left:
        raise ValueError(f"left-over tensors: {', '.join(sorted(found.where[name][1] for name in left))}")
    filled = {}
    for name, parameter in named.items():
        tensor, (file, together, form) = found[places[name].file], places[name]
        whole, rows = form.read(tensor), [named[each].shape[0] for each in together]
        wanted = (sum(rows), *parameter.shape[1:])
        if whole.shape != wanted:
            stored = tuple(form.write(parameter.new_empty(wanted)).shape)
            raise ValueError(
                f"{family.full(file)} must have the shape {stored} by the settings (got {tuple(tensor.shape)})"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{family.full(file)} must hold floating-point numbers (got {tensor.dtype})")
        own = whole.split(rows)[together.index(name)]
        filled[parameter] = nn.Parameter(own.to(device, dtype))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = filled[parameter]  # what was shared stays shared
    return {name: place._replace(file=family.full(place.file)) for name, place in places.items()}


def _set_graphs(model: nn.Module, graphs: Mapping[str, str]) -> None:
    """The graphs that `save` wrote beside the settings."""
    parts = transformers(model)
    known = [*parts, "memory"] if isinstance(model, EncoderDecoder) else [*parts]
    if isinstance(graphs, dict) and "graphs" in graphs:
        raise ValueError(
            "the setting 'attngraph' was written by hf.connect, for transformers' from_pretrained and connect: "
            "without it, hf.load makes the model on its own pattern, and model.transformer.graphs takes others"
        )
    if not isinstance(graphs, dict) or graphs.keys() - set(known):
        raise ValueError(f"the setting 'attngraph' must give graphs to {' or '.join(known)} (got {graphs!r})")
    for name, text in graphs.items():
        if not isinstance(text, str):
            raise ValueError(f"the setting 'attngraph' must give graphs as text (got {text!r} for {name!r})")
        try:
            found = parse_list(text)
        except ValueError as error:
            raise ValueError(f"the setting 'attngraph' gives {name!r} the graph {text!r}: {error}") from None
        if name == "memory" and isinstance(model, EncoderDecoder):
            model.memory_graph = found[0]
        else:
            parts[name].graphs = found
