"""The user's modules behind a graph that Dynamo compiles: where a node belongs, its layer number, whether it trains."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from lighthouse_fx.kernels.torch_private import (
    AttrSource,
    DictGetItemSource,
    GetItemSource,
    GlobalSource,
    InstructionTranslator,
    LocalSource,
    Source,
)
from lighthouse_fx.passes.attention_call import MODULE, Layer
from lighthouse_fx.passes.ir.subgraphs import regions
from lighthouse_fx.passes.match.sdpa import bare

from .guards import add_guard, source_name

Found = tuple[Source, Any]  # a value of the user's frame, and how guards reach it
Step = tuple[str, Source, Any]  # one more step of a path

_LISTS = (nn.ModuleList, nn.Sequential)
_ROOT = re.compile(r"([LG])\[(['\"])(.+?)\2\]")
_STEP = re.compile(r"\[(?P<quote>['\"])(?P<key>.*?)(?P=quote)\]|\[(?P<index>\d+)\]|\.(?P<attribute>[^.\[\]()]+)")


class Modules:
    """The user's modules behind a graph: which of them a node belongs to, how it is called and whether it trains.

    Dynamo records the modules that were entered around a node as paths, `L['self'].layers.0.attn`, but not the module whose
    own forward is the outermost frame. Paths are followed from the variables of that frame.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._locals, self._globals = _root_frame()
        self._inputs = list(self._behind_inputs(gm))
        self._known = {id(module): source for source, module in reversed(self._inputs)}
        self._followed: dict[str, list[Step]] = {}
        self.modes: dict[str, bool] = {}  # the flags that the graph is guarded on, by their expressions

    # --- modes ----------------------------------------------------------------------------------------------------

    def training(self, node: fx.Node) -> bool | None:
        """Whether the module around a node trains; the graph will be valid only while that stays so.

        None where a module's forward calls the outermost frame, but no variable there leads to that module: its mode can
        change without being seen. A node that no module calls counts as training: there is no `eval()` to respect.
        """
        around = self.around(node)
        for source, module in around:
            flag = AttrSource(self._known.get(id(module), source), "training")  # rather as Dynamo itself reaches it
            add_guard(flag)
            self.modes[source_name(flag)] = module.training
            if not module.training:
                return False
        return True if around or not _inside_a_module() else None

    def around(self, node: fx.Node) -> list[Found]:
        """The innermost module around a node, or else all modules that it may belong to."""
        for path in reversed(_stack(node)):
            steps = self._follow(path)
            if steps and isinstance(steps[-1][2], nn.Module):
                return [steps[-1][1:]]
        return self._outermost()

    def _outermost(self) -> list[Found]:
        """The module whose forward is the outermost frame: its first argument. In a function, any that it can see."""
        names = [name for name in self._locals if not name.startswith("__")]  # what does is left over from Dynamo
        found = [self._as_module(name) for name in names]
        if found and found[0]:
            return found[0]
        return [pair for pairs in found for pair in pairs] + self._inputs

    def _as_module(self, name: str) -> list[Found]:
        """A local variable, if it is a module or a tuple, `*args`, that begins with one."""
        value, source = self._locals[name], LocalSource(name)
        if isinstance(value, tuple) and value and isinstance(value[0], nn.Module):
            return [(GetItemSource(source, 0), value[0])]
        return [(source, value)] if isinstance(value, nn.Module) else []

    # --- names ----------------------------------------------------------------------------------------------------

    def name_nodes(self, gm: fx.GraphModule) -> None:
        """Write into every node the path of its innermost module, below the outermost module of that path."""
        for region in regions(gm):
            for node in region.gm.graph.nodes:
                if (stack := _stack(node)) and (steps := self._below_outermost(stack[-1])):
                    node.meta[MODULE] = _join(name for name, _, _ in steps[1:])

    def layer(self, node: fx.Node) -> Layer | None:
        """Which layer of the model a node is in: its number in the outermost list of blocks of one class.

        Where no list is of one class, in the outermost list. Lists of lists (stages) are counted through.
        """
        stack = _stack(node)
        steps = self._below_outermost(stack[-1]) if stack else []
        lists = [n for n, (_, _, value) in enumerate(steps[:-1]) if isinstance(value, _LISTS)]
        if not lists:
            return None
        alike = (n for n in lists if len({type(block) for block in _blocks(steps[n][2]).values()}) == 1)
        first = next(alike, lists[0])
        blocks = list(_blocks(steps[first][2]))
        last = next((n for n in range(first + 1, len(steps)) if not isinstance(steps[n][2], _LISTS)), first)
        name = _join(name for name, _, _ in steps[first + 1 : last + 1])
        if name not in blocks:
            return None
        path = _join(name for name, _, _ in steps[1 : first + 1])
        return Layer(path=path, number=blocks.index(name), count=len(blocks))

    def names(self, node: fx.Node) -> set[str]:
        """The paths of all modules below the outermost one around a node."""
        stack = _stack(node)
        steps = self._below_outermost(stack[-1]) if stack else []
        return {bare(name) for name, _ in steps[0][2].named_modules()} if steps else set()

    def _below_outermost(self, path: str) -> list[Step]:
        """The steps of a path from its first module on."""
        steps = self._follow(path)
        first = next((n for n, (_, _, value) in enumerate(steps) if isinstance(value, nn.Module)), len(steps))
        return steps[first:]

    # --- following paths ------------------------------------------------------------------------------------------

    def _follow(self, path: str) -> list[Step]:
        """Every value on a path, outermost first; nothing where it leads nowhere."""
        if path not in self._followed:
            try:
                self._followed[path] = list(self._steps(_plain(path)))
            except Exception:  # properties of the user's classes may raise anything
                self._followed[path] = []
        return self._followed[path]

    def _steps(self, path: str) -> Iterator[Step]:
        root = _ROOT.match(path)
        if root is None:
            raise ValueError(path)
        scope, name, end = root[1], root[3], root.end()
        source: Source = LocalSource(name) if scope == "L" else GlobalSource(name)
        value = (self._locals if scope == "L" else self._globals)[name]
        yield name, source, value
        while end < len(path):
            step = _STEP.match(path, end)
            if step is None:
                raise ValueError(path)
            end = step.end()
            if (attribute := step["attribute"]) is not None:
                value, source = getattr(value, attribute), AttrSource(source, attribute)
            else:
                key = int(step["index"]) if step["index"] else step["key"]
                of_dict = isinstance(value, dict)
                value = value[key]
                source = DictGetItemSource(source, key) if of_dict else GetItemSource(source, key)
            yield step["attribute"] or step["index"] or step["key"], source, value

    def _behind_inputs(self, gm: fx.GraphModule) -> Iterator[Found]:
        """The modules whose parameters and buffers are inputs of the graph, and the modules around them."""
        seen: set[str] = set()
        for node in gm.graph.find_nodes(op="placeholder"):
            source = getattr(node.meta.get("grapharg"), "source", None)
            while source is not None:
                name = source_name(source)
                if name not in seen:  # a module's source comes wrapped in another of the same name
                    seen.add(name)
                    value = self._value(name)
                    if isinstance(value, nn.Module):
                        yield source, value
                source = getattr(source, "base", None)

    def _value(self, name: str) -> Any:
        scope = {"L": self._locals, "G": self._globals, "__builtins__": {"getattr": getattr}}
        try:
            return eval(name, scope)  # the same expression that Dynamo's own guards evaluate
        except Exception:
            return None  # a source that is no plain expression is no module either


