"""Structured outputs: which tokens a grammar allows next, as bit masks that the sampler applies on the device.

llguidance walks a grammar over the vocabulary. Compiling happens in the thread that submits a request, after a process
of its own has found the grammar good (`grammar_check`); the step loop only asks for masks and tells tokens.

The mask of a token depends on the token before it, which the overlap scheduler knows one step late. A constrained
sequence therefore waits for each of its tokens (`Sequence.wait_for_token`): beside other sequences it takes every
second step, and these lose nothing; where all are constrained the steps follow each other without overlap.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.engine.grammar_check import LIMITS, GrammarChecker, GrammarError, make_grammar
from jaxllm.engine.request import Request, Sequence
from jaxllm.engine.step import LaneSteps, Step
from jaxllm.structured import StructuredOutputs

if TYPE_CHECKING:
    from jaxllm.engine.tokenizer import Tokenizer

_KEPT = 128  # compiled grammars


class GrammarCompiler:
    """Compiles constraints for one tokenizer, and keeps the last ones. Any thread may call it.

    end_ids: the model's end tokens, all allowed where a text may end.
    """

    def __init__(self, tokenizer: Tokenizer | None, end_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = tuple(end_ids)
        self._checker = GrammarChecker()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_words(self) -> int:
        """Words of 32 bits in a mask."""
        assert self._tokenizer is not None
        return -(-self._tokenizer.vocab_size // 32)

    def compile(self, wanted: StructuredOutputs, end_id: int | None = None) -> Guide:
        """A guide at the start of a text. end_id: replaces the model's end tokens. Raises GrammarError."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise GrammarError("structured outputs need a tokenizer, and this engine has none")
        ends = self._end_ids if end_id is None else (end_id,)
        if not self._end_ids:
            raise GrammarError("structured outputs need an end token, and this model has none")
        if wanted.begin_after is not None and wanted.begin_after >= tokenizer.vocab_size:
            raise GrammarError(f"begin_after = {wanted.begin_after} is not in the vocabulary")
        source = wanted.source()
        with self._lock:
            found = self._compiled.get(source)
            if found is not None:
                self._compiled.move_to_end(source)
        if found is None:
            found = self._compile(*source)
            with self._lock:
                self._compiled[source] = found
                while len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        matcher, first = found
        return Guide(matcher, first, wanted.begin_after, self._end_ids[0], ends)

    def _compile(self, kind: str, text: str) -> tuple[Any, np.ndarray]:
        """(a matcher at its start, its first mask)."""
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise GrammarError('structured outputs need llguidance: pip install "jaxllm[serve]"') from None
        self._checker.check(kind, text)
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer, self._end_ids)
        limits = LLParserLimits(**LIMITS)
        matcher = LLMatcher(self._vocabulary, make_grammar(kind, text), log_level=0, limits=limits)
        first = np.zeros(self.num_words, np.int32)
        _fill(matcher, first)
        return matcher, first

    def close(self) -> None:
        """Ends the process that checks grammars."""
        self._checker.close()


class Guide:
    """The grammar of one sequence, at the place that its tokens have reached."""

    __slots__ = ("_at_start", "_begin_after", "_end", "_ended", "_ends", "_first", "_matcher", "_problem")

    def __init__(
        self, matcher: Any, first: np.ndarray, begin_after: int | None, end: int, ends: tuple[int, ...]
    ) -> None:
        self._matcher, self._first = matcher, first
        self._begin_after = begin_after
        self._end, self._ends = end, ends  # llguidance's only end token, and those of the request
        self._at_start = True  # the matcher is shared until the first token
        self._ended = False
        self._problem: GrammarError | None = None

    def copy(self) -> Guide:
        """One for another sequence, from the start of the text."""
        return Guide(self._matcher, self._first, self._begin_after, self._end, self._ends)

    def fill(self, words: np.ndarray) -> None:
        """Writes the mask of the next token, bit 1 = allowed, into int32 words of the vocabulary and perhaps more.

        What goes wrong is told when the token is accepted.
        """
        if self._begin_after is not None or self._problem is not None:
            words[:] = -1
            return
        words[:] = 0
        size = len(self._first)
        if self._at_start:
            words[:size] = self._first
        elif not self._ended:
            try:
                _fill(self._matcher, words[:size])
            except GrammarError as error:
                self._problem = error
                words[:] = -1
                return
        bits = words.view(np.uint32)
        place, bit = self._end >> 5, np.uint32(1 << (self._end & 31))
        if self._ended or bits[place] & bit:
            bits[place] &= ~bit
            for end in self._ends:
                bits[end >> 5] |= np.uint32(1 << (end & 31))

    def accept(self, token: int) -> None:
        """Takes the next token. Raises GrammarError when it cannot follow, or its mask could not be made."""
        if self._problem is not None:
            raise self._problem
        if self._begin_after is not None:
            if token == self._begin_after:
                self._begin_after = None
            return
        if self._ended:
            return
        if self._at_start:
            self._matcher, self._at_start = self._matcher.deep_copy(), False
        if token in self._ends:
            self._ended = True
        elif not self._matcher.consume_token(token):
            # It was allowed, unless biases and bad words left nothing; or the limits are reached.
            reason = self._matcher.get_error().partition("\n")[0][:200]
            raise GrammarError(f"structured outputs: the text cannot go on in this form ({reason})")
        elif self._matcher.is_stopped():
            self._ended = True


