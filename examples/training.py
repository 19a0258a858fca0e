"""What every training run needs: settings that resume, optimisers, checkpoints, metrics, the loop. The examples use it.

A run is a folder: config.json, metrics.csv, and the model, model.safetensors, as `load` of its class reads it, with the
optimisers' state beside it. It can be stopped at any time, by Ctrl-C after the step that it falls into, and goes on bit
for bit.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
import torch.distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import attngraph
from attngraph import Graph, draw, parse_list
from attngraph.models import Model, saved

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ---------------------------------------------------------------------------------------------------------- settings

PLACE = ("name", "runs", "resume", "quick")  # where a run is; the others are kept in its config.json
FREE = (*PLACE, "draw_attention")  # of a run that is resumed
LATER = ("steps", "device")  # may be others when a run goes on: more steps, on another device
MOST = 2**31 - 1  # of any number


GRAPHS = """graphs:
  who hears whom, as an expression that attngraph.parse reads; in a shell, between quotes
    Causal() Full() Window(left, right) Prefix(length) Strided(stride) Chunks(chunk)
    ChunkEnds(chunk, length) Random(degree): of any size
    a & b, a | b, a - b, a ^ b, ~a, a.T, a @ b: combined; PerHead([a, b]): one for each head
    "a, b, c, d": one for each layer
  documented, with pictures, in docs/graphs.md and docs/algebra.md; in Python, by help(attngraph)
"""


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Text as it is written, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or action.default is False or "by default" in (action.help or "")
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A command line; of a run that is resumed, the `free` settings may be others."""

    free: tuple[str, ...] = FREE
    quick: Mapping[str, Any] = MappingProxyType({})  # the defaults under --quick
    reading: Path | None = None  # the file that the arguments are from

    def error(self, message: str) -> NoReturn:
        super().error(message if self.reading is None else f"{self.reading}: {message}")


def parser_of(
    doc: str | None,
    free: tuple[str, ...] = (),
    quick: Mapping[str, Any] = MappingProxyType({}),
    **defaults: Any,
) -> Parser:
    """A command line, described by `doc`, with what all runs have, and these defaults; or `quick` ones, by --quick."""
    parser = Parser(description=doc, epilog=GRAPHS, formatter_class=Help, allow_abbrev=False)
    anew = ", ".join(f"--{name.replace('_', '-')}" for name in ("device", *free))
    add = parser.add_argument
    add("--name", help="the run's folder below --runs")
    add("--runs", default="runs", help="where runs are kept; else only downloads are, in the user's cache")
    resume = f"go on from the run's checkpoint, by its own settings; others may be {anew}, and --steps, if more"
    add("--resume", action="store_true", help=resume)
    if quick:
        told = {name: " ".join(value) if isinstance(value, list) else value for name, value in quick.items()}
        short = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in told.items())
        add("--quick", action="store_true", help=f"seconds, enough to see what happens: as {short}")
    add("--batch", type=int, help="examples in each forward pass")
    add("--accumulate", type=int, default=1, help="forward passes for each step, of all processes that torchrun starts")
    add("--steps", type=int, help="of the optimiser; the rates fall to 0 at the last")
    add("--optimizer", default="muon", choices=["muon", "adamw"], help="for the matrices; vectors always have AdamW")
    add("--lr", type=float, default=None, help="peak rate of the matrices; by default 0.02 for muon, 0.001 for adamw")
    add("--adamw-lr", type=float, default=0.003, help="peak rate of embeddings, head and vectors")
    add("--warmup", type=int, default=20, help="steps in which the rates rise from 0")
    add("--weight-decay", type=float, default=0.0, help="of the matrices")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; 0: any")
    add("--dropout", type=float, default=0.0, help="probability with which weights and features are dropped")
    add("--seed", type=int, default=1337, help="of weights, batches and samples")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: what trains faster here")
    add("--evaluate-every", type=int, help="steps between evaluations and checkpoints")
    add("--draw-attention", metavar="LAYER.HEAD", help="whose attention is drawn, from 0, as in 2.3")
    parser.set_defaults(**defaults)
    parser.free, parser.quick = (*FREE, *LATER, *free), quick
    return parser


