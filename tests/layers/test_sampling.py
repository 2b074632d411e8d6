"""layers/sampling against plain numpy (which sorts), by distribution, and for independence of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

from jaxllm.layers import draw, sampling
from jaxllm.layers.sampling import PenaltyState, SamplingBatch, init_penalties, reset_slots, sample, token_logprobs

INT_FIELDS = {"top_k", "position", "slot", "bias_row", "bias_token"}


def make_batch(rows, bias=(), bias_capacity=None, **values):
    """A SamplingBatch of neutral rows, with `values` (scalars or one per row) put in."""
    capacity = len(bias) if bias_capacity is None else bias_capacity
    pad = capacity - len(bias)
    fields = dict.fromkeys(("temperature", "top_k", "min_p", "presence", "frequency", "seed"), 0)
    fields |= {"top_p": 1.0, "repetition": 1.0, "position": 7, "slot": np.arange(rows)} | values
    fields = {name: np.broadcast_to(value, (rows,)) for name, value in fields.items()}
    fields["bias_row"] = np.array([row for row, _, _ in bias] + [rows] * pad)
    fields["bias_token"] = np.array([token for _, token, _ in bias] + [0] * pad)
    fields["bias_value"] = np.array([value for _, _, value in bias] + [1.0] * pad)
    dtype = {name: jnp.int32 if name in INT_FIELDS else jnp.float32 for name in fields} | {"seed": jnp.uint32}
    return SamplingBatch(**{name: jnp.asarray(value, dtype[name]) for name, value in fields.items()})


@functools.cache
def compiled(vocab_size, penalties, num_logprobs):
    return jax.jit(functools.partial(sample, vocab_size=vocab_size, penalties=penalties, num_logprobs=num_logprobs))


def run(logits, batch, state=None, vocab_size=None, num_logprobs=0, penalties=None):
    penalties = state is not None if penalties is None else penalties
    logits = jnp.asarray(logits)
    return compiled(vocab_size or logits.shape[1], penalties, num_logprobs)(logits, batch, state)


def tokens(logits, batch, **kw):
    return np.asarray(run(logits, batch, **kw)[0].token_R)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference_probs(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution of one row, the plain way: sort, cut, renormalise. Ties with the last kept token stay."""
    p = np.exp(log_softmax(np.asarray(logits, np.float64) / temperature))
    if top_k and top_k < len(p):
        p = np.where(p >= np.sort(p)[::-1][top_k - 1], p, 0)
    p /= p.sum()
    if top_p < 1:
        ordered = np.sort(p)[::-1]
        last = min(np.searchsorted(np.cumsum(ordered), top_p * (1 - 1e-7)), len(p) - 1)
        p = np.where(p >= ordered[last], p, 0)
    p = np.where(p >= min_p * p.max() * (1 - 1e-7), p, 0)
    return p / p.sum()


def draw_many(row, count, vocab_size=None, **values):
    """`count` tokens drawn from one row of logits, with other seeds, 50 rows a call."""
    row = np.asarray(row, np.float32)
    drawn = []
    for start in range(0, count, 50):
        batch = make_batch(50, seed=np.arange(start, start + 50), **values)
        drawn.append(tokens(np.broadcast_to(row, (50, len(row))), batch, vocab_size=vocab_size))
    return np.concatenate(drawn)


def kept_by_device(logits, temperature, top_k, top_p):
    """The set that the device's threshold keeps, per row: the filter itself, without a draw."""

    def mask(x, temperature, top_k, top_p):
        blocks = sampling._in_blocks(x, x.shape[1])
        top = blocks.max((1, 2))
        e = jnp.exp((blocks - top[:, None, None]) / temperature[:, None, None])
        threshold = draw._top_k_top_p(e, draw._weight_scale(e), top_k, top_p)
        kept = jax.lax.bitcast_convert_type(e, jnp.int32) >= threshold[:, None, None]
        return kept.reshape(x.shape[0], -1)[:, : x.shape[1]]

    rows = len(logits)
    args = (
        jnp.asarray(logits, jnp.float32),
        jnp.full((rows,), temperature, jnp.float32),
        jnp.full((rows,), top_k, jnp.int32),
        jnp.full((rows,), top_p, jnp.float32),
    )
    return np.asarray(jax.jit(mask)(*args))


def logits_like(shape, spread, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * spread).astype(np.float32)


# Greedy


@pytest.mark.parametrize("vocab", [5, 128, 1000, 49152])
def test_greedy_is_argmax_with_ties_to_the_lower_id(vocab):
    logits = np.round(logits_like((16, vocab), 1.0), 1)  # many ties
    np.testing.assert_array_equal(tokens(logits, make_batch(16)), logits.argmax(-1))


