"""Which stage of training is on: Lighthouse, dense, or neither said.

`pretraining(...)` and `dense()` set the stage for the whole process, all threads, as long as they last. A compiled model
guards on `State.key`, so that a change of stage recompiles once and going back finds the graph compiled before. The documents
that are on are kept here as well; of them a graph depends on `State.packed` alone, whether there are any.

`current`, `key`, `documents` and `packed` are what is on now. What is compiled reads `now()` instead.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch

from lighthouse_fx.kernels.torch_private import CompileContext
from lighthouse_fx.passes.config import LighthouseConfig, check_fields

from .packed_rows import PackedRows

Function = TypeVar("Function", bound=Callable[..., Any])
Entered = TypeVar("Entered")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage. `fields` are laid over the backend's own options; `config` takes their place."""

    kind: Literal["default", "pretraining", "dense"]
    config: LighthouseConfig | None = None
    fields: tuple[tuple[str, Any], ...] = ()

    def resolve(self, own: LighthouseConfig) -> LighthouseConfig | None:
        """The configuration that holds for a backend with options `own`; None where the stage is dense."""
        if self.kind == "dense":
            return None
        return replace(self.config or own, **dict(self.fields))

    def __str__(self) -> str:
        """Says all that a graph depends on: it is what graphs are guarded by, and what TORCH_LOGS=recompiles shows.

        Stages that mean the same are spelled the same: `pretraining()` is the default.
        """
        given = [repr(self.config)] if self.config else [f"{name}={value!r}" for name, value in self.fields]
        return f"{'dense' if self.kind == 'dense' else 'pretraining'}({', '.join(given)})"


_DEFAULT = Stage(kind="default")


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What is on from one change to the next: the stage and the documents, with what graphs are guarded by.

    Attributes:
        key: all of the stage that a graph depends on; packed: whether there are documents.
        thread: which thread made it so.
    """

    stage: Stage = _DEFAULT
    documents: PackedRows | None = None
    key: str = str(_DEFAULT)
    packed: bool = False
    thread: int = 0


_entered: list[tuple[Context, Stage]] = []  # contexts that are on, the one entered last at the end
_packed: list[PackedRows] = []  # likewise
_state = State()
_changing = threading.Lock()
_compiling: WeakKeyDictionary[CompileContext, State] = WeakKeyDictionary()
current, key, documents, packed = _state.stage, _state.key, _state.documents, _state.packed


def now() -> State:
    """What is on, in one reading. In a thread that compiles: what was on when that compilation asked first.

    So what the passes read and what the graph is guarded by are the same, whatever other threads do meanwhile.
    """
    context = CompileContext.try_get()
    return _state if context is None else _compiling.setdefault(context, _state)


class Context(ContextDecorator):
    """What `pretraining` and `dense` return: a context manager and decorator, which may be entered again while it is on.

    The stage is that of the context entered last among those not left yet, in whichever order they are left.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __call__(self, func: Function) -> Function:
        """Decorate a function: the stage is on while it runs.

        Raises:
            TypeError: for a generator or an async function, whose body runs only after the call.
        """
        kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if any(is_kind(func) for is_kind in kinds):
            raise TypeError(
                f"{getattr(func, '__qualname__', func)} is a generator or async function, whose body runs when the stage "
                "is off again: write the with statement inside it"
            )
        return super().__call__(func)

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():  # of this thread: another one may compile
            # A graph is compiled for the stage in which it is traced; a stage that changes inside it would go unseen.
            raise RuntimeError(
                "the stage was entered inside a compiled function: enter pretraining() or dense() around the compiled call"
            )
        with _changing:
            _entered.append((self, self._stage))
            _update()

    def __exit__(self, *error: object) -> None:
        _leave(_entered, lambda entered: entered[0] is self)


def pretraining(config: LighthouseConfig | None = None, /, **overrides: Any) -> Context:
    """Turn Lighthouse attention on in models compiled with the backend, as a context manager or a decorator.

    Args:
        config: takes the place of the backend's own options, all of them.
        overrides: single fields of `LighthouseConfig`, laid over `config`, or over the backend's own options without one.

    Without arguments the backend's own options hold (inside a `dense()` block, say). Contexts nest. Keep the backward
    inside the context, as activation checkpointing runs the forward again there; another stage there is an error.

    Raises:
        TypeError, ValueError: at the call, naming the argument, its value and the remedy.
    """
    if config is not None and not isinstance(config, LighthouseConfig):
        raise TypeError(f"config={config!r} is a {type(config).__name__}: give a LighthouseConfig, or fields by name")
    check_fields(overrides)
    if config is not None:
        return Context(Stage(kind="pretraining", config=replace(config, **overrides)))
    # Fields that limit each other are judged together. What is not given is the backend's, so it is taken as lenient.
    lenient = {"levels": 1, "pooling": 2} | overrides
    if "topk" not in overrides:
        lenient.pop("quota", None)
    checked = LighthouseConfig(**lenient)
    given = {name: getattr(checked, name) for name in overrides} | {n: overrides[n] for n in overrides if n == "quota"}
    names = [field.name for field in fields(LighthouseConfig) if field.name in given]
    return Context(Stage(kind="pretraining", fields=tuple((name, given[name]) for name in names)))


def dense() -> Context:
    """Turn Lighthouse attention off: stage 2, or a dense validation inside stage 1. Context manager or decorator."""
    return Context(Stage(kind="dense"))


def with_topk(topk: int) -> Context:
    """The stage that is on now, with this `topk`; the dense stage as it is."""
    return _with_topk(current, topk)


@cache  # it is entered anew for every block of every step
def _with_topk(on: Stage, topk: int) -> Context:
    if on.kind == "dense":
        return Context(on)
    if on.config is not None:
        return Context(replace(on, config=replace(on.config, topk=topk)))
    given = dict(on.fields) | {"topk": topk}
    names = [field.name for field in fields(LighthouseConfig) if field.name in given]
    return Context(Stage(kind="pretraining", fields=tuple((name, given[name]) for name in names)))


def enter_documents(entered: PackedRows) -> None:
    """Make these the documents that are on, until they are left or others are entered."""
    with _changing:
        _packed.append(entered)
        _update()


def leave_documents(left: PackedRows) -> None:
    """Take these back: on are those entered last among the others, in whichever order they are left."""
    _leave(_packed, lambda entered: entered is left)


def _leave(entered: list[Entered], is_left: Callable[[Entered], bool]) -> None:
    with _changing:
        del entered[max(place for place, one in enumerate(entered) if is_left(one))]
        _update()


def _update() -> None:
    global _state, current, key, documents, packed
    current = _entered[-1][1] if _entered else _DEFAULT
    documents = _packed[-1] if _packed and not _packed[-1].alone else None
    key, packed = str(current), documents is not None
    _state = State(current, documents, key, packed, threading.get_ident())
