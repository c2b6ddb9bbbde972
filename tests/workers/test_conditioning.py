"""Conditioning keeps what varies, against what should not matter."""

from __future__ import annotations

import numpy as np
import pytest

from workers.conditioning import Conditioning, Moments, signal_over_nuisance, unit_rows, whitening


def moments_of(*blocks: np.ndarray) -> Moments:
    moments = Moments(blocks[0].shape[1])
    for block in blocks:
        moments.add(block)
    return moments


def rows(seed: int = 0, count: int = 4000) -> np.ndarray:
    """Eight channels of standard deviations 8, 4, 2, 1, ..., with a mean far from zero."""
    deviations = 2.0 ** np.arange(3, -5, -1)
    return np.random.default_rng(seed).normal(size=(count, 8)) * deviations + 5


def test_moments_add_up_whatever_the_blocks() -> None:
    x = rows()
    whole, pieces = moments_of(x), moments_of(x[:7], x[7:1000], x[1000:])
    np.testing.assert_allclose(whole.mean, x.mean(0))
    np.testing.assert_allclose(whole.covariance, np.cov(x.T, bias=True), atol=1e-8)
    np.testing.assert_allclose(pieces.covariance, whole.covariance, atol=1e-9)


@pytest.mark.parametrize(("power", "deviations"), [(0, [8, 4, 2]), (0.5, [8**0.5, 2, 2**0.5]), (1, [1, 1, 1])])
def test_whitening_scales_principal_components(power: float, deviations: list[float]) -> None:
    x = rows()
    fitted = whitening(moments_of(x), 3, power)
    found = (x - fitted.mean) @ fitted.directions
    np.testing.assert_allclose(found.std(0), deviations, rtol=0.05)
    np.testing.assert_allclose(np.corrcoef(found.T), np.eye(3), atol=0.05)
    np.testing.assert_allclose(np.linalg.norm(fitted(x), axis=1), 1, atol=1e-5)


def test_few_rows_tell_few_components_and_the_width_stays() -> None:
    fitted = whitening(moments_of(rows(count=20)), 6, 1)
    assert fitted.directions.shape == (8, 6)
    assert fitted.directions.any(0).tolist() == [True, True, False, False, False, False]
    for few in (rows(count=1), np.zeros((0, 8)), np.ones((50, 8))):
        nothing = whitening(moments_of(few), 6, 1)
        assert np.isfinite(nothing.directions).all() and not nothing(np.ones((2, 8))).any()


def test_what_should_not_matter_is_left_out() -> None:
    """A strong channel that differs between neighbours, and a weak one that tells the classes apart."""
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 2, 3000)
    nuisance = rng.normal(size=(3000, 4)) * [9, 1, 1, 1]
    x = nuisance.copy()
    x[:, 3] += 4.0 * classes
    fitted = signal_over_nuisance(moments_of(x), [moments_of(nuisance)], 1)
    assert np.abs(fitted.directions[:, 0]).argmax() == 3
    side = fitted(x)[:, 0] > 0
    assert max((side == classes).mean(), (side != classes).mean()) > 0.95
    principal = whitening(moments_of(x), 1, 0)
    assert np.abs(principal.directions[:, 0]).argmax() == 0


def test_each_kind_of_nuisance_counts_alike_and_none_is_no_division_by_zero() -> None:
    rng = np.random.default_rng(2)
    x, a, b = rng.normal(size=(500, 5)), rng.normal(size=(400, 5)), rng.normal(size=(300, 5))
    one = signal_over_nuisance(moments_of(x), [moments_of(a), moments_of(b)], 3)
    scaled = signal_over_nuisance(moments_of(x), [moments_of(a), moments_of(1000 * b)], 3)
    np.testing.assert_allclose(one.directions, scaled.directions, atol=1e-4)
    assert np.isfinite(signal_over_nuisance(moments_of(x), [moments_of(0 * a)], 3).directions).all()
    assert np.isfinite(signal_over_nuisance(moments_of(0 * x), [moments_of(0 * a)], 9).directions).all()


def test_it_survives_its_bytes_and_refuses_other_rows() -> None:
    fitted = whitening(moments_of(rows()), 3, 1)
    again = Conditioning.from_bytes(fitted.to_bytes())
    np.testing.assert_array_equal(again(rows(5, 10)), fitted(rows(5, 10)))
    with pytest.raises(ValueError, match="the rows have 7 values, the conditioning 8"):
        fitted(np.ones((2, 7)))
    assert unit_rows(np.zeros((1, 3))).tolist() == [[0, 0, 0]]
