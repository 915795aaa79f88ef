"""What `verify` notes of attention calls as they run, on either side of its comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from lighthouse_fx.passes.attention_call import Steps
from lighthouse_fx.report.report import AttentionRecord


@dataclass(slots=True)
class ObservedCall:
    """One attention call as it ran.

    Of a call that was rewritten: `tensors`, query, key and value; `out`; `gradients`, those of query, key and value, as far as
    they need one; `entries` int32 `[B, G, S]` and `slots` int32 `[B, G, P]`, the selection that it read; `scored`, what the
    scorer read in place of query and key, None where it read those.

    Of its functional twin: `starts`, where documents begin; `steps` and `projection`, which turn an output `[B, H, N, D]` into
    `out`; `dense`, how far the model's own attention is from plain attention of these arguments. `unknown`: what was not
    compared, and why.
    """

    rewritten: bool
    record: AttentionRecord
    tensors: tuple[Tensor, ...] = ()
    out: Tensor | None = None
    entries: Tensor | None = None
    slots: Tensor | None = None
    scored: tuple[Tensor | None, Tensor | None] = (None, None)
    scale: float | None = None
    is_causal: bool = False
    dropout_p: float = 0.0
    starts: Tensor | None = None
    steps: Steps = ()
    projection: tuple[Tensor, ...] = ()
    dense: float | None = None
    unknown: str = ""
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, name: str, gradient: Tensor | None) -> None:
        """Take a gradient over; there is none where a cut leaves nothing."""
        if gradient is not None:
            self.gradients[name] = gradient.detach().clone()


class Observer:
    """Notes attention calls during the forward. A checkpoint's second run, in the backward, is not noted again."""

    def __init__(self) -> None:
        self.calls: list[ObservedCall] = []
        self.forward = True

    def note(self, call: ObservedCall) -> None:
        """Take a call over, and its gradients once they are there."""
        if not self.forward:
            return
        if call.out is not None:
            call.out = call.out.detach().clone()  # the model may write to it afterwards
        self.calls.append(call)
        for name, x in zip(("query", "key", "value"), call.tensors, strict=False):
            if x.requires_grad:
                x.register_hook(partial(call.keep, name))
