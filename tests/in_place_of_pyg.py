"""PyG's own tests, with the layers of `attngraph.pyg` in the place of its own: a pytest plugin, and the command for it.

    ATTNGRAPH_PYG_TESTS=…/pytorch_geometric/test python -m tests.in_place_of_pyg

Nothing is fetched: the variable names the tests of a checkout of PyG.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

VARIABLE = "ATTNGRAPH_PYG_TESTS"
FILES = (
    "nn/conv/test_agnn_conv.py",
    "nn/conv/test_gat_conv.py",
    "nn/conv/test_gatv2_conv.py",
    "nn/conv/test_gps_conv.py",
    "nn/conv/test_hetero_conv.py",
    "nn/conv/test_hgt_conv.py",
    "nn/conv/test_supergat_conv.py",
    "nn/conv/test_transformer_conv.py",
    "nn/conv/test_static_graph.py",
    "nn/aggr/test_set_transformer.py",
    "nn/models/test_basic_gnn.py",
    "nn/test_to_hetero_module.py",
    "nn/test_to_hetero_transformer.py",
    "nn/test_to_hetero_with_bases_transformer.py",
    "explain/algorithm/test_attention_explainer.py",
    "explain/algorithm/test_captum.py",
    "explain/algorithm/test_captum_explainer.py",
    "explain/algorithm/test_gnn_explainer.py",
    "explain/algorithm/test_pg_explainer.py",
    "explain/test_hetero_explainer.py",
)


def pytest_configure() -> None:
    """Before a test imports anything: every name of these layers in torch_geometric names ours."""
    import torch_geometric.explain
    import torch_geometric.nn

    from attngraph.pyg.accelerate import LAYERS

    for name, module in list(sys.modules.items()):
        for attribute, value in list(vars(module).items()) if name.startswith("torch_geometric") else ():
            if isinstance(value, type) and value in LAYERS:
                setattr(module, attribute, LAYERS[value])
    assert torch_geometric.nn.GATConv.__module__.startswith("attngraph")


def main() -> int:
    """Run them; the exit code of pytest."""
    tree = os.environ.get(VARIABLE)
    if not tree or not Path(tree, FILES[0]).is_file():
        sys.exit(f"set {VARIABLE} to the test folder of a checkout of PyG (got {tree!r}); nothing is fetched")
    files = [str(Path(tree, file)) for file in FILES if Path(tree, file).is_file()]
    options = ["-q", "-p", "tests.in_place_of_pyg", "-p", "no:cacheprovider", "--rootdir", tree, *sys.argv[1:]]
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-m", "pytest", *options, *files], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
