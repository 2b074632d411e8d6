"""Typed reading of model settings, from `config.json` or from GGUF metadata, with errors that name the setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


class ModelConfigError(ValueError):
    """A model's settings are missing, malformed, or ask for something that the decoder cannot do."""


class Fields:
    """A read-only view of a settings dict: `where` names it in errors, `defaults` fill keys that are absent or null."""

    def __init__(self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        if not isinstance(values, Mapping):
            raise ModelConfigError(f"{where}: expected a table of settings, got {type(values).__name__}")
        self.values = values
        self.where = where
        self.defaults = defaults or {}

    def error(self, message: str) -> ModelConfigError:
        return ModelConfigError(f"{self.where}: {message}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or else the family's default, or else `default`; null counts as absent."""
        value = self.values.get(key)
        if value is None:
            value = self.defaults.get(key)
        if value is None:
            value = default
        # GGUF readers hand out numpy scalars
        return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        """An integer of at least `low`; required when there is no default."""
        value = self.get(key, default)
        if value is None:
            raise self.error(f"{key} is missing, an integer of at least {low} is needed")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < low:
            raise self.error(f"{key} is {value!r}, it must be an integer of at least {low}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; required when there is no default."""
        value = self.get(key, default)
        if value is None:
            raise self.error(f"{key} is missing, a positive number is needed")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise self.error(f"{key} is {value!r}, it must be a positive finite number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def optional_integer(self, key: str, *, low: int = 1) -> int | None:
        return None if self.get(key) is None else self.integer(key, low=low)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} is {value!r}, it must be true or false")
        return value

    def refuse(self, key: str, *allowed: Any, why: str) -> None:
        """Raise unless `key` is absent or one of `allowed`."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise self.error(f"{key} is {value!r}: {why}")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them, without repetitions; empty when absent."""
        value = self.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.error(f"{key} is {value!r}, it must be a token id or a list of token ids")
        return tuple(dict.fromkeys(ids))


def check_heads(fields: Fields, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """The sizes of attention that no decoder can work with, whichever file they came from."""
    if num_heads % num_kv_heads:
        raise fields.error(f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly")
    if head_dim % 2:
        raise fields.error(f"the head dimension is {head_dim}, rotary embeddings need an even one")
