"""Physical values to [-1, 1] and back."""

import numpy as np
import pytest

from meanflow_ros.core.normalize import Normalizer

LOW, HIGH = [-0.37, 12.9, -1e-3], [0.11, 13.7, 4.2e3]


def test_the_ends_and_the_middle_map_to_minus_one_zero_and_one():
    normalizer = Normalizer(low=LOW, high=HIGH)
    middle = (np.array(LOW) + HIGH) / 2
    mapped = normalizer.apply(np.array([LOW, middle, HIGH]))
    np.testing.assert_allclose(mapped, [[-1] * 3, [0] * 3, [1] * 3], atol=1e-12)


def test_a_quarter_of_the_range_is_minus_a_half():
    normalizer = Normalizer(low=[-0.37], high=[0.11])
    np.testing.assert_allclose(normalizer.apply(np.array([-0.25])), [-0.5], atol=1e-12)
    np.testing.assert_allclose(normalizer.invert(np.array([-0.5])), [-0.25], atol=1e-12)


def test_invert_undoes_apply():
    normalizer = Normalizer(low=LOW, high=HIGH)
    values = np.random.default_rng(0).uniform(LOW, HIGH, (5, 7, 3))
    np.testing.assert_allclose(normalizer.invert(normalizer.apply(values)), values, rtol=1e-9)


def test_values_beyond_the_range_are_clipped():
    normalizer = Normalizer(low=LOW, high=HIGH)
    np.testing.assert_array_equal(normalizer.apply(np.array([-1e9, 99.0, 1e9])), [-1, 1, 1])


def test_fit_takes_the_1_and_99_percent_quantiles():
    values = np.linspace([-3.3, 10], [7.1, 90], 1001)
    fitted = Normalizer.fit(values[np.random.default_rng(1).permutation(1001)])
    np.testing.assert_allclose(fitted.low, [-3.3 + 0.104, 10.8])
    np.testing.assert_allclose(fitted.high, [7.1 - 0.104, 89.2])


def test_an_outlier_does_not_squeeze_the_rest():
    values = np.linspace(0.2, 0.7, 1000)[:, None]
    values[0] = 1e6
    assert Normalizer.fit(values).high[0] < 0.71


def test_fit_stays_within_the_limits():
    values = np.linspace([-3.3, 10], [7.1, 90], 1001)
    fitted = Normalizer.fit(values, lower=np.array([-1.5, 0]), upper=np.array([9, 55.5]))
    np.testing.assert_allclose(fitted.low, [-1.5, 10.8])
    np.testing.assert_allclose(fitted.high, [7.1 - 0.104, 55.5])


def test_a_constant_dimension_gets_a_range_of_two_within_the_limits():
    values = np.tile([0.77, 0.77], (9, 1))
    fitted = Normalizer.fit(values, lower=np.array([-5, -1]), upper=np.array([5, 1]))
    np.testing.assert_allclose(fitted.low, [-0.23, -0.23])
    np.testing.assert_allclose(fitted.high, [1.77, 1.0])
    np.testing.assert_allclose(fitted.invert(fitted.apply(values)), values)


def test_the_bounds_are_read_only_copies():
    low = np.array([0.3])
    normalizer = Normalizer(low=low, high=[0.9])
    low[0] = 0.5
    assert normalizer.low[0] == 0.3
    with pytest.raises(ValueError):
        normalizer.low[0] = 0.5


@pytest.mark.parametrize('low, high, message', [
    ([0.0], [1.0, 2.0], 'one size, got 1 and 2'),
    ([0.0, np.nan], [1.0, 2.0], 'finite'),
    ([0.0], [np.inf], 'finite'),
    ([0.5, 0.1], [1.0, 0.1], 'high must exceed low'),
    ([0.5], [0.4], 'high must exceed low'),
    (0.5, [1.0], r'low must have 1 dimension\(s\), got shape \(\)'),
])
def test_bad_bounds_are_refused(low, high, message):
    with pytest.raises(ValueError, match=message):
        Normalizer(low=low, high=high)


@pytest.mark.parametrize('values', [
    np.zeros((0, 3)), np.zeros(3), np.array([[0.1, np.nan]]), np.array([[0.1, np.inf]])])
def test_data_that_cannot_be_fitted_is_refused(values):
    with pytest.raises(ValueError, match='normalization needs finite values'):
        Normalizer.fit(values)
