"""Where the documents of a batch of packed rows lie, and what is known of them on the CPU."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lighthouse_fx.kernels import Pyramid
from lighthouse_fx.kernels.packed.attention import crowded_out
from lighthouse_fx.kernels.packed.plan import summary
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.passes.pyramid import pyramid_over


class PackedRows:
    """`starts` int32 `[B, N]` on the CPU, where each token's document begins.

    `known`: how many documents there are and how long (`kernels/packed/plan.py`). `alone`: each row is one document. That is
    no documents at all.
    """

    def __init__(self, starts: Tensor) -> None:
        self.starts = starts.cpu()
        self.alone = not bool(self.starts.any())
        self.known = summary(self.starts)
        self._copies = {x.device: x for x in (starts, self.starts)}
        self._checked: set[LighthouseConfig] = set()

    def __str__(self) -> str:
        return f"documents {list(self.starts.shape)}"

    def same_as(self, other: PackedRows | None) -> bool:
        """Whether these are the same documents."""
        return other is not None and (self is other or torch.equal(self.starts, other.starts))

    def on(self, device: torch.device) -> Tensor:
        """`starts` on a device; copied there once."""
        if device not in self._copies:
            self._copies[device] = self.starts.to(device, non_blocking=True)
        return self._copies[device]

    def crowded_out(self, config: LighthouseConfig) -> int:
        """How many windows at borders of documents a configuration cannot expand, over all rows.

        Tokens below them are attended to by nobody and may be left without attention output: choose a larger topk.
        """
        return int(crowded_out(self.starts, self._pyramid(config)).sum())

    def _pyramid(self, config: LighthouseConfig) -> Pyramid:
        return pyramid_over(self.starts.shape[1], config)

    def check(self, config: LighthouseConfig) -> None:
        """Warn, once, of windows that are crowded out."""
        if config in self._checked:
            return
        self._checked.add(config)
        if missing := self.crowded_out(config):
            topk = self._pyramid(config).topk
            warnings.warn(
                f"documents(): {missing} windows at borders of documents are more than topk={topk} expands in their "
                "tiles; tokens below them are not attended to and may get no attention output: use a larger topk or fewer, "
                "longer documents",
                stacklevel=2,
            )
