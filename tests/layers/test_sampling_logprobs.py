"""Logprobs of `layers/sampling.py`: those of the model's own distribution, in order, and only where asked for."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layers.sampling import init_penalties, reset_slots, token_logprobs
from tests.layers.sampling_rows import (
    log_softmax,
    logits_like,
    make_batch,
    run,
)


@pytest.mark.parametrize("vocab", [30, 1000, 20_000])
def test_logprobs_are_of_the_models_own_distribution(vocab):
    logits = logits_like((5, vocab), 3.0)
    state = reset_slots(init_penalties(5, vocab), jnp.arange(5), jnp.arange(5)[:, None], jnp.ones(5, int))
    batch = make_batch(5, bias=[(0, 3, 30.0)], temperature=0.7, top_k=9, repetition=2.0, seed=np.arange(5))
    output, _ = run(logits, batch, state, num_logprobs=20)
    expected = log_softmax(logits)
    token = np.asarray(output.token_R)
    assert token[0] == 3
    chosen = expected[np.arange(5), token]
    np.testing.assert_allclose(output.logprob_R, chosen, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(output.rank_R, 1 + (expected > chosen[:, None]).sum(-1))
    order = np.argsort(-logits, -1, kind="stable")[:, :20]
    np.testing.assert_array_equal(output.top_ids_RX, order)
    np.testing.assert_allclose(output.top_logprobs_RX, np.take_along_axis(expected, order, 1), rtol=1e-5, atol=1e-5)


def test_top_logprobs_break_ties_by_lower_id():
    logits = np.round(logits_like((3, 10_000), 0.3), 1)
    output, _ = run(logits, make_batch(3), num_logprobs=20)
    np.testing.assert_array_equal(output.top_ids_RX, np.argsort(-logits, -1, kind="stable")[:, :20])


def test_token_logprobs_of_given_tokens():
    logits = logits_like((4, 700), 2.0)
    given = jnp.asarray([0, 699, 128, 127])
    output = token_logprobs(jnp.asarray(logits), given, 700, num_logprobs=3)
    np.testing.assert_allclose(output.logprob_R, log_softmax(logits)[np.arange(4), given], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(output.token_R, given)


def test_no_logprobs_leave_empty_fields():
    output, _ = run(logits_like((4, 700), 2.0), make_batch(4))
    assert output.top_ids_RX.shape == output.top_logprobs_RX.shape == (4, 0)
    assert not np.asarray(output.logprob_R).any() and not np.asarray(output.rank_R).any()
