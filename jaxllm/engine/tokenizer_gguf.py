"""The tokenizer that a GGUF file describes, built with the `tokenizers` package: no torch, no transformers.

llama.cpp stores the vocabulary, and for byte-level BPE the merges, but only the *name* of how text is split before
merging (`tokenizer.ggml.pre`). The splits below are those of the models' own tokenizer.json files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "\u2581"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What tokenizer.ggml.pre names: a regular expression, or one of the two splits built into `tokenizers`.
_GPT2, _DIGITS_GPT2 = "gpt-2", "digits, gpt-2"
SPLITS: dict[str, str] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS_GPT2),
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "phi-2"), _GPT2),
    "tekken": _TEKKEN,
}
_WHOLE_WORDS = frozenset(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"))
"""Vocabularies whose words are taken whole when they are in it, whatever the merges say."""
_BOS_BY_DEFAULT = frozenset(("llama-bpe", "llama3", "llama-v3", "tekken"))


class TokenizerError(ValueError):
    """A tokenizer that is missing, damaged or of a kind without support."""


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file's metadata, with its special tokens and what it adds to a prompt (BOS, EOS).

    Raises:
        TokenizerError: no tokenizer in the file, or one of an unknown kind.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(tokens, Sequence) or not tokens or not isinstance(kind, str):
        raise TokenizerError("this GGUF file has no tokenizer: give tokenizer=DIRECTORY, or skip_tokenizer_init=True")
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise TokenizerError(
            f"GGUF tokenizer: {len(tokens)} tokens but {len(types)} token types: convert the file again"
        )
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens, types)
        add_bos = metadata.get("tokenizer.ggml.pre") in _BOS_BY_DEFAULT
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens)
        add_bos = True
    else:
        raise TokenizerError(f"GGUF tokenizer model {kind!r} is not supported, only 'gpt2' (BPE) and 'llama' (SPM) are")
    tokenizer.add_special_tokens([_added(t, special=True) for t, k in zip(tokens, types, strict=True) if k == _CONTROL])
    tokenizer.add_tokens([_added(t, special=False) for t, k in zip(tokens, types, strict=True) if k == _USER_DEFINED])
    ends = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", add_bos) and special_id(metadata, "bos"),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False) and special_id(metadata, "eos"),
    }
    before, after = ([] if i is None or i is False else [(tokens[i], i)] for i in ends.values())
    if before or after:
        template = [*(t for t, _ in before), "$A", *(t for t, _ in after)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[*before, *after])
    return tokenizer


def special_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """`name` is bos or eos; None where the file has none, or one outside its vocabulary."""
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return value if isinstance(value, int) and 0 <= value < len(metadata["tokenizer.ggml.tokens"]) else None


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in SPLITS:
        raise TokenizerError(
            f"GGUF tokenizer.ggml.pre {pre!r} is not supported, only {', '.join(sorted(SPLITS))} are: "
            "give tokenizer=DIRECTORY with the model's own tokenizer.json"
        )
    alphabet = byte_alphabet()
    known = set(alphabet.values())
    vocab = {
        # some converters write ordinary tokens as plain text instead of in the byte alphabet
        token
        if kind in (_CONTROL, _USER_DEFINED) or known.issuperset(token)
        else "".join(alphabet[b] for b in token.encode()): i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
    }
    merges = [tuple(m.split(" ", 1)) for m in metadata.get("tokenizer.ggml.merges") or ()]
    if not merges:
        raise TokenizerError("this GGUF file has a BPE vocabulary without merges: convert it again")
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS)
    except Exception as error:  # tokenizers raises plain Exception
        raise TokenizerError(f"GGUF tokenizer: merges do not fit the vocabulary ({error}): convert it again") from error
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    split = SPLITS[pre]
    if split == _GPT2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif split == _DIGITS_GPT2:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if split == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    """SentencePiece BPE: merges are not stored, they are every way to make a piece, best piece first."""
    gemma = str(metadata.get("general.architecture", "")).startswith("gemma")
    # Gemma's files spell runs of spaces as spaces, and its scores do not follow the order of the merges; ids do.
    pieces = [_SPACE * len(t) if t and not t.strip(" ") else t for t in tokens]
    scores = range(0, -len(pieces), -1) if gemma else metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(pieces):
        raise TokenizerError("this GGUF file has a SentencePiece vocabulary without scores: convert it again")
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, score in zip(pieces, scores, strict=True):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-score, -cut, cut - len(piece), left, right))
    merges.sort(key=lambda m: m[:3])
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in merges],
            unk_token=None if unknown is None else pieces[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    if gemma:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (b for b in range(256) if b not in set(plain))
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}
