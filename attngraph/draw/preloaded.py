"""What the processes of a live page have in memory when they begin: one question is answered as this is imported."""

import torch

from attngraph.draw.evaluating import answered

torch.set_num_threads(1)
answered({"texts": ["Causal() & (Window(64, 0) | Random(4))"], "n": 2048, "heads": 8, "head_dim": 64})
