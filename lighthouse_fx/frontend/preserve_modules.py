"""Trace a model as it is written, and leave its modules' attributes as they were."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


@contextmanager
def untouched(roots: Iterable[Any]) -> Iterator[None]:
    """Put back what a trace changes in the modules among `roots`.

    Attributes of modules are put back, one level deep: numbers, tensors that were replaced, lists, dicts, hooks. Tensors
    that eager code between two graphs writes to, and whatever else Python code reaches, are not.
    """
    modules = dict.fromkeys(m for root in roots for found in _modules(root) for m in found.modules())
    before = [(module, type(module), _copied(vars(module))) for module in modules]
    try:
        yield
    finally:
        for module, kind, kept in before:
            if type(module) is kind:  # a lazy module that became another one has no way back
                _put_back(vars(module), kept)


@contextmanager
def as_written(model: Any) -> Iterator[None]:
    """Take back, for a while, that modules of a model are compiled in place: traced as a whole, it is as it was written."""
    modules = [m for found in _modules(model) for m in found.modules()]
    compiled = [(module, module._compiled_call_impl) for module in modules if module._compiled_call_impl is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


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
