"""One vocabulary of operations: however an operation and its arguments are spelled, it is the same operation."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

import lighthouse_fx
from lighthouse_fx import LighthouseConfig
from lighthouse_fx.passes.ir.ops import arguments, operands, operation_name, works_in_place

CONFIG = LighthouseConfig(pooling=4, topk=4)
N = 64
INF = float("-inf")


def only_node(target, *args, **kwargs):
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.zeros(4, 4)
    given = [x if arg == "x" else arg for arg in args]
    named = {key: x if value == "x" else value for key, value in kwargs.items()}
    make = graph.call_method if isinstance(target, str) else graph.call_function
    return x, make(target, tuple(given), named)


SPELLINGS = {
    "mul": [
        (operator.mul, ("x", 2), {}), (torch.mul, ("x",), {"other": 2}), (torch.multiply, (), {"input": "x", "other": 2}),
        ("mul", ("x", 2), {}), ("multiply_", ("x", 2), {}), (operator.imul, ("x", 2), {}), (torch.ops.aten.mul, ("x", 2), {}),
        (torch.ops.aten.mul.Tensor, ("x", 2), {}), (torch.Tensor.mul, ("x", 2), {}), ("__mul__", ("x", 2), {}),
    ],
    "div": [
        (operator.truediv, ("x", 2), {}), (torch.true_divide, ("x", 2), {}), ("divide_", ("x",), {"other": 2}),
        ("true_divide", ("x", 2), {}), (operator.itruediv, ("x", 2), {}), (torch.div, ("x", 2), {}),
    ],
    "bitwise_and": [(operator.and_, ("x", 2), {}), ("__iand__", ("x", 2), {}), (torch.bitwise_and, ("x", 2), {})],
    "ge": [(operator.ge, ("x", 2), {}), (torch.greater_equal, ("x", 2), {}), ("__ge__", ("x", 2), {}), ("ge_", ("x", 2), {})],
    "floor_divide": [(operator.floordiv, ("x", 2), {}), (torch.floor_divide, ("x", 2), {})],
}  # fmt: skip
VIEWS = {
    "transpose": [
        ("transpose", ("x", 0, 1), {}), ("swapaxes", ("x",), {"axis0": 0, "axis1": 1}), (torch.swapdims, ("x", 0, 1), {}),
    ],
    "permute": [("permute", ("x", 1, 0), {}), ("permute", ("x", (1, 0)), {}), (torch.permute, ("x",), {"dims": (1, 0)})],
    "softmax": [
        (torch.softmax, ("x", -1), {}), (F.softmax, ("x",), {"dim": -1}), (torch.special.softmax, ("x", -1), {}),
        ("softmax", ("x", -1), {}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_an_operation_on_two_operands(name):
    for target, args, kwargs in SPELLINGS[name]:
        x, node = only_node(target, *args, **kwargs)
        assert operation_name(node) == name, target
        assert operands(node) == [x, 2] and arguments(node) in ({"input": x, "other": 2}, None), target
        in_place = target in (operator.imul, operator.itruediv, "__iand__", "multiply_", "divide_", "ge_")
        assert works_in_place(node) == in_place, target


@pytest.mark.parametrize("name", VIEWS)
def test_spellings_of_other_operations(name):
    found = []
    for target, args, kwargs in VIEWS[name]:
        x, node = only_node(target, *args, **kwargs)
        assert operation_name(node) == name, target
        bound = arguments(node)
        assert bound.pop("input") is x
        found.append(bound)
    assert all(bound == found[0] for bound in found), found


def test_what_is_not_pytorchs_own_has_no_name():
    def mul(x, y):
        return x

    assert operation_name(only_node(mul, "x", 2)[1]) == ""


def test_arguments_that_no_schema_takes_are_none():
    assert arguments(only_node(torch.mul, "x", 2, 3)[1]) is None
    assert arguments(only_node(torch.mul, "x", unknown=2)[1]) is None


def test_an_argument_that_changes_the_result_is_an_operand():
    assert len(operands(only_node(torch.add, "x", 2, alpha=3)[1])) == 3
    assert len(operands(only_node(torch.div, "x", 2, rounding_mode="floor")[1])) == 3


# --- attention --------------------------------------------------------------------------------------------------------


def call_of(function):
    x = torch.randn(1, 2, N, 16, requires_grad=True)
    (call,) = lighthouse_fx.explain(function, x, config=CONFIG).calls
    return call


def scores(x):
    return x @ x.mT


def lower():
    return torch.ones(N, N, dtype=torch.bool).tril()


def weights(x):
    return scores(x).mul(0.25).masked_fill(~lower(), INF)


WRITTEN_OUT = {
    "true_divide": lambda x: F.softmax(torch.true_divide(scores(x), 4.0), -1) @ x,
    "multiply_": lambda x: F.softmax(scores(x).multiply_(0.25), -1) @ x,
    "divide_": lambda x: F.softmax(scores(x).divide_(4.0), -1) @ x,
    "mul, other by name": lambda x: F.softmax(torch.mul(scores(x), other=0.25), -1) @ x,
    "mul, all by name": lambda x: F.softmax(torch.mul(input=scores(x), other=0.25), -1) @ x,
    "special.softmax": lambda x: torch.special.softmax(scores(x) * 0.25, -1) @ x,
    "softmax, all by name": lambda x: torch.softmax(input=scores(x) * 0.25, dim=-1) @ x,
    "matmul, all by name": lambda x: torch.matmul(input=F.softmax(torch.matmul(input=x, other=x.mT) * 0.25, -1), other=x),
    "masked_fill, all by name": lambda x: F.softmax(torch.masked_fill(input=scores(x), mask=~lower(), value=INF), -1) @ x,
    "where, the condition by name": lambda x: F.softmax(torch.where(condition=lower(), input=scores(x), other=INF), -1) @ x,
    "add, other by name": lambda x: F.softmax(torch.add(scores(x), other=torch.full((N, N), INF).triu(1)), -1) @ x,
    "aten": lambda x: torch.ops.aten.softmax(torch.ops.aten.mul(torch.ops.aten.matmul(x, x.mT), 0.25), -1) @ x,
    "-inf before a positive scale": lambda x: F.softmax(scores(x).masked_fill(~lower(), INF) * 0.25, -1) @ x,
    "-inf before a division": lambda x: F.softmax(scores(x).masked_fill(~lower(), INF) / 4, -1) @ x,
}
WRITTEN_OUT["less its maximum"] = lambda x: (lambda w: F.softmax(w - w.max(-1, keepdim=True).values, -1))(weights(x)) @ x
WRITTEN_OUT["less its maximum, amax"] = lambda x: (lambda w: F.softmax(w - w.amax(-1, keepdim=True), -1))(weights(x)) @ x


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_attention_written_out_is_rewritten(name):
    call = call_of(WRITTEN_OUT[name])
    assert call.rewritten, call.reason


OTHER_ATTENTION = {
    "a multiple of the mask": lambda x: F.softmax(torch.add(scores(x), torch.zeros(N, N), alpha=2), -1) @ x,
    "rounded down": lambda x: F.softmax(torch.div(scores(x), 4.0, rounding_mode="floor"), -1) @ x,
    "a negative scale of -inf": lambda x: F.softmax(scores(x).masked_fill(~lower(), INF) * -0.25, -1) @ x,
    "a lowest number before a scale": lambda x: (
        F.softmax(scores(x).masked_fill(~lower(), torch.finfo(torch.float32).min) * 0.25, -1) @ x
    ),
    "less another maximum": lambda x: (lambda w: F.softmax(w - w.amax(-2, keepdim=True), -1))(scores(x)) @ x,
}


@pytest.mark.parametrize("name", OTHER_ATTENTION)
def test_other_attention_is_not(name):
    call = call_of(OTHER_ATTENTION[name])
    assert not call.rewritten and "by hand" in call.reason


# --- masks ------------------------------------------------------------------------------------------------------------


def upper(dtype=torch.bool, diagonal=0):
    return torch.ones(N, N, dtype=dtype).triu(diagonal)


def positions():
    return torch.arange(N)


def changed_by(change, mask):
    change(mask)
    return mask


MASKS = {
    "unsqueeze_": lambda: lower().unsqueeze_(0),
    "unsqueeze_, the name kept": lambda: changed_by(lambda mask: mask.unsqueeze_(0), lower()),
    "unsqueeze_ of positions": lambda: positions().unsqueeze_(1) >= positions(),
    "t_": lambda: upper().t_(),
    "transpose_": lambda: upper().transpose_(0, 1),
    "swapaxes_": lambda: upper().swapaxes_(0, 1),
    "logical_not_": lambda: upper(diagonal=1).logical_not_(),
    "bitwise_not_": lambda: upper(diagonal=1).bitwise_not_(),
    "multiply_": lambda: torch.ones(N, N).tril().sub_(1).multiply_(torch.finfo(torch.float32).max),
    "log_": lambda: torch.ones(N, N).tril().log_(),
    "logical_and_": lambda: lower().logical_and_(torch.ones(N, N, dtype=torch.bool)),
    "__iand__": lambda: lower().__iand__(lower()),
    "ge, all by name": lambda: torch.ge(input=positions()[:, None], other=positions()),
    "concatenate": lambda: torch.concatenate([lower()]),
    "vstack": lambda: torch.vstack([lower()]),
    "fill": lambda: torch.fill(torch.zeros(N, N), INF).triu(1),
    "swapaxes, by name": lambda: upper().swapaxes(axis0=0, axis1=1),
    "one chunk": lambda: lower() & (positions()[:, None] // 64 == positions() // 64),
    "one chunk from an offset": lambda: lower() & ((positions()[:, None] + 32) // 128 == (positions() + 32) // 128),
}


def by_mask(build):
    return lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=build())


@pytest.mark.parametrize("name", MASKS)
def test_causal_mask_is_proved(name):
    call = call_of(by_mask(MASKS[name]))
    assert call.rewritten and call.is_causal, call.reason


CHUNKS = {
    "chunks": lambda: lower() & (positions()[:, None] // 32 == positions() // 32),
    "the chunk's border inside": lambda: lower() & ((positions()[:, None] + 32) // 64 == (positions() + 32) // 64),
    "chunks without a causal mask": lambda: positions()[:, None] // 16 == positions() // 16,
}


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_are_named_and_not_assumed_to_be_causal(name):
    call = call_of(by_mask(CHUNKS[name]))
    assert not call.rewritten
    assert "hides earlier tokens: it keeps attention inside chunks of" in call.reason, call.reason
    assert "assume_causal" not in call.remedy


def test_a_tensor_read_before_its_shape_changed_is_not_relied_on():
    def build():
        row = torch.arange(N)
        before = torch.zeros(N, N, dtype=torch.int64) + row  # row[j], in the shape [N]
        row.unsqueeze_(1)
        return row >= before

    x = torch.randn(1, 2, N, 16, requires_grad=True)
    call = call_of(by_mask(build))
    assert not call.rewritten or torch.equal(build(), lower()), x.shape
    assert not call.rewritten and "changed in place" in call.reason


def test_a_mask_of_chosen_keys_is_said_to_be_one():
    def attention(x):
        chosen = (x @ x.mT).topk(8, -1).indices
        mask = torch.zeros(1, 2, N, N, dtype=torch.bool).scatter(-1, chosen, True)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    assert "depends on scatter, as a mask of chosen keys (sparse attention) does" in call_of(attention).reason


def test_a_window_longer_than_any_length_is_no_sliding_window():
    def attention(x):
        at = torch.arange(x.shape[2])
        far = at[:, None] - at
        return F.scaled_dot_product_attention(x, x, x, attn_mask=(far >= 0) & (far < 512))

    x = torch.randn(1, 2, 4 * N, 16, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 2, min=128, max=512)
    (call,) = lighthouse_fx.explain(attention, x, config=CONFIG).calls
    assert call.rewritten and call.is_causal, call.reason