def test_greedy_and_sampled_rows_share_a_batch():
    logits = logits_like((12, 3000), 2.0)
    temperature = np.arange(12) % 2 * 0.7
    got = tokens(logits, make_batch(12, temperature=temperature, seed=np.arange(12)))
    np.testing.assert_array_equal(got[::2], logits.argmax(-1)[::2])
    assert (got[1::2] != logits.argmax(-1)[1::2]).any()


def test_top_k_one_is_greedy_even_when_tokens_nearly_tie():
    logits = np.zeros((4, 500), np.float32)
    logits[:, 77] = 1e-30
    assert set(tokens(logits, make_batch(4, temperature=9.0, top_k=1, seed=np.arange(4)))) == {77}


# Filters: the kept set against a sort


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 10.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(1, 1), (5, 1), (50, 1), (300, 1), (4000, 1), (0, 0.1), (0, 0.5), (0, 0.9), (0, 0.999), (50, 0.9), (2000, 0.5)],
)
def test_kept_set_equals_the_sorted_reference(spread, top_k, top_p):
    """12,000 tokens are more than the candidate blocks, so both the near and the far search run.

    The device works in f32 and in integer weights: tokens lighter than 2**-32 of the likeliest are never kept,
    probabilities that differ by less than 1e-6 of themselves tie, and shares are p to 1e-5.
    """
    logits = logits_like((8, 12_000), spread, seed=3)
    kept = kept_by_device(logits, 0.8, top_k, top_p)
    for row in range(8):
        p = np.exp(log_softmax(logits[row].astype(np.float64) / 0.8))
        ordered = np.sort(p)[::-1]
        heavy = p > ordered[0] * 2.0**-32 * (1 + 1e-5)
        least = p[kept[row]].min()
        np.testing.assert_array_equal(kept[row] & heavy, (p >= least) & heavy)  # nothing likelier was left out
        clearly_above = p > least * (1 + 1e-6)
        if top_k and top_k < len(p):
            limit = ordered[top_k - 1]
            assert clearly_above.sum() < top_k
            if top_p == 1:
                np.testing.assert_array_equal(kept[row][heavy], (p >= min(limit, least))[heavy])
                assert least <= limit * (1 + 1e-6) or limit < ordered[0] * 2.0**-31
            p = np.where(p >= limit, p, 0)
            p /= p.sum()
        if top_p < 1:
            assert p[kept[row]].sum() >= top_p - 1e-5
            assert p[clearly_above].sum() < top_p + 1e-5


def test_near_and_far_rows_in_one_batch_keep_what_they_keep_alone():
    logits = np.concatenate([logits_like((3, 12_000), 8.0), logits_like((3, 12_000), 0.2)])
    together = kept_by_device(logits, 1.0, 0, 0.9)
    for row in range(6):
        np.testing.assert_array_equal(together[row], kept_by_device(logits[row : row + 1], 1.0, 0, 0.9)[0])


def test_a_top_k_larger_than_the_candidates_weighs_all_it_keeps_before_top_p():
    """A flat row: top_k 8000 then top_p 0.5 keeps 4000 tokens; weighing candidates alone would keep fewer."""
    logits = np.tile(np.linspace(0, 1e-3, 12_000, dtype=np.float32), (2, 1))
    assert abs(kept_by_device(logits, 1.0, 8000, 0.5)[0].sum() - 4000) < 12


def test_ties_with_the_threshold_are_all_kept():
    logits = np.zeros((1, 700), np.float32)
    logits[0, :3] = 2.0
    assert kept_by_device(logits, 1.0, 2, 1.0)[0].sum() == 3
    assert kept_by_device(logits, 1.0, 4, 1.0)[0].sum() == 700
    assert kept_by_device(logits, 1.0, 0, 0.01)[0].sum() == 3


def test_min_p_draws_only_what_the_reference_keeps():
    row = logits_like((1000,), 2.0)
    drawn = draw_many(row, 1000, temperature=1.5, min_p=0.1)
    allowed = np.flatnonzero(reference_probs(row, 1.5, min_p=0.1))
    assert set(drawn) <= set(allowed) and len(set(drawn)) > len(allowed) // 2


# Distribution


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 6},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.3, "min_p": 0.2},
        {"temperature": 1.2, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=lambda values: "-".join(values),
)
def test_draws_follow_the_distribution(values):
    """Chi-square over 20 tokens that lie spread over several blocks of a vocabulary of 700."""
    row = np.full(700, -np.inf, np.float32)
    live = np.arange(20) * 36 + 3
    row[live] = logits_like((20,), 1.2, seed=5)
    count = 10_000
    drawn = draw_many(row, count, **values)
    expected = reference_probs(row, **values) * count
    observed = np.bincount(drawn, minlength=700)
    assert observed[expected == 0].sum() == 0
    live = expected > 0
    chi2 = ((observed - expected)[live] ** 2 / expected[live]).sum()
    freedom = live.sum() - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 4, chi2


