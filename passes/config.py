"""The configuration of Lighthouse attention: frozen, validated once, hashable.

A leaf of the package: it imports nothing of it, so passes may use it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache
from typing import Any

SCORERS = ("norm", "dilated", "gla")
KERNELS = ("auto", "cudnn", "flash", "efficient", "math", "flash-attn-4", "flash-attn")
_WIDEST_WINDOW = 2**31  # window numbers are int32
_LEAST_CAUSAL_QUOTA = 64  # measured: at 128 nothing is learnt from the competition for a quota (SPEC.md, "Causal selection")


@dataclass(frozen=True, slots=True, kw_only=True)
class LighthouseConfig:
    """What is computed in place of dense attention, and where.

    Args:
        levels: pyramid levels `L`; level 0 is the tokens, so `levels=1` is dense attention. 0: the local branch alone.
        pooling: pooling factor `p >= 2` between levels.
        topk: windows expanded per level over the whole sequence, `k >= 1`; None: it follows the length, so that half of the
            sequence is expanded, `k = N / (2 p (L - 1))`, rounded down to whole tiles: half at multiples of 1,024 tokens with
            two levels and pooling 4, a quarter at least; less where deep or coarse pyramids have no windows for it.
        quota: windows expanded per tile and level, a divisor of `topk`; None: the divisor nearest 128 (from 64 on, if there is
            one), and of a topk that follows the length 128, or 64, 16 or 2 where the sequence is too short for that.
        keep_first: always expand window 0, so that no token is left without output.
        causal_selection: in causal attention rank each window by the scores of the window before it, so that no token is told
            of later ones by what is selected; False: by its own, the published form, for comparison. Quotas below 64 still
            tell, as windows compete for them, and warn.
        local_window: each token also attends, with its own query, to itself and the tokens before it, so many together (in
            bidirectional attention as many on either side); merged with what entries give by log-sum-exp. 0: no local branch.
        scorer: "norm" (norms of q and k, or of what they were before a norm, with QK-norm), "dilated" (norms of two strided
            attention passes) or "gla" (of two passes of linear attention; on a GPU by fla-core, the extra `gla`).
        dilation: strided sub-sequences of the "dilated" scorer.
        kernel: what attends to the gathered sub-sequence on a GPU: "auto" (cuDNN on Hopper and newer, otherwise
            FlashAttention, as far as they can), or "cudnn", "flash", "efficient", "math", or the packages "flash-attn" and
            "flash-attn-4" (extras of the same names), an error where it cannot.
        max_kept: a call stays dense where more than this share of the tokens would be gathered (`S > max_kept * N`).
        max_documents: documents in a row that attention on a GPU keeps apart at most, an error beyond.
        dense_layers: layers that stay dense in a whole-model compile, by number (negative ones count from the end) or
            by a pattern of the module's name, such as "model.layers.3" or "*.cross_attn".
        assume_causal: take an explicit mask that is not proved to be causal, nor to be anything else, for causal; the
            compiled model checks the mask in every step, and raises where it is another.

    With the pyramid of the defaults, two levels and half of the tokens, the final loss matched dense training in most of our
    runs (docs/evidence.md, with the published selection). `LighthouseConfig.paper()` keeps far less of a long sequence and is
    far faster.

    Source: SPEC.md, "Names" and "The four stages".

    Raises:
        ValueError, TypeError: naming the argument, its value and the remedy.
    """

    levels: int = 2
    pooling: int = 4
    topk: int | None = None
    quota: int | None = None
    keep_first: bool = True
    causal_selection: bool = True
    local_window: int = 0
    scorer: str = "norm"
    dilation: int = 64
    max_kept: float = 0.8  # what the defaults gather, three quarters and the tail, is just below
    kernel: str = "auto"
    max_documents: int = 256
    dense_layers: tuple[int | str, ...] = ()
    assume_causal: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", _as_tuple(self.dense_layers))
        check_fields({field.name: getattr(self, field.name) for field in fields(self)})
        if self.levels == 0 and self.local_window == 0:
            raise ValueError(
                "levels=0 and local_window=0 leave nothing to attend to: give levels, such as levels=2, or a window, such "
                "as local_window=512"
            )
        if self.quota is not None and self.topk is not None and self.topk % self.quota:
            raise ValueError(
                f"quota={self.quota} does not divide topk={self.topk}: give a divisor of topk, or None to have one chosen"
            )
        if self.pooling ** max(0, self.levels - 1) >= _WIDEST_WINDOW:
            raise ValueError(
                f"levels={self.levels} with pooling={self.pooling} makes coarsest windows of {self.pooling}^"
                f"{self.levels - 1} tokens, more than any sequence has: use fewer levels, such as levels=3"
            )
        quota = self.topk if self.quota is None else self.quota
        if self.causal_selection and self.levels > 1 and quota is not None and quota < _LEAST_CAUSAL_QUOTA:
            _warn_of_small_quota("topk" if self.quota is None else "quota", quota)

    def keeps_too_much(self, gathered: float, length: float) -> bool:
        """Whether so many entries are more than `max_kept` of so many tokens. Either may be symbolic."""
        # In small integers: the ratio of a float such as 0.8 is one of numbers that overflow where guards are compiled.
        share = Fraction(self.max_kept).limit_denominator(1_000_000)
        return gathered * share.denominator > share.numerator * length

    @classmethod
    def paper(cls, **fields: Any) -> LighthouseConfig:
        """The paper's pyramid over 98,304 tokens, three levels and `topk=1536`, which keeps 19% of them.

        The published selection leaks the future: whether a token has an entry of its own depends on the tokens behind it in its
        window. Models learn to read that, 1.2 nats of the next token where we measured it, and lose it with dense attention.
        It is here to compare with (`causal_selection=False`, no local branch); in our runs it ended above dense training
        (docs/evidence.md). Below some 14,000 tokens it would gather most of the sequence, so attention stays dense.

        Args:
            fields: any others, or another `topk`.

        Raises:
            TypeError, ValueError: naming the argument, its value and the remedy.
        """
        check_fields(fields)
        published = {"levels": 3, "pooling": 4, "topk": 1536, "causal_selection": False, "local_window": 0, "max_kept": 0.75}
        return cls(**published | fields)

    @classmethod
    def sliding_window(cls, window: int, **fields: Any) -> LighthouseConfig:
        """A sliding window alone, without a pyramid: each token attends to itself and the `window - 1` tokens before it.

        What a user would take instead, to compare with.

        Args:
            fields: any others.

        Raises:
            TypeError, ValueError: naming the argument, its value and the remedy.
        """
        check_fields(fields)
        return cls(**{"levels": 0, "local_window": window} | fields)


@cache
def _warn_of_small_quota(name: str, value: int) -> None:
    """Warn once of each value: a program makes many configurations of it."""
    warnings.warn(
        f"{name}={value} expands fewer than {_LEAST_CAUSAL_QUOTA} windows per tile. Windows compete with those behind, "
        "so that causal attention tells tokens of later ones and training may learn to use it: use "
        f"{name}={_LEAST_CAUSAL_QUOTA} or more, or topk=None",
        stacklevel=4,
    )


def config_field_names() -> tuple[str, ...]:
    """The names that `options=` and `pretraining(...)` take."""
    return tuple(field.name for field in fields(LighthouseConfig))


def check_fields(values: Mapping[str, Any]) -> None:
    """Check configuration fields one by one, as far as each can be judged alone.

    Raises:
        TypeError: an unknown name or a value of the wrong type; ValueError: a value out of range.
    """
    for name, value in values.items():
        if name not in config_field_names():
            raise TypeError(
                f"{name}={value!r} is no field of LighthouseConfig: use one of {', '.join(config_field_names())}"
            )
        _CHECKS[name](name, value)


def _as_tuple(value: Any) -> Any:
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        return (value,)
    return tuple(value) if isinstance(value, (list, set, frozenset, range)) else value


def _integer_from(least: int, advice: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}: give an integer, such as {advice}")
        if value < least:
            raise ValueError(f"{name}={value} is below {least}: give an integer of at least {least}, such as {advice}")
        if value >= _WIDEST_WINDOW:
            raise ValueError(f"{name}={value} is more than any sequence has tokens: give fewer, such as {advice}")

    return check


def _optional(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    return lambda name, value: None if value is None else check(name, value)


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: give True or False")


def _scorer(name: str, value: Any) -> None:
    if value not in SCORERS:
        raise ValueError(f"{name}={value!r} is not a known scorer: use one of {', '.join(map(repr, SCORERS))}")


def _kernel(name: str, value: Any) -> None:
    if value not in KERNELS:
        raise ValueError(f"{name}={value!r} is not a known kernel: use one of {', '.join(map(repr, KERNELS))}")


def _share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: give a number between 0 and 1, such as 0.8")
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value} is not in (0, 1]: give a share of the tokens, such as 0.8")


def _layers(name: str, value: Any) -> None:
    value = _as_tuple(value)
    if not isinstance(value, tuple) or any(isinstance(x, bool) or not isinstance(x, (int, str)) for x in value):
        raise TypeError(
            f"{name}={value!r}: give a tuple of layer numbers and module-name patterns, such as (0, 1, -2, -1)"
        )


_CHECKS = {
    "levels": _integer_from(0, "levels=3"),
    "local_window": _integer_from(0, "local_window=512, or 0 for none"),
    "pooling": _integer_from(2, "pooling=4"),
    "topk": _optional(_integer_from(1, "topk=1536, or None to have it follow the length")),
    "quota": _optional(_integer_from(1, "quota=128, or None to have it chosen")),
    "keep_first": _boolean,
    "causal_selection": _boolean,
    "scorer": _scorer,
    "dilation": _integer_from(1, "dilation=64"),
    "max_kept": _share,
    "kernel": _kernel,
    "max_documents": _integer_from(1, "max_documents=256"),
    "dense_layers": _layers,
    "assume_causal": _boolean,
}
