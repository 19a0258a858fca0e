"""What is called sparse makes no tensor of the size of all pairs, whatever is added to the call."""

import pytest
import torch
from test_attend import biases
from torch.utils._python_dispatch import TorchDispatchMode

from attngraph import Causal, Prefix, Random, Window, attend
from attngraph.nn import Transformer, TransformerConfig

N, PAIRS = 4096, 4096 * 4096
GRAPHS = {
    "window": Causal() & (Window(32, 0) | Prefix(2)),
    "random": Random(4),
    "both": Causal() & (Window(32, 0) | Random(1)),
}


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that was made, as an operator's result that owns its memory."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for part in made if isinstance(made, tuple | list) else (made,):
            if isinstance(part, torch.Tensor):
                self.numbers = max(self.numbers, part.untyped_storage().nbytes() // part.element_size())
        return made


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("position", ["none", "learned", "sinusoidal", "rotary", "alibi", "relative"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_model_on_a_sparse_graph(graph, position, padded):
    config = TransformerConfig(embed_dim=32, num_layers=1, num_heads=4, position=position, max_length=N)
    model = Transformer(config, GRAPHS[graph])
    mask = torch.arange(N) >= torch.tensor([[N // 8], [0]]) if padded else None
    with Largest() as largest:
        model(torch.randn(2, N, 32), attention_mask=mask).sum().backward()
    assert largest.numbers < PAIRS / 4


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", ["none", "alibi", "clipped", "buckets", "edges", "dense-keys"])
@pytest.mark.parametrize(
    ("graph", "backend"), [("window", "tiles"), ("window", "rows"), ("random", "rows"), ("both", "auto")]
)
def test_a_call_on_a_sparse_graph(graph, backend, kind, padded):
    sides = [side.requires_grad_() for side in torch.randn(3, 2, 4, N, 8)]
    bias, _ = biases(kind, GRAPHS[graph], N, N)
    mask = torch.arange(N) < torch.tensor([[N // 2], [N]]) if padded else None
    with Largest() as largest:
        out, lse = attend(*sides, GRAPHS[graph], bias=bias, attention_mask=mask, backend=backend, return_lse=True)
        (out.sum() + lse[lse != -torch.inf].sum()).backward()
    assert largest.numbers < PAIRS / 4