def parsed(parser: Parser, arguments: list[str] | None) -> argparse.Namespace:
    """The settings; those of the run that is to go on, if it is to. What can't be is told before anything begins."""
    given = parser.parse_args(arguments)
    if parser.quick and given.quick:
        parser.set_defaults(**parser.quick)
        given = parser.parse_args(arguments)
    if given.resume:
        unset = argparse.Namespace(**dict.fromkeys(vars(given)))
        given = resumed(given, vars(parser.parse_args(arguments, unset)), parser)
    least = dict.fromkeys(("warmup", "clip", "dropout", "weight_decay", "adamw_lr", "lr"), 0)
    require_at_least(given, parser, **least, batch=1, accumulate=1, steps=1, evaluate_every=1, seed=-MOST)
    if given.dropout >= 1:
        parser.error(f"--dropout must be a probability below 1 (got {given.dropout})")
    if given.accumulate % (count := processes().count):
        parser.error(f"--accumulate must be a multiple of the {count} processes (got {given.accumulate})")
    if given.device not in ("auto", "cpu", "mps") and not given.device.startswith("cuda"):
        parser.error(f"--device must be auto, cpu, cuda or mps (got {given.device})")
    chosen_head(given, parser)
    return given


def require_at_least(given: argparse.Namespace, parser: argparse.ArgumentParser, **least: float) -> None:
    """An error for settings that are below what they must be, or above all reason."""
    for name, bound in least.items():
        value = getattr(given, name)
        if value is not None and not value >= bound:
            parser.error(f"--{name.replace('_', '-')} must be {bound} or more (got {value})")
        if value is not None and value > MOST:
            parser.error(f"--{name.replace('_', '-')} must be {MOST} or less (got {value})")


def require_graphs(given: argparse.Namespace, parser: argparse.ArgumentParser, read: Callable[[str], object]) -> None:
    """An error unless --graph, and each of --against, can be read."""
    for name, texts in (("graph", [given.graph]), ("against", given.against)):
        for text in texts:
            try:
                read(text)
            except ValueError as error:
                parser.error(f"--{name}: {error}")


def require_heads(given: argparse.Namespace, parser: argparse.ArgumentParser, even: bool = False) -> None:
    """An error unless each head has as many features, an even number where they are turned in pairs."""
    if given.width % (given.heads * (1 + even)):
        times = "2 × --heads" if even else "--heads"
        parser.error(f"--width must be a multiple of {times} (got --width {given.width} --heads {given.heads})")


def resumed(given: argparse.Namespace, explicit: dict[str, Any], parser: Parser) -> argparse.Namespace:
    """The settings of the run that is to go on; one that is given beside --resume must be the same."""
    path = Path(given.runs) / given.name / "config.json"
    if not path.exists():
        parser.error(f"nothing to resume: {path} does not exist")
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        saved, default = whole["settings"], parser.get_default
        maker = whole.get("example", default("name"))
        missing = sorted(
            name
            for name in {*vars(given)} - {*FREE}
            if name not in saved or (saved[name] is None and default(name) is not None)
        )
        arguments = as_arguments(saved)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        parser.error(f"{path} is damaged, it holds no settings ({type(error).__name__}: {error})")
    if maker != default("name"):
        parser.error(f"{path} is of a run of examples/{maker}.py, which resumes it (this is {default('name')}.py)")
    if missing:
        parser.error(f"{path} is damaged, it lacks the settings {', '.join(missing)}")
    parser.reading = path
    saved = {name: value for name, value in vars(parser.parse_args(arguments)).items() if name in saved}
    parser.reading = None
    for name, value in explicit.items():
        if value is not None and name not in parser.free and value != saved[name]:
            parser.error(
                f"--resume goes on with the run's settings, and --{name.replace('_', '-')} was {saved[name]} "
                f"(got {value}); start another run with another --name"
            )
    if explicit["steps"] is not None and explicit["steps"] < saved["steps"]:
        parser.error(f"--steps was {saved['steps']}, and a run can only go on for more (got {explicit['steps']})")
    wanted = {name: explicit[name] for name in parser.free if explicit[name] is not None}
    return argparse.Namespace(**{**vars(given), **saved, **wanted})


