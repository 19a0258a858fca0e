"""Train a ViT on images, as message passing between their patches, and see what CLS looks at. Read top to bottom.

    python examples/vit.py                                            handwritten digits, a minute on a CPU
    python examples/vit.py --graph "Neighborhood((4, 4), 1)" --name local       patches hear those beside them, and CLS
    python examples/vit.py --graph "Axial((4, 4))" --pool mean                  their row and column, and no CLS
    python examples/vit.py --graph "ShiftedWindows((4, 4), (2, 2), (0, 0)), ShiftedWindows((4, 4), (2, 2), (1, 1))" \\
        --layers 2 --pool mean                                                  as in Swin, layer by layer
    python examples/vit.py --data cifar10 --patch 4 --width 192 --layers 6      where it can be had

Everything is left in runs/NAME: config.json, metrics.csv, accuracy.png, connectivity.png, heads.png, attention.png if
there is a CLS node, outcome.json, and the model, for ViT.load and for --resume: model.safetensors and
optimizer-STEP.safetensors.
"""

from __future__ import annotations

import argparse
import gzip
import tarfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import checkpoints
import command_line
import numpy as np
import optimization
import reporting
import torch
import training
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from attngraph import record
from attngraph.models import ViT
from attngraph.nn import Recording, TransformerConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ---------------------------------------------------------------------------------------------------------- settings


QUICK = {"steps": 150, "layers": 2}


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. What is not given is the recipe for digits."""
    parser = command_line.parser_of(
        __doc__,
        free=("folder",),
        quick=QUICK,
        name="vit",
        draws=True,
        batch=128,
        steps=1000,
        evaluate_every=250,
        warmup=50,
    )
    add = parser.add_argument
    add("--data", default="digits", choices=["digits", "mnist", "cifar10"], help="images to learn from")
    add("--folder", help="where MNIST's or CIFAR-10's own files are, or are put; by default the user's cache")
    add("--graph", default="Full()", help="which patches hear which; one for each layer, separated by commas")
    add("--pool", default="cls", choices=["cls", "mean"], help="classify a node that hears all patches, or their mean")
    add("--patch", type=int, default=2, help="pixels on a patch's side")
    add("--layers", type=int, default=4, help="of the Transformer")
    add("--heads", type=int, default=4, help="of attention, in each layer")
    add("--width", type=int, default=64, help="of the nodes' vectors")
    add("--distort", type=float, default=0.7, help="how far training images are turned, scaled and moved; 0: not")
    given = command_line.parsed(parser, arguments)
    command_line.require_at_least(given, parser, layers=1, heads=1, width=1, patch=1, distort=0)
    command_line.require_heads(given, parser)
    return given


# ------------------------------------------------------------------------------------------------------------ images

MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
CIFAR = "https://www.cs.toronto.edu/~kriz/"


def images_of(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (E, channels, height, width), their classes, test images and theirs; numbers from 0 to 1."""
    if args.data == "digits":  # with scikit-learn, nothing to download
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, classes = load_digits(return_X_y=True)
        parts = train_test_split(
            images.reshape(-1, 1, 8, 8) / 16, classes, test_size=0.2, stratify=classes, random_state=0
        )
        training_images, test_images, training_classes, test_classes = map(torch.from_numpy, parts)
        return training_images.float(), training_classes, test_images.float(), test_classes
    folder = Path(args.folder) if args.folder else checkpoints.cached(args.data)
    return mnist(folder) if args.data == "mnist" else cifar10(folder)


