"""Which stage of training is on: Lighthouse, dense, or neither said.

`pretraining(...)` and `dense()` set the stage for the whole process, all threads, as long as they last. A compiled model
guards on `key`, so that a change of stage recompiles once and going back finds the graph compiled before. The state is
this module's two names, because a guard can reach a module attribute from any frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import torch

from .config import LighthouseConfig, check_fields


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
        """Says all that a graph depends on: it is what graphs are guarded by, and what TORCH_LOGS=recompiles shows."""
        given = [repr(self.config)] if self.config else [f"{name}={value!r}" for name, value in self.fields]
        return f"{self.kind}({', '.join(given)})"


class Context(AbstractContextManager[None], ContextDecorator):
    """What `pretraining` and `dense` return: a context manager that is a decorator too (for type checkers)."""


current = Stage(kind="default")
key = str(current)


def pretraining(config: LighthouseConfig | None = None, /, **overrides: Any) -> Context:
    """Turn Lighthouse attention on in models compiled with the backend, as a context manager or a decorator.

    Args:
        config: takes the place of the backend's own options, all of them.
        overrides: single fields of `LighthouseConfig`, laid over `config`, or over the backend's own options without one.

    Without arguments the backend's own options hold (inside a `dense()` block, say). Contexts nest.

    Raises:
        TypeError, ValueError: at the call, naming the argument, its value and the remedy.
    """
    if config is not None and not isinstance(config, LighthouseConfig):
        raise TypeError(f"config={config!r} is a {type(config).__name__}: give a LighthouseConfig, or fields by name")
    check_fields(overrides)
    if config is not None:
        config = replace(config, **overrides)
        overrides = {}
    names = [field.name for field in fields(LighthouseConfig) if field.name in overrides]
    return _during(
        Stage(kind="pretraining", config=config, fields=tuple((name, _frozen(overrides[name])) for name in names))
    )


def dense() -> Context:
    """Turn Lighthouse attention off: stage 2, or a dense validation inside stage 1. Context manager or decorator."""
    return _during(Stage(kind="dense"))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _during(stage: Stage) -> Context:
    return cast(Context, _entered(stage))


@contextmanager
def _entered(stage: Stage) -> Iterator[None]:
    if torch.compiler.is_compiling():
        # A graph is compiled for the stage in which it is traced; a stage that changes inside it would go unseen.
        raise RuntimeError(
            "the stage was entered inside a compiled function: enter pretraining() or dense() around the compiled call"
        )
    before = current
    _set(stage)
    try:
        yield
    finally:
        _set(before)


def _set(stage: Stage) -> None:
    global current, key
    current, key = stage, str(stage)
