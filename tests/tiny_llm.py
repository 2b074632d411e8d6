"""A tiny model with a tokenizer behind the real engine, and its logits over whole sequences.

All engines have the same shapes wherever a test does not need others, so that the compilation cache makes every one
after the first start in a second or two.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm import LLM
from jaxllm.engine.request import Request, Update
from jaxllm.models.registry import config_from_hf
from jaxllm.weights.resolve import resolve_model
from tests.golden.full_logits import FullLogits

MODEL = Path(__file__).parent / "golden" / "qwen3"
VOCAB = 203
EOS = 2
PAGE = 4
MAX_SEQ_LEN = 64
SLOTS = 8


def make_llm(tokenizer: Path | None = None, *, kv_tokens: int = 512, reuse: bool = True, **settings: Any) -> LLM:
    """An engine with 8 slots, steps of at most 32 tokens, and 128 pages of 4 tokens."""
    return LLM(
        MODEL,
        tokenizer=tokenizer,
        skip_tokenizer_init=tokenizer is None,
        **{
            "dtype": "float32",
            "max_batch_size": SLOTS,
            "max_num_tokens": 32,
            "max_seq_len": MAX_SEQ_LEN,
            "kv_cache_config": {"tokens_per_block": PAGE, "max_tokens": kv_tokens, "enable_block_reuse": reuse},
            "batch_buckets": [SLOTS],
            "token_buckets": [32],
            "progress": False,
            **settings,
        },
    )


def make_tokenizer(directory: Path) -> Path:
    """A tokenizer of 203 tokens, all of them ASCII: 3 special ones, 95 characters, and pairs of letters."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for code in range(32, 127):
        vocab[chr(code)] = len(vocab)
    letters = "etaoinshrdlu"
    pairs = [(a, b) for a in letters for b in letters][: VOCAB - len(vocab)]
    for a, b in pairs:
        vocab[a + b] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def prompts(count: int, seed: int = 0, low: int = 1, high: int = 40) -> list[list[int]]:
    """Random prompts without special tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, rng.integers(low, high + 1)).tolist() for _ in range(count)]


@cache
def _model() -> FullLogits:
    files = resolve_model(MODEL)
    assert files.config is not None
    source = files.open()
    try:
        return FullLogits(config_from_hf(files.config), source)
    finally:
        source.close()


def full_logits(sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits [len, VOCAB] of every position of whole sequences, computed without scheduler, cache or engine."""
    return _model()(sequences, 16)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def tokens_of(outputs: Any) -> list[list[int]]:
    """The tokens of all completions of one output or a list of them."""
    many = outputs if isinstance(outputs, list) else [outputs]
    return [completion.token_ids for output in many for completion in output.outputs]


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Waits for something that another thread does; False when it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def submit(llm: LLM, request_id: int, prompt: list[int], params: Any, on_update: Callable[[Update], None]) -> Request:
    """Hands a request to the engine past the Python API."""
    request = Request(request_id, prompt, params, on_update=on_update)
    llm._engine.submit(request)
    return request
