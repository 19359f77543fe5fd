# SPDX-License-Identifier: Apache-2.0
"""ERR: errors."""

import copy
import re
from dataclasses import replace

import pytest
import torch

from conformance import accept
from conformance.steps import parameters, take
from conformance.strategies import HYPER, tensor
from conformance.target import Target

NAN, INF = float("nan"), float("inf")
# options outside their range -> what the message has to say
BAD = [
    ({"lr": -1.0}, ["Learning rate", "-1.0"]),
    ({"lr": NAN}, ["Learning rate", "nan"]),
    ({"lr": INF}, ["Learning rate", "inf"]),
    ({"lr": torch.ones(2)}, ["Tensor lr must be 1-element"]),
    ({"momentum": -0.1}, ["momentum", "-0.1"]),
    ({"momentum": 1.0}, ["momentum", "1.0"]),
    ({"momentum": 1.5}, ["momentum", "1.5"]),
    ({"momentum": NAN}, ["momentum", "nan"]),
    ({"weight_decay": -0.1}, ["weight decay", "-0.1"]),
    ({"weight_decay": NAN}, ["weight decay", "nan"]),
    ({"eps": -1.0}, ["eps", "-1.0"]),
    ({"steps": 0}, ["ns_steps", "0"]),
    ({"steps": -1}, ["ns_steps", "-1"]),
    ({"steps": 100}, ["Number of steps must be less than 100"]),
    ({"schedule": (1.5, -0.5)}, ["Coefficients must be a tuple of exactly 3 values"]),
    ({"schedule": (NAN, 0.0, 0.0)}, ["nan"]),
    ({"schedule": None}, ["ns_coefficients", "None"]),
    ({"steps": 5.0}, ["ns_steps", "5.0"]),
    ({"adjust_lr_fn": "arbitrary"}, ["Adjust learning rate function arbitrary is not supported"]),
    ({"algorithm": "sgd"}, ["algorithm", "sgd"]),
    ({"algorithm": "adamw", "adamw_betas": (0.9, 1.0)}, ["adamw_betas", "1.0"]),
    ({"algorithm": "adamw", "adamw_betas": (0.9,)}, ["adamw_betas"]),
    ({"algorithm": "adamw", "adamw_eps": -1.0}, ["adamw_eps", "-1.0"]),
    ({"algorithm": "adamw", "adamw_eps": 0.0}, ["adamw_eps", "0.0"]),
    ({"algorithm": "adamw", "adamw_eps": 1e-50}, ["adamw_eps", "1e-50"]),
    ({"algorithm": "adamw", "adamw_lr_ratio": -1.0}, ["adamw_lr_ratio", "-1.0"]),
    ({"algorithm": "adamw", "layout": {"blocks": 2}}, ["layout", "adamw"]),
    ({"maximize": "yes"}, ["maximize", "yes"]),
    ({"nesterov": "yes"}, ["nesterov", "yes"]),
    ({"normuon_beta2": 1.0}, ["normuon_beta2", "1.0"]),
    ({"normuon_beta2": -0.1}, ["normuon_beta2", "-0.1"]),
    ({"normuon_beta2": NAN}, ["normuon_beta2", "nan"]),
    ({"normuon_beta2": False}, ["normuon_beta2", "False"]),
    ({"algorithm": "adamw", "adamw_eps": 1e-40}, ["adamw_eps", "1e-40"]),
]
bad = pytest.mark.parametrize(
    ("options", "words"), BAD, ids=[" ".join(f"{k}={v}" for k, v in options.items()) for options, _ in BAD]
)
# Each error that torch.optim.Muon raises for wrong use: type and beginning of the message.
TORCH = [
    ({"lr": torch.ones(2)}, (2, 3), "Tensor lr must be 1-element"),
    ({"lr": -1.0}, (2, 3), "Learning rate should be >= 0 but is: -1.0"),
    ({"momentum": -1.0}, (2, 3), "momentum should be >= 0 but is: -1.0"),
    ({"weight_decay": -1.0}, (2, 3), "weight decay should be >= 0 but is: -1.0"),
    ({"adjust_lr_fn": "arbitrary"}, (2, 3), "Adjust learning rate function arbitrary is not supported"),
    ({}, (2, 3, 4), "Muon only supports 2D parameters whereas we found a parameter with size: torch.Size([2, 3, 4])"),
    ({}, (2,), "Muon only supports 2D parameters whereas we found a parameter with size: torch.Size([2])"),
]


@pytest.mark.clause("ERR-1")
@bad
def test_constructor_refuses(validating: Target, options, words):
    named = parameters([tensor((4, 6), 0)])
    accept.refuses(lambda: validating.optimizer(named, replace(HYPER, **options)), ValueError, *words)


@pytest.mark.clause("ERR-2")
@bad
def test_added_group_is_refused_likewise(validating: Target, options, words):
    named = parameters([tensor((4, 6), 0), tensor((4, 6), 1)])
    optimizer = validating.optimizer(named[:1], HYPER)
    group = validating.group(named[1:], replace(HYPER, **options))
    accept.refuses(lambda: optimizer.add_param_group(group), ValueError, *words, unchanged=lambda: len(optimizer.param_groups))


@pytest.mark.clause("ERR-2")
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), ()], ids=str)
def test_added_parameter_that_is_no_matrix_is_refused(validating: Target, shape):
    named = [*parameters([tensor((4, 6), 0)]), ("odd_one", torch.nn.Parameter(tensor(shape, 1)))]
    optimizer = validating.optimizer(named[:1], HYPER)
    group = validating.group(named[1:], HYPER)
    accept.refuses(lambda: optimizer.add_param_group(group), ValueError, "2D", unchanged=lambda: len(optimizer.param_groups))


@pytest.mark.clause("ERR-3")
@pytest.mark.parametrize("begun", [True, False], ids=["later", "at once"])
@pytest.mark.parametrize(
    ("last", "gradient", "words"),
    [
        (tensor((4, 6), 1), torch.ones(4, 6).to_sparse(), ["Muon does not support sparse gradients"]),
        (
            torch.ones(4, 6, dtype=torch.complex64),
            torch.ones(4, 6, dtype=torch.complex64),
            ["Muon does not support complex parameters"],
        ),
    ],
    ids=["sparse", "complex"],
)
def test_error_in_a_step_changes_nothing(validating: Target, last, gradient, words, begun):
    named = parameters([tensor((4, 6), 0), last])
    optimizer = validating.optimizer(named, HYPER)
    if begun:
        take(optimizer, named, [tensor((4, 6), 2), None])
    named[0][1].grad, named[1][1].grad = tensor((4, 6), 3), gradient

    def unchanged():
        return copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for _, p in named]

    accept.refuses(optimizer.step, RuntimeError, *words, unchanged=unchanged)


@pytest.mark.clause("ERR-4")
@pytest.mark.parametrize(("options", "shape", "beginning"), TORCH, ids=[message for *_, message in TORCH])
def test_errors_are_torchs(validating: Target, options, shape, beginning):
    named = parameters([torch.zeros(shape)])
    with pytest.raises(ValueError, match="^" + re.escape(beginning)):
        validating.optimizer(named, replace(HYPER, **options))
