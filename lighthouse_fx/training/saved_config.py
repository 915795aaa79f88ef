"""A `LighthouseConfig` as checkpoints and run logs hold it: all fields, so that new defaults change no run that goes on.

A field that the data lacks was added after they were saved. Attention was then what `_BEFORE` says, whatever the default is
today.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lighthouse_fx.passes.config import LighthouseConfig, check_fields, config_field_names

# The published form: windows are ranked by all tokens of the row, and there is no local branch.
_BEFORE: Mapping[str, Any] = {"causal_selection": False, "local_window": 0}
# LighthouseConfig() in version 0.1.0, which did not save the defaults that a run rested on.
DEFAULTS_0_1_0: Mapping[str, Any] = {
    "levels": 2,
    "pooling": 4,
    "topk": None,
    "quota": None,
    "keep_first": True,
    "scorer": "norm",
    "dilation": 64,
    "max_kept": 0.8,
    "kernel": "auto",
    "max_documents": 256,
    "dense_layers": (),
    "assume_causal": False,
}


def save_config(config: LighthouseConfig) -> dict[str, Any]:
    """All fields, as strings, numbers, None and lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def restore_config(saved: Any, *, name: str) -> LighthouseConfig:
    """The configuration that was saved, by this version or an earlier one.

    Args:
        saved: what `save_config` returned.
        name: of the data, for errors.

    Raises:
        TypeError, ValueError: the data is damaged, or of a later version.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(f"{name}={saved!r} is a {type(saved).__name__}: give all fields, as they were saved")
    known = config_field_names()
    if unknown := sorted(map(str, saved.keys() - set(known))):
        raise ValueError(f"{name} has {', '.join(unknown)}, which this version does not know: use a newer lighthouse-fx")
    values = {field: saved.get(field, _BEFORE.get(field)) for field in known if field in saved or field in _BEFORE}
    if missing := [field for field in known if field not in values]:
        raise ValueError(f"{name} has no {', '.join(missing)}: give all fields, as they were saved")
    try:
        check_fields(values)
        return LighthouseConfig(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} is damaged: {error}") from error


def differences(before: LighthouseConfig, now: LighthouseConfig) -> str:
    """The fields that differ, such as "topk was 1536 and is 512"; "" where none does."""
    pairs = ((name, getattr(before, name), getattr(now, name)) for name in config_field_names())
    return ", ".join(f"{name} was {old!r} and is {new!r}" for name, old, new in pairs if old != new)
