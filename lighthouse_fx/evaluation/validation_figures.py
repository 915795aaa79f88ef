"""The pictures of a validation: loss by position, and passkeys by length and depth. They need matplotlib, the extra `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lighthouse_fx.extras import new_figure, save_figure

from .passkey import CHANCE, PasskeyResult

if TYPE_CHECKING:
    from .validation_result import Validation


def save_positions(result: Validation, path: Path) -> None:
    """Loss by where in the window a token is, dense and under Lighthouse attention."""
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    edges = [result.positions[0].start, *(at.end for at in result.positions)]
    axes.stairs([at.dense for at in result.positions], edges, baseline=None, color="#1f5fa8", linewidth=2, label="dense")
    curve = [at.lighthouse for at in result.positions if at.lighthouse is not None]
    if curve:
        label = "Lighthouse (no likelihood)"
        axes.stairs(curve, edges, baseline=None, color="#d95f02", linewidth=2, linestyle=":", label=label)
    axes.set_xscale("symlog", base=2, linthresh=max(1, edges[1]))
    axes.set_xticks(edges, [_tokens(edge) for edge in edges])
    axes.minorticks_off()
    axes.set(xlabel="tokens before", ylabel="loss (nats per token)")
    axes.set_title(f"{result.title}: loss by position, {result.windows} windows of {result.length:,} tokens", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


def save_passkeys(result: PasskeyResult, path: Path, *, title: str) -> None:
    """A heat map: the share of digits found."""
    figure = new_figure(2.6 + 0.9 * len(result.lengths), 1.6 + 0.55 * len(result.depths))
    axes = figure.subplots()
    shares = [list(row) for row in zip(*result.found, strict=True)]  # depth by length
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
    for row, cells in enumerate(shares):
        for column, cell in enumerate(cells):
            colour = "white" if cell > 0.6 else "black"
            axes.text(column, row, f"{cell:.0%}", ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(result.lengths)), [_tokens(length) for length in result.lengths])
    axes.set_yticks(range(len(result.depths)), [f"{depth:.0%}" for depth in result.depths])
    axes.set(xlabel="tokens of the prompt", ylabel="depth of the digit")
    axes.set_title(f"{title}: passkeys found\n{result.accuracy:.0%} of all, guessing {CHANCE:.0%}", fontsize=10)
    figure.colorbar(image, format=lambda share, _: f"{share:.0%}")
    save_figure(figure, path)


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count and count % 1024 == 0 else f"{count:,}"
