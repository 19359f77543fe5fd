# SPDX-License-Identifier: Apache-2.0
"""What only the inside of impl shows, and how it fits into torch; SPEC.md's clauses are tested in conformance/."""

import copy
import inspect
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

import impl
from conformance import accept
from conformance.strategies import tensor
from impl import Layout, Muon, Section, clip_grad_norm_, orthogonalize, param_groups
from impl.layout import cut, matrices
from impl.options import check_options

LAYOUTS = [
    ((12, 5), Layout(blocks=3)),
    ((3, 4, 5), Layout(blocks=6, columns=5)),
    ((12, 6), Layout(groups=2, columns=3, sections=(Section(2), Section(4, head_dim=2)))),
    ((8, 3, 2, 2), Layout(flatten=True)),
]


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_cut_is_views_and_matrices_go_back_in_place(shape, layout):
    T = torch.arange(torch.Size(shape).numel()).view(shape)
    restored = torch.zeros_like(T)
    for (section, view), (_, target) in zip(cut(layout, T), cut(layout, restored), strict=True):
        assert view.untyped_storage().data_ptr() == T.untyped_storage().data_ptr()
        target.copy_(matrices(section, view).reshape(view.shape))
    assert torch.equal(restored, T)


def model_and_optimizer() -> tuple[nn.Module, Muon]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 11))
    model[1].weight.muon_layout = Layout(sections=(Section(8), Section(4, algorithm="adamw")))
    return model, Muon(param_groups(model), lr=0.02)


def train(model: nn.Module, optimizer: Muon, seed: int = 0) -> None:
    tokens = torch.randint(11, (16,), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(tokens), tokens).backward()
    optimizer.step()


def test_distributed_checkpoint_round_trip():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, optimizer = model_and_optimizer()
    before = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer)  # steps once with zero gradients, to create state
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    train(model, optimizer)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other_model, other = model_and_optimizer()
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, saved)
    train(model, optimizer, 1)
    train(other_model, other, 1)
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_pickle_and_defaults_go_round():
    model, optimizer = model_and_optimizer()
    train(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    Muon([nn.Parameter(torch.zeros(2, 3))], **optimizer.defaults)
    again = pickle.loads(pickle.dumps(optimizer))  # noqa: S301
    assert again.param_groups[1]["layout"] == optimizer.param_groups[1]["layout"]


def test_a_checkpoint_of_torchs_muon_loads():
    W = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    p, q = nn.Parameter(W.clone()), nn.Parameter(W.clone())
    theirs = torch.optim.Muon([p], lr=0.02)
    p.grad = torch.ones(4, 6)
    theirs.step()
    mine = Muon([q])
    mine.load_state_dict(theirs.state_dict())
    assert torch.equal(mine.state[q]["momentum_buffer"], theirs.state[p]["momentum_buffer"])
    assert mine.param_groups[0]["ns_coefficients"] == (3.4445, -4.775, 2.0315)
    q.grad = torch.ones(4, 6)
    mine.step()
    assert q.isfinite().all()


def test_parameters_with_other_strides_step_alike():
    W, G = (torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(2))
    results = []
    for memory in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(W.clone(memory_format=memory))
        p.grad = G.clone(memory_format=memory)
        Muon([p], layout=Layout(flatten=True)).step()
        results.append(p.detach().contiguous())
    assert torch.equal(*results)


def test_defaults_are_torchs_but_for_what_the_readme_says():
    def defaults(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}

    torchs, mine = defaults(torch.optim.Muon), defaults(Muon)
    changed = {"ns_coefficients": "polar_express_s4", "eps": 0.0}
    added = {"algorithm": "muon", "layout": None, "adamw_lr_ratio": 1.0, "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8}
    added |= {"normuon_beta2": None, "maximize": False, "skip_nonfinite": True, "process_group": None, "dump_nonfinite": None}
    added |= {"shard_mode": "owned", "replicas": None}
    assert mine == torchs | changed | added
    assert defaults(orthogonalize) == {"ns_coefficients": "polar_express_s4", "ns_steps": 5, "eps": 0.0}


def test_options_of_a_group_survive_a_checkpoint_that_lacks_them():
    p, q = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    theirs = torch.optim.Muon([p])
    p.grad = torch.ones(4, 6)
    theirs.step()
    mine = Muon([{"params": [q], "layout": Layout(blocks=2), "adamw_betas": (0.5, 0.6), "maximize": True}])
    mine.load_state_dict(theirs.state_dict())
    group = mine.param_groups[0]
    assert (group["layout"], group["adamw_betas"], group["maximize"]) == (Layout(blocks=2), (0.5, 0.6), True)


def test_a_loaded_momentum_with_other_strides_steps_alike():
    W, M, G = (torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(i)) for i in range(3))
    results = []
    for saved in (M, M.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        p = nn.Parameter(W.clone())
        optimizer = Muon([p], layout=Layout(blocks=4))
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": {0: {"momentum_buffer": saved}}, "param_groups": groups})
        assert optimizer.state[p]["momentum_buffer"].is_contiguous(), "kernels find it by its address"
        p.grad = G.clone()
        optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_load_hooks_see_and_change_what_is_loaded():
    p = nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    optimizer = Muon([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    seen = []

    def sevens(_, saved):
        return {**saved, "state": {0: {"momentum_buffer": torch.full((4, 6), 7.0)}}}

    optimizer.register_load_state_dict_pre_hook(sevens)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["momentum_buffer"].dtype))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [torch.float32]
    assert (optimizer.state[p]["momentum_buffer"] == 7).all()


@pytest.mark.parametrize(
    "broken", [None, [], {}, {"state": {}, "param_groups": [3]}, {"state": None, "param_groups": None}], ids=str
)
def test_what_is_no_state_dict_is_refused_with_a_value_error(broken):
    with pytest.raises(ValueError, match="state"):
        Muon([nn.Parameter(torch.ones(4, 6))]).load_state_dict(broken)


def test_a_parameter_given_twice_is_refused():
    p = nn.Parameter(torch.ones(4, 6))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="twice"):
        Muon([p, p])


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@pytest.mark.parametrize("other", [torch.ones(4, 6).double(), torch.ones(4, 8)], ids=["dtype", "shape"])
def test_a_parameter_that_changed_is_refused_before_anything_moves(algorithm, other):
    first, second = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([first, second], algorithm=algorithm)
    first.grad, second.grad = torch.ones(4, 6), torch.ones(4, 6)
    optimizer.step()
    second.data, second.grad = other.clone(), None
    second.grad, before = other.clone(), first.detach().clone()
    with pytest.raises(RuntimeError, match=f"{other.dtype} {re.escape(str(tuple(other.shape)))}".replace("torch.", "")):
        optimizer.step()
    assert torch.equal(first, before)


def test_a_weight_is_looked_at_also_after_one_without_a_gradient():
    still, odd = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))
    optimizer = Muon([still, odd])
    odd.grad = torch.ones_like(odd)
    with pytest.raises(RuntimeError, match="Muon does not support complex parameters"):
        optimizer.step()
    assert odd.eq(1).all()


