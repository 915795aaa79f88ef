"""Every private name of PyTorch that the package uses, so that a release that moves one fails here, by name.

They come from Dynamo (guards, compiled modules), Inductor (the compiler and its options) and the operator library. As one
file tried on torch 2.13. It lies in the lowest layer because all layers need some of them; `tests/repo/test_layering.py` keeps
such names out of every other file.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch

try:
    from torch import _assert_async
    from torch import _native_multi_head_attention as fused_multi_head_attention
    from torch import _TorchCompileWrapper as TorchCompileWrapper
    from torch import _transformer_encoder_layer_fwd as fused_encoder_layer
    from torch._C import _current_graph_task_id as current_backward
    from torch._C import _get_sdp_priority_order as sdp_priority_order
    from torch._C import _has_storage as has_storage
    from torch._C import _set_grad_enabled as set_grad_enabled
    from torch._C import _set_sdp_priority_order as set_sdp_priority_order
    from torch._dynamo import config as dynamo_config
    from torch._dynamo import eval_frame, graph_break
    from torch._dynamo.eval_frame import OptimizedModule, skip_code
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list as cache_entries
    from torch._dynamo.eval_frame import _TorchDynamoContext as DynamoContext
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import (
        AttrSource,
        DictGetItemSource,
        GetItemSource,
        GlobalSource,
        ImportSource,
        LocalSource,
    )
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._guards import CompileContext, Guard, Source, TracingContext
    from torch._inductor import list_mode_options, list_options
    from torch._inductor.compile_fx import compile_fx
    from torch._library.custom_ops import CustomOpDef
    from torch._logging._internal import trace_log, trace_structured
    from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensorMode
    from torch.autograd.graph import _engine_run_backward as run_backward
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, has_free_unbacked_symbols
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import _disable_current_modes as without_modes
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    cpu_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    cpu_attention_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    cudnn_attention_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    cudnn_attention_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
    efficient_attention_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    efficient_attention_forward = torch.ops.aten._scaled_dot_product_efficient_attention
    flash_attention_backward = torch.ops.aten._flash_attention_backward
    flash_attention_forward = torch.ops.aten._flash_attention_forward
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"lighthouse-fx does not know torch {torch.__version__}: {error}. Use torch 2.11 to 2.13, or a newer lighthouse-fx"
    ) from error

_LARGEST = 1 << 62  # a size
_LONGEST = 254  # bytes of a message that a device-side assertion takes


def assert_async(holds: torch.Tensor, message: str) -> None:
    """Raise where a bool `[]` is False; on CUDA as a device-side assertion, which nobody waits for."""
    _assert_async(holds, message.encode()[:_LONGEST].decode(errors="ignore"))


def fake_mode_of(values: Iterable[object]) -> AbstractContextManager[object]:
    """The mode of fake tensors among these values, or in the memory of tensor subclasses among them."""
    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
        if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
            return fake_mode_of(getattr(value, name) for name in value.__tensor_flatten__()[0])
    raise ValueError("none of these values is a fake tensor: give what Dynamo saw at a node")


def bounds(size: int | torch.SymInt) -> tuple[int, int]:
    """The least and the greatest value that a size may have, as far as that is known without a guard."""
    if not isinstance(size, torch.SymInt):
        return size, size
    found = size.node.shape_env.bound_sympy(size.node.expr)
    least, most = (int(x) if x.is_Integer else None for x in (found.lower, found.upper))
    return 0 if least is None else least, _LARGEST if most is None else min(most, _LARGEST)


def compile_stance() -> str:
    """What `torch.compiler.set_stance` has set; it is "default" at first."""
    stance: str = eval_frame._stance.stance
    return stance


def in_backward() -> bool:
    """Whether this thread is inside a backward pass."""
    running: int = current_backward()
    return running != -1


def other_names(placeholder: torch.fx.Node) -> list[str]:
    """How Dynamo's graph was given an input, in Python, where it was given the same tensor under several names."""
    context, argument = TracingContext.try_get(), placeholder.meta.get("grapharg")
    if placeholder.op != "placeholder" or context is None or argument is None:
        return []
    pairs = [
        (guard.originating_source, guard.create_fn.keywords["source_b"])
        for guard in context.guards_context.dynamo_guards
        if isinstance(guard.create_fn, functools.partial) and guard.create_fn.func is GuardBuilder.DUPLICATE_INPUT
    ]
    sources = [source for pair in pairs if argument.source in pair for source in pair]
    return sorted({str(source.name() if callable(source.name) else source.name) for source in sources})


def is_unbacked(size: int | torch.SymInt) -> bool:
    """Whether a size hangs on data, so that nothing can be guarded on it."""
    return isinstance(size, torch.SymInt) and has_free_unbacked_symbols(size)


__all__ = [
    "AttrSource",
    "CompileContext",
    "CustomOpDef",
    "DictGetItemSource",
    "DynamoContext",
    "FunctionalTensorMode",
    "GetItemSource",
    "GlobalSource",
    "Guard",
    "GuardBuilder",
    "GuardOnDataDependentSymNode",
    "HigherOrderOperator",
    "ImportSource",
    "InstructionTranslator",
    "LocalSource",
    "OpOverload",
    "OpOverloadPacket",
    "OptimizedModule",
    "Source",
    "TorchCompileWrapper",
    "TracingContext",
    "assert_async",
    "bounds",
    "cache_entries",
    "compile_fx",
    "compile_stance",
    "cpu_attention_backward",
    "cpu_attention_forward",
    "cudnn_attention_backward",
    "cudnn_attention_forward",
    "dynamo_config",
    "efficient_attention_backward",
    "efficient_attention_forward",
    "fake_mode_of",
    "flash_attention_backward",
    "flash_attention_forward",
    "fused_encoder_layer",
    "fused_multi_head_attention",
    "graph_break",
    "has_storage",
    "in_backward",
    "is_traceable_wrapper_subclass",
    "list_mode_options",
    "list_options",
    "pytree",
    "run_backward",
    "sdp_priority_order",
    "set_grad_enabled",
    "set_sdp_priority_order",
    "skip_code",
    "trace_log",
    "trace_structured",
    "without_modes",
]
