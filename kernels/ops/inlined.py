"""Ops whose Triton kernels Inductor sees, and launches itself.

A custom op is opaque: the compiled graph calls into Python for each, tens of microseconds, which at 8K tokens costs more than
the kernels. Where Triton serves a tensor, the op is therefore replaced by its kernels when AOTAutograd traces the graph, as
`torch.library.triton_op` does; anywhere else, and when called eagerly, it stays the op that it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..torch_private import CustomOpDef, FunctionalTensorMode
from .dispatch import serving, traced

Body = Callable[..., Any]


def kernel_op(
    name: str, *, inline: Callable[..., bool] = lambda *_: True
) -> Callable[[Body], CustomOpDef]:
    """Define a custom op, as `torch.library.custom_op`, that is inlined into compiled graphs where Triton serves it.

    Args:
        inline: whether a call with these arguments may be inlined; one that may not stays an opaque op.
    """

    def define(body: Body) -> CustomOpDef:
        op = torch.library.custom_op(name, mutates_args=())(body)

        def functionalize(mode: Any, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            first = next(x for x in args if isinstance(x, Tensor))
            if serving(first.device) == "Triton" and inline(*args):
                with mode, traced():
                    return body(*args, **kwargs)
            return mode.__torch_dispatch__(func, types, args, kwargs)

        op.register_torch_dispatch(FunctionalTensorMode, functionalize)
        return op

    return define
