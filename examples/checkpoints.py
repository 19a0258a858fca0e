"""A run's folder: written whole or not at all, by one run at a time, with checkpoints that it goes on from."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from processes import processes
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attngraph.models import Model, saved

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None


def cached(name: str) -> Path:
    """Where a download is kept: in the user's cache directory, or without a home among temporary files."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home
        folder = Path(tempfile.gettempdir())
    return folder / "attngraph" / name


@contextmanager
def or_told(path: Path) -> Iterator[None]:
    """What can't be written is told in a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"{path} can't be written ({error}); what was there before is still whole") from None


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """The whole file or what was there before; what can't be written is told."""
    with or_told(path):
        saved.write_whole(path, write)


@contextmanager
def only_run(args: argparse.Namespace) -> Iterator[None]:
    """Nobody else writes to the run's folder meanwhile: a second run of its name, new or resumed, is refused."""
    folder = Path(args.runs) / args.name
    if processes().rank:  # it writes nothing
        yield
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_name(f".{folder.name}.lock"), "a+")  # noqa: SIM115  closed below
    except OSError as error:
        raise SystemExit(f"{folder.parent} can't be written ({error}); choose another --runs") from None
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"a run is going on in {folder}; wait for it, or choose another --name") from None
        yield


def made(folder: Path) -> Path:
    """The folder, which is there now; what is in its way is told."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{folder} can't be a folder ({error}); choose another place") from None
    return folder


def set_aside(folder: Path) -> Path:
    """Rename an earlier run, so that a new one of its name loses nothing."""
    number = next(number for number in range(1, 10**6) if not folder.with_name(f"{folder.name}.{number}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.{number}"))


MODEL = saved.WEIGHTS


def state_of(folder: Path, step: int) -> Path:
    """Where the optimisers' state is kept, beside the model of the same step."""
    return folder / f"optimizer-{step}.safetensors"


def save_checkpoint(
    folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, config: dict[str, Any]
) -> None:
    """The model, and the optimisers' state beside it, in safetensors.

    The state is there before the model that belongs to it, whose header names the step; and the old one until after: so
    wherever this is interrupted, a model and its state are there.
    """
    state = {
        f"{number}.{index}.{name}": tensor.detach().cpu().contiguous()
        for number, optimizer in enumerate(optimizers)
        for index, entries in optimizer.state_dict()["state"].items()
        for name, tensor in entries.items()
    }
    write_whole(state_of(folder, step), lambda aside: save_file(state, aside))
    metadata = {"step": str(step), "config": json.dumps(config)}
    with or_told(folder / MODEL):
        if isinstance(model, Model):
            model.save(folder, metadata=metadata)
        else:
            saved.write_whole(folder / MODEL, lambda aside: save_file(model.state_dict(), aside, metadata))
    for old in folder.glob("optimizer-*.safetensors"):
        if old != state_of(folder, step):
            old.unlink()


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    config: dict[str, Any],
    changed: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Put a checkpoint into the model and the optimisers; the number of steps it had made.

    `changed` has, by name, sentences for what in the config is another than it was.
    """
    path = folder / MODEL
    metadata, tensors = read_tensors(path)
    try:
        before, step = json.loads(metadata.get("config", "{}")), int(metadata["step"])
        names = sorted(name for name in {*before, *config} if before.get(name) != config.get(name))
        for name in names:
            if name in before and name in changed:
                raise SystemExit(f"{path} can't go on: {changed[name]}; start another run with another --name")
        if before != config:
            other = "; ".join(f"{name} was {before.get(name)!r}, and is {config.get(name)!r}" for name in names)
            raise SystemExit(f"{path} is of another model: {other or 'no config'}; use its own settings")
        state = read_tensors(state_of(folder, step))[1]
        model.load_state_dict(type(model).load(folder).state_dict() if isinstance(model, Model) else tensors)
        for number, optimizer in enumerate(optimizers):
            load_optimizer(optimizer, f"{number}.", state)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise SystemExit(
            f"{path} is damaged ({type(error).__name__}: {error}); delete the run and start anew"
        ) from None
    return step


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file, and of nothing else."""
    if not path.exists():
        raise SystemExit(f"{path} is not there, and belongs to the checkpoint; delete the run and start anew")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
    except SafetensorError as error:
        head = path.read_bytes()[:9]
        if head[:1] in (b"P", b"\x80") and head[8:] != b"{":  # a safetensors header begins there
            raise SystemExit(f"{path} holds a pickle, which could run anything, not safetensors") from None
        raise SystemExit(f"{path} is no whole safetensors file ({error}); delete the run and start anew") from None


def load_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Its state of every parameter, from the tensors of a checkpoint; ValueError if that is not what it holds."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, entry = name.removeprefix(prefix).split(".", 1)
            state.setdefault(int(index), {})[entry] = tensor
    for index, param in enumerate(params):
        if {entry: tensor.shape for entry, tensor in state.get(index, {}).items()} != entries(optimizer, param):
            raise ValueError(f"it does not hold the optimiser's state of parameter {index} of {prefix[:-1]}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def entries(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> dict[str, torch.Size]:
    """What an optimiser keeps of a parameter."""
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step": torch.Size(), "exp_avg": param.shape, "exp_avg_sq": param.shape}
    return {"momentum_buffer": param.shape}