class Guides:
    """The guides of the engine's constrained sequences; the step loop's side. See the module."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._guides: dict[Sequence, Guide] = {}
        self._masked: set[int] = set()  # slots that have a mask on the device

    def prepare(self, request: Request) -> Guide | None:
        """Compiles the constraint of a request, in any thread. Raises GrammarError."""
        params: Any = request.params
        wanted = getattr(params, "structured_outputs", None)
        if wanted is None:
            return None
        guide = self._compiler.compile(wanted, params.end_id)
        for seq in request.sequences:
            seq.wait_for_token = True
        return guide

    def open(self, request: Request, guide: Guide) -> None:
        for seq in request.sequences:
            self._guides[seq] = guide.copy()

    def close(self, request: Request) -> None:
        if self._guides:
            for seq in request.sequences:
                self._guides.pop(seq, None)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._guides

    def accept(self, seq: Sequence, token: int) -> None:
        """Tells the guide of a sequence, if it has one, its new token. Raises GrammarError."""
        guide = self._guides.get(seq)
        if guide is not None:
            guide.accept(token)

    def masks(self, step: Step | LaneSteps, num_words: int) -> tuple[list[int], np.ndarray] | None:
        """(slots, their int32 masks [slots, num_words]) that are new with a step; None when nothing is."""
        if not self._guides and not self._masked:
            return None
        stale = [seq.slot for seq in step.started if seq.slot in self._masked and seq not in self._guides]
        self._masked.difference_update(stale)
        rows = [seq for seq in step.decodes if seq in self._guides]
        rows += [chunk.seq for chunk in step.prefills if chunk.samples and chunk.seq in self._guides]
        if not rows and not stale:
            return None
        words = np.full((len(stale) + len(rows), num_words), -1, np.int32)
        for row, seq in enumerate(rows, len(stale)):
            self._guides[seq].fill(words[row])
            self._masked.add(seq.slot)
        return stale + [seq.slot for seq in rows], words


def _fill(matcher: Any, words: np.ndarray) -> None:
    """llguidance's mask for the next token. Raises GrammarError when it cannot be computed within the limits."""
    if not matcher.is_error():
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    if matcher.is_error():
        reason = matcher.get_error().partition("\n")[0][:200]
        raise GrammarError(f"structured outputs: the form is too complex ({reason})")


def _vocabulary(tokenizer: Any, ends: tuple[int, ...]) -> Any:
    """llguidance's view of a tokenizer: the bytes of every token, and which are special."""
    from llguidance import LLTokenizer, TokenizerWrapper

    special = tokenizer.special_ids | {end for end in ends if end < tokenizer.vocab_size}

    class Described(SimpleNamespace):
        def __call__(self, text: bytes) -> list[int]:
            found: list[int] = tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False)
            return found

    described = Described(
        eos_token_id=ends[0],
        bos_token_id=tokenizer.bos_token_id,
        tokens=[tokenizer.plain_bytes(token) for token in range(tokenizer.vocab_size)],
        special_token_ids=sorted(special),
    )
    return LLTokenizer(TokenizerWrapper(described), n_vocab=tokenizer.vocab_size)
