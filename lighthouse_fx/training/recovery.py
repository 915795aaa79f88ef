"""What the switch of stages does to the training loss: how far it jumps, and when it is back.

The *level* is the mean of the last `window` losses of stage 1, the *jump* the first loss of stage 2 less the level. The loss
has *recovered* at the first step at which the mean of the last `window` losses of stage 2 is at the level or below; so not
before `window` losses, one lucky batch is no recovery. A loss that is not finite takes no part.

A stage 1 training loss is not a language-model likelihood (SPEC.md, "What is causal and what is not"): these figures tell
how the switch went. They compare no models.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from lighthouse_fx.arguments import is_integer, is_number


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEvent:
    """Something that a two-stage run came to.

    Attributes:
        kind: "switch": the first dense step begins; "jump": its loss is known; "recovered": the loss is back at its level;
            "finished": all steps are done.
        step: the step (from 0) that it happened in; message: the same as a sentence.
        loss: the loss of that step, or None; level: the loss before the switch, or None where none was observed.
    """

    kind: Literal["switch", "jump", "recovered", "finished"]
    step: int
    message: str
    loss: float | None = None
    level: float | None = None


class Recovery:
    """Watches the losses of one run. `switch` is the first dense step."""

    def __init__(self, *, switch: int, window: int) -> None:
        self._switch = switch
        self._before: deque[float] = deque(maxlen=window)
        self._after: deque[float] = deque(maxlen=window)
        self._peak = -math.inf
        self._recovered: int | None = None

    @property
    def level(self) -> float | None:
        """The loss before the switch."""
        return fmean(self._before) if self._before else None

    def observe(self, step: int, loss: float) -> list[StageEvent]:
        """Take the loss of a step.

        Returns:
            What became known by it.
        """
        if not math.isfinite(loss):
            return []
        if step < self._switch:
            self._before.append(loss)
            return []
        level = self.level
        if level is None or self._recovered is not None:
            return []
        first = not self._after
        self._after.append(loss)
        self._peak = max(self._peak, loss)
        events = []
        if first:
            said = f"step {step}: the first loss under dense attention is {loss:.4f}, {loss - level:+.4f} from {level:.4f}"
            events.append(StageEvent(kind="jump", step=step, message=said, loss=loss, level=level))
        if len(self._after) == self._after.maxlen and fmean(self._after) <= level:
            self._recovered = step
            said = (
                f"step {step}: the loss is back at {level:.4f}, its level before the switch, {step + 1 - self._switch} steps "
                f"after it; the highest was {self._peak:.4f}"
            )
            events.append(StageEvent(kind="recovered", step=step, message=said, loss=loss, level=level))
        return events

    def verdict(self) -> str:
        """What there is to say at the end of the run."""
        if self.level is None or not self._after:
            return "no losses of both stages were given, so nothing is known of the recovery"
        if self._recovered is None:
            now = fmean(self._after)
            return f"the loss has not come back to {self.level:.4f}, its level before the switch: it is {now:.4f}"
        return f"the loss was back at its level before the switch in step {self._recovered}"

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists only."""
        peak = self._peak if self._after else None
        return {"before": [*self._before], "after": [*self._after], "peak": peak, "recovered": self._recovered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            TypeError, ValueError: the state is damaged, naming the field.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state['recovery']={state!r} is a {type(state).__name__}: give what state_dict() returned")
        for name in ("before", "after", "peak", "recovered"):
            _check_saved(name, state)
        for mine, saved in ((self._before, state["before"]), (self._after, state["after"])):
            mine.clear()
            mine.extend(saved)
        self._peak = -math.inf if state["peak"] is None else state["peak"]
        self._recovered = state["recovered"]


def _check_saved(name: str, state: Mapping[str, Any]) -> None:
    if name not in state:
        raise ValueError(f"state['recovery'] has no {name!r}: give what state_dict() returned")
    value = state[name]
    if name in ("before", "after"):
        known = isinstance(value, list) and all(is_number(loss) and math.isfinite(loss) for loss in value)
        wanted = "a list of losses"
    else:
        known = value is None or (is_number(value) and math.isfinite(value) if name == "peak" else is_integer(value))
        wanted = "a loss or None" if name == "peak" else "a step or None"
    if not known:
        raise ValueError(f"state['recovery'][{name!r}]={value!r} is damaged: it has to be {wanted}")