def as_arguments(settings: dict[str, Any]) -> list[str]:
    """The command line that says the same."""
    arguments = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            arguments += [flag, *map(str, value)]
        elif value is not None:
            arguments.append(f"{flag}={value}")
    return arguments


def layer_graphs(text: str, layers: int, size: tuple[int, int] | None = None) -> Graph | list[Graph]:
    """--graph: one graph, or one for each layer; it must fit any length, or be of this size."""
    graphs = parse_list(text)
    for graph in graphs:
        if size is None and graph.size != (None, None):
            raise ValueError(f"--graph must fit texts of any length, and {graph} has size {graph.size}")
        if size is not None and any(own not in (None, wanted) for own, wanted in zip(graph.size, size, strict=True)):
            raise ValueError(f"--graph must fit {size[0]} nodes, and {graph} has size {graph.size}")
    if len(graphs) not in (1, layers):
        raise ValueError(f"--graph must be one graph, or one for each of {layers} layers (got {len(graphs)})")
    return graphs[0] if len(graphs) == 1 else graphs


def chosen_head(given: argparse.Namespace, parser: argparse.ArgumentParser | None = None) -> tuple[int, int] | None:
    """--draw-attention: a layer and one of its heads, both from 0; None for the example's own choice."""
    if given.draw_attention is None:
        return None
    layer, _, head = given.draw_attention.partition(".")
    if parser is not None and not (layer.isdecimal() and head.isdecimal()):
        parser.error(f"--draw-attention must be a layer and a head, as in 2.3 (got {given.draw_attention})")
    if parser is not None and not (int(layer) < given.layers and int(head) < given.heads):
        last = f"{given.layers - 1}.{given.heads - 1}"
        parser.error(f"--draw-attention must be from 0.0 to {last} (got {given.draw_attention})")
    return int(layer), int(head)


