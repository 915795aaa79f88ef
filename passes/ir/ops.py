"""The one vocabulary of operations: what a node calls, however it is spelled, and its arguments by name.

    x.multiply_(0.5)      x *= 0.5      torch.mul(x, other=0.5)       ->  operation_name: "mul", arguments: input=x, other=0.5

The name is that of the ATen operator without what says that it works in place, or `.T` for an attribute. Arguments are bound by
the operator's schema, with `self` called `input`. Only PyTorch's own operations have a name: others are "".
"""

from __future__ import annotations

import builtins
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lighthouse_fx.kernels.torch_private import OpOverload, OpOverloadPacket

_HOMES: tuple[tuple[Any, str], ...] = (
    (operator, ""), (torch, ""), (F, ""), (torch.Tensor, ""), (torch.special, "special_"), (torch.linalg, ""),
)  # fmt: skip
_OPERATORS = {
    "truediv": "div", "floordiv": "floor_divide", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "invert": "bitwise_not", "inv": "bitwise_not", "mod": "remainder",
}  # fmt: skip
_ALIASES = {
    "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "negative": "neg", "absolute": "abs",
    "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "not_equal": "ne", "clip": "clamp",
    "concat": "cat", "concatenate": "cat", "swapaxes": "transpose", "swapdims": "transpose", "moveaxis": "movedim",
    "special_softmax": "softmax", "special_log_softmax": "log_softmax", "row_stack": "vstack", "rsub": "rsub",
}  # fmt: skip
_BINARY = frozenset({*_OPERATORS, "add", "sub", "mul", "matmul", "pow", "lshift", "rshift"})
_COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
_NAMES = {"self": "input", "t": "data", "axis0": "dim0", "axis1": "dim1"}


def operation_name(node: fx.Node) -> str:
    """The operation's name, in the one spelling that all have in common; "" where it is not PyTorch's own."""
    name = _spelled(node)
    if name.startswith("."):
        return name
    name = name.removesuffix("_") if _ends_in_place(name) else name
    return _ALIASES.get(name, name)


def works_in_place(node: fx.Node) -> bool:
    """Whether a node spells an operation that changes its first argument, such as `triu_`, `*=` or `x[mask] = 0`."""
    return node.target in IN_PLACE_OPERATORS or _ends_in_place(_spelled(node))


def schemas(node: fx.Node) -> list[torch.FunctionSchema]:
    """The signatures, with what they write to, of PyTorch's and custom operations. Empty if unknown."""
    if isinstance(node.target, OpOverload):
        return [node.target._schema]
    custom = isinstance(node.target, OpOverloadPacket)
    packet = node.target if custom else getattr(torch.ops.aten, _spelled(node) or "?", None)
    if not isinstance(packet, OpOverloadPacket):
        return []
    found = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return [schema for schema in found if not any(a.is_out and a.name not in node.kwargs for a in schema.arguments)]


def arguments(node: fx.Node) -> dict[str, Any] | None:
    """The arguments that a node gives, by name and in the order of the schema; None where no schema takes them."""
    if operation_name(node) == "where" and len(node.args) > 1 and _is_method(node):
        return dict(zip(("input", "condition", "other"), node.args, strict=False)) | dict(node.kwargs)
    for strict in (True, False):
        for positional, named in _signatures(node):
            if (bound := _bind(node, positional, named, strict=strict)) is not None:
                return {_NAMES.get(name, name): value for name, value in bound.items()}
    return None


def operands(node: fx.Node) -> list[Any]:
    """The same without the names; as they are written, where no schema takes them."""
    bound = arguments(node)
    return [*node.args, *node.kwargs.values()] if bound is None else list(bound.values())


# --- spellings --------------------------------------------------------------------------------------------------------


def _spelled(node: fx.Node) -> str:
    if node.op == "call_method":
        return _without_dunder(str(node.target))
    if node.op != "call_function":
        return ""
    if node.target is builtins.getattr:
        return f".{node.args[1]}"
    if isinstance(node.target, OpOverload | OpOverloadPacket):
        schema_name = str(node.target if isinstance(node.target, OpOverloadPacket) else node.target.overloadpacket)
        return schema_name.removeprefix("aten.") if schema_name.startswith("aten.") else ""
    name = getattr(node.target, "__name__", "")
    for home, prefix in _HOMES:
        if getattr(home, name.removeprefix(prefix), None) is node.target:
            return _of_operator(name) if home is operator else _without_dunder(name)
    return ""