def test_a_state_that_is_elsewhere_is_refused():
    p = nn.Parameter(torch.ones(4, 6))
    p.grad = torch.ones(4, 6)
    optimizer = Muon([p])
    optimizer.step()
    optimizer.state[p]["momentum_buffer"] = torch.empty(4, 6, device="meta")
    with pytest.raises(RuntimeError, match="on cpu and was not when its momentum_buffer was made"):
        optimizer.step()


def test_all_that_is_promised_is_there():
    shown = {name for name, value in vars(impl).items() if getattr(value, "__module__", "").startswith("impl.")}
    assert set(impl.__all__) == shown


@pytest.mark.parametrize("shape", [(1,), (1,) * 6], ids=str)
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_options_may_be_tensors_of_any_one_element(algorithm, shape):
    found = []
    for wrap in (float, lambda x: torch.full(shape, x, dtype=torch.float64)):
        p = nn.Parameter(tensor((2, 3), 0))
        optimizer = Muon([p], algorithm=algorithm, lr=wrap(0.1), momentum=wrap(0.5), weight_decay=wrap(0.25))
        for _ in range(2):
            p.grad = tensor((2, 3), 1)
            optimizer.step()
        found.append(p.detach())
    accept.same_bits(actual=found[1], expected=found[0])


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_a_learning_rate_may_be_a_number_of_numpys(kind):
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    optimizer = Muon([p])
    optimizer.param_groups[0]["lr"] = kind(1)
    optimizer.step()
    assert (p != 1).all()


def test_a_rank_may_have_no_experts():
    p = nn.Parameter(torch.ones(0, 4, 6))
    p.grad = torch.ones(0, 4, 6)
    Muon([p], layout=Layout(blocks=1)).step()
    assert p.shape == (0, 4, 6)


@pytest.mark.parametrize("count", [0, 1])
def test_a_group_may_be_empty(count):
    """As on a stage of a pipeline; and all of them."""
    weights = [nn.Parameter(torch.ones(2, 3)) for _ in range(count)]
    optimizer = Muon([{"params": []}, {"params": weights, "algorithm": "adamw"}])
    for p in weights:
        p.grad = torch.ones(2, 3)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(p.ne(1).all() for p in weights)
    assert clip_grad_norm_(optimizer, 1.0).total == (6 * count) ** 0.5


def test_who_looks_at_a_state_before_there_is_one_leaves_nothing():
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    optimizer = Muon([p])
    assert optimizer.state[p] == {}
    optimizer.step()
    assert optimizer.state[p].keys() == {"momentum_buffer"}


