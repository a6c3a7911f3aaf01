"""Moments equal numpy's and survive numbers that cancel."""

import numpy as np
import pytest

from characterflywheel.experiment.moments import Moments


def test_mean_and_covariance_equal_numpy() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.poisson(4, 500), rng.poisson(2, 500)
    moments = Moments.of({"x": x, "y": y})
    assert moments.mean("x") == pytest.approx(x.mean(), rel=1e-12)
    assert moments.covariance("y", "x") == pytest.approx(np.cov(x, y)[0, 1], rel=1e-12)
    assert moments.covariance("y", "y") == pytest.approx(y.var(ddof=1), rel=1e-12)


def test_integers_do_not_cancel() -> None:
    """1e9, 1e9 + 1, 1e9 + 2 have variance 1; sums of squares in float64 would lose it."""
    x = np.array([10**9, 10**9 + 1, 10**9 + 2])
    assert Moments.of({"x": x}).covariance("x", "x") == 1.0


def test_adding_is_pooling() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.poisson(4, 100), rng.poisson(2, 100)
    halves = [Moments.of({"x": x[part], "y": y[part]}) for part in (slice(0, 30), slice(30, 100))]
    assert halves[0] + halves[1] == Moments.of({"x": x, "y": y})


def test_tea_tasting_reads_the_same_numbers() -> None:
    x, y = np.array([1, 2, 3, 4]), np.array([1, 0, 1, 1])
    aggregates = Moments.of({"x": x, "y": y}).aggregates()
    assert (aggregates.count(), aggregates.mean("x"), aggregates.var("y")) == (4, 2.5, 0.25)
    assert aggregates.cov("y", "x") == pytest.approx(np.cov(x, y)[0, 1])
