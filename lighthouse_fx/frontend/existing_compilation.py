"""How a model is compiled already: with which backend, which options, which of its modules.

PyTorch does not tell, so this reads private state of `torch.compile`; tried on torch 2.11 and 2.13. Where that state is
not what is expected here, the answer is "compiled, but nobody knows how", never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lighthouse_fx.backend import EXCLUDED_BY_COMPILE, lighthouse_excluded, split_options
from lighthouse_fx.kernels.torch_private import DynamoContext, OptimizedModule
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.passes.match.sdpa import clean_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilation:
    """One `torch.compile` call; `backend` is "" where it cannot be known."""

    backend: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    dynamic: bool | None = None

    def __str__(self) -> str:
        return f"backend={self.backend!r}" if self.backend else "a backend that cannot be known"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the backend does with a model as it is compiled now.

    `compiled`: whether any of it is compiled with this backend. `dense` gives the reason for each module (by its path) that is
    not, while others are.
    """

    config: LighthouseConfig = field(default_factory=LighthouseConfig)
    dynamic: bool | None = None
    compiled: bool = False
    dense: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def reason(self, module: str) -> str:
        """Why attention in a module is not this backend's, or ""."""
        return next((why for path, why in self.dense.items() if f"{module}.".startswith(f"{path}.")), "")


def setting_of(model: Callable[..., Any]) -> Setting:
    """Find out from the model; a model that is not compiled with this backend gets the default options."""
    parts = _parts(model) if isinstance(model, nn.Module) else [("", _compilation(model))]
    known = [(clean_path(f"L['model'].{path}"), part) for path, part in parts]
    ours = [(path, part) for path, part in known if part is not None and part.backend == "lighthouse"]
    if not ours:
        others = dict.fromkeys(str(part) for _, part in known if part is not None)
        advice = "this is what backend='lighthouse' would do with its default options, unless config= was given"
        return Setting(notes=(f"compiled with {' and '.join(others)}: {advice}",) if others else ())
    configs = list(dict.fromkeys(split_options(part.options)[0] for _, part in ours))
    notes = []
    if len(configs) > 1:
        notes.append(
            f"its modules are compiled with {len(configs)} different sets of options: all are shown with those of "
            f"{ours[0][0]}; explain(block, ...) shows one block as it is"
        )
    if any(path for path, _ in ours) and configs[0].dense_layers:
        notes.append(
            f"dense_layers={configs[0].dense_layers} is an option of blocks that are compiled alone, whose graphs do not "
            "know their place in the model: give it to lighthouse_fx.compile(model, dense_layers=...)"
        )
    dense = {
        path: "not compiled, while other modules are" if part is None else _why_dense(part)
        for path, part in known
        if part is None or part.backend != "lighthouse"
    }
    config = replace(configs[0], dense_layers=(*configs[0].dense_layers, *dense))
    return Setting(config=config, dynamic=ours[0][1].dynamic, compiled=True, dense=dense, notes=tuple(notes))


def lighthouse_parts(model: nn.Module) -> dict[str, tuple[nn.Module, LighthouseConfig]]:
    """The outermost modules that are compiled with this backend and each one's options, by path; "" is the model itself."""
    return {
        path: (model.get_submodule(path), split_options(part.options)[0])
        for path, part in _parts(model)
        if part is not None and part.backend == "lighthouse"
    }


def _why_dense(part: Compilation) -> str:
    return EXCLUDED_BY_COMPILE if part.backend == lighthouse_excluded.__name__ else f"compiled with {part}"


def _parts(model: nn.Module) -> list[tuple[str, Compilation | None]]:
    """The outermost compiled modules by path, and (None) the largest ones that hold nothing compiled."""
    found = _compilation(model)
    if found is None:
        below = [
            (f"{name}.{path}" if path else name, part)
            for name, child in model.named_children()
            for path, part in _parts(child)
        ]
        if any(part is not None for _, part in below):
            return below
    return [("", found)]


def _compilation(target: Any) -> Compilation | None:
    """How one module or function was compiled; None where it was not."""
    if isinstance(target, OptimizedModule):
        context = target.dynamo_ctx
    else:
        call = target._compiled_call_impl if isinstance(target, nn.Module) else target
        if not hasattr(call, "_torchdynamo_orig_callable"):
            return None
        context = _context(call)
    backend: Any = getattr(context, "callback", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    if not hasattr(backend, "compiler_name"):
        return Compilation()
    options = getattr(backend, "kwargs", {}).get("options") or {}
    return Compilation(backend=backend.compiler_name, options=options, dynamic=getattr(backend, "dynamic", None))


def _context(call: Any) -> Any:
    """What `torch.compile` made of its arguments: the function that it returned has it in its closure."""
    cells = getattr(getattr(call, "__func__", call), "__closure__", None) or ()
    contexts = (cell.cell_contents for cell in cells)
    return next((x for x in contexts if isinstance(x, DynamoContext)), None)