def test_a_flat_distribution_is_drawn_evenly_over_the_whole_vocabulary():
    drawn = draw_many(np.zeros(5000), 5000, vocab_size=4900, temperature=1.0)
    assert drawn.min() >= 0 and drawn.max() < 4900
    observed = np.histogram(drawn, bins=20, range=(0, 4900))[0]
    assert ((observed - 250) ** 2 / 250).sum() < 19 + 4 * np.sqrt(38)


def test_a_very_peaked_distribution_gives_its_peak():
    row = np.full(2000, -50.0)
    row[1234] = 1000.0
    assert set(draw_many(row, 100, temperature=1.0)) == {1234}
    assert set(draw_many(row, 100, temperature=1e-30, top_p=0.5)) == {1234}


def test_positions_of_one_sequence_get_independent_draws():
    row = np.zeros((50, 64), np.float32)
    drawn = np.concatenate(
        [
            tokens(row, make_batch(50, temperature=1.0, seed=11, position=np.arange(start, start + 50)))
            for start in range(0, 3200, 50)
        ]
    )
    observed = np.bincount(drawn, minlength=64)
    assert ((observed - 50) ** 2 / 50).sum() < 63 + 4 * np.sqrt(126)
    pairs = np.corrcoef(drawn[:-1], drawn[1:])[0, 1]
    assert abs(pairs) < 0.07


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("vocab", [5, 300, 49152, 262144])
def test_weights_use_31_bits_and_never_overflow(vocab, spread):
    logits = logits_like((3, vocab), spread)
    logits[2, 1:] = -np.inf
    blocks = sampling._in_blocks(jnp.asarray(logits), vocab)
    e = jnp.exp(blocks - blocks.max((1, 2), keepdims=True))
    weights = np.asarray(draw._weights(e, draw._weight_scale(e), jnp.zeros(3, jnp.int32)), np.int64)
    total = weights.sum((1, 2))
    # 5 % is lost where half a unit per padded token is many units of the first, safe weighing.
    assert (weights >= 0).all() and (total < 2**31).all() and (total > 0.9 * 2**31).all()
    exact = np.asarray(e, np.float64)
    exact *= (total / exact.sum((1, 2)))[:, None, None]
    assert np.abs(weights - exact).max() < 1 + 1e-6 * 2**31 * 0.5


def test_multiply_high_equals_wide_arithmetic():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 1 << 32, (2, 10_000), dtype=np.uint64)
    got = draw._multiply_high(jnp.asarray(a, jnp.uint32), jnp.asarray(b, jnp.uint32))
    np.testing.assert_array_equal(np.asarray(got, np.uint64), (a * b) >> 32)


# Independence


@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0])
@pytest.mark.parametrize(
    "values",
    [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 3000, "top_p": 0.6}, {"min_p": 0.02}],
    ids=lambda values: "-".join(values) or "temperature",
)
def test_a_row_gives_the_same_token_whatever_the_batch(spread, values):
    """Bit for bit: alone, at another row, among 2 to 64 rows, beside greedy, flat, peaked and broken neighbours."""
    random = np.random.default_rng(1)
    vocab = 20_000
    mine = logits_like((6, vocab), spread, seed=2)
    params = {"temperature": 0.9, "seed": 5} | values
    alone = [tokens(mine[i : i + 1], make_batch(1, position=i, **params))[0] for i in range(6)]
    for rows in (2, 7, 16, 64):
        logits = logits_like((rows, vocab), 3.0, seed=rows)
        logits[random.integers(rows)] = np.nan
        logits[random.integers(rows)] = 0.0
        place = random.permutation(rows)[: min(6, rows)]
        settings = {"temperature": random.choice([0.0, 1.0], rows), "top_k": random.choice([0, 5, 9999], rows)}
        settings |= {"top_p": random.choice([0.3, 1.0], rows), "min_p": np.zeros(rows), "seed": np.arange(rows) + 90}
        settings |= {"position": np.arange(rows)}
        neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        for i, row in enumerate(place):
            logits[row] = mine[i]
            for name, value in (neutral | params | {"position": i}).items():
                settings[name][row] = value
        got = tokens(logits, make_batch(rows, **settings))
        assert [got[row] for row in place] == [alone[i] for i in range(len(place))]


