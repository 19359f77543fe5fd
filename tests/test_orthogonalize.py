# SPDX-License-Identifier: Apache-2.0
"""The orthogonalization and its schedules where no clause of SPEC.md says it by name; see conformance/ for ORTH."""

import pytest
import torch
from torch import nn

import reference
from conformance import accept
from conformance.strategies import tensor
from impl import Muon, orthogonalize
from impl import schedules as ours


@pytest.mark.parametrize("steps", reference.LOWER)
def test_default_coefficients_are_the_derived_ones(steps):
    assert ours.POLAR_EXPRESS_S4[steps] == reference.schedule("polar_express_s4", steps).coefficients


@pytest.mark.parametrize("name", ["polar_express", "you", "jordan"])
def test_published_coefficients_agree(name):
    mine, theirs = ours.schedule(name, 5), reference.schedule(name, 5)
    assert (mine.coefficients, mine.norm, mine.margin) == (theirs.coefficients, theirs.norm, theirs.margin)


@pytest.mark.parametrize(
    "coefficients",
    [*ours.POLAR_EXPRESS_S4.values(), ours.YOU, (ours.JORDAN,) * 9, ((1.5, -0.5, 0.0),) * 3, ((2.0, -1.0, 0.0),)],
)
def test_images_agree(coefficients):
    for low, high in ((0.0, 1.0), (1e-3, 1.001), (0.5, 0.9)):
        assert ours.image(coefficients, low, high) == pytest.approx(reference.Schedule(coefficients).image(low, high))


def test_coefficients_may_be_three_quintics_or_whole_numbers():
    three = ours.POLAR_EXPRESS_S4[3]
    assert ours.schedule(three, 3).coefficients == three
    assert ours.schedule((1, 0, 0), 2).coefficients == ((1, 0, 0),) * 2


def test_coefficients_may_come_back_as_lists():
    assert ours.schedule([3.4445, -4.775, 2.0315], 5) == ours.schedule("jordan", 5)
    assert ours.schedule([[3.4445, -4.775, 2.0315]] * 2, 2) == ours.schedule("jordan", 2)


def test_autocast_does_not_reach_the_iteration():
    X = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = orthogonalize(X)
    assert torch.equal(inside, orthogonalize(X))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_matrix_that_is_not_finite_comes_out_as_nan_and_its_neighbours_do_not_notice(bad):
    X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = orthogonalize(X)
    X[1, 2, 3] = bad
    O = orthogonalize(X)
    assert O[1].isnan().any()
    assert torch.equal(O[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0, 3, 4), (2, 0, 4)])
def test_empty(shape):
    assert orthogonalize(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize(
    ("X", "error", "words"),
    [
        (torch.zeros(3), ValueError, r"\(m, n\) or \(B, m, n\) but has shape \(3,\)"),
        (torch.zeros(2, 2, 2, 2), ValueError, "but has shape"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(2, 3, dtype=torch.complex64), TypeError, "complex64"),
    ],
)
def test_orthogonalize_refuses(X, error, words):
    with pytest.raises(error, match=words):
        orthogonalize(X)


def test_epsilon_is_in_the_unit_of_every_matrix_of_a_batch():
    batch = torch.stack([tensor((4, 6), i) * 2.0**k for i, k in enumerate((0, 20, -20))])
    for X, O in zip(batch, orthogonalize(batch, "jordan", 5, eps=1.0), strict=True):
        accept.same_bits(actual=O, expected=orthogonalize(X, "jordan", 5, eps=1.0))
    subnormal = tensor((4, 6), 0) * 2.0**-135
    accept.same_bits(
        actual=orthogonalize(subnormal, "jordan", 5, eps=2.0**-149), expected=orthogonalize(subnormal, "jordan", 5)
    )


@pytest.mark.parametrize("shape", [(3, 5), (7, 9), (15, 17), (33, 47), (63, 65), (101, 103), (127, 255)], ids=str)
def test_neighbours_of_odd_sizes_do_not_matter(shape):
    """Inside a batch such a matrix is not aligned as it is alone."""
    batch = tensor((5, *shape), 0)
    for alone, O in zip(batch, orthogonalize(batch, "jordan", 5), strict=True):
        accept.same_bits(actual=O, expected=orthogonalize(alone.clone(), "jordan", 5))


def test_jordans_steps_are_up_to_99():
    weight = nn.Parameter(torch.ones(2, 3))
    assert Muon([weight], ns_coefficients="jordan", ns_steps=99).defaults["ns_steps"] == 99
    with pytest.raises(ValueError, match="100"):
        Muon([weight], ns_coefficients="jordan", ns_steps=100)
