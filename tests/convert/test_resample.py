"""Resampled weights: timm's numbers (see tests/peers/make_fixtures_resnet.py) and properties."""

import functools

import numpy as np
import pytest

from tapvit_jax.convert.resample import (
    bicubic_matrix,
    resample_patch_embed,
    resample_pos_embed,
    resample_rel_pos_bias,
)
from tapvit_jax.errors import InputError
from tests.peers.make_fixtures_resnet import DATA, draw, resample_cases

RESAMPLE = {
    "pos": resample_pos_embed,
    "patch": resample_patch_embed,
    "window": resample_rel_pos_bias,
}
CASES = resample_cases()


@functools.cache
def fixture():
    with np.load(DATA / "timm_resample.npz") as file:
        return dict(file)


@pytest.mark.parametrize(("key", "array", "arguments"), CASES, ids=[case[0] for case in CASES])
def test_same_numbers_as_timm(key, array, arguments):
    before, expected = array.copy(), fixture()[key]
    found = RESAMPLE[key.partition("_")[0]](array, *arguments)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(array, before)


def test_every_stored_case_is_tested():
    assert fixture().keys() == {key for key, _, _ in CASES}


def test_the_same_size_changes_nothing():
    table, kernel, bias = draw("t", (1, 18, 3)), draw("k", (2, 1, 5, 5)), draw("b", (49, 2))
    np.testing.assert_array_equal(resample_pos_embed(table, 4, 2), table)
    np.testing.assert_array_equal(resample_patch_embed(kernel, 5), kernel)
    np.testing.assert_array_equal(resample_rel_pos_bias(bias, 4), bias)


def test_prefix_rows_and_their_number_matter():
    table = draw("prefix", (1, 18, 3))
    found = resample_pos_embed(table, 6, 2)
    assert found.shape == (1, 38, 3)
    np.testing.assert_array_equal(found[:, :2], table[:, :2])
    np.testing.assert_array_equal(found[:, 2:], resample_pos_embed(table[:, 2:], 6, 0))


@pytest.mark.parametrize(("old", "new"), [(1, 4), (3, 7), (7, 3), (14, 16), (16, 1)])
def test_constants_stay_constant(old, new):
    np.testing.assert_allclose(bicubic_matrix(old, new).sum(axis=1), 1, rtol=1e-12)
    table = np.full(((2 * old - 1) ** 2, 2), 3.0, np.float32)
    np.testing.assert_allclose(resample_rel_pos_bias(table, new), 3, rtol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (8, 16), (14, 16)])
def test_enlarged_patches_keep_their_embeddings(old, new):
    patches, kernel = draw("patches", (6, 3, old, old)), draw("kernel", (5, 3, old, old))
    resize = bicubic_matrix(old, new)
    enlarged = np.einsum("ai,bj,ncij->ncab", resize, resize, patches)
    found = np.einsum("ncab,ocab->no", enlarged, resample_patch_embed(kernel, new))
    expected = np.einsum("ncab,ocab->no", patches, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rows_and_columns_are_not_mixed_up():
    # What does not change along a row still does not.
    rows = np.repeat(draw("rows", (5, 1)), 5, axis=1).reshape(25, 1)
    positions = resample_pos_embed(rows[None], 7, 0).reshape(7, 7)
    biases = resample_rel_pos_bias(rows, 5).reshape(9, 9)
    for found in (positions, biases):
        np.testing.assert_allclose(np.ptp(found, axis=1), 0, atol=1e-6)
        assert np.ptp(found, axis=0).min() > 0.1


@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_the_dtype_stays(kind):
    for key, array, arguments in CASES[::6]:
        found = RESAMPLE[key.partition("_")[0]](array.astype(kind), *arguments)
        assert found.dtype == kind


@pytest.mark.parametrize(
    ("resample", "message"),
    [
        (lambda: resample_pos_embed(np.zeros((1, 12, 2)), 4, 1), "11 rows, expected a square"),
        (lambda: resample_pos_embed(np.zeros((1, 2, 2)), 4, 2), "0 rows, expected a square"),
        (lambda: resample_pos_embed(np.zeros((1, 9, 2)), 0, 0), "new_grid is 0"),
        (lambda: resample_patch_embed(np.zeros((1, 1, 4, 5)), 4), "4 x 5 kernels"),
        (lambda: resample_patch_embed(np.zeros((1, 1, 4, 4)), 0), "new_size is 0"),
        (lambda: resample_rel_pos_bias(np.zeros((10, 2)), 4), "10 rows, expected a square"),
        (lambda: resample_rel_pos_bias(np.zeros((16, 2)), 4), r"16 rows, expected \(2 window - 1"),
        (lambda: resample_rel_pos_bias(np.zeros((9, 2)), 0), "new_window is 0"),
    ],
)
def test_bad_sizes_are_refused(resample, message):
    with pytest.raises(InputError, match=message):
        resample()