def test_groups_of_rows_equal_one_batch(monkeypatch):
    """The CPU's row groups, with bias and penalties, give what the ungrouped function gives."""
    logits = logits_like((12, 6000), 2.0)
    bias = [(row, 17 * row, 8.0) for row in range(12)]
    state = reset_slots(
        init_penalties(12, 6000), jnp.arange(12), jnp.asarray(logits.argsort(-1)[:, -4:], jnp.int32), jnp.full((12,), 2)
    )
    values = {"temperature": np.arange(12) % 3 * 0.6, "top_p": 0.9, "seed": np.arange(12), "slot": np.arange(12)[::-1]}
    batch = make_batch(12, bias=bias, repetition=1.3, presence=0.4, **values)
    outputs = []
    for elements in (1, 6000 * 4, 1 << 30):
        monkeypatch.setattr(sampling, "_GROUP_ELEMENTS", elements)
        function = jax.jit(functools.partial(sample, vocab_size=6000, penalties=True, num_logprobs=5))
        outputs.append(jax.tree.leaves(function(jnp.asarray(logits), batch, state)))
    for other in outputs[1:]:
        for a, b in zip(outputs[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6) if a.dtype == jnp.float32 else np.testing.assert_array_equal(
                a, b
            )


# Penalties, bias, bans


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


# Broken and padded logits


@pytest.mark.parametrize("values", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.5}])
def test_broken_rows_give_a_token_and_spare_the_others(values):
    logits = logits_like((6, 9000), 2.0)
    good = tokens(logits, make_batch(6, seed=np.arange(6), **values))
    logits[1], logits[2], logits[3, ::2], logits[4, 8] = np.nan, -np.inf, np.nan, np.inf
    output, _ = run(logits, make_batch(6, seed=np.arange(6), **values), num_logprobs=20)
    got = np.asarray(output.token_R)
    assert (got[[0, 5]] == good[[0, 5]]).all()
    assert got[1] == got[2] == 0 and got[3] % 2 == 1 and got[4] == 8
    assert ((got >= 0) & (got < 9000)).all()
    assert np.isfinite(np.asarray(output.logprob_R)[[0, 3, 4, 5]]).all()


@pytest.mark.parametrize("vocab_size", [1, 100, 127, 129, 333])
def test_padding_is_never_sampled_or_reported(vocab_size):
    logits = logits_like((8, 400), 1.0)
    logits[:, vocab_size:] = 100.0
    for temperature in (0.0, 5.0):
        batch = make_batch(8, temperature=temperature, top_p=0.99, seed=np.arange(8))
        output, _ = run(logits, batch, vocab_size=vocab_size, num_logprobs=1)
        assert (np.asarray(output.token_R) < vocab_size).all() and (np.asarray(output.top_ids_RX) < vocab_size).all()
    np.testing.assert_array_equal(
        tokens(logits, make_batch(8), vocab_size=vocab_size), logits[:, :vocab_size].argmax(-1)
    )


def test_bfloat16_logits_are_sampled_as_float32():
    logits = jnp.asarray(logits_like((4, 2000), 2.0), jnp.bfloat16)
    batch = make_batch(4, temperature=1.0, seed=np.arange(4))
    np.testing.assert_array_equal(tokens(logits, batch), tokens(logits.astype(jnp.float32), batch))


# Logprobs


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


# What the program may not contain


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, jax_core.Jaxpr | jax_core.ClosedJaxpr)
        ):
            if isinstance(value, jax_core.ClosedJaxpr):
                yield from equations(value.jaxpr)
            elif isinstance(value, jax_core.Jaxpr):
                yield from equations(value)


def test_no_sort_over_the_vocabulary_and_few_random_bits():
    vocab = 20_000
    function = functools.partial(sample, vocab_size=vocab, penalties=True, num_logprobs=20)
    jaxpr = jax.make_jaxpr(function)(jnp.zeros((16, vocab)), make_batch(16, bias_capacity=8), init_penalties(16, vocab))
    found = {"top_k": 0, "random_bits": 0, "while": 0}
    for equation in equations(jaxpr.jaxpr):
        name = equation.primitive.name
        found[name] = found.get(name, 0) + 1
        if name in ("sort", "top_k", "approx_top_k", "cumsum"):
            # top_k above 16 entries is a sort on a GPU: 2,560 is 20 blocks of 128.
            assert equation.invars[0].aval.shape[-1] <= 20 * 128, equation
        if name in ("random_bits", "threefry2x32"):
            assert max(equation.outvars[0].aval.size, equation.invars[0].aval.size) < vocab, equation
    assert all(found.values()), found  # the walk does reach into the branches


def test_one_compilation_serves_every_request():
    function = jax.jit(functools.partial(sample, vocab_size=500, penalties=False, num_logprobs=0))
    for values in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.2, "min_p": 0.3}):
        function(jnp.zeros((3, 500)), make_batch(3, **values), None)
    assert function._cache_size() == 1
