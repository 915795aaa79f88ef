"""Bad arguments of the functional form: each is an error at the call that names the argument, its value and the remedy."""

import re

import pytest
import torch

from lighthouse_fx import LighthouseConfig, lighthouse_attention
from lighthouse_fx.kernels.shapes import shape_problem, tensor_problem

CONFIG = LighthouseConfig(levels=2, pooling=2, topk=4)
SHAPE = (1, 4, 32, 8)

ARGUMENTS = [
    ("scale", "x", TypeError, "None for 1/sqrt"),
    ("scale", True, TypeError, "give a number"),
    ("scale", torch.tensor(0.5), TypeError, "float(scale)"),
    ("scale", float("nan"), ValueError, "finite number"),
    ("dropout_p", "x", TypeError, "dropout_p=0.0"),
    ("dropout_p", None, TypeError, "dropout_p=0.0"),
    ("dropout_p", True, TypeError, "dropout_p=0.0"),
    ("dropout_p", 2.0, ValueError, "dropout_p=0.0"),
    ("is_causal", "no", TypeError, "True or False"),
    ("is_causal", None, TypeError, "True or False"),
    ("is_causal", 2, TypeError, "True or False"),
    ("enable_gqa", "no", TypeError, "True or False"),
    ("enable_gqa", 1, TypeError, "True or False"),
    ("config", {"levels": 2}, TypeError, "LighthouseConfig"),
]


@pytest.mark.parametrize(("name", "value", "error", "remedy"), ARGUMENTS)
def test_arguments(name, value, error, remedy):
    q = torch.randn(SHAPE)
    with pytest.raises(error, match=rf"{name}=.*{re.escape(remedy)}") as raised:
        lighthouse_attention(q, q, q, **{"config": CONFIG, name: value})
    shown = str(value) if isinstance(value, float) else repr(value)
    assert f"{name}={shown}" in str(raised.value)


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize(
    ("bad", "remedy"),
    [
        (torch.randn(SHAPE).to_sparse(), "to_dense()"),
        (torch.randn(SHAPE).to(torch.float8_e4m3fn), "float()"),
        (torch.ones(SHAPE, dtype=torch.int32), "float()"),
        (torch.ones(SHAPE, dtype=torch.complex64), "float()"),
        (torch.nested.nested_tensor([torch.randn(SHAPE[1:])]), "to_padded_tensor"),
        (torch.nested.nested_tensor([torch.randn(32, 8), torch.randn(16, 8)], layout=torch.jagged), "to_padded_tensor"),
    ],
)
def test_tensors(position, bad, remedy):
    tensors = [torch.randn(SHAPE)] * 3
    tensors[position] = bad
    name = ("query", "key", "value")[position]
    with pytest.raises(TypeError, match=rf"^{name} .*: .*{name}\.{re.escape(remedy)}"):
        lighthouse_attention(*tensors, config=CONFIG)
    assert remedy in tensor_problem(name, bad)  # what the compiler pass says


@pytest.mark.parametrize(
    ("dimension", "what"), [(0, "batch entries"), (1, "heads"), (2, "tokens"), (3, "head dimensions")]
)
def test_zero_sizes(dimension, what):
    shape = [n if i != dimension else 0 for i, n in enumerate(SHAPE)]
    q = torch.randn(shape)
    said = re.escape(f"query has shape {shape}, so no {what}: give at least one")
    with pytest.raises(ValueError, match=said):
        lighthouse_attention(q, q, q, config=CONFIG)
    assert re.match(said, shape_problem(shape, shape, shape, enable_gqa=False))


def test_value_without_head_dimension():
    q = torch.randn(SHAPE)
    with pytest.raises(ValueError, match=r"value has shape .* no head dimensions"):
        lighthouse_attention(q, q, q[..., :0], config=CONFIG)


def test_checks_under_torch_compile():
    q = torch.randn(SHAPE)

    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def run(q, scale, dropout_p):
        return lighthouse_attention(q, q, q, is_causal=True, scale=scale, dropout_p=dropout_p, config=CONFIG)

    expected = lighthouse_attention(q, q, q, is_causal=True, scale=0.25, config=CONFIG)
    torch.testing.assert_close(run(q, 0.25, 0.0), expected)
