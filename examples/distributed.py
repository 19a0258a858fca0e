"""A GPT on a text that no rank holds whole: its nodes lie on several processes, and only what crosses travels.

    torchrun --nproc-per-node 2 examples/distributed.py                              two processes, gloo on a CPU
    torchrun --nproc-per-node 4 examples/distributed.py --length 16384 --graph "Causal() & Window(512, 0)"
    python examples/distributed.py --help                                            every option
    torchrun --nproc-per-node 2 --max-restarts 3 examples/distributed.py --save runs/distributed      survives a death

Each step reads one text of --length characters. Rank r holds the nodes plan.nodes of every layer; attention is the only
place where ranks hear each other. With --save, the model and its optimizer are kept every --every steps, and a run that
is started again, by torchrun or by hand, goes on from there.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import gpt
import processes
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from attngraph import parse
from attngraph.distributed import CommunicationError, distribute
from attngraph.models import GPT
from attngraph.nn import TransformerConfig


def settings() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", default="Causal() & (Window(256, 0) | Prefix(4))", help="of all layers but the last")
    parser.add_argument(
        "--last", default="", help="of the last layer, by default --graph; Causal() goes around the ring"
    )
    parser.add_argument("--length", type=int, default=4096, help="characters of a text, over all ranks")
    parser.add_argument("--partition", default="auto", help="contiguous, zigzag, weighted, metis or auto")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--text", help="UTF-8 text; by default tiny Shakespeare, or the text that Python ships")
    parser.add_argument("--save", type=Path, help="a folder for checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, and say what travels."""
    args = settings()
    if "RANK" not in os.environ:
        raise SystemExit("start it with torchrun: torchrun --nproc-per-node 2 examples/distributed.py")
    on_gpus = torch.cuda.is_available()
    processes.begin(on_gpu=on_gpus)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if not on_gpus:
        torch.set_num_threads(1)
    rank, ranks = dist.get_rank(), dist.get_world_size()

    text, source = gpt.read_text(args.text)
    tokens = gpt.Characters(text)
    numbers = torch.tensor(tokens.encode(text))
    if len(numbers) <= args.length:
        raise SystemExit(f"--length must be below the {len(numbers):,} characters of {source} (got {args.length})")
    graphs = [parse(args.graph)] * (args.layers - 1) + [parse(args.last or args.graph)]
    made = distribute(graphs, args.length, dist.group.WORLD, partition=args.partition)
    plans = dict(zip(graphs, made, strict=True))
    plan = plans[graphs[0]]

    torch.manual_seed(args.seed)  # the same weights on every rank
    config = TransformerConfig(embed_dim=args.width, num_layers=args.layers, num_heads=max(args.width // 32, 1))
    model = GPT(config, vocab_size=len(tokens)).to(device)
    model.transformer.graphs = [plans[graph] for graph in graphs]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    trained = DistributedDataParallel(model)
    begun = load(args.save, model, optimizer)
    if rank == 0:
        print(f"{source}: texts of {args.length:,} characters over {ranks} ranks, from step {begun}", flush=True)
    if rank == ranks - 1:  # which hears most of others where all hear the past
        told = [plans[graph].explain(heads=config.num_heads, head_dim=32) for graph in dict.fromkeys(graphs)]
        print("", *told, sep="\n\n", flush=True)
    for step in range(begun, args.steps):
        chance = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # the same text on every rank
        first = int(torch.randint(len(numbers) - args.length, (), generator=chance))
        inputs, targets = (plan.scatter(numbers[None, first + by : first + by + args.length], dim=1) for by in (0, 1))
        logits = trained(inputs.to(device))
        # DDP divides the sum of all ranks' gradients by their number, so this is the mean over the whole text.
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten().to(device), reduction="sum") / args.length
        (loss * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach())
        if rank == 0 and (step % 10 == 0 or step == args.steps - 1):
            print(f"step {step:4}  loss {loss:.3f} nats a character", flush=True)
        if args.save and ((step + 1) % args.every == 0 or step == args.steps - 1):
            save(args.save, step + 1, model, optimizer)
    dist.destroy_process_group()


def save(folder: Path, step: int, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """A checkpoint of this step; it counts once it is whole."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / f"step-{step}")
    if dist.get_rank() == 0:
        written = folder / "last.txt.new"
        written.write_text(str(step), encoding="utf-8")
        written.replace(folder / "last.txt")


def load(folder: Path | None, model: GPT, optimizer: torch.optim.Optimizer) -> int:
    """The step from which a run goes on, its weights and its optimizer read."""
    if folder is None or not (folder / "last.txt").exists():
        return 0
    step = int((folder / "last.txt").read_text(encoding="utf-8"))
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder / f"step-{step}")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return step


def remedy(folder: Path | None) -> str:
    """What to do after a rank was lost."""
    if folder is None or not (folder / "last.txt").exists():
        return "there is no checkpoint yet: with --save FOLDER there is one every --every steps"
    step = (folder / "last.txt").read_text(encoding="utf-8")
    return f"started again, with --save {folder}, it goes on from {folder / f'step-{step}'}"


if __name__ == "__main__":
    try:
        main()
    except CommunicationError as error:
        raise SystemExit(f"{error}; {remedy(settings().save)}") from None