def mnist(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LeCun, Cortes, Burges 1998: 60,000 and 10,000 images of 28 × 28."""
    found = []
    for part in ("train", "t10k"):
        for kind, header, shape in (("images-idx3", 16, (-1, 1, 28, 28)), ("labels-idx1", 8, (-1,))):
            path = fetched(MNIST, f"{part}-{kind}-ubyte.gz", folder)
            numbers = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
            tensor = torch.from_numpy(numbers.reshape(shape).copy())
            found.append(tensor / 255 if kind.startswith("images") else tensor.long())
    return tuple(found)


def cifar10(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Krizhevsky 2009: 50,000 and 10,000 images of 32 × 32, in its binary form, a class and the pixels each."""
    path = fetched(CIFAR, "cifar-10-binary.tar.gz", folder)
    found = []
    with tarfile.open(path) as archive:
        for names in ([f"data_batch_{number}" for number in range(1, 6)], ["test_batch"]):
            files = [archive.extractfile(f"cifar-10-batches-bin/{name}.bin") for name in names]
            parts = [file.read() for file in files if file is not None]  # all are plain files
            rows = torch.from_numpy(np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 1 + 3 * 32 * 32).copy())
            found += [rows[:, 1:].reshape(-1, 3, 32, 32) / 255, rows[:, 0].long()]
    return tuple(found)


def fetched(address: str, name: str, folder: Path) -> Path:
    """A file of a data set, downloaded once."""
    path = folder / name
    if not path.exists():
        try:
            with urllib.request.urlopen(address + name, timeout=30) as answer:
                content = answer.read()
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise SystemExit(f"{name} can't be had from {address} ({reason}); put it into {folder}") from None
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.write_whole(path, lambda aside: aside.write_bytes(content))
        print(f"kept      {address}{name} as {path}")
    return path


def distorted(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Each turned by up to 15°, scaled by up to 10%, sheared a little and moved by up to a tenth of its size."""
    turn, grow, shear, right, down = amount * (2 * torch.rand(5, len(images), generator=generator) - 1)
    turn, grow, shear = turn * 0.26, 1 + 0.1 * grow, 0.1 * shear
    rows = [grow * turn.cos(), shear - grow * turn.sin(), 0.2 * right, grow * turn.sin(), grow * turn.cos(), 0.2 * down]
    grid = affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


# ---------------------------------------------------------------------------------------------------------- training


def build(args: argparse.Namespace, images: Tensor, num_classes: int) -> ViT:
    """The model; its graph is that of the patches."""
    _, channels, height, width = images.shape
    patches = (height // args.patch) * (width // args.patch)
    config = TransformerConfig(
        embed_dim=args.width,
        num_layers=args.layers,
        num_heads=args.heads,
        norm="rms",
        activation="squared_relu",
        bias=(),
        qk_norm=True,
        position="learned",
        max_length=patches + (args.pool == "cls"),
        dropout=args.dropout,
        init="zero",
    )
    graph = command_line.layer_graphs(args.graph, args.layers, (patches, patches))
    return ViT(
        config, num_classes, image_size=(height, width), patch_size=args.patch, channels=channels, graph=graph,
        pool=args.pool,
    )  # fmt: skip


def train(args: argparse.Namespace) -> dict:
    """Train, and leave the run's folder behind. Returns the last figures."""
    images, classes, test_images, test_classes = images_of(args)
    mean, deviation = images.mean(), images.std()
    num_classes = int(classes.max()) + 1
    device = optimization.best_device(args.device)
    torch.manual_seed(args.seed)
    try:
        model = build(args, images, num_classes).to(device)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    nodes = model.num_patches + (args.pool == "cls")
    edges = reporting.edges_of(model.transformer.graphs, nodes)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"images    {args.data}: {len(images):,} to learn from, {len(test_images):,} to test, {num_classes} classes")
    print(f"model     {parameters:,} parameters, {nodes} nodes, graph {args.graph}, {edges:,} edges in all layers")

    def loss(number: int) -> Tensor:
        generator = training.batch_generator(args, number)
        index = torch.randint(len(images), (args.batch,), generator=generator)
        batch = images[index] if args.distort == 0 else distorted(images[index], args.distort, generator)
        return cross_entropy(model(((batch - mean) / deviation).to(device)).float(), classes[index].to(device))

    def accuracy() -> float:
        right = 0
        for batch, targets in zip(test_images.split(500), test_classes.split(500), strict=True):
            right += int((model(((batch - mean) / deviation).to(device)).argmax(-1).cpu() == targets).sum())
        return 100 * right / len(test_classes)

    task = training.Task(
        model,
        loss,
        accuracy,
        device,
        identity={"shape": list(images.shape[1:]), "classes": num_classes},
        record={"example": "vit", "edges": edges, "nodes": nodes},
        unit="images",
        per_batch=args.batch,
        score="test_accuracy",
        free=(*command_line.FREE, "folder"),
    )
    with checkpoints.only_run(args):
        score, metrics = training.fit(args, task)
        right = f"{score:.2f}% of {len(test_images):,} test images right"
        print(f"{right}, after {metrics.seconds:.0f} s, with {edges:,} edges")
        model.eval()
        folder = Path(args.runs) / args.name
        curve = reporting.loss_curve(
            metrics, f"{args.data} on {args.graph}", "loss [nats an image]", "test images right [%]"
        )
        reporting.save_picture(curve, folder / "accuracy.png")
        reporting.save_connectivity(model.transformer.graphs, nodes, folder / "connectivity.png")
        shown = test_images[:8]
        with torch.no_grad(), record(model) as recorded:
            guess = model(((shown - mean) / deviation).to(device)).argmax(-1).tolist()
        reporting.save_picture(recorded.draw(), folder / "heads.png")
        if args.pool == "cls":
            grid, chosen = model.patches.grid, command_line.chosen_head(args)
            reporting.save_picture(attention_map(recorded, grid, shown, guess, chosen), folder / "attention.png")
        nearest = {"the nearest training image": nearest_image(images, classes, test_images, test_classes)}
        best = "attention.png" if args.pool == "cls" else "accuracy.png"
        reporting.tell(
            folder,
            reporting.Outcome("test images right [%]", score, nearest, args.graph, edges, metrics.seconds, best),
        )
    return {"test_accuracy": score, "seconds": metrics.seconds, "parameters": parameters, "edges": edges}


