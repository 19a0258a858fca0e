"""Whatever is done to a module, it computes the same: its parameters and its config are all that it is."""

import copy
import pickle

import pytest
import torch
from modules import CLASSES, given, made, tensors, variants
from torch import nn

from attngraph import hf
from attngraph.models import GPT
from attngraph.nn import Rotary, SinusoidalPositions, TransformerConfig

VARIANTS = [pytest.param(*each, id=f"{each[0].__name__}-{each[1]}") for each in variants()]


def empty(cls, position):
    with torch.device("meta"):
        return made(cls, position)


def to_empty(cls, position, state):
    """As a model comes that is too large to be made twice."""
    junk = [torch.full((size,), 7.0) for size in (4, 8, 16, 32) for _ in range(50)]
    del junk
    module = empty(cls, position).to_empty(device="cpu")
    module.load_state_dict(state)
    return module


def assigned(cls, position, state):
    module = empty(cls, position)
    module.load_state_dict(state, assign=True)
    return module


def loaded(cls, position, state):
    module = made(cls, position)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    module.load_state_dict(state)
    return module


def outputs(module, dtype=None):
    with torch.no_grad():
        return tensors(module(**given(module, dtype)))


@pytest.mark.parametrize(("cls", "position"), VARIANTS)
def test_a_module_is_its_parameters_and_its_config(cls, position):
    """Nothing else is state: no buffers; and what comes out of memory, files and copies is the same, bit for bit."""
    module = made(cls, position)
    assert not list(module.buffers())
    wanted = outputs(module)
    again = {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "load_state_dict": loaded(cls, position, module.state_dict()),
        "to_empty": to_empty(cls, position, module.state_dict()),
        "assign": assigned(cls, position, module.state_dict()),
    }
    for way, other in again.items():
        assert not other.training
        for found, right in zip(outputs(other), wanted, strict=True):
            assert torch.equal(found, right), way
        assert len(list(other.parameters())) == len(list(module.parameters())), way  # what is tied stays tied


@pytest.mark.parametrize(("cls", "position"), VARIANTS)
def test_a_module_in_another_precision_is_as_near_as_its_precision(cls, position):
    """Near to the one with the same rounded parameters in float64."""
    for dtype, eps in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float64, 1e-6)):
        cast = made(cls, position).to(dtype)
        exact = outputs(copy.deepcopy(cast).double(), torch.float64)
        for found, right in zip(outputs(cast, dtype), exact, strict=True):
            error = (found.double() - right).norm() / right.norm()
            assert error < 20 * eps, (dtype, error)


def test_half_precision_keeps_far_positions():
    positions = torch.arange(4096)
    angles = positions.double()[:, None] / 10_000 ** (torch.arange(0, 64, 2).double() / 64)
    for dtype in (torch.bfloat16, torch.float16):
        cos, sin = Rotary(64).to(dtype)(positions)
        table = SinusoidalPositions(64).to(dtype)(positions)
        for found, right in ((cos[:, :32], angles.cos()), (sin[:, 32:], angles.sin()), (table[:, 1::2], angles.cos())):
            assert (found - right).abs().max() < 1e-3


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def test_a_default_dtype_changes_no_number(default_dtype):
    for cls, position in variants():
        module = made(cls, position)
        takes, wanted = given(module), outputs(module)
        torch.set_default_dtype(default_dtype)
        with torch.no_grad():
            found = tensors(module(**takes))
        torch.set_default_dtype(torch.float32)
        for one, right in zip(found, wanted, strict=True):
            assert torch.equal(one, right), (cls, position)


def test_what_is_loaded_may_be_cast_before_or_after(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
        vocab_size=37, max_position_embeddings=2048, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(settings).save_pretrained(tmp_path)
    tokens = torch.randint(37, (1, 300))
    with torch.no_grad():
        after = hf.load(tmp_path).to(torch.bfloat16)(tokens)
        assert torch.equal(after, hf.load(tmp_path, dtype=torch.bfloat16)(tokens))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_parameters_can_be_initialised_where_they_are(cls):
    """As FSDP does it: on meta, memory for them, then `reset_parameters` of every module, the inner ones first."""

    def reset(module):
        if list(module.parameters(recurse=False)):
            assert callable(module.reset_parameters), type(module)
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    takes = given(made(cls))
    with torch.device("meta"):
        module = made(cls)
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    module.apply(reset)
    assert all(output.isfinite().all() for output in tensors(module(**takes)))


def test_an_initialisation_anew_is_that_of_the_constructor():
    """Each parameter has the spread that it has in a model that was just made; tied ones are one."""
    for init in ("gpt2", "zero"):
        settings = TransformerConfig(embed_dim=96, num_layers=3, num_heads=3, max_length=90, init=init)
        fresh = GPT(settings, 120)
        with torch.device("meta"):
            again = GPT(settings, 120)
        again = again.to_empty(device="cpu")
        again.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
        assert again.head.weight is again.embedding.weight
        for (name, own), other in zip(again.named_parameters(), fresh.parameters(), strict=True):
            assert own.std().item() == pytest.approx(other.std().item(), rel=0.1), name
            assert (own.mean() - other.mean()).abs() <= 0.1 * (other.std() + 1e-9), name