def test_overrides_options_reach_the_group():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lr = torch.tensor(0.5), torch.tensor(0.5)
    groups = param_groups(model, overrides={"0.weight": {"lr": lr[0]}, "1.weight": {"lr": lr[1], "momentum": 0.5}})
    found = {name: group for group in groups for name, _ in group["params"]}
    assert found["0.weight"]["lr"] is lr[0]
    assert found["1.weight"]["lr"] is lr[1]
    assert found["1.weight"]["momentum"] == 0.5


def test_a_step_does_not_look_at_options_that_are_tensors():
    """It would have to wait for their device, which a CUDA graph being captured forbids; these have nothing to look at."""
    group = Muon([nn.Parameter(torch.ones(2, 3))]).param_groups[0]
    tensors = {option: torch.empty((), device="meta") for option in ("lr", "weight_decay", "momentum")}
    check_options({**group, **tensors}, wait=False)


def test_what_is_no_tensor_is_looked_at_in_every_step():
    """Also beside a learning rate that is one."""
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    optimizer = Muon([p], lr=torch.tensor(0.1))
    optimizer.param_groups[0]["weight_decay"] = float("nan")
    with pytest.raises(ValueError, match="weight decay should be >= 0 but is: nan"):
        optimizer.step()
    assert p.eq(1).all()


def test_a_tensor_learning_rate_of_low_precision_still_decays():
    p = nn.Parameter(torch.ones(4, 6))
    p.grad = torch.zeros(4, 6)
    Muon([p], lr=torch.tensor(1e-3, dtype=torch.bfloat16), weight_decay=0.1).step()
    assert ((p < 1 - 0.9e-4) & (p > 1 - 1.1e-4)).all()


def test_sections_are_told_by_their_type():
    assert Layout.of({"sections": [{"rows": 2}, Section(4)]}) == Layout(sections=(Section(2), Section(4)))


def test_sections_may_be_a_list():
    layout = Layout(sections=[Section(8), Section(4)])
    assert layout == Layout(sections=(Section(8), Section(4))) and hash(layout) == hash(
        Layout.of({"sections": layout.sections})
    )


def test_rates_that_are_two_tensors_stay_two():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    rates = [torch.tensor(0.1), torch.tensor(0.1)]
    groups = param_groups(model, head=(), overrides={f"{i}.weight": {"lr": lr} for i, lr in enumerate(rates)})
    assert [id(group["lr"]) for group in groups] == [id(lr) for lr in rates]


def test_a_count_is_no_flag():
    with pytest.raises(ValueError, match="blocks should be an integer >= 1 but is True"):
        Muon([nn.Parameter(torch.ones(2, 3))], layout=Layout(blocks=True))


def test_the_report_tells_the_rate_of_adamw():
    group = {"params": [nn.Parameter(torch.ones(3))], "algorithm": "adamw", "adamw_lr_ratio": 0.5}
    assert Muon([group], lr=0.03).report().splitlines()[2].split()[-2] == "0.015"


def test_a_parameter_without_a_name_is_told_by_its_group_and_place():
    with pytest.raises(ValueError, match=r"0\.1.* 5 .*blocks"):
        Muon([torch.ones(4, 2), torch.ones(5, 2)], layout=Layout(blocks=2))
    optimizer = Muon([torch.ones(2, 2)])
    with pytest.raises(ValueError, match=r"1\.0.* 5 .*blocks"):
        optimizer.add_param_group({"params": [torch.ones(5, 2)], "layout": Layout(blocks=2)})


def test_what_has_a_gradient_is_stepped_also_where_it_asks_for_none():
    """As by torch's optimizers: a parameter may have been frozen after its last backward pass."""
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    optimizer = Muon([p.requires_grad_(False)])
    optimizer.step()
    assert (p != 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_gradient_that_lies_across_the_same_sections_are_clipped(dtype):
    layout, found = Layout(sections=(Section(6), Section(2, algorithm="adamw"))), []
    for across in (False, True):
        p, G = nn.Parameter(torch.ones(8, 5, dtype=dtype)), torch.arange(40.0).view(8, 5).to(dtype)
        p.grad = G.mT.contiguous().mT if across else G.clone()
        norms = clip_grad_norm_(Muon([p], layout=layout), 1.0, error_if_nonfinite=True)
        assert torch.equal(p.grad[:6], G[:6])
        assert torch.linalg.vector_norm(p.grad[6:].float()).item() == pytest.approx(1, rel=1e-2)
        found.append((*norms, p.grad))
    for straight, across in zip(*found, strict=True):
        assert (straight is None and across is None) or torch.equal(straight, across)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm_type", [2.0, torch.inf])
def test_the_norm_of_nothing_is_a_double(norm_type, dtype):
    p = nn.Parameter(torch.ones(0, 5, dtype=dtype))
    p.grad = torch.ones(0, 5, dtype=dtype)
    total = clip_grad_norm_(Muon([p], algorithm="adamw"), 1.0, norm_type).total
    assert (total.dtype, total.item()) == (torch.float64, 0.0)
