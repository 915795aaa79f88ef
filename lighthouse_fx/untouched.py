"""Trace a model and leave everything as it was, as far as that can be done: the model's attributes and Dynamo's memory."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo import convert_frame, pgo

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)
_NO_LIMIT = 1 << 30


@contextmanager
def untouched(roots: Iterable[Any], backend: Callable[..., Any]) -> Iterator[None]:
    """Put back what a trace with `backend` changes in the modules among `roots`, and what Dynamo learns from it.

    Attributes of modules are put back, one level deep: numbers, tensors that were replaced, lists, dicts, hooks. Tensors
    that eager code between two graphs writes to, and whatever else Python code reaches, are not.
    """
    modules = dict.fromkeys(m for root in roots for found in _modules(root) for m in found.modules())
    before = [(module, type(module), _copied(vars(module))) for module in modules]
    with _forgetting(backend):
        try:
            yield
        finally:
            for module, kind, kept in before:
                if type(module) is kind:  # a lazy module that became another one has no way back
                    _put_back(vars(module), kept)


def _modules(root: Any) -> Iterator[nn.Module]:
    """A module; those of a list or dict; that of a bound method; those that a function closes over."""
    if isinstance(root, nn.Module):
        yield root
    elif isinstance(root, list | tuple | dict):
        for item in root.values() if isinstance(root, dict) else root:
            yield from _modules(item)
    else:
        cells = getattr(root, "__closure__", None) or ()
        inner = [cell.cell_contents for cell in cells if _filled(cell)]
        yield from (m for m in (getattr(root, "__self__", None), *inner) if isinstance(m, nn.Module))


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that is assigned later
        return False


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and where it is a plain container a copy of it."""
    return {
        name: (value, copy.copy(value) if type(value) in _CONTAINERS else None) for name, value in attributes.items()
    }


def _put_back(attributes: dict[str, Any], kept: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in attributes if name not in kept]:
        del attributes[name]
    for name, (value, contents) in kept.items():
        if name not in attributes or attributes[name] is not value:
            attributes[name] = value
        if contents is not None and not _same(value, contents):
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(contents)


def _same(one: Any, other: Any) -> bool:
    """Whether two containers hold the same objects; equality of tensors would be another question."""
    pair = [list(map(id, [*x, *x.values()] if isinstance(x, dict) else x)) for x in (one, other)]
    return sorted(pair[0]) == sorted(pair[1]) if isinstance(one, set) else pair[0] == pair[1]


@contextmanager
def _forgetting(backend: Callable[..., Any]) -> Iterator[None]:
    """Where the model breaks its graph, Dynamo keeps things for the model's own functions, which must not last.

    Compiled graphs count towards the limit of recompilations, and sizes seen towards making them dynamic. A function of
    which the model has compiled graphs of its own loses these too, as Dynamo cannot drop one alone: it compiles again.
    """
    seen = copy.deepcopy(pgo.get_code_state())
    limits = torch._dynamo.config.patch(recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT)
    with mock.patch.object(pgo, "_CODE_STATE", seen), limits:
        try:
            yield
        finally:
            for reference in [*convert_frame.input_codes.seen, *convert_frame.output_codes.seen]:
                code = reference()
                if code is not None and any(
                    getattr(entry.backend, "compiler_fn", None) is backend for entry in _debug_get_cache_entry_list(code)
                ):
                    reset_code(code)