def nearest_image(images: Tensor, classes: Tensor, test_images: Tensor, test_classes: Tensor) -> float:
    """How many test images are of the class of the training image whose pixels are nearest, in percent."""
    known, right = images.flatten(1), 0
    for batch, targets in zip(test_images.flatten(1).split(500), test_classes.split(500), strict=True):
        right += int((classes[torch.cdist(batch, known).argmin(1)] == targets).sum())
    return 100 * right / len(test_classes)


# --------------------------------------------------------------------------------------------------- what it learned


def attention_map(
    recorded: Recording, grid: tuple[int, int], images: Tensor, guess: list[int], chosen: tuple[int, int] | None
) -> Figure:
    """Test images, and over each what the CLS node hears in one head, or in the mean of those of the last layer."""
    from matplotlib.figure import Figure

    layer = recorded[-1 if chosen is None else chosen[0]]
    weights = layer.weights.mean(1) if chosen is None else layer.weights[:, chosen[1]]
    of_cls = slice(1, 1 + grid[0] * grid[1])  # the first edges are those of node 0, which hears itself and every patch
    maps = weights[:, of_cls].unflatten(1, grid).cpu()
    figure = Figure(figsize=(1.6 * len(images), 4), layout="constrained")
    axes = figure.subplots(2, len(images), squeeze=False)
    extent = (0, images.shape[-1], images.shape[-2], 0)
    for column, (image, weight) in enumerate(zip(images, maps, strict=True)):
        shown, colors = image.movedim(0, -1).squeeze(-1), None if len(image) == 3 else "gray"
        axes[0, column].imshow(shown, cmap=colors, extent=extent)
        axes[0, column].set_title(f"taken for {guess[column]}", fontsize=9)
        axes[1, column].imshow(shown, cmap=colors, extent=extent)
        axes[1, column].imshow(weight, cmap="inferno", alpha=0.65, extent=extent, vmin=0, vmax=float(maps.max()))
        for ax in axes[:, column]:
            ax.set_xticks([])
            ax.set_yticks([])
    axes[0, 0].set_ylabel("test image")
    axes[1, 0].set_ylabel("attention of CLS")
    figure.colorbar(axes[1, 0].images[-1], ax=axes[1].tolist(), label="weight of a patch", shrink=0.8)
    heads = "mean of its heads" if chosen is None else f"head {chosen[1]}"
    figure.suptitle(f"attention of the CLS node in layer {layer.layer}, {heads}", fontsize=10)
    return figure


if __name__ == "__main__":
    train(settings())
