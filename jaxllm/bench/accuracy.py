"""What quantisation costs: the distributions of a quantised model against those of the model as it was.

    KL         mean over all positions of KL(reference || quantised), in nats
    agreement  share of positions at which both would choose the same token
    perplexity of the text under each, where the model knows text

Every position of a text is a row of one step, whose tokens see the ones before them in pages: the products, kernels and
pages are those that the engine decodes with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import EngineConfig
from jaxllm.engine.batch import BatchShape
from jaxllm.engine.buckets import Bucket
from jaxllm.engine.compilation_cache import enable_compilation_cache
from jaxllm.engine.forward import KV_AXES, StepFunctions
from jaxllm.engine.sizes import kv_cache_dtype
from jaxllm.engine.start import load_weights, model_config, quantized
from jaxllm.kernels.cuda.checks import check_kernels
from jaxllm.mapping import Mapping
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.mesh import make_mesh
from jaxllm.weights.resolve import resolve_model

PAGE = 32


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to run a model. dtype: of activations; cache: of keys and values."""

    name: str
    quantization: str | None = None
    dtype: str = "float32"
    cache: str = "auto"
    lm_head: bool = False


@dataclass(frozen=True, slots=True)
class Cost:
    """See the module. weight_bytes: of the whole model in memory. seconds: to load, compile and run it."""

    kind: Kind
    kl: float
    worst_kl: float
    agreement: float
    perplexity: float
    weight_bytes: int
    seconds: float


class Logits:
    """A model on one device, for texts of one length.

    rows: positions of a step, a multiple of the length.
    """

    def __init__(self, model: str, kind: Kind, *, length: int, rows: int, dummy: bool = False, seed: int = 0):
        settings: dict[str, Any] = {
            "model": model,
            "quantization": kind.quantization,
            "quantize_lm_head": kind.lm_head,
            "dequantize_weights": kind.quantization is None,
            "kv_cache_config": {"dtype": kind.cache, "tokens_per_block": PAGE},
            "progress": False,
        }
        config = EngineConfig(**settings | ({"load_format": "dummy", "seed": seed} if dummy else {}))
        files = resolve_model(model, need_weights=not dummy)
        cfg = quantized(model_config(files), config)
        enable_compilation_cache(None)
        check_kernels(cfg.quantization is not None, cfg.has_latents, cfg.experts is not None)
        layout = Layout(Mapping(), np.dtype(jnp.dtype(kind.dtype)))
        mesh = make_mesh(Mapping())
        self.vocab_size = cfg.vocab_size
        functions = StepFunctions(cfg, layout, mesh)
        (params,) = load_weights(config, cfg, files, [functions])
        self.weight_bytes = sum(array.nbytes for array in jax.tree.leaves(params))
        self.weights = functions.flatten(params)
        self.length, self.rows = length, rows
        self._each = -(-length // PAGE)
        shape = (rows // length * self._each + 1, *functions.kv_shape(PAGE))
        cache = kv_cache_dtype(config, layout.dtype, False)
        place = layout.sharding(mesh, *KV_AXES)
        self._kv = [jax.device_put(jnp.zeros(shape, cache), place) for _ in range(cfg.num_layers)]
        self._shape = BatchShape(Bucket(rows, 0), 1, self._each)
        step = functions.forward(self._shape)
        self._replicated = layout.sharding(mesh)
        packed, tokens = self._pack(), jax.ShapeDtypeStruct((rows,), np.int32, sharding=self._replicated)
        args = (self.weights, self._kv, tokens, jax.device_put(packed, self._replicated))
        options = functions.compiler_options(self._shape)
        self._step = jax.jit(lambda *args: step(*args)[1]).lower(*args).compile(options)

    def _pack(self) -> np.ndarray:
        """Row r is position r % length of text r // length, whose pages nobody else has."""
        packed = np.zeros(self._shape.shape, np.int32)
        parts = self._shape.unpack(packed[0, 0])
        text, position = np.divmod(np.arange(self.rows), self.length)
        parts.positions_T[:] = position
        parts.slots_R[:] = np.arange(self.rows)
        parts.last_R[:] = np.arange(self.rows)
        parts.pages_RW[:] = 1 + text[:, None] * self._each + np.arange(self._each)
        return packed

    def __call__(self, tokens: np.ndarray) -> jax.Array:
        """Log probabilities after each token of `tokens`, int32 [rows]: float32 [rows, vocab]."""
        last_token = jax.device_put(tokens.astype(np.int32), self._replicated)
        packed = jax.device_put(self._pack(), self._replicated)
        logits = self._step(self.weights, self._kv, last_token, packed)
        return jax.nn.log_softmax(logits[:, : self.vocab_size], axis=-1)


def costs(
    model: str,
    kinds: Sequence[Kind],
    tokens: np.ndarray,
    *,
    reference: Kind,
    rows: int = 256,
    dummy: bool = False,
    workers: int = 1,
) -> list[Cost]:
    """The cost of each kind against a reference, which comes first.

    Args:
        tokens: texts, int32 [texts, length]; as many as fill whole steps of `rows` positions are used.
        dummy: random weights.
        workers: models that are in memory at the same time.

    Raises:
        ValueError: there is not one whole step of text.
    """
    length = tokens.shape[1]
    if rows % length or tokens.size < rows:
        raise ValueError(f"{tokens.shape[0]} texts of {length} tokens do not fill steps of {rows} positions")
    steps = tokens.reshape(-1)[: tokens.size // rows * rows].reshape(-1, rows)
    options: dict[str, Any] = {"length": length, "rows": rows, "dummy": dummy}
    every = [reference, *kinds]
    with ThreadPoolExecutor(workers) as pool:
        runs = list(pool.map(lambda kind: _run(model, kind, steps, options), every))
    exact = runs[0][0]
    found = []
    for kind, (run, weight_bytes, seconds) in zip(every, runs, strict=True):
        divergence, same, surprise = [], [], []
        for wanted, part, ids in zip(exact, run, steps, strict=True):
            kl, agree = _compare(jnp.asarray(wanted), jnp.asarray(part))
            divergence.append(np.asarray(kl))
            same.append(np.asarray(agree))
            inside = np.arange(rows - 1)[np.arange(1, rows) % length != 0]
            surprise.append(-np.asarray(part)[inside, ids[inside + 1]])
        kls = np.concatenate(divergence)
        found.append(
            Cost(
                kind,
                float(kls.mean()),
                float(kls.max()),
                float(np.concatenate(same).mean()),
                math.exp(min(50.0, float(np.concatenate(surprise).mean()))),
                weight_bytes,
                seconds,
            )
        )
    found[0] = replace(found[0], kl=0.0, worst_kl=0.0)
    return found


def _run(model: str, kind: Kind, steps: np.ndarray, options: dict[str, Any]) -> tuple[list[np.ndarray], int, float]:
    """Log probabilities of every step, the bytes of the weights, and seconds; the model is gone afterwards."""
    began = time.perf_counter()
    logits = Logits(model, kind, **options)
    found = [np.asarray(logits(ids)) for ids in steps]
    return found, logits.weight_bytes, time.perf_counter() - began


@jax.jit
def _compare(wanted: jax.Array, found: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL(wanted || found) of each row, and whether both have their largest in the same place."""
    kl = (jnp.exp(wanted) * (wanted - found)).sum(axis=-1)
    return jnp.maximum(kl, 0), wanted.argmax(axis=-1) == found.argmax(axis=-1)
