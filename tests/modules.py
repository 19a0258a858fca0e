"""Every module of attngraph, found by walking its packages, made and called by the names of what it takes."""

import importlib
import inspect
import pkgutil

import torch
from torch import nn

import attngraph
from attngraph import Causal, Window
from attngraph.bias import Alibi, RelativeBias
from attngraph.nn import TransformerConfig

POSITIONS = ("none", "learned", "sinusoidal", "rotary", "alibi", "relative")
SCALINGS = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 6},
    "longrope": {
        "rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 6,
        "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0, 4.0, 5.0, 6.0],
    },
}  # fmt: skip


def config(position="rotary", **switches):
    """Of a small Transformer; a position may also be a rotary scaling."""
    if position in SCALINGS:
        switches = {"position": "rotary", "rotary_scaling": SCALINGS[position], **switches}
    else:
        switches = {"position": position, **switches}
    return TransformerConfig(**{"embed_dim": 24, "num_layers": 2, "num_heads": 3, "max_length": 20, **switches})


def module_classes():
    """Every subclass of nn.Module that attngraph defines and that has a forward."""
    found = set()
    for info in pkgutil.walk_packages(attngraph.__path__, "attngraph."):
        # Layers of attngraph.pyg are made and called as PyG's own: see test_pyg.
        if info.name.startswith(("attngraph.__main__", "attngraph.kernels.", "attngraph.pyg")):
            continue
        for value in vars(importlib.import_module(info.name)).values():
            own = inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__.startswith("attngraph.")
            if own and value.forward is not nn.Module.forward:
                found.add(value)
    return sorted(found, key=lambda cls: cls.__name__)


CLASSES = module_classes()
MODELS = [each for each in CLASSES if issubclass(each, attngraph.models.Model)]


def _sized(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tokens(*shape, seed=0):
    return torch.randint(17, shape, generator=torch.Generator().manual_seed(seed))


ARGUMENTS = {  # of constructors; a new module whose arguments are called otherwise is added here
    "embed_dim": 24, "num_heads": 3, "head_dim": 8, "hidden_dim": 30, "max_length": 20, "num_buckets": 5,
    "num_embeddings": 17, "vocab_size": 17, "num_classes": 5, "classify": "sequence", "image_size": (8, 8),
    "patch_size": (2, 2), "channels": 3, "state_dim": 4, "action_dim": 2, "max_time": 30,
    "graph": Causal() & Window(3, 0),
}  # fmt: skip


def inputs():
    """Of forward, by name."""
    return {
        "x": _sized(2, 9, 24), "graph": Causal() & Window(3, 0), "positions": torch.arange(9), "input": _tokens(2, 9),
        "tokens": _tokens(2, 9), "source": _tokens(2, 7, seed=1), "target": _tokens(2, 9), "images": _sized(2, 3, 8, 8),
        "features": _sized(2, 3, 10), "sound": _sized(2, 800), "states": _sized(2, 5, 4), "actions": _sized(2, 5, 2),
        "returns": _sized(2, 5, 1), "timesteps": torch.arange(5).expand(2, 5),
    }  # fmt: skip


ALSO = {"DecisionTransformer": ("state_dim", "action_dim")}  # one of two is required


def _required(function):
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD and name != "self"
    ]


def made(cls, position="rotary", **switches):
    """A module with random parameters, so large that a mistake shows, in eval mode."""
    configs = {
        "config": config(position, **switches), "encoder": config(position, **switches),
        "decoder": config(position, cross=True, **switches),
    }  # fmt: skip
    torch.manual_seed(0)
    takes = [*_required(cls.__init__), *ALSO.get(cls.__name__, ())]
    module = cls(**{name: {**ARGUMENTS, **configs}[name] for name in takes})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.ndim == 1))
    return module.eval()


def given(module, dtype=None, device=None):
    """What its forward takes, by name: what is required of it."""
    takes = {name: inputs()[name] for name in _required(module.forward)}
    for name, value in takes.items():
        if isinstance(value, torch.Tensor):
            takes[name] = value.to(device, dtype if value.is_floating_point() else None)
    return takes


def tensors(found):
    """What a module gives, as a list of tensors."""
    match found:
        case torch.Tensor():
            return [found]
        case Alibi():
            return [found.slopes]
        case RelativeBias():
            return [found.table]
    return list(found)


def variants():
    """Every module; those that are made of a config with every kind of positions."""
    for cls in CLASSES:
        takes = _required(cls.__init__)
        several = (*POSITIONS, *SCALINGS) if {"config", "encoder"} & set(takes) else ("none",)
        for position in several:
            yield cls, position
