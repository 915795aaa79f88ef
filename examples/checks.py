"""Is the pre-trained model an ordinary dense model? Checked against plain eager copies of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PREFIX = 2_048  # tokens for the float32 yardstick: its attention may need the whole score matrix


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of outputs."""

    what: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Not so for NaN."""
        return self.difference <= self.tolerance


@torch.no_grad()
def eager_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits in eval mode with nothing compiled, even where the model was."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        logits: Tensor = model(ids).logits
    return logits


@torch.no_grad()
def check_inference(model: nn.Module, fresh: nn.Module, ids: Tensor) -> list[Check]:
    """Compare a trained, compiled model with a fresh model of its class that loads its weights and is never compiled."""
    fresh.load_state_dict(model.state_dict())
    eager = eager_logits(fresh, ids)
    model.eval()
    compiled = model(ids).logits
    scale = eager.abs().max().item()
    if eager.dtype == torch.float32:
        tolerance = 1e-4 * max(1.0, scale)
    else:
        # Twice the error that eager inference itself makes in this precision.
        exact = eager_logits(copy.deepcopy(fresh).float(), ids[:, :PREFIX])
        tolerance = 2 * (eager[:, :PREFIX].float() - exact).abs().max().item()
    own = eager_logits(model, ids)
    return [
        Check("compiled inference (eval, no_grad) against the eager dense model", _gap(compiled, eager), tolerance),
        Check("the trained model run eagerly against a fresh model with its weights", _gap(own, eager), 0.0),
    ]


def check_unchanged(before: Tensor, after: Tensor) -> Check:
    """The eager outputs before and after lighthouse_fx.compile: the same bits."""
    return Check("eager outputs after lighthouse_fx.compile against before", _gap(after, before), 0.0)


def _gap(left: Tensor, right: Tensor) -> float:
    """Largest difference."""
    return (left.float() - right.float()).abs().max().item()
