"""layers/sampling against plain numpy (which sorts), by distribution, and for independence of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

from jaxllm.layers import draw, sampling
from jaxllm.layers.sampling import init_penalties, reset_slots, sample
from tests.layers.sampling_rows import (
    draw_many,
    kept_by_device,
    log_softmax,
    logits_like,
    make_batch,
    reference_probs,
    run,
    tokens,
)

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
