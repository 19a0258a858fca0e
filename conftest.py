"""What every doctest may use without importing it, as a reader expects."""

import pytest
import torch

import attngraph


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    doctest_namespace["torch"] = torch
    modules = ("analysis", "cache", "draw", "models", "nn")
    doctest_namespace.update({name: getattr(attngraph, name) for name in (*attngraph.__all__, *modules)})
