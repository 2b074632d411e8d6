"""From the model that a user names to what a plan needs of it: only small files are read."""

from __future__ import annotations

import difflib
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxllm.models.registry import config_from_gguf, config_from_hf
from jaxllm.plan.sizes import Model, dense
from jaxllm.settings import ConfigError
from jaxllm.weights.resolve import resolve_model

_SHIPPED = files("jaxllm.plan") / "models"


def shipped() -> list[str]:
    """Names of the models whose config.json comes with jaxllm."""
    return sorted(Path(item.name).stem for item in _SHIPPED.iterdir() if item.name.endswith(".json"))


def find_model(name: str, *, quantised: bool = True) -> Model:
    """A shipped name (a hub id such as meta-llama/Llama-3.1-70B-Instruct finds it too), a config.json, or a model.

    Raises:
        ConfigError: nothing of that name. ModelConfigError: a model that no plan can be made for.
    """
    path = Path(name).expanduser()
    if path.suffix == ".json" and (path.is_file() or not _shipped_name(name)):
        return _from_config(path.stem if path.stem != "config" else path.resolve().parent.name, _read(path), quantised)
    if path.is_dir() and (path / "config.json").is_file():
        return _from_config(path.resolve().name, _read(path / "config.json"), quantised)
    known = None if path.exists() else _shipped_name(name)
    if known is not None:
        return _from_config(known, json.loads((_SHIPPED / f"{known}.json").read_text(encoding="utf-8")), quantised)
    try:
        found = resolve_model(name, need_weights=False)
    except ValueError as error:
        near = difflib.get_close_matches(name.split("/")[-1], shipped(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped())}"
        raise ConfigError(f"no model {name!r} to plan for ({error}); {hint}") from None
    if found.config is not None:
        return _from_config(found.root.name, found.config, quantised)
    assert found.metadata is not None
    if found.kind == "none":
        return dense(found.root.name, config_from_gguf(found.metadata, None, found.rope_factors))
    source = found.open()
    try:
        return dense(found.root.stem, config_from_gguf(found.metadata, set(source.tensors), found.rope_factors))
    finally:
        source.close()


def _shipped_name(name: str) -> str | None:
    """The shipped model that a name means, whatever its case, owner, `Meta-` or endings such as `-Instruct-v0.1`."""
    plain = name.split("/")[-1].lower().removesuffix(".json").removeprefix("meta-")
    names = {known.lower(): known for known in shipped()}
    for known, spelled in names.items():
        if re.fullmatch(re.escape(known) + r"(-(base|chat|instruct|hf|v\d+(\.\d+)*))*", plain):
            return spelled
    starts = [spelled for known, spelled in names.items() if plain and known.startswith(plain + "-")]
    return starts[0] if len(starts) == 1 else None


def _from_config(name: str, config: dict[str, Any], quantised: bool) -> Model:
    if not quantised:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    return dense(name, config_from_hf(config))


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{str(path)!r} must hold a JSON object, not a {type(value).__name__}")
    return value