def _root_frame() -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The local and global variables of the outermost frame in the graph: what `L[...]` and `G[...]` stand for."""
    try:
        root = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return {}, {}
    return root.f_locals, root.f_globals


def _stack(node: fx.Node) -> list[str]:
    """The paths of the modules that were entered around a node, outermost first."""
    return [path for path, *_ in (node.meta.get("nn_module_stack") or {}).values()]


def _plain(path: str) -> str:
    """`getattr(L['self'].layers, '0')._modules['attn']` -> `L['self'].layers.0.attn`"""
    path, changed = re.subn(r"getattr\(([^()]*), '([^']+)'\)", r"\1.\2", path)
    return _plain(path) if changed else re.sub(r"\._modules\[(['\"])(.+?)\1\]", r".\2", path)


def _join(names: Any) -> str:
    return bare(".".join(names))


def _blocks(modules: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The blocks of a list, and of the lists in it, by their paths below it."""
    found: dict[str, nn.Module] = {}
    for name, child in modules._modules.items():  # named_children leaves out a block that comes again
        if child is not None:
            found |= _blocks(child, f"{prefix}{name}.") if isinstance(child, _LISTS) else {prefix + name: child}
    return found


def _inside_a_module() -> bool:
    """Whether the frame that is being compiled was called, at some distance, by a module's forward."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
