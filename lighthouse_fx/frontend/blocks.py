"""The repeated blocks of a model: its lists of layers, the layers' names and numbers, and which of them stay dense."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lighthouse_fx.passes.attention_call import Layer
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.passes.decide.policy import excludes, unmatched

DENSE_LAYERS = (0, 1, -2, -1)  # paper: the first and last two
_NOT_CALLED = (nn.ModuleList, nn.ModuleDict)
_NAMES_OF_ATTENTION = ("attn", "attention", "q_proj", "qkv", "wq")  # parts of names of modules and of their classes


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """One list of blocks.

    Attributes:
        names: the blocks in order, each with its name in the model.
        numbers: their numbers: places in the list, or the keys of a dict that begins elsewhere, as a pipeline stage's does.
    """

    names: Mapping[nn.Module, str]
    numbers: Sequence[int]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.names)

    @property
    def partial(self) -> bool:
        """Whether the numbers are those of a larger model, of which this is a part."""
        return list(self.numbers) != list(range(self.count))

    def layers(self) -> list[Layer]:
        """Each block's place, as an entry of `dense_layers` means it."""
        return [Layer(path="", number=number, count=max(self.numbers) + 1) for number in self.numbers]

    def dense(self, entries: Sequence[int | str]) -> list[str]:
        """The names of the blocks that entries of `dense_layers` mean."""
        return [
            name
            for name, layer in zip(self.names.values(), self.layers(), strict=True)
            if any(excludes(wanted, module=name, layer=layer) for wanted in entries)
        ]

    def __str__(self) -> str:
        names = list(self.names.values())
        return f"{self.count} blocks, {names[0]} to {names[-1]}"


def find_blocks(model: nn.Module) -> list[Blocks]:
    """The model's lists of blocks that hold attention, told by the names of their modules, or else the largest list.

    Raises:
        ValueError: where there is no list of equal blocks.
    """
    lists = _lists(model)
    with_attention = [blocks for blocks in lists if any(map(looks_like_attention, blocks.children()))]
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    found: list[Blocks] = []
    taken: set[nn.Module] = set()
    for blocks in with_attention or lists[:1]:
        children = dict.fromkeys(blocks.children())  # a block that occurs twice is one
        if not taken & {m for child in children for m in child.modules()}:
            taken.update(m for child in children for m in child.modules())
            keys = blocks.keys() if isinstance(blocks, nn.ModuleDict) else range(len(children))
            found.append(Blocks(names={block: names[id(block)] for block in children}, numbers=[*map(int, keys)]))
    return found


def repeated_blocks(model: nn.Module) -> nn.ModuleList | nn.ModuleDict:
    """The model's layers: the module list with the most parameters, or the dict of numbered ones that torchtitan has.

    Raises:
        ValueError: where none holds blocks of one kind.
    """
    return _lists(model)[0]


def looks_like_attention(block: nn.Module) -> bool:
    """Whether a block holds attention, by the names of its modules and of their classes."""
    names = (f"{name} {type(module).__name__}".lower() for name, module in block.named_modules())
    return any(part in name for name in names for part in _NAMES_OF_ATTENTION)


def choose_dense(lists: Sequence[Blocks], config: LighthouseConfig) -> set[str]:
    """The names of the blocks that stay dense.

    Entries mean blocks of every list. The default, where the config names none, leaves out less of a short list.

    Raises:
        ValueError: an entry that means no block, or no block left for Lighthouse.
    """
    if not config.dense_layers:
        return _default(lists)
    entries = config.dense_layers
    for blocks in lists:
        if blocks.partial and (negative := [n for n in entries if isinstance(n, int) and n < 0]):
            raise ValueError(
                f"dense_layers has {negative[0]}, and {blocks} are a part of a larger model, which numbers from its end do not "
                f"fit: give their own numbers, {blocks.numbers[0]} to {blocks.numbers[-1]}"
            )
    names = [name for blocks in lists for name in blocks.names.values()]
    if missing := unmatched(config, names, [blocks.layers()[0] for blocks in lists]):
        longest = max(blocks.count for blocks in lists)
        raise ValueError(
            f"dense_layers has {missing[0]!r}, and the model has {' and '.join(map(str, lists))}: use "
            f"-{longest} to {longest - 1}, or patterns of these names"
        )
    dense = {name for blocks in lists for name in blocks.dense(entries)}
    if len(dense) == len(names):
        raise ValueError(
            f"dense_layers={entries} keeps all {len(names)} blocks dense: leave some out, such as "
            f"dense_layers={_at_most(len(names))}"
        )
    return dense


def _default(lists: Sequence[Blocks]) -> set[str]:
    dense: set[str] = set()
    for blocks in lists:
        if blocks.partial:
            raise ValueError(
                f"the model has {blocks}, numbered {blocks.numbers[0]} to {blocks.numbers[-1]}, a part of a larger one, whose "
                "first and last two, the default of dense_layers, are not known: give dense_layers"
            )
        entries = _at_most(blocks.count)
        if entries != DENSE_LAYERS:
            warnings.warn(
                f"the model has {blocks}, of which the default of dense_layers, {DENSE_LAYERS}, would leave none: "
                f"dense_layers={entries} is used there",
                stacklevel=4,
            )
        dense.update(blocks.dense(entries))
    return dense


def _at_most(count: int) -> tuple[int, ...]:
    """The entries of the default that leave a block for Lighthouse."""
    return DENSE_LAYERS if count > len(DENSE_LAYERS) else (0, -1) if count > 2 else ()


def _lists(model: nn.Module) -> list[nn.ModuleList | nn.ModuleDict]:
    """The lists of blocks of one kind, the one with the most parameters first."""
    lists = [
        m
        for m in model.modules()
        if (isinstance(m, nn.ModuleList) or (isinstance(m, nn.ModuleDict) and all(map(str.isdecimal, m))))
        and _alike([type(block) for block in m.children()])
    ]
    if not lists:
        raise ValueError(
            f"model={type(model).__name__} has no ModuleList of equal blocks: "
            "use torch.compile(model, backend='lighthouse') on it as a whole"
        )
    return sorted(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), reverse=True)


def _alike(classes: Sequence[type[nn.Module]]) -> bool:
    """Whether blocks are of one kind: of one class, or of several with a base of their own (a hybrid's layers)."""
    if not classes or any(issubclass(kind, _NOT_CALLED) for kind in classes):
        return False
    shared = set(classes[0].__mro__).intersection(*(kind.__mro__ for kind in classes))
    return len(set(classes)) == 1 or any(
        issubclass(base, nn.Module) and not base.__module__.startswith("torch.") for base in shared
    )
