"""Single-digit passkey retrieval: is a digit, told once somewhere in a long text, known at its end?

    filler ... The pass key is 7. Keep it in mind: 7 is the pass key. ... filler What is the pass key? The pass key is ->  7

The protocol of the paper: several lengths, seven depths, one digit, and the answer is whichever of the ten digits has the
largest logit, so that chance is one in ten. A model must have been trained to find it: it tells nothing of a small one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from rich.progress import track
from torch import Tensor, nn

from .model_outputs import last_logits

CHANCE = 0.1
_FILLER = (
    "The river is wide and slow here. ",
    "Boats pass under the old bridge. ",
    "Somebody on the bank is reading. ",
    "Nobody is in a hurry today. ",
)
_NEEDLE = "The pass key is {digit}. Keep it in mind: {digit} is the pass key. "
_QUESTION = "What is the pass key? The pass key is {digit}."


def utf8(text: str) -> list[int]:
    """The bytes of a text, for models whose tokens are bytes."""
    return list(text.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Passkey:
    """What is asked.

    Args:
        lengths: tokens of a prompt; depths: places of the digit, evenly from the start to the end; trials: prompts of each
            length and depth, every digit in turn.
        encode: a text's tokens, without any special ones; by default its bytes. start: tokens before all others.
        seed: of the filler's phase; batch: prompts at once.

    Raises:
        ValueError: naming the argument, its value and the remedy.
    """

    lengths: tuple[int, ...]
    depths: int = 7
    trials: int = 10
    encode: Callable[[str], Sequence[int]] = field(default=utf8, repr=False)
    start: tuple[int, ...] = ()
    seed: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        for name in ("depths", "trials", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1: give an integer, such as {name}=7")
        if not self.lengths:
            raise ValueError("lengths=() asks nothing: give tokens of a prompt, such as lengths=(4096, 8192)")
        self.answers()
        shortest = len(self.start) + len(self._needle(0)) + len(self._question())
        if min(self.lengths) < shortest:
            raise ValueError(f"lengths has {min(self.lengths)}, and a prompt without filler has {shortest} tokens: use more")

    @property
    def places(self) -> tuple[float, ...]:
        """The depths as shares of the text before the question."""
        return tuple(place / max(1, self.depths - 1) for place in range(self.depths))

    def answers(self) -> list[int]:
        """The token of each digit after the question.

        Raises:
            ValueError: two digits begin with the same token.
        """
        place = len(self._question())
        asked = [self.encode(_QUESTION.format(digit=digit)) for digit in range(10)]
        tokens = [tokens[place] for tokens in asked if len(tokens) > place]
        if len(set(tokens)) != 10:
            raise ValueError(f"encode gives the ten digits the tokens {tokens}: give one that tells them apart by one token")
        return tokens

    def prompt(self, *, length: int, depth: float, digit: int, trial: int) -> list[int]:
        """`length` tokens, the digit at a share `depth` of the filler, between two of its sentences."""
        sentences = [list(self.encode(sentence)) for sentence in _FILLER]
        ahead = random.Random(f"{self.seed} {length} {trial}").randrange(len(sentences))
        needle, question = self._needle(digit), self._question()
        room = length - len(self.start) - len(needle) - len(question)
        filler: list[int] = []  # made from its end, so that the question follows a whole sentence
        ends = {0, room}
        while len(filler) < room:
            filler = sentences[ahead % len(sentences)] + filler
            ends.add(room - len(filler))
            ahead += 1
        filler = filler[len(filler) - room :]
        place = min((end for end in ends if end >= 0), key=lambda end: (abs(end - depth * room), end))
        return [*self.start, *filler[:place], *needle, *filler[place:], *question]

    def _needle(self, digit: int) -> list[int]:
        return list(self.encode(_NEEDLE.format(digit=digit)))

    def _question(self) -> list[int]:
        """What the ten questions and answers have in common."""
        asked = [self.encode(_QUESTION.format(digit=digit)) for digit in range(10)]
        alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*asked, strict=False))
        return [tokens[0] for tokens in alike]


@dataclass(frozen=True, slots=True, kw_only=True)
class PasskeyResult:
    """The share of digits found, `found[length][depth]`, each of `trials` prompts."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    found: tuple[tuple[float, ...], ...]

    @property
    def accuracy(self) -> float:
        """Over all lengths and depths."""
        cells = [cell for row in self.found for cell in row]
        return sum(cells) / len(cells)

    @property
    def error(self) -> float:
        """The standard error that guessing would have."""
        return float((CHANCE * (1 - CHANCE) / (self.trials * len(self.lengths) * len(self.depths))) ** 0.5)


@torch.no_grad()
def find_passkeys(model: nn.Module, task: Passkey, *, device: torch.device, progress: bool = False) -> PasskeyResult:
    """Ask a model as it is: its mode and its attention are the caller's affair."""
    answers = torch.tensor(task.answers(), device=device)
    cells = [(length, depth) for length in task.lengths for depth in task.places]
    shares: dict[tuple[int, float], float] = {}
    for length, depth in track(cells, "passkeys", transient=True, disable=not progress):
        digits = [trial % 10 for trial in range(task.trials)]
        prompts = torch.tensor(
            [
                task.prompt(length=length, depth=depth, digit=digit, trial=trial)
                for trial, digit in enumerate(digits)
            ],
            device=device,
        )  # [trials, length]
        said: list[Tensor] = [last_logits(model, rows)[:, answers].argmax(1) for rows in prompts.split(task.batch)]
        shares[length, depth] = (torch.cat(said).cpu() == torch.tensor(digits)).double().mean().item()
    return PasskeyResult(
        lengths=task.lengths,
        depths=task.places,
        trials=task.trials,
        found=tuple(tuple(shares[length, depth] for depth in task.places) for length in task.lengths),
    )