# ------------------------------------------------------------------------------------------------------ optimisation


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is orthogonalised, for matrices (Jordan et al. 2024), with torch.optim.Muon's meaning.

    The Newton–Schulz iteration runs over all matrices of one shape at once, in the precision that is faster here;
    torch's runs in bfloat16, one by one, which is right for a GPU and slow on most CPUs.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; of a closure, which computes the loss and its gradients, first that."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                steps = torch.stack([self._momentum(param, group["momentum"]) for param in params])
                updates = orthogonal(steps.to(self.dtype)).to(steps.dtype)
                rate = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for param, update in zip(params, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
        return loss

    def _momentum(self, param: Tensor, momentum: float) -> Tensor:
        """Nesterov's."""
        assert param.grad is not None  # every matrix of a layer has its part in the loss
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
        mean = state["momentum_buffer"].lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(mean, momentum)


def orthogonal(x: Tensor) -> Tensor:
    """About the nearest matrices with orthonormal rows or columns, by five quintic Newton–Schulz steps: (n, A, B)."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


def optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """The layers' matrices in the first, everything else in the last."""
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(rest, lr=args.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if not matrices:
        return [adamw]
    if args.optimizer == "adamw":
        lr = args.lr or 0.001
        return [
            torch.optim.AdamW(matrices, lr=lr, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True),
            adamw,
        ]
    options = {"lr": args.lr or 0.02, "momentum": 0.9, "weight_decay": args.weight_decay}
    if matrices[0].is_cuda:
        return [torch.optim.Muon(matrices, **options), adamw]
    return [Muon(matrices, dtype=getattr(torch, args.dtype), **options), adamw]


def rate(step: int, args: argparse.Namespace) -> float:
    """The factor of the peak learning rates: warm-up, then half a cosine to 0."""
    rising = min(1.0, (step + 1) / max(args.warmup, 1))
    return rising * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def best_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def faster_dtype(loss: Callable[[int], Tensor], model: nn.Module, device: torch.device) -> str:
    """bfloat16 on GPUs; on a CPU whichever trains this very model faster, by a trial."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if device.type == "mps":
        return "bfloat16"
    seconds = {}
    for dtype in ("float32", "bfloat16") * 3:
        start = time.perf_counter()
        with autocast(device, dtype):
            loss(0).backward()
        seconds[dtype] = min(seconds.get(dtype, math.inf), time.perf_counter() - start)
    model.zero_grad()
    return "bfloat16" if seconds["bfloat16"] < 0.9 * seconds["float32"] else "float32"


# ------------------------------------------------------------------------------------------------------- checkpoints


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


def save_picture(figure: Figure, path: Path) -> None:
    """The whole picture or none."""
    write_whole(path, lambda aside: draw.save(figure, aside))


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


class Metrics:
    """A table, a row a step, written to its file with each checkpoint."""

    def __init__(self, path: Path, unit: str, score: str, from_step: int):
        self.columns = ("step", "seconds", unit, "training_loss", score, "rate", "gradient_norm")
        self.path, self.rows = path, []
        if from_step and path.exists():
            try:
                self.rows = [row for row in self._read() if int(row["step"]) <= from_step]
            except (OSError, ValueError, csv.Error) as error:
                raise SystemExit(f"{path} is damaged ({error}); move it away, and a new one is begun") from None

    def _read(self) -> list[dict[str, Any]]:
        with open(self.path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for number, row in enumerate(rows, 1):
            if tuple(row) != self.columns or None in row.values():
                raise ValueError(f"row {number} must have {', '.join(self.columns)}")
            int(row["step"]), [float(value) for value in row.values() if value != ""]
        return rows

    @property
    def seconds(self) -> float:
        return float(self.rows[-1]["seconds"]) if self.rows else 0.0

    def add(self, **row: Any) -> None:
        self.rows.append({column: row.get(column, "") for column in self.columns})

    def save(self) -> None:
        write_whole(self.path, self._write)

    def _write(self, path: Path) -> None:
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, self.columns)
            table.writeheader()
            table.writerows(self.rows)

    def column(self, name: str) -> list[tuple[int, float]]:
        return [(int(row["step"]), float(row[name])) for row in self.rows if row[name] != ""]


# ---------------------------------------------------------------------------------------------------------- training


class Task(NamedTuple):
    """What is trained, as the loop sees it."""

    model: nn.Module
    loss: Callable[[int], Tensor]  # of the batch of this number
    evaluate: Callable[[], float]
    device: torch.device
    identity: dict  # what a checkpoint must agree in, beside the settings
    record: dict  # what config.json says, beside the settings
    unit: str = "tokens"
    per_batch: int = 1  # of these units
    score: str = "validation_loss"  # what evaluate gives, a column of the metrics
    free: tuple[str, ...] = FREE  # settings in which a resumed run may differ
    changed: Mapping[str, str] = MappingProxyType({})  # sentences for what of the identity is another


class Processes(NamedTuple):
    """Those that train one model together, each on its own part of every step's batches."""

    rank: int
    """Which of them this is; the first alone writes and tells."""
    count: int


def processes() -> Processes:
    """As torchrun has started them; else this one alone."""
    return Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def join(device: str) -> Processes:
    """Let the processes that torchrun has started know each other, each on a GPU of its own where there are any."""
    own = processes()
    if own.count > 1 and not torch.distributed.is_initialized():
        on_gpu = best_device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        if own.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  to the end
    return own


def summed(tensors: list[Tensor]) -> None:
    """Each becomes its sum over the processes: of parts of a gradient, the whole."""
    flat = torch.cat([tensor.flatten().float() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def batch_seed(args: argparse.Namespace, number: int) -> int:
    """The seed of a batch: even, below 2³², and far from those of other --seeds, which would else share their batches.

    Generators of torch forget all but the last 32 bits of a seed.
    """
    return 2 * ((args.seed * 0x9E3779B1 + number) % 2**31)


def batch_generator(args: argparse.Namespace, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(batch_seed(args, number))


TEST_SEED, TUNING_SEED = 1, 3  # odd, as no batch's is


def fit(args: argparse.Namespace, task: Task) -> tuple[float, Metrics]:
    """Train, with a progress bar; leave config, metrics and checkpoints in the run's folder. The last score."""
    folder, model, own = Path(args.runs) / args.name, task.model, join(args.device)
    if args.dtype == "auto":
        args.dtype = faster_dtype(task.loss, model, task.device)
    if own.count > 1:  # which may differ in what is faster
        torch.distributed.broadcast_object_list(chosen := [args.dtype])
        args.dtype = chosen[0]
    parameters = sum(p.numel() for p in model.parameters())
    per_step = args.accumulate * task.per_batch
    print(f"training  {args.steps} steps of {per_step:,} {task.unit} on {task.device}, {args.dtype}")
    steppers = optimizers(model, args)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in steppers]
    shape, first = agreed(args, task.identity, task.free), 0
    if args.resume:
        if not (folder / MODEL).exists():
            raise SystemExit(
                f"nothing to resume: {folder / MODEL} does not exist; the run stopped before its first checkpoint"
            )
        first = load_checkpoint(folder, model, steppers, shape, task.changed)
    if own.count > 1:
        torch.distributed.barrier()  # what there was has been read
    try:
        if folder.exists() and not args.resume and not own.rank:
            print(f"kept      the run that was there before as {set_aside(folder)}")
        if not own.rank:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{folder} can't be written ({error}); choose another --runs or --name") from None
    settings = {name: value for name, value in vars(args).items() if name not in PLACE}
    config = json.dumps(
        {"settings": settings, "parameters": parameters, **task.record, "attngraph": attngraph.__version__}, indent=2
    )
    if not own.rank:
        write_whole(folder / "config.json", lambda path: path.write_text(config))
    metrics = Metrics(folder / "metrics.csv", task.unit, task.score, first)
    before = metrics.seconds
    begin = time.perf_counter() - before

    score = math.nan
    steps, each = range(first, args.steps), args.accumulate // own.count
    bar = tqdm(steps, initial=first, total=args.steps, unit="step", dynamic_ncols=True, disable=own.rank > 0)
    with interruptible() as stopped:
        for step in bar:
            factor = rate(step, args)
            for optimizer, peak in zip(steppers, peaks, strict=True):
                for group, lr in zip(optimizer.param_groups, peak, strict=True):
                    group["lr"] = lr * factor
            chances = batch_seed(args, step * own.count + own.rank) + 1  # of dropout: a resumed run takes the same
            torch.manual_seed(chances)
            loss = 0.0
            for part in range(own.rank * each, (own.rank + 1) * each):
                with autocast(task.device, args.dtype):
                    part_loss = task.loss(step * args.accumulate + part) / args.accumulate
                part_loss.backward()
                loss += part_loss.detach()
            if own.count > 1:
                stops = torch.tensor(float(bool(stopped)), device=task.device)
                summed([p.grad for p in model.parameters() if p.grad is not None] + [loss, stops])
                stopped += [0] * int(stops)  # all of them, if any
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
            for optimizer in steppers:
                optimizer.step()
            model.zero_grad()

            done, loss, new_score = step + 1, float(loss), ""
            if not math.isfinite(loss):
                raise SystemExit(f"the loss is {loss} at step {done}; the last good checkpoint stays; try lower rates")
            evaluates = done % args.evaluate_every == 0 or done == args.steps
            if evaluates:
                new_score = score = evaluated(task)
            seconds = time.perf_counter() - begin
            metrics.add(
                step=done, seconds=f"{seconds:.3f}", training_loss=loss, rate=factor, gradient_norm=float(norm),
                **{task.unit: done * per_step, task.score: new_score},
            )  # fmt: skip
            if (evaluates or stopped) and not own.rank:
                metrics.save()
                save_checkpoint(folder, model, steppers, done, shape)
            if stopped:
                raise SystemExit(f"stopped after step {done}; go on with --name {args.name} --resume")
            speed = (done - first) * per_step / (seconds - before)
            name = task.score.replace("_", " ").replace("validation loss", "validation")
            known = "" if math.isnan(score) else f"{name} {score:.3f}, "  # nan: not evaluated yet
            bar.set_postfix_str(f"loss {loss:.3f}, {known}{speed:,.0f} {task.unit}/s", refresh=False)
    return (evaluated(task) if math.isnan(score) else score), metrics  # resumed at the end


def agreed(args: argparse.Namespace, identity: dict, free: tuple[str, ...]) -> dict:
    """What a checkpoint must agree in: an identity, and the settings that are not free."""
    return identity | {name: value for name, value in vars(args).items() if name not in {*free, *LATER}}


def evaluated(task: Task) -> float:
    """The score, in eval mode and without gradients."""
    task.model.eval()
    with torch.no_grad():
        score = task.evaluate()
    task.model.train()
    return score


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Ctrl-C is noted in a list, to stop after the step that it falls into; a second one stops at once."""
    stopped: list[int] = []

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


# ----------------------------------------------------------------------------------------------------------- outcomes


class Outcome(NamedTuple):
    """What an example reached, beside what it is to be compared with."""

    metric: str
    """What is measured, with its unit: "values right [%]"."""
    figure: float
    baselines: Mapping[str, float]
    """The same of others, by what they are: "Causal() & Window(7, 0)", "ridge regression"."""
    graph: str
    """The one line that differs."""
    edges: int
    """Of all layers, for one example."""
    seconds: float
    """Of training."""
    picture: str
    """The file in the run's folder that shows it best."""
    lower_is_better: bool = False


OUTCOME = "outcome.json"


def edges_of(graphs: Iterable[Graph], nodes: int) -> int:
    """Of all layers; of a graph that the data choose, those that any queries and keys choose."""
    sides = {graph: torch.randn(2, *([] if graph.heads is None else [graph.heads]), nodes, 8) for graph in graphs}
    return sum(graph.resolve(*sides[graph]).num_edges(nodes, nodes) for graph in graphs)


def tell(folder: Path, outcome: Outcome) -> dict[str, Any]:
    """Print the figure with its baselines below it, keep it as outcome.json, and return it as that."""
    print(f"{outcome.metric:40}{outcome.figure:10.4g}   {outcome.graph}, {outcome.edges:,} edges")
    for name, figure in outcome.baselines.items():
        print(f"{'':40}{figure:10.4g}   {name}")
    kept = {**outcome._asdict(), "baselines": dict(outcome.baselines)}
    write_whole(folder / OUTCOME, lambda path: path.write_text(json.dumps(kept, indent=2)))
    return kept


def beside(args: argparse.Namespace, train: Callable[[argparse.Namespace], dict]) -> dict[str, dict]:
    """What `train` returns on each graph of --against, all else the same, in runs of their own: NAME-against-1, …"""
    found = {}
    for number, graph in enumerate(args.against, 1):
        name = f"{args.name}-against-{number}"
        begun = args.resume and (Path(args.runs) / name / MODEL).exists()  # or the first was stopped before
        print(f"\nthe same model and budget under {graph}:")
        found[graph] = train(argparse.Namespace(**{**vars(args), "graph": graph, "name": name, "resume": begun}))
    return found


# ---------------------------------------------------------------------------------------------------------- pictures


def loss_curve(metrics: Metrics, title: str, loss: str, score: str) -> Figure:
    """Training loss and score against the step; a score that is no loss has an axis of its own."""
    from matplotlib.figure import Figure

    ax = Figure(figsize=(6, 3.5), layout="constrained").subplots()
    lines = ax.plot(
        *zip(*metrics.column("training_loss"), strict=True),
        color=draw.BLUE,
        alpha=0.4,
        lw=0.8,
        label="training, each batch",
    )
    name = metrics.columns[4]
    other = ax if name.endswith("_loss") else ax.twinx()
    lines += other.plot(*zip(*metrics.column(name), strict=True), "o-", color="#c2410c", label=score)
    if other is not ax:
        other.set_ylabel(score)
        other.set_ylim(top=min(100.5, other.get_ylim()[1]))  # in percent
    ax.set(xlabel="step", ylabel=loss)
    draw.set_title(ax, title)
    ax.grid(alpha=0.3)
    ax.legend(handles=lines)
    return ax.figure


def left_in(folder: Path) -> str:
    """What a run has left."""
    return f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir() if not path.name.startswith('.')))}"
