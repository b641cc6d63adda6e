"""The order of samples: a permutation per epoch, pure, random access, local."""

import pickle

import numpy as np
import pytest

from vilg.data.order import BLOCK_SAMPLES, WINDOW_BLOCKS, Order, uniforms
from vilg.errors import UserError

WINDOW = BLOCK_SAMPLES * WINDOW_BLOCKS
GOLDEN_ORDER = [61947, 75264, 95990, 86755, 87696, 11318]
GOLDEN_UNIFORMS = [0.7191376927395471, 0.21452762913246926, 0.9380729991002944, 0.17931039353966105]


@pytest.mark.parametrize("num", [1, 2, 255, 256, 257, 4095, 4096, 4097, 3 * WINDOW + 1, 3 * WINDOW - 1, 50_003])
def test_each_epoch_visits_every_sample_exactly_once(num: int):
    order = Order(num, seed=3)
    for epoch in range(3):
        samples = order.at(epoch, np.arange(num))
        assert samples.dtype == np.int64
        np.testing.assert_array_equal(np.sort(samples), np.arange(num))


def test_every_place_of_the_short_block_keeps_the_permutation():
    num = 2 * WINDOW + 5 * BLOCK_SAMPLES + 17  # the short block lands in each of the three windows for some epoch
    order = Order(num, seed=0)
    places = {order._short_window(epoch) for epoch in range(30)}
    assert places == {0, 1, 2}
    for epoch in range(30):
        assert np.unique(order.at(epoch, np.arange(num))).size == num


def test_a_position_alone_is_what_the_whole_epoch_says():
    order = Order(9_001, seed=5)
    whole = order.at(7, np.arange(9_001))
    fresh = Order(9_001, seed=5)
    for position in (9_000, 0, 4_096, 4_095, 8_191, 8_192, 17):
        assert fresh.at(7, np.array([position]))[0] == whole[position]


def test_global_indices_run_through_epochs():
    order = Order(10, seed=1)
    expected = np.concatenate([order.at(e, np.arange(10)) for e in range(3)])
    np.testing.assert_array_equal(order(np.arange(30)), expected)
    np.testing.assert_array_equal(order(np.array([25, 3, 14])), expected[[25, 3, 14]])


def test_epochs_and_seeds_differ():
    positions = np.arange(5_000)
    orders = [Order(5_000, seed).at(epoch, positions) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.01


def test_order_is_the_same_on_every_machine_and_version():
    # Golden: a run that resumes after an upgrade must not see other samples.
    np.testing.assert_array_equal(
        Order(100_000, seed=42)(np.array([0, 1, 2, 50_000, 99_999, 100_000])), GOLDEN_ORDER
    )
    np.testing.assert_allclose(uniforms(42, "pair-choices", 1000, 1)[0], GOLDEN_UNIFORMS, rtol=0, atol=0)


def test_a_window_reads_from_few_blocks_and_is_well_mixed():
    order = Order(40 * WINDOW, seed=2)
    samples = order.at(0, np.arange(WINDOW, 2 * WINDOW))
    assert np.unique(samples // BLOCK_SAMPLES).size == WINDOW_BLOCKS
    assert np.unique(samples[:64] // BLOCK_SAMPLES).size > WINDOW_BLOCKS // 2
    assert np.corrcoef(np.arange(WINDOW), np.argsort(samples))[0, 1] < 0.1


def test_order_survives_pickling():
    order = Order(777, seed=9)
    order.at(0, np.arange(5))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(order))(np.arange(777)), order(np.arange(777)))


def test_uniforms_depend_on_the_global_index_only():
    whole = uniforms(1, "x", 100, 50)
    np.testing.assert_array_equal(uniforms(1, "x", 120, 7), whole[20:27])
    assert 0 <= whole.min() and whole.max() < 1
    assert not np.array_equal(whole, uniforms(1, "y", 100, 50))
    assert not np.array_equal(whole, uniforms(2, "x", 100, 50))
    assert abs(uniforms(0, "x", 0, 20_000).mean(0) - 0.5).max() < 0.01


def test_positions_outside_the_epoch_and_empty_data_are_refused():
    with pytest.raises(IndexError):
        Order(10, seed=0).at(0, np.array([10]))
    with pytest.raises(UserError, match="no samples"):
        Order(0, seed=0)
