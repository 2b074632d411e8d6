"""Text to token ids and back, chat templates, and decoding as tokens arrive."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from jaxllm.engine.tokenizer_gguf import TokenizerError, build_tokenizer, byte_alphabet, special_id
from jaxllm.weights.gguf_header import read_gguf_header
from jaxllm.weights.resolve import TOKENIZER_FILES, ModelFiles
from jaxllm.weights.source import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IncrementalDecoder", "Tokenizer", "TokenizerError", "load_tokenizer"]

_BYTES = {character: byte for byte, character in byte_alphabet().items()}


class Tokenizer:
    """A `tokenizers` tokenizer with its special ids and chat template.

    Attributes:
        vocab_size: tokens including added ones; the model's output may be wider.
        bos_token_id, eos_token_id: None when the model has none.
        backend: the `tokenizers.Tokenizer`.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        chat_template: str | None = None,
        hf: PreTrainedTokenizerBase | None = None,
    ) -> None:
        # A tokenizer.json may ask for both; cutting or padding prompts is the engine's to decide.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.chat_template = chat_template
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._hf = hf
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """The fast tokenizer of a Hugging Face directory.

        Raises:
            TokenizerError: there is none, or it is damaged or slow only.
        """
        path = Path(path)
        if not any((path / name).is_file() for name in TOKENIZER_FILES):
            raise TokenizerError(
                f"{path}: no tokenizer here (none of {', '.join(TOKENIZER_FILES)}): give tokenizer=DIRECTORY, or "
                "skip_tokenizer_init=True and token ids"
            )
        from transformers import AutoTokenizer

        try:
            hf = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False, use_fast=True)
        except Exception as error:  # tokenizers raises plain Exception for damaged files
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TokenizerError(f"{path}: the tokenizer cannot be loaded ({reason}): download it again") from error
        if not hf.is_fast:
            raise TokenizerError(f"{path}: only a slow tokenizer here: save it with tokenizer.json (a fast tokenizer)")
        return cls(
            hf.backend_tokenizer,
            bos_token_id=hf.bos_token_id,
            eos_token_id=hf.eos_token_id,
            chat_template=hf.chat_template,
            hf=hf,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that GGUF metadata describes; see `build_tokenizer` for errors."""
        return cls(
            build_tokenizer(metadata),
            bos_token_id=special_id(metadata, "bos"),
            eos_token_id=special_id(metadata, "eos"),
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised.

        Raises:
            ValueError: `text` is not valid Unicode (lone surrogates).
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):  # which of the two depends on the version of tokenizers
            bad = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if bad is None:
                raise
            raise ValueError(f"the text is not valid Unicode: lone surrogate at character {bad}, remove it") from None

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """Text of token ids. Bytes that are not UTF-8 become U+FFFD; nothing is cleaned up.

        `spaces_between_special_tokens` is accepted for compatibility: fast tokenizers never put spaces there.
        """
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        *,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Token ids (`tokenize=True`) or text of a conversation, by the model's own template.

        Args:
            messages: dicts with "role" and "content".
            tools, kwargs: passed to the template.

        Raises:
            TokenizerError: the model has no template, or the template refuses the messages.
        """
        if not messages:
            raise TokenizerError("messages is empty: a chat needs at least one message")
        if self.chat_template is None:
            raise TokenizerError("this model has no chat template: use generate() with a plain prompt")
        try:
            if self._hf is not None:
                text: Any = self._hf.apply_chat_template(
                    [dict(m) for m in messages],
                    tools=None if tools is None else list(tools),
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **kwargs,
                )
            else:
                text = _template(self.chat_template).render(
                    messages=list(messages),
                    tools=tools,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    bos_token=self._token(self.bos_token_id),
                    eos_token=self._token(self.eos_token_id),
                    **kwargs,
                )
        except Exception as error:  # templates are programs of the model's author
            raise TokenizerError(f"the chat template refuses these messages: {error}") from error
        # the template writes BOS itself
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for in a byte-level vocabulary; empty for an id outside of it."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self.backend.id_to_token(token_id) or ""
            try:
                found = bytes(map(_BYTES.__getitem__, token))
            except KeyError:  # an added token, which is plain text
                found = token.encode()
            self._bytes[token_id] = found
        return found

    def plain_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for inside a text, whatever the kind of vocabulary."""
        if self.is_byte_level:
            return self.token_bytes(token_id)
        token = self.backend.id_to_token(token_id) or ""
        if len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode("utf-8", "replace")

    def _token(self, token_id: int | None) -> str:
        return "" if token_id is None else self.backend.id_to_token(token_id) or ""


def load_tokenizer(where: ModelFiles | str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a resolved model, a directory, a GGUF file or converted GGUF metadata.

    Raises:
        TokenizerError: there is none, or it cannot be used.
    """
    if isinstance(where, ModelFiles):
        if where.tokenizer is None:
            raise TokenizerError(
                f"{where.root}: no tokenizer here: give tokenizer=DIRECTORY, or skip_tokenizer_init=True and token ids"
            )
        if where.metadata is not None:
            return Tokenizer.from_gguf(where.metadata)
        where = where.tokenizer
    path = Path(where)
    if path.is_dir():
        return Tokenizer.from_directory(path)
    if not path.is_file():
        raise TokenizerError(f"tokenizer {os.fspath(where)!r}: no such directory or file")
    try:
        metadata = json.loads(path.read_text("utf-8")) if path.suffix == ".json" else read_gguf_header(path).metadata
    except (CheckpointError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TokenizerError(f"tokenizer {os.fspath(where)!r}: {error}") from error
    return Tokenizer.from_gguf(metadata)


@lru_cache(maxsize=8)
def _template(source: str) -> Any:
    """A compiled chat template. Templates come with the model and are not trusted: they run in jinja's sandbox."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **kwargs: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **kwargs)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


class IncrementalDecoder:
    """Text of one sequence as its tokens arrive: never half a character, and all of it equals `Tokenizer.decode`.

    Byte-level vocabularies (GPT-2, Llama 3, Qwen) go through an incremental UTF-8 decoder, a dictionary look-up per
    token. The others decode a short window of tokens again and give what is new.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.is_byte_level else None
        self._window: list[int] = []  # tokens from an earlier clean boundary on
        self._new = 0  # where the tokens after the last clean boundary start in the window
        self._emitted = 0  # characters of the window's text that were returned

    def decode(self, ids: Sequence[int]) -> str:
        """The new text that these tokens complete."""
        if self._utf8 is not None:
            token_bytes, skipped = self._tokenizer.token_bytes, self._skipped
            return self._utf8.decode(b"".join([token_bytes(i) for i in ids if i not in skipped]))
        token = self._tokenizer.backend.id_to_token
        kept = [i for i in ids if i not in self._skipped and token(i) is not None]
        if not kept:
            return ""
        self._window += kept
        if self._is_byte(self._window[-1]):
            return ""  # a run of bytes becomes text as a whole
        text = self._text(self._window)
        if text.endswith("\ufffd"):
            return ""
        new = text[self._emitted :]
        recent = self._window[self._new :]
        shorter = self._text(recent)
        if shorter:  # a window without text would make the next token look like the first one
            self._window, text = recent, shorter
        self._new, self._emitted = len(self._window), len(text)
        return new

    def flush(self) -> str:
        """What is left when no more tokens come: characters that were never completed, as U+FFFD."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        new = self._text(self._window)[self._emitted :]
        self._emitted += len(new)
        return new

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.backend.id_to_token(token_id) or ""
        return len(token) == 6 and token.startswith("<0x")
