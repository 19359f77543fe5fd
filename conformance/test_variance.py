# SPDX-License-Identifier: Apache-2.0
"""VAR: row-wise variance normalization."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance import accept
from conformance.steps import accept_fused, expected, parameters, run, take
from conformance.strategies import DTYPES, HYPER, LAYOUTS, MIXED, conditioned, matrix, seeds, shapes, tensor
from conformance.target import Target

NORMUON = replace(HYPER, normuon_beta2=0.95)
# A step of this moves a weight of zeros by the update alone.
UPDATE = replace(NORMUON, lr=1.0, weight_decay=0.0, adjust_lr_fn="original")
betas = st.sampled_from([0.0, 0.5, 0.95])
all_layouts = LAYOUTS | MIXED


@pytest.mark.clause("VAR-1")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@given(shape=shapes, seed=seeds, beta2=betas, nesterov=st.booleans())
def test_steps_are_normuons(target: Target, device, dtype, adjust_lr_fn, shape, seed, beta2, nesterov):
    W, gradients = tensor(shape, seed, dtype), [[tensor(shape, seed + 1 + i, dtype)] for i in range(3)]
    hyper = replace(NORMUON, normuon_beta2=beta2, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn)
    (p,), _ = run(target, [W], gradients, hyper, device)
    accept.step(before=W, actual=p, expected=expected([W], gradients, hyper)[0], precision=target.precision(W.dtype, device))


@pytest.mark.clause("VAR-1", "VAR-4")
@pytest.mark.parametrize(("shape", "layout"), all_layouts.values(), ids=all_layouts.keys())
@settings(max_examples=5)
@given(seed=seeds)
def test_every_layout_is_normalized_by_matrix(target: Target, device, shape, layout, seed):
    accept_fused(target, device, shape, layout, seed, NORMUON)


@pytest.mark.clause("VAR-2")
@given(shape=shapes, spectrum=conditioned, seed=seeds, beta2=betas)
def test_a_matrix_keeps_its_norm(target: Target, device, shape, spectrum, seed, beta2):
    steps = [[matrix(shape, spectrum, seed)], [matrix(shape, spectrum, seed + 1)]]
    sizes = []
    for beta in (beta2, None):
        hyper = replace(UPDATE, normuon_beta2=beta)
        (before,), _ = run(target, [torch.zeros(shape)], steps[:1], hyper, device)
        (after,), _ = run(target, [torch.zeros(shape)], steps, hyper, device)
        sizes.append([before.detach().norm(), (after - before).detach().norm()])
    accept.close(actual=torch.tensor(sizes[0]), expected=torch.tensor(sizes[1]), dtype=torch.float32)


@pytest.mark.clause("VAR-3")
@given(shape=shapes.filter(lambda shape: shape[1] > 1), seed=seeds, beta2=betas)
def test_rows_are_balanced_in_the_first_step(target: Target, device, shape, seed, beta2):
    """Rows of one number are left out: one may be so small that the constant next to its root shows."""
    (p,), _ = run(target, [torch.zeros(shape)], [[tensor(shape, seed)]], replace(UPDATE, normuon_beta2=beta2), device)
    rows = p.detach().norm(dim=1)
    accept.close(actual=rows, expected=rows.mean().expand_as(rows), dtype=torch.float32)


@pytest.mark.clause("VAR-4")
@given(shape=shapes, seed=seeds)
def test_a_zero_gradient_only_decays(target: Target, device, shape, seed):
    (p,), _ = run(target, [tensor(shape, seed)], [[torch.zeros(shape)]] * 2, replace(NORMUON, weight_decay=0.0), device)
    accept.same_bits(actual=p, expected=tensor(shape, seed))


SHAPES = {  # of V for every layout
    "experts by columns": (6, 4),
    "experts in three dimensions": (4, 6, 1),
    "gate beside up of every expert": (3, 5, 2),
    "convolution": (8, 1),
}


@pytest.mark.clause("VAR-5")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_state_is_one_number_a_row(target: Target, device, dtype, name):
    shape, layout = LAYOUTS[name]
    hyper = replace(NORMUON, layout=layout)
    (p,), optimizer = run(target, [tensor(shape, 0, dtype)], [[tensor(shape, 1, dtype)]], hyper, device)
    V = target.variance_buffer(optimizer, p)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    accept.dtype(actual=V, at_least=wide, shape=SHAPES[name])
    assert (V > 0).all()


@pytest.mark.clause("VAR-5", "STATE-2")
def test_state_comes_back(target: Target, device):
    named = parameters([tensor((6, 4), 0)], device)
    optimizer = target.optimizer(named, NORMUON)
    take(optimizer, named, [tensor((6, 4), 1)])
    twins = copy.deepcopy(named)
    fresh = target.optimizer(twins, NORMUON)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in range(2):
        take(optimizer, named, [tensor((6, 4), 2 + i)])
        take(fresh, twins, [tensor((6, 4), 2 + i)])
    accept.same_bits(actual=twins[0][1], expected=named[0][1])


CORRUPTIONS = {
    "missing": (lambda state: state.pop("variance_buffer"), "variance_buffer"),
    "misshapen": (lambda state: state.update(variance_buffer=torch.zeros(6, 4)), "(6, 1)"),
    "negative": (lambda state: state["variance_buffer"].fill_(-1.0), "negative"),
    "not finite": (lambda state: state["variance_buffer"].fill_(float("inf")), "finite"),
}


@pytest.mark.clause("VAR-5", "STATE-4")
@pytest.mark.parametrize(("edit", "word"), CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_corrupt_state_is_refused(validating: Target, device, edit, word):
    (_,), optimizer = run(validating, [tensor((6, 4), 0)], [[tensor((6, 4), 1)]], NORMUON, device)
    saved = copy.deepcopy(optimizer.state_dict())
    edit(saved["state"][0])
    accept.refuses(
        lambda: optimizer.load_state_dict(saved),
        ValueError,
        "w0",
        word,
        unchanged=lambda: copy.deepcopy(optimizer.state_dict()),
    )


@pytest.mark.clause("VAR-5", "STATE-4")
def test_state_of_plain_muon_is_refused(validating: Target, device):
    (_,), plain = run(validating, [tensor((6, 4), 0)], [[tensor((6, 4), 1)]], HYPER, device)
    optimizer = validating.optimizer(parameters([tensor((6, 4), 0)], device), NORMUON)
    accept.refuses(
        lambda: optimizer.load_state_dict(plain.state_dict()), ValueError, "normuon_beta2=None", "normuon_beta2=0.95"
    )


@pytest.mark.clause("VAR-6")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_a_skipped_step_keeps_the_average(skipping: Target, device, poison):
    shape = (6, 4)
    (p,), optimizer = run(skipping, [tensor(shape, 0)], [[tensor(shape, 1)]], NORMUON, device)
    V = skipping.variance_buffer(optimizer, p).clone()
    with skipping.orthogonalizing(poison):
        optimizer.step()
    accept.same_bits(actual=skipping.variance_buffer(optimizer, p), expected=V)
    assert (V > 0).all()
