"""Prefill attention over pages: against the reference, its speed next to cuDNN's, and a sweep of how it is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_rows._measure import Row, difference, rate, time_call

from jaxllm.kernels.cuda import rtc
from jaxllm.kernels.paged_attention import prefill_cuda, reference
from jaxllm.kernels.paged_attention.prefill_cuda import VARIANTS, Variant, wgmma

BF16 = jnp.bfloat16
TILE, O = 128, 32
LLAMA = (8, 4, 128)
"""K, G, H"""
ALIVE = """
from jaxllm.kernels.paged_attention import prefill_cuda as p
for variant in p.VARIANTS[{head_dim}]:
    if variant.kernel == {kernel!r}:
        print(p.check(variant, {head_dim}), p.check(variant, {head_dim}, 20.0, fp8=variant.persistent))
"""
SECONDS = 60
"""A kernel that waits for what never comes ends itself after ten seconds, and its process with it."""


def prompts(lengths: list[int], start: int = 0) -> np.ndarray:
    """Positions of the tiles of prompts whose first `start` tokens are in the pages already."""
    rows = []
    for length in lengths:
        positions = np.full(-(-length // TILE) * TILE, -1, np.int32)
        positions[:length] = start + np.arange(length)
        rows.append(positions.reshape(-1, TILE))
    return np.concatenate(rows)


def stripes(length: int, ranks: int, rank: int) -> np.ndarray:
    """The last key of rank number `rank` that each token of one prompt sees, with pages in stripes (RING, HELIX)."""
    tokens = prompts([length]) + 1
    return tokens // (O * ranks) * O + np.clip(tokens % (O * ranks) - rank * O, 0, O).astype(np.int32) - 1


SHAPES: dict[str, tuple[np.ndarray, int, tuple[int, int, int], dict[str, Any]]] = {
    # last visible keys, prompts, K G H, options
    "8 x 2048": (prompts([2048] * 8), 8, LLAMA, {}),
    "1 x 8000": (prompts([8000]), 1, LLAMA, {}),
    "8192 after 122880": (prompts([8192], 122_880), 1, LLAMA, {}),
    "stripes of 16384 over 4": (stripes(16_384, 4, 1), 1, LLAMA, {}),
    "tp2 8 x 2048": (prompts([2048] * 8), 8, (4, 4, 128), {}),
    "H=64 8 x 2048": (prompts([2048] * 8), 8, (3, 3, 64), {}),
    "fp8 8 x 2048": (prompts([2048] * 8), 8, LLAMA, {"fp8": True}),
    "H=256 1 x 8192 softcap window": (prompts([8192]), 1, (8, 2, 256), {"softcap": 50.0, "window": 4096}),
}
COMPARED = ("8 x 2048", "fp8 8 x 2048", "8192 after 122880", "H=256 1 x 8192 softcap window")
"""With the reference at full size."""
SWEEP: dict[str, Variant] = {"2 stages": wgmma(128, 2)}
SWEPT = ("1 x 8000", "8 x 2048")
PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    # what is replaced in the sources, to see what a part costs; the results are wrong
    "without copies": (("barrier_expect(full, KV_BYTES);", "barrier_arrive(full);\n  return;"),),
    "with copies of zeros": (("base + i <= tile.last_key ? page : -1", "-1"),),
    "without exponentials": (("p = fast_exp2(p * EXPONENT - zero);", "p = p * EXPONENT - zero;"),),
}
COUNTS = (
    # K, G, H, page, tokens of a row, softcap
    (8, 4, 128, 32, 128, None),
    (3, 3, 64, 32, 100, None),
    (2, 16, 128, 16, 3, 30.0),
    (4, 1, 96, 64, 128, None),
    (2, 2, 256, 16, 77, 50.0),
)


@cache
def run_checks(kernel: str, head_dim: int) -> tuple[bool, str]:
    """Whether a kernel's checks pass in a process of its own, and what it says: an illegal access ends that one."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_CLIENT_MEM_FRACTION": "0.05"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_TRACEBACK_FILTERING": "off"}
    command = [sys.executable, "-c", ALIVE.format(kernel=kernel, head_dim=head_dim)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False, f"{kernel}: its checks took more than {SECONDS} s"
    if done.returncode:
        return False, f"{kernel}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}"
    return True, done.stdout.strip().replace("\n", "; ")


def alive(kernel: str, head_dim: int) -> str:
    """The errors that its checks found. Raises RuntimeError if it must not be run in this process."""
    passed, said = run_checks(kernel, head_dim)
    if not passed:
        raise RuntimeError(said)
    return said


def prepare(variant: Variant, q: Any, kv: Any, pages: Any, *, softcap: float | None = None) -> Any:
    alive(variant.kernel, q.shape[-1])
    ptx = prefill_cuda.compile_variant(variant, q, kv, pages, scale=q.shape[-1] ** -0.5, softcap=softcap)
    return partial(prefill_cuda.run, variant=variant, ptx=ptx)


@lru_cache(maxsize=1)
def arguments(name: str) -> tuple[Any, ...]:
    """q, kv, pages, last and first visible keys."""
    last, count, (K, G, H), options = SHAPES[name]
    rows = len(last)
    width = -(-int(last.max() + 1) // O)
    rng = np.random.default_rng(0)
    ids = (1 + rng.permutation(count * width)).reshape(count, width).repeat(rows // count, axis=0)
    keys = jax.random.split(jax.random.key(0))
    q = jax.random.normal(keys[0], (rows, TILE, K * G, H), BF16)
    kv = jax.random.normal(keys[1], (count * width + 1, 2, K, O, H), BF16)
    kv = kv.astype(prefill_cuda.FP8) if options.get("fp8") else kv
    window = options.get("window")
    first = np.zeros_like(last) if window is None else np.maximum(last - window + 1, 0)
    return q, kv, *(jnp.asarray(x, jnp.int32) for x in (ids, last, first))


def chain(attend: Any, calls: int, q: jax.Array, *others: jax.Array) -> jax.Array:
    """Calls, each on the output of the one before."""
    for _ in range(calls):
        q = attend(q, *others)[0]
    return q


@lru_cache(maxsize=1)
def results(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the variant that is used."""
    inputs, options = arguments(name), SHAPES[name][3]
    attend = prepare(VARIANTS[SHAPES[name][2][2]][0], *inputs[:3], softcap=options.get("softcap"))
    out, lse = jax.jit(attend)(*inputs)
    return np.asarray(out, np.float32), np.asarray(lse)


def time_attention(name: str, attend: Any) -> dict[str, Any]:
    K, G, H = SHAPES[name][2]
    inputs = arguments(name)
    seen = int(np.maximum(SHAPES[name][0] - np.asarray(inputs[4]) + 1, 0).sum())
    calls = 4 if seen < 10**8 else 1
    flops = 4.0 * K * G * H * seen
    seconds = time_call(jax.jit(partial(chain, attend, calls)), *inputs, calls=calls)
    return {**rate(seconds, flops=flops), "tflops": flops / seconds / 1e12}


def speed(name: str, variant: Variant | None = None) -> dict[str, Any]:
    """Of a variant, and how far it is from the reference (at some sizes) or (another variant) from the one in use."""
    last, _, (_, _, H), options = SHAPES[name]
    inputs = arguments(name)
    softcap = options.get("softcap")
    attend = prepare(variant or VARIANTS[H][0], *inputs[:3], softcap=softcap)
    found = time_attention(name, attend)
    if variant is None and name not in COMPARED:
        return found
    out, lse = (np.asarray(x, np.float32) for x in jax.jit(attend)(*inputs))
    if variant is None:
        wide = (inputs[0], inputs[1].astype(BF16), *inputs[2:])
        wanted, wanted_lse = jax.jit(partial(reference.attend, scale=H**-0.5, softcap=softcap))(*wide)
    else:
        wanted, wanted_lse = results(name)
    real = last >= 0
    found["difference"] = difference(out[real], np.asarray(wanted, np.float32)[real])
    found["lse_error"] = float(np.abs(lse - np.asarray(wanted_lse))[real].max())
    found["wrong"] = not (found["difference"] < 0.02 and found["lse_error"] < 0.02)
    return found


def speed_of_parts(name: str, part: str) -> dict[str, Any]:
    """Of the variant in use with a part of it left out."""
    whole = rtc.SOURCES
    try:
        with tempfile.TemporaryDirectory() as folder:
            for path in whole.glob("*.cu*"):
                text = path.read_text()
                for old, new in PARTS[part] if "prefill" in path.name else ():
                    text = text.replace(old, new)
                (Path(folder) / path.name).write_text(text)
            rtc.SOURCES = Path(folder)
            attend = prepare(VARIANTS[SHAPES[name][2][2]][0], *arguments(name)[:3])
    finally:
        rtc.SOURCES = whole
    return time_attention(name, attend)


def right(kernel: str, head_dim: int) -> dict[str, Any]:
    """The checks in a process of its own."""
    return {"errors": alive(kernel, head_dim)}


def right_counts(K: int, G: int, H: int, page: int, tokens: int, softcap: float | None) -> dict[str, Any]:
    """Error against float32 with counts of every kind: causal, jumping, in windows, none."""
    rng = np.random.default_rng(2)
    R, W = 11, 2048 // page
    q = jnp.asarray(rng.standard_normal((R, tokens, K * G, H)), BF16)
    kv = jnp.asarray(rng.standard_normal((R * W, 2, K, page, H), np.float32), BF16)
    pages = jnp.asarray(rng.permutation(R * W).reshape(R, W), jnp.int32)
    last = rng.integers(0, 2048 - tokens, (R, 1)) + np.arange(tokens)
    last[1] = rng.integers(-1, 2048, tokens)
    last[2] = -1
    last[3, tokens // 2 :] = -1
    first = np.where(np.arange(R)[:, None] % 3 == 1, last - rng.integers(-1, 700, (R, tokens)), 0)
    counts = [jnp.asarray(x, jnp.int32) for x in (last, first)]
    found = jax.jit(prepare(VARIANTS[H][0], q, kv, pages, softcap=softcap))(q, kv, pages, *counts)
    with jax.default_matmul_precision("highest"):
        plain = jax.jit(partial(reference.attend, scale=H**-0.5, softcap=softcap))
        wanted = plain(q.astype(jnp.float32), kv.astype(jnp.float32), pages, *counts)
    out, lse = (np.asarray(x, np.float32) for x in found)
    real = last >= np.maximum(first, 0)
    error = difference(out[real], np.asarray(wanted[0])[real])
    lse_error = float(np.abs(lse - np.asarray(wanted[1]))[real].max())
    finite = bool(np.isfinite(out).all() and (lse[~real] < -1e29).all())
    return {"difference": error, "lse_error": lse_error, "wrong": not (error < 6e-3 and lse_error < 5e-3 and finite)}


def cudnn(name: str) -> dict[str, Any]:
    """The same work by cuDNN on keys and values that lie side by side; a context before the chunk is seen whole."""
    last, count, (K, G, H), _ = SHAPES[name]
    tokens, context = len(last) // count * TILE, int(last.max()) + 1
    causal = context <= tokens
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (count, tokens, K * G, H), BF16)
    k, v = (jax.random.normal(key, (count, max(context, tokens), K, H), BF16) for key in keys[1:])
    lengths = {"query_seq_lengths": jnp.full(count, tokens, jnp.int32)} if causal else {}
    if causal:
        lengths["key_value_seq_lengths"] = jnp.full(count, context, jnp.int32)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array]:
        return (jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn", **lengths),)

    seen = int((last + 1).sum()) if causal else count * tokens * context
    calls, flops = 4 if causal else 1, 4.0 * K * G * H * seen
    seconds = time_call(jax.jit(partial(chain, attend, calls)), q, k, v, calls=calls)
    return {**rate(seconds, flops=flops), "tflops": flops / seconds / 1e12}


def rows() -> Iterator[Row]:
    for head_dim, variants in VARIANTS.items():
        for variant in variants:
            yield Row(f"right {variant.kernel} H={head_dim}", partial(right, variant.kernel, head_dim))
    for name in SHAPES:
        yield Row(name, partial(speed, name))
        if name in SWEPT:
            for part in PARTS:
                yield Row(f"{name} part {part}", partial(speed_of_parts, name, part))
            for label, variant in SWEEP.items():
                yield Row(f"{name} variant {label}", partial(speed, name, variant))
            yield Row(f"{name} cuDNN", partial(cudnn, name))
    yield Row("8192 after 122880 cuDNN", partial(cudnn, "8192 after 122880"))
    for case in COUNTS:
        K, G, H, page, tokens, softcap = case
        yield Row(f"counts K={K} G={G} H={H} O={page} Q={tokens} softcap={softcap}", partial(right_counts, *case))
