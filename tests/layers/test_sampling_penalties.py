"""Penalties, bias and bans of `layers/sampling.py`: against the formulas, and against transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layers import sampling
from jaxllm.layers.sampling import PenaltyState, init_penalties, reset_slots
from tests.layers.sampling_rows import kept_by_device, logits_like, make_batch, run, tokens


def reference_penalties(logits, prompt, output, repetition, presence, frequency):
    logits = np.array(logits, np.float64)
    for token in set(prompt) | set(output):
        logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
    for token in set(output):
        logits[token] -= presence + frequency * output.count(token)
    return logits


def penalised_by_device(logits, batch, state):
    out = sampling._penalise(sampling._in_blocks(jnp.asarray(logits), logits.shape[1]), batch, state)
    return np.asarray(out).reshape(len(logits), -1)[:, : logits.shape[1]]


def test_penalties_equal_the_formulas_over_a_generation():
    """Prompt and outputs come from reset_slots, further outputs from sample itself, slots in another order."""
    vocab, random = 300, np.random.default_rng(4)
    prompts = [[1, 2, 2, 9], [299, 0], [5]]
    outputs = [[2, 7, 7, 7], [], [5, 5]]
    known = [a + b for a, b in zip(prompts, outputs, strict=True)]
    table = np.full((4, 10), -1)
    for i, row in enumerate(known):
        table[i, : len(row)] = row
    table[3, :3] = 8  # a padding row with a slot out of range
    state = PenaltyState(jnp.full((5, vocab), 7, jnp.int16))  # what an earlier sequence left behind
    state = reset_slots(
        state, jnp.asarray([4, 0, 2, 5]), jnp.asarray(table), jnp.asarray([len(p) for p in prompts] + [0])
    )
    values = {"repetition": [1.5, 1.0, 0.7], "presence": [0.3, 1.0, -0.5], "frequency": [0.2, 0.0, 2.0]}
    for step in range(5):
        logits = random.normal(size=(3, vocab)).astype(np.float32) * 2
        batch = make_batch(3, slot=[4, 0, 2], position=step, temperature=[0, 1, 0], **values)
        expected = [
            reference_penalties(logits[i], prompts[i], outputs[i], *(values[name][i] for name in values))
            for i in range(3)
        ]
        np.testing.assert_allclose(penalised_by_device(logits, batch, state), expected, rtol=2e-6, atol=1e-6)
        output, state = run(logits, batch, state)
        assert output.token_R[0] == expected[0].argmax() and output.token_R[2] == expected[2].argmax()
        for i in range(3):
            outputs[i].append(int(output.token_R[i]))
    assert (np.asarray(state.seen_WV)[[1, 3]] == 7).all()  # slots of nobody in the batch stay as they were


def test_repetition_penalty_equals_transformers():
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor(1.7)
    logits = logits_like((3, 200), 2.0)
    seen = np.random.default_rng(0).integers(0, 200, (3, 40))
    state = reset_slots(init_penalties(3, 200), jnp.arange(3), jnp.asarray(seen), jnp.asarray([40, 0, 13]))
    got = penalised_by_device(logits, make_batch(3, repetition=1.7), state)
    np.testing.assert_allclose(got, process(torch.tensor(seen), torch.tensor(logits)).numpy(), rtol=1e-6)


@pytest.mark.parametrize("values", [{"top_k": 30}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.7}])
def test_kept_sets_equal_transformers(values):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = logits_like((6, 8000), 2.0, seed=8)
    scores = torch.tensor(logits)
    for name, warper in (
        ("top_k", transformers.TopKLogitsWarper),
        ("top_p", transformers.TopPLogitsWarper),
        ("min_p", transformers.MinPLogitsWarper),
    ):
        if name in values:
            scores = warper(values[name])(None, scores)
    expected = torch.isfinite(scores).numpy()
    kept = kept_by_device(logits, 1.0, values.get("top_k", 0), values.get("top_p", 1.0))
    if "min_p" in values:
        kept = kept & (np.exp(logits - logits.max(-1, keepdims=True)) >= values["min_p"])
    assert (kept != expected).sum() <= 1


def test_neutral_penalties_change_nothing():
    logits = logits_like((4, 3000), 2.0)
    batch = make_batch(4, temperature=0.8, seed=np.arange(4), top_p=0.9)
    state = reset_slots(init_penalties(4, 3000), jnp.arange(4), jnp.arange(40).reshape(4, 10), jnp.full((4,), 5))
    np.testing.assert_array_equal(tokens(logits, batch, state=state), tokens(logits, batch))


def test_counts_saturate_instead_of_wrapping():
    state = PenaltyState(jnp.full((1, 10), 2 * sampling._MAX_COUNT, jnp.int16))
    _, state = run(np.eye(1, 10, 3), make_batch(1), state)
    np.testing.assert_array_equal(state.seen_WV, np.full((1, 10), 2 * sampling._MAX_COUNT))
    many = jnp.full((1, 40_000), 3)
    assert reset_slots(state, jnp.zeros(1, int), many, jnp.zeros(1, int)).seen_WV[0, 3] == 2 * sampling._MAX_COUNT


def test_ignored_rows_leave_the_state_alone():
    before = jnp.zeros((2, 10), jnp.int16)
    for out_of_range in (2, 1 << 30, -1):
        _, state = run(np.eye(1, 10, 3), make_batch(1, slot=out_of_range), PenaltyState(before), penalties=False)
        np.testing.assert_array_equal(state.seen_WV, before)


def test_penalties_need_a_state():
    with pytest.raises(ValueError, match="init_penalties"):
        run(np.zeros((1, 10)), make_batch(1), penalties=True)


def test_bias_moves_bans_and_ignores_padding():
    logits = np.zeros((20, 30_000), np.float32)  # enough for several groups of rows
    bias = [(row, 100 + row, 5.0) for row in range(20)] + [(3, 103, -5.0), (3, 9, 1.0), (5, 105, -np.inf), (5, 0, 1.0)]
    bias += [(7, 29_999, 9.0), (8, 30_000, 99.0), (9, -1, 99.0), (-1, 5, 99.0), (20, 5, 99.0)]
    expected = 100 + np.arange(20)
    expected[[3, 5, 7]] = 9, 0, 29_999
    np.testing.assert_array_equal(tokens(logits, make_batch(20, bias=bias, bias_capacity=64)), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_never_come(temperature):
    """All but one token banned, by the logits or by the bias, in presence of NaN and inf at banned tokens."""
    logits = np.full((8, 200), -np.inf, np.float32)
    logits[:, 150] = -3.0
    batch = make_batch(8, temperature=temperature, top_p=0.5, seed=np.arange(8))
    assert set(tokens(logits, batch)) == {150}
    logits = np.zeros((8, 200), np.float32)
    logits[:, 5], logits[:, 6] = np.inf, np.nan
    bans = [(row, token, -np.inf) for row in range(8) for token in range(200) if token != 150]
    batch = make_batch(8, bias=bans, temperature=temperature, seed=np.arange(8))
    assert set(tokens(logits, batch)) == {150}
