# SPDX-License-Identifier: Apache-2.0
"""What a user reads when something is refused: whole messages, since what was found and what to do are half of each."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impl import ChainedOptimizer, Layout, Muon, clip_grad_norm_, import_state, orthogonalize, param_groups


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


ONE = weight(2, 3)


def clip(G: Tensor, **options: Any) -> None:
    """Clip a gradient, of whatever kind."""
    p = nn.Parameter(torch.ones_like(G) if G.layout == torch.strided else torch.ones(G.shape))
    p.grad = G
    clip_grad_norm_(torch.optim.SGD([p]), 1.0, **options)


def step(G: Tensor) -> None:
    p = nn.Parameter(torch.ones(G.shape, dtype=G.dtype))
    p.grad = G
    Muon([p]).step()


def step_after(change: Callable[[Muon, Tensor], Any]) -> None:
    """Step once more, after a change."""
    p = weight(2, 3)
    optimizer = Muon([p])
    for _ in range(2):
        p.grad = torch.ones(2, 3)
        optimizer.step()
        change(optimizer, p)


def load(change: Callable[[dict[str, Any]], Any]) -> None:
    """Load a state dict after a change."""
    optimizer = Muon([("a", weight(2, 3)), ("b", weight(2, 3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 3)
    optimizer.step()
    saved = optimizer.state_dict()
    change(saved)
    optimizer.load_state_dict(saved)


def load_entry(key: str, value: Any) -> None:
    load(lambda saved: saved["state"][1].update({key: value}))


def tied(first: nn.Module, second: nn.Module) -> nn.Sequential:
    second.weight = first.weight
    return nn.Sequential(first, second)


def declaring(blocks: int) -> nn.Module:
    module = nn.Linear(4, 4, bias=False)
    module.muon_layout = Layout(blocks=blocks)
    return module


def around(module: nn.Module) -> nn.Module:
    outer = nn.Sequential(module)
    outer.muon_layout = Layout(blocks=2)
    return outer


def with_config(**config: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3))
    model.config = SimpleNamespace(**config)
    return model


LINEAR = nn.Sequential(nn.Linear(4, 3))

MESSAGES = [
    (lambda: Muon([ONE], lr=torch.ones(2)), "ValueError: Tensor lr must be 1-element, found shape (2,)"),
    (lambda: Muon([ONE], lr=-1.0), "ValueError: Learning rate should be >= 0 but is: -1.0"),
    (lambda: Muon([ONE], momentum=1.0), "ValueError: momentum should be < 1 but is: 1.0"),
    (
        lambda: Muon([ONE], eps=torch.tensor(0.5)),
        "ValueError: eps should be a number but is: tensor(0.5000); lr, momentum, weight_decay may be tensors",
    ),
    (
        lambda: Muon([ONE], adamw_eps=0.0),
        "ValueError: adamw_eps should be >= 1.1754943508222875e-38, or nothing keeps 0 / 0 away, but is: 0.0",
    ),
    (lambda: Muon([ONE], adamw_betas=(0.9, 1.0)), "ValueError: adamw_betas should be two numbers in [0, 1) but is: (0.9, 1.0)"),
    (lambda: Muon([ONE], normuon_beta2=1.0), "ValueError: normuon_beta2 should be None or a number in [0, 1) but is: 1.0"),
    (lambda: Muon([ONE], maximize="yes"), "ValueError: maximize should be True or False but is: 'yes'"),
    (
        lambda: Muon([ONE], adjust_lr_fn="rms"),
        "ValueError: Adjust learning rate function rms is not supported; adjust_lr_fn is one of (None, 'original', "
        "'match_rms_adamw', 'spectral', 'unit_rms_norm')",
    ),
    (lambda: Muon([ONE], algorithm="sgd"), "ValueError: algorithm should be one of ('muon', 'adamw') but is: 'sgd'"),
    (
        lambda: Muon([ONE], shard_mode="owner"),
        "ValueError: shard_mode should be one of ('owned', 'duplicated', 'distributed', 'blockwise') but is: 'owner'",
    ),
    (
        lambda: Muon([ONE], algorithm="adamw", layout=Layout()),
        "ValueError: layout has no meaning for algorithm='adamw'; leave it out, found Layout(blocks=1, columns=1, "
        "groups=1, sections=(), flatten=False)",
    ),
    (
        lambda: Muon([ONE], ns_steps=100),
        "ValueError: Number of steps must be less than 100 for computational efficiency, found ns_steps=100",
    ),
    (
        lambda: Muon([ONE], ns_coefficients=(1.5, -0.5, 0.0), ns_steps=True),
        "ValueError: ns_steps should be an integer >= 1 but is: True",
    ),
    (
        lambda: Muon([ONE], ns_coefficients=(1.5, -0.5)),
        "ValueError: Coefficients must be a tuple of exactly 3 values, found (1.5, -0.5)",
    ),
    (
        lambda: Muon([ONE], ns_coefficients=(1.5, float("inf"), 0.0)),
        "ValueError: Coefficients must be finite numbers, found (1.5, inf, 0.0)",
    ),
    (
        lambda: Muon([ONE], ns_coefficients=[(1.5, -0.5, 0.0)] * 4, ns_steps=2),
        "ValueError: ns_coefficients has 4 quintics but ns_steps is 2; say ns_steps=4",
    ),
    (
        lambda: Muon([ONE], ns_coefficients=7),
        "ValueError: ns_coefficients should be a name, a quintic (a, b, c) or quintics, but is: 7",
    ),
    (
        lambda: Muon([ONE], ns_coefficients="quintic"),
        "ValueError: ns_coefficients should be one of polar_express_s4, polar_express, you, jordan, or quintics, but is: "
        "'quintic'",
    ),
    (
        lambda: Muon([ONE], ns_coefficients="polar_express_s4", ns_steps=7),
        "ValueError: schedule 'polar_express_s4' is defined for ns_steps in (3, 4, 5, 6) but ns_steps is 7",
    ),
    (
        lambda: Muon([ONE], ns_coefficients=(1.0, -1.2, 0.0), ns_steps=1),
        "ValueError: ns_coefficients of 1 steps reverses directions and shrinks large singular values: singular values in"
        " [0, 1] are mapped to [-0.203, 0.351], those in [0.5, 1] to no less than -0.2, and the slope at 0 is 1. Use a "
        "number of steps that the coefficients were made for, or a named schedule: polar_express_s4, polar_express, you, "
        "jordan",
    ),
    (
        lambda: Muon([weight(2, 3, 4)]),
        "ValueError: Muon only supports 2D parameters whereas we found a parameter with size: torch.Size([2, 3, 4]) "
        "(0.0). Put it in a group with algorithm='adamw' or a layout (experts, convolutions); impl.param_groups(model) "
        "does both",
    ),
    (
        lambda: Muon([weight(5, 2)], layout=Layout(blocks=2)),
        "ValueError: layout of parameter 0.0 with shape (5, 2) does not fit: 5 rows cannot be cut into 2 blocks of 1 "
        "groups; found Layout(blocks=2, columns=1, groups=1, sections=(), flatten=False)",
    ),
    (
        lambda: Muon([weight(4, 2)], layout=7),
        "ValueError: layout should be a Layout or a dict of its fields but is: 7 ('int' object has no attribute 'get')",
    ),
    (
        lambda: Muon([torch.ones(2, 3, dtype=torch.int64)]),
        "ValueError: parameter 0.0 should be floating point but is torch.int64",
    ),
    (
        lambda: Muon([{"params": [ONE, ONE]}]),
        "ValueError: group 0 holds a parameter twice and would step it twice: ['0.0', '0.1']",
    ),
    (lambda: orthogonalize(torch.ones(3)), "ValueError: X should be (m, n) or (B, m, n) but has shape (3,)"),
    (
        lambda: orthogonalize(torch.ones(2, 3, dtype=torch.int64)),
        "TypeError: X should be real floating point but is torch.int64",
    ),
    (
        lambda: step(torch.ones(2, 3, dtype=torch.complex64)),
        "RuntimeError: Muon does not support complex parameters; use torch.view_as_real on the weight",
    ),
    (
        lambda: step(torch.ones(2, 3).to_sparse()),
        "RuntimeError: Muon does not support sparse gradients; route this parameter to another optimizer",
    ),
    (
        lambda: step_after(lambda optimizer, p: optimizer.param_groups[0].update(normuon_beta2=0.9)),
        "RuntimeError: a group's options ask for state ('momentum_buffer', 'variance_buffer') but ('momentum_buffer',) "
        "was made with others; put them back, or make a new optimizer",
    ),
    (
        lambda: step_after(lambda optimizer, p: optimizer.state[p].update(momentum_buffer=torch.ones(3, 2))),
        "RuntimeError: a parameter is torch.float32 (2, 3) on cpu and was not when its momentum_buffer was made",
    ),
    (
        lambda: Muon([ONE]).load_state_dict(None),
        "ValueError: the state dict should be a dict with 'state' and 'param_groups' but is: None",
    ),
    (
        lambda: load(lambda saved: saved.pop("state")),
        "ValueError: the state dict is not that of an optimizer, with 'state' and 'param_groups': KeyError('state')",
    ),
    (
        lambda: load(lambda saved: saved["param_groups"].clear()),
        "ValueError: the state dict has 0 parameter groups but the optimizer has 1",
    ),
    (
        lambda: load(lambda saved: saved["param_groups"][0]["params"].pop()),
        "ValueError: group 0 of the state dict has 1 parameters but the optimizer's has 2",
    ),
    (
        lambda: load(lambda saved: saved["param_groups"][0]["param_names"].pop()),
        "ValueError: group 0 of the state dict has another number of names than of parameters",
    ),
    (
        lambda: load(lambda saved: saved["param_groups"][0].update(params=[0, 0])),
        "ValueError: group 0 of the state dict has parameters that came before: [0]",
    ),
    (
        lambda: load(lambda saved: saved["param_groups"][0].update(param_names=["b", "a"])),
        "ValueError: group 0 of the state dict names its parameters otherwise: 'b' where the optimizer has 'a', 'a' where"
        " the optimizer has 'b'",
    ),
    (
        lambda: load(lambda saved: saved["param_groups"][0].update(normuon_beta2=0.9)),
        "ValueError: group 0 of the state dict is for algorithm='muon', layout=None, normuon_beta2=0.9 but the optimizer "
        "has algorithm='muon', layout=None, normuon_beta2=None",
    ),
    (
        lambda: load(lambda saved: saved["state"].update({7: {}})),
        "ValueError: the state dict holds state for parameters ['7'] that none of its groups has",
    ),
    (
        lambda: load(lambda saved: saved["state"].pop(1)),
        "ValueError: the state dict has no state for parameter b, expected ('momentum_buffer',)",
    ),
    (
        lambda: load_entry("exp_avg", torch.ones(2, 3)),
        "ValueError: state of parameter b should have the entries ('momentum_buffer',) but has ('momentum_buffer', 'exp_avg')",
    ),
    (
        lambda: load_entry("momentum_buffer", torch.ones(3, 2)),
        "ValueError: state 'momentum_buffer' of parameter b should have shape (2, 3) but is: (3, 2)",
    ),
    (
        lambda: load_entry("momentum_buffer", torch.ones(2, 3).to_sparse()),
        "ValueError: state 'momentum_buffer' of parameter b should be a dense tensor with values but is: torch.sparse_coo"
        " on cpu",
    ),
    (
        lambda: load_entry("momentum_buffer", torch.ones(2, 3, dtype=torch.float64)),
        "ValueError: state 'momentum_buffer' of parameter b should be torch.float32 or narrower but is: torch.float64",
    ),
    (
        lambda: load_entry("momentum_buffer", torch.full((2, 3), torch.inf)),
        "ValueError: state 'momentum_buffer' of parameter b is not finite or an average of squares is negative; it would "
        "poison the weights",
    ),
    (
        lambda: import_state(Muon([ONE]), {"state": {}}, [ONE], "adam"),
        "ValueError: origin should be one of torch, keller, moonlight, dion, megatron but is: 'adam'",
    ),
    (
        lambda: import_state(Muon([ONE]), {}, [ONE], "keller"),
        "ValueError: state_dict should have a dict of states by number under 'state' but has: None",
    ),
    (
        lambda: import_state(Muon([ONE]), {"state": {}}, [], "keller"),
        "ValueError: params should hold every parameter of the optimizer, but 0.0 is missing",
    ),
    (
        lambda: import_state(Muon([ONE]), {"state": {0: {"exp_avg": 0}}}, [ONE], "keller"),
        "ValueError: keller's state of parameter 0.0 should have 'momentum_buffer' but has ['exp_avg']",
    ),
    (
        lambda: import_state(Muon([ONE]), {"state": {0: {"momentum_buffer": "M"}}}, [ONE], "keller"),
        "ValueError: keller's 'momentum_buffer' of parameter 0.0 should be a tensor but is: 'M'",
    ),
    (
        lambda: clip_grad_norm_([ONE], 1.0),
        "TypeError: clip_grad_norm_ takes the optimizer, which knows what is exempt, in place of its parameters; for "
        "several optimizers, a ChainedOptimizer",
    ),
    (
        lambda: clip_grad_norm_(7, 1.0),
        "TypeError: expected an optimizer with param_groups, or .optimizer or .optimizers, found 7",
    ),
    (lambda: clip_grad_norm_(Muon([ONE]), -1.0), "ValueError: max_norm should be >= 0 but is: -1.0"),
    (lambda: clip_grad_norm_(Muon([ONE]), 1.0, norm_type=1.0), "ValueError: norm_type should be 2 or inf but is: 1.0"),
    (
        lambda: clip_grad_norm_(Muon([ONE]), 1.0, clip_norm="both"),
        "ValueError: clip_norm should be one of ('own', 'global') but is: 'both'",
    ),
    (lambda: clip_grad_norm_(Muon([ONE]), 1.0, floor=-0.5), "ValueError: floor should be in [0, 1] but is: -0.5"),
    (
        lambda: clip(torch.full((2, 3), torch.nan), error_if_nonfinite=True),
        "RuntimeError: the total norm of order 2.0 of the gradients is nan, so they cannot be clipped",
    ),
    (
        lambda: clip(torch.ones(2, 3).to_sparse()),
        "RuntimeError: sparse gradients have no norm here; declare them exempt, or step them outside the chain",
    ),
    (
        lambda: ChainedOptimizer([ChainedOptimizer([Muon([ONE])], clip_grad=1.0)]),
        "ValueError: a chain inside another should have neither clip_grad nor grad_norm_skip_threshold; the outer one has",
    ),
    (
        lambda: ChainedOptimizer([SimpleNamespace(optimizers=[torch.optim.SGD([ONE])], skip_grad_norm_clip=True)]),
        "ValueError: SimpleNamespace declares skip_grad_norm_clip but not all of its members do; declare it on each member",
    ),
    (
        lambda: ChainedOptimizer([Muon([ONE]), Muon([ONE])]),
        "ValueError: a parameter is in more than one of the optimizers and would be stepped by each",
    ),
    (lambda: ChainedOptimizer([Muon([ONE])], clip_grad=-1.0), "ValueError: clip_grad should be >= 0 but is: -1.0"),
    (
        lambda: ChainedOptimizer([Muon([ONE])], grad_norm_skip_threshold=-1.0),
        "ValueError: grad_norm_skip_threshold should be >= 0 but is: -1.0",
    ),
    (
        lambda: ChainedOptimizer([Muon([ONE])]).add_param_group({"params": [weight(2, 3)]}),
        "ValueError: add the group to one of the chain's optimizers; it has to say which one steps it",
    ),
    (
        lambda: ChainedOptimizer([Muon([ONE])]).load_state_dict({"optimizers": [{}, {}]}),
        "ValueError: the state dict is of 2 optimizers but the chain has 1",
    ),
    (
        lambda: param_groups(nn.Sequential(nn.LazyLinear(4))),
        "ValueError: parameter 0.weight has no shape yet; run the model once before routing it",
    ),
    (
        lambda: param_groups(nn.LayerNorm(4)),
        "ValueError: nothing in this model would be orthogonalized; it has ['weight', 'bias']",
    ),
    (
        lambda: param_groups(nn.Sequential(nn.Bilinear(4, 5, 3))),
        "ValueError: parameter 0.weight (3, 4, 5) of Bilinear is not recognised; say what it is: overrides={'0.weight': "
        "{'algorithm': 'adamw'}} or {'layout': Layout(...)}, or set the attribute muon_layout or use_muon on the "
        "parameter",
    ),
    (
        lambda: param_groups(LINEAR, overrides={"0.weight": {"learning_rate": 1}}),
        "ValueError: override '0.weight' has options ['learning_rate'] that a group does not have: ('lr', 'weight_decay',"
        " 'momentum', 'nesterov', 'ns_coefficients', 'eps', 'ns_steps', 'adjust_lr_fn', 'algorithm', 'layout', "
        "'shard_mode', 'normuon_beta2', 'adamw_lr_ratio', 'adamw_betas', 'adamw_eps', 'maximize', 'skip_grad_norm_clip')",
    ),
    (
        lambda: param_groups(LINEAR, overrides={"0.*": {"lr": 1}, "0.weight": {"lr": 2}}),
        "ValueError: parameter 0.weight is matched by two overrides, '0.*' and '0.weight'",
    ),
    (
        lambda: param_groups(LINEAR, overrides={"1.weight": {"lr": 1}}),
        "ValueError: override '1.weight' matches no parameter; there are ['0.weight', '0.bias']",
    ),
    (
        lambda: param_groups(LINEAR, head="1.weight"),
        "ValueError: head '1.weight' matches no parameter; there are ['0.weight', '0.bias']",
    ),
    (
        lambda: param_groups(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 7))),
        "ValueError: no output head was recognised: embeddings have [8] entries and as many outputs have []; say "
        "head='name.weight', or head=() if the model has none",
    ),
    (
        lambda: param_groups(with_config(num_experts=4, text_config={"num_experts": 8})),
        "ValueError: the model's config contradicts itself about the number of experts: {'num_experts': 4, "
        "'text_config.num_experts': 8}",
    ),
    (
        lambda: param_groups(tied(declaring(2), declaring(4))),
        "ValueError: parameter ['0.weight', '1.weight'] has several layouts, ['Layout(blocks=2, columns=1, groups=1, "
        "sections=(), flatten=False)', 'Layout(blocks=4, columns=1, groups=1, sections=(), flatten=False)']; say what it is: "
        "overrides={'0.weight': {'algorithm': 'adamw'}} or {'layout': Layout(...)}, or set the attribute muon_layout or "
        "use_muon on the parameter",
    ),
    (
        lambda: param_groups(nn.Sequential(nn.Sequential(declaring(2)), around(nn.Linear(4, 4)))),
        "ValueError: muon_layout of module '1', Sequential, is for ['weight'], but its own parameters are []; put it on the "
        "module that has the weight",
    ),
    (
        lambda: param_groups(tied(nn.Conv1d(4, 4, 1, bias=False), nn.Conv1d(8, 4, 1, groups=2, bias=False))),
        "ValueError: parameter ['0.weight', '1.weight'] is tied and has several meanings; say what it is: "
        "overrides={'0.weight': {'algorithm': 'adamw'}} or {'layout': Layout(...)}, or set the attribute muon_layout or "
        "use_muon on the parameter",
    ),
]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate:UserWarning")
@pytest.mark.parametrize(("call", "message"), MESSAGES, ids=[message[:60] for _, message in MESSAGES])
def test_a_refusal_says_what_was_found_and_what_to_do(call, message):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        call()
    assert f"{type(caught.value).__name__}: {caught.value}" == message
