"""What the doctests of docstrings may use without importing it. Pages import what they use, as their readers must."""

import pytest
import torch

import attngraph


@pytest.fixture(autouse=True)
def _names(request, doctest_namespace):
    if request.path.suffix == ".md":
        return
    modules = ("analysis", "cache", "draw", "models", "nn")
    doctest_namespace["torch"] = torch
    doctest_namespace.update({name: getattr(attngraph, name) for name in (*attngraph.__all__, *modules)})
