"""The loop of every training run. The examples use it.

A run is a folder: config.json, metrics.csv, and the model, model.safetensors, as `load` of its class reads it, with the
optimisers' state beside it. It can be stopped at any time, by Ctrl-C after the step that it falls into, and goes on bit
for bit.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed
from checkpoints import MODEL, load_checkpoint, save_checkpoint, set_aside, write_whole
from command_line import FREE, LATER, PLACE
from optimization import autocast, faster_dtype, optimizers, rate
from processes import join, summed
from torch import Tensor, nn
from tqdm import tqdm

import attngraph


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
