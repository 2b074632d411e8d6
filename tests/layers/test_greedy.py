"""The most likely token, found in one pass over the logits and in two."""

from __future__ import annotations

import numpy as np
import pytest

from jaxllm.layers.embedding import _best, _best_of_blocks


@pytest.mark.parametrize("V", [1, 100, 128, 384, 512, 1280])
def test_the_first_of_the_largest(V: int) -> None:
    rng = np.random.default_rng(V)
    values = rng.integers(0, 3, (7, V)).astype(np.float32)  # many alike
    values[0] = -np.inf
    values[1] = 2
    values[2, V // 2] = np.inf
    for find in (_best, _best_of_blocks):
        best, index = find(values)
        np.testing.assert_array_equal(best, values.max(axis=1))
        np.testing.assert_array_equal(index, values.argmax(axis=1))


def test_a_nan_gives_the_last_index() -> None:
    values = np.zeros((2, 512), np.float32)
    values[0, 3] = np.nan
    for find in (_best, _best_of_blocks):
        best, index = find(values)
        assert np.isnan(best[0]) and index.tolist() == [511, 0]
