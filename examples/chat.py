"""A pretrained model completes a text, on its own graph or on another one.

    python examples/chat.py path/of/model --prompt "Once upon a time"
    python examples/chat.py path/of/model --graph "Causal() & (Window(256, 0) | Prefix(4))"     asks for prompts

`path/of/model` is a directory as `hf download` makes it: config.json, model.safetensors, and tokenizer.json of the
library `tokenizers` (pip install tokenizers). transformers is not needed.
"""

import argparse
import sys
from pathlib import Path

import torch

from attngraph import hf
from attngraph.generation import generate
from attngraph.graph.text import parse_list
from attngraph.models import GPT

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("path", type=Path, help="a directory with a decoder of the families of hf.load")
parser.add_argument("--graph", help="an expression, with commas one for each layer (default: the model's own)")
parser.add_argument("--prompt", help="a text to complete (default: one for each line of the standard input)")
parser.add_argument("--tokens", type=int, default=100, help="new ones (default: %(default)s)")
parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="of the choices (default: %(default)s)")


def main() -> None:
    args = parser.parse_args()
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise SystemExit("chat.py reads texts by tokenizers: pip install tokenizers") from None
    try:
        model = hf.load(args.path)
        if not isinstance(model, GPT):
            raise ValueError(f"{args.path} must be a decoder that completes texts (got {type(model).__name__})")
        if args.graph is not None:
            model.transformer.graphs = parse_list(args.graph)
        tokenizer = Tokenizer.from_file(str(args.path / "tokenizer.json"))
    except Exception as error:  # tokenizers raises a bare Exception
        raise SystemExit(f"chat.py: {error}") from None
    torch.manual_seed(args.seed)
    for prompt in sys.stdin if args.prompt is None else [args.prompt]:
        tokens = torch.tensor([tokenizer.encode(prompt.rstrip("\n")).ids])
        if tokens.numel():
            found = generate(model, tokens, args.tokens, temperature=args.temperature)
            print(tokenizer.decode(found[0].tolist()), flush=True)


if __name__ == "__main__":
    main()
