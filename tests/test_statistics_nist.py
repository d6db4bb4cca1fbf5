"""Statistics of data that is hard for them: the NIST Statistical Reference Datasets, univariate, NumAcc1 to NumAcc4.

https://www.itl.nist.gov/div898/strd/univ/homepage.html. They are defined by formula. The certified values are those of
the decimal numbers; NumAcc3 and NumAcc4 as doubles have other ones (1000000.2 is none), so the exact rational
statistics of the doubles are what is compared, and the certified values show that it is the right data.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import reference

import lanenorm

# name: (values, certified mean, certified standard deviation, the one with n - 1)
DATA = {
    "NumAcc1": ([10000001, 10000003, 10000002], 10000002, 1),
    "NumAcc2": ([1.2, *[1.1, 1.3] * 500], 1.2, 0.1),
    "NumAcc3": ([1000000.2, *[1000000.1, 1000000.3] * 500], 1000000.2, 0.1),
    "NumAcc4": ([10000000.2, *[10000000.1, 10000000.3] * 500], 10000000.2, 0.1),
}
by_data = pytest.mark.parametrize("name", DATA)


def assert_last_two_digits(result, exact):
    """Good to the last two of 16 digits: off by no more than what 8u of the promise is."""
    error = abs(Fraction(float(result)) - exact)
    assert error <= Fraction(float(reference.tolerance("rstd", np.float64, np.longdouble(float(exact))))), float(
        error / exact
    )


@by_data
def test_statistics_of_nist_data_by_exact_rationals(name):
    """The data itself: exact mean and deviation are the certified ones, up to the rounding of the decimals."""
    values, mean, deviation = DATA[name]
    exact_mean, exact_var = reference.exact_statistics(values)
    count = len(values)
    assert math.isclose(exact_mean, mean, rel_tol=1e-15)
    assert math.isclose(math.sqrt(exact_var * count / (count - 1)), deviation, rel_tol=2e-8)


@by_data
def test_layer_norm_statistics_of_nist_data(isa, name):
    """Mean and variance as a user gets them, from mean and rstd with eps = 0; in a row, and in a column."""
    values = DATA[name][0]
    exact_mean, exact_var = reference.exact_statistics(values)
    row = np.array([values], np.float64)
    for x, axis in ((row, 1), (np.repeat(row, 9, axis=0).T.copy(), 0)):
        _, mean, rstd = lanenorm.layer_norm_forward(x, axis=axis, eps=0.0)
        assert_last_two_digits(mean.ravel()[0], exact_mean)
        # 1 / rstd**2 rounds twice more, and doubles the error of rstd: rstd itself is what is promised
        exact_rstd = 1 / np.sqrt(reference.fraction_to_wide(exact_var))
        reference.check("rstd", rstd.ravel()[:1], np.array([exact_rstd]))
        reference.check("mean", mean.ravel()[:1], np.array([reference.fraction_to_wide(exact_mean)]), 1 / exact_rstd)


@by_data
def test_batch_norm_statistics_of_nist_data(isa, name):
    """The unbiased variance comes out of the running statistics with momentum 1, in every layout."""
    values = DATA[name][0]
    count = len(values)
    exact_mean, exact_var = reference.exact_statistics(values)
    column = np.array(values, np.float64).reshape(-1, 1)
    for x in (np.repeat(column, 9, axis=1), column.T[None], np.repeat(column, 3, axis=1)[:, :, None]):
        channels = x.shape[1]
        running = np.zeros(channels), np.ones(channels)
        _, mean, rstd = lanenorm.batch_norm_forward(
            x, running_mean=running[0], running_var=running[1], momentum=1.0, eps=0.0
        )
        exact_rstd = 1 / np.sqrt(reference.fraction_to_wide(exact_var))
        unbiased = reference.fraction_to_wide(exact_var * count / (count - 1))
        for channel in range(channels):
            assert_last_two_digits(mean[channel], exact_mean)
            assert_last_two_digits(running[0][channel], exact_mean)
        reference.check("rstd", rstd, np.full(channels, exact_rstd))
        reference.check("running_var", running[1], np.full(channels, unbiased), unbiased)


def test_nist_data_in_float32(isa):
    """NumAcc1 is exact in float32 too: mean to the last bit, deviation too."""
    x = np.array([DATA["NumAcc1"][0]], np.float32)
    y, mean, rstd = lanenorm.layer_norm_forward(x, eps=0.0)
    exact = reference.layer_norm(x, eps=0.0)
    assert mean[0, 0] == 10000002
    reference.check("rstd", rstd, exact.rstd)
    reference.check("normalized", y, exact.normalized, exact.largest)