def _of_operator(name: str) -> str:
    """`imul` -> `mul_`, `and_` -> `bitwise_and`"""
    plain = name.strip("_")
    if plain.startswith("i") and plain[1:] in _BINARY:
        return f"{_OPERATORS.get(plain[1:], plain[1:])}_"
    return _OPERATORS.get(plain, plain)


def _without_dunder(name: str) -> str:
    """`__and__` -> `bitwise_and`: a method that stands for an operator."""
    if not (name.startswith("__") and name.endswith("__")):
        return name
    plain = name.strip("_")
    return _of_operator(plain) if plain in _BINARY | _COMPARISONS or (plain[1:] in _BINARY and plain[0] == "i") else name


def _ends_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _is_method(node: fx.Node) -> bool:
    return node.op == "call_method" or node.target is torch.Tensor.where


# --- arguments --------------------------------------------------------------------------------------------------------


def _signatures(node: fx.Node) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
    """The positional and the keyword-only parameters of what a node may mean."""
    if inspect.isfunction(node.target):
        parameters = inspect.signature(node.target).parameters.values()
        yield [x for x in parameters if x.kind == x.POSITIONAL_OR_KEYWORD], [x for x in parameters if x.kind == x.KEYWORD_ONLY]
    for schema in schemas(node):
        yield [a for a in schema.arguments if not a.kwarg_only], [a for a in schema.arguments if a.kwarg_only]


def _bind(node: fx.Node, positional: Sequence[Any], named: Sequence[Any], *, strict: bool) -> dict[str, Any] | None:
    """Arguments by the names of one signature, in its order; None where it does not take them, if `strict` by their types."""
    given = list(node.args)
    last = positional[-1] if positional else None
    if last is not None and _is_list(last) and len(given) >= len(positional) and not isinstance(given[-1], list | tuple):
        given[len(positional) - 1 :] = [tuple(given[len(positional) - 1 :])]  # x.view(2, 3)
    if len(given) > len(positional):
        return None
    bound = dict(zip((x.name for x in positional), given, strict=False))
    known = {x.name for x in (*positional, *named)}
    for name, value in node.kwargs.items():
        name = "self" if name == "input" and name not in known else name
        if name in bound or name not in known:
            return None
        bound[name] = value
    if any(not _has_default(x) and x.name not in bound for x in (*positional, *named)):
        return None
    if strict and not all(_takes(x, bound[x.name]) for x in (*positional, *named) if x.name in bound):
        return None
    return {x.name: bound[x.name] for x in (*positional, *named) if x.name in bound}


def _is_list(parameter: Any) -> bool:
    return not isinstance(parameter, inspect.Parameter) and str(parameter.type).startswith("List[int")


def _has_default(parameter: Any) -> bool:
    if isinstance(parameter, inspect.Parameter):
        return parameter.default is not parameter.empty
    return bool(parameter.has_default_value())


def _takes(parameter: Any, value: Any) -> bool:
    if isinstance(parameter, inspect.Parameter):
        return True
    is_tensor = isinstance(value, fx.Node) and isinstance(value.meta.get("example_value"), torch.Tensor)
    kind = str(parameter.type)
    if kind.startswith(("Tensor", "Optional[Tensor")):
        return is_tensor or value is None
    if kind == "bool":
        return isinstance(value, bool)
    return not is_tensor


IN_PLACE_OPERATORS: frozenset[Callable[..., Any]] = frozenset(
    getattr(operator, name)
    for name in (
        "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub", "itruediv",
        "ixor", "setitem",
    )
)  # fmt: skip
PURE_OPERATORS: frozenset[Callable[..., Any]] = frozenset(
    getattr(operator, name)
    for name in (
        "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "inv", "invert", "is_", "is_not", "le", "lshift",
        "lt", "matmul", "mod", "mul", "ne", "neg", "not_", "or_", "pos", "pow", "rshift", "sub", "truediv", "truth", "xor",
    )
)  # fmt: skip
