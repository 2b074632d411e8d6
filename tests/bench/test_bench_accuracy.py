"""The cost of quantisation as it is reported: nothing for the model itself, and in order for what rounds more."""

from __future__ import annotations

import numpy as np
import pytest

from jaxllm.bench.accuracy import Kind, Logits, costs
from tests.tiny_llm import MODEL, VOCAB, full_logits, log_softmax


def test_positions_see_their_own_text_only() -> None:
    tokens = np.random.default_rng(0).integers(3, VOCAB, (2, 12))
    found = Logits(str(MODEL), Kind("exact"), length=12, rows=24)(tokens.reshape(-1))
    wanted = np.concatenate([log_softmax(part) for part in full_logits(tokens.tolist())])
    np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-3)


def test_costs() -> None:
    exact, rough = Kind("exact"), Kind("fp8", "fp8")
    tokens = np.random.default_rng(1).integers(3, VOCAB, (4, 12))
    first, second = costs(str(MODEL), [rough], tokens, reference=exact, rows=24)
    assert first.kind == exact and first.kl == 0 and first.agreement == 1
    assert 1e-5 < second.kl < second.worst_kl < 5 and second.agreement < 1
    assert 1 < first.perplexity < np.inf and first.perplexity != second.perplexity
    with pytest.raises(ValueError, match="4 texts of 12 tokens do not fill steps of 25 positions"):
        costs(str(MODEL), [], tokens, reference=exact, rows=25)
