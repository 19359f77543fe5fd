# SPDX-License-Identifier: Apache-2.0
"""What is saved, pickled and loaded where no clause of SPEC.md says it by name: older files, other programs, frozen weights."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from conformance import accept
from impl import Layout, Muon, Section


def stepped(*named: tuple[str, nn.Parameter] | nn.Parameter, **options: object) -> Muon:
    """An optimizer that has taken a step."""
    optimizer = Muon(list(named), **options)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def test_a_frozen_parameter_has_no_state_until_it_has_thawed():
    w, frozen = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2), requires_grad=False)
    w.grad = torch.ones(2, 3)
    first, second, third = (Muon([w, frozen]) for _ in range(3))
    first.step()
    saved = first.state_dict()
    second.load_state_dict(saved)
    second.step()
    assert saved["state"].keys() == {0} and second.state.keys() == {w}
    frozen.requires_grad_(True).grad = torch.ones(3, 2)
    second.step()
    assert second.state.keys() == {w, frozen}
    with pytest.raises(ValueError, match=r"the state dict has no state for parameter 0\.1"):
        third.load_state_dict(saved)


def test_a_state_is_looked_at_also_while_its_parameter_is_frozen():
    w, frozen = weight(2, 3), weight(3, 2)
    saved = stepped(w, frozen).state_dict()
    saved["state"][1]["momentum_buffer"] = torch.full((3, 2), float("nan"))
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match=r"state 'momentum_buffer' of parameter 0\.1 is not finite"):
        Muon([w, frozen]).load_state_dict(saved)


def test_another_layout_is_not_loaded_where_the_state_would_fit():
    saved = stepped(weight(12, 3), layout=Layout(blocks=2)).state_dict()
    optimizer = Muon([weight(12, 3)], layout=Layout(blocks=3))
    with pytest.raises(ValueError, match=r"group 0 of the state dict is for .*'blocks': 2.* but the optimizer has .*blocks=3"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["layout"] == Layout(blocks=3)


def test_a_hook_may_leave_the_options_out():
    optimizer = stepped(weight(2, 3))
    optimizer.register_state_dict_post_hook(lambda _, saved: {"state": saved["state"]})
    assert optimizer.state_dict().keys() == {"state"}


def test_loading_changes_no_decision(tmp_path):
    """Whether steps are skipped, where the dump goes and what has been counted are the optimizer's, not its state's."""
    p, dump = weight(2, 3), tmp_path / "dump"
    saved = stepped(weight(2, 3)).state_dict()
    optimizer = Muon([p], skip_nonfinite=False, dump_nonfinite=dump)
    optimizer.found_inf, p.grad = torch.ones(()), torch.ones(2, 3)
    optimizer.step()
    optimizer.found_inf = None
    optimizer.load_state_dict(saved)
    assert optimizer.guard.dump == dump and int(optimizer.skipped["found_inf"]) == 1
    p.grad = torch.full((2, 3), float("nan"))
    optimizer.step()
    assert p.isnan().all()


def test_loading_leaves_no_hook_behind():
    optimizer = stepped(weight(2, 3))
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="0 parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert not optimizer._optimizer_load_state_dict_pre_hooks and not optimizer._optimizer_load_state_dict_post_hooks


def test_what_was_pickled_before_an_option_was_there_has_its_default():
    state = copy.deepcopy(stepped(weight(4, 3), layout=Layout(blocks=2), momentum=0.5).__getstate__())
    (group,) = state["param_groups"]
    group["layout"] = {"blocks": 2}
    del group["normuon_beta2"], group["skip_grad_norm_clip"]
    old = Muon.__new__(Muon)
    old.__setstate__(state)
    (group,) = old.param_groups
    assert (group["layout"], group["normuon_beta2"], group["momentum"]) == (Layout(blocks=2), None, 0.5)
    assert group["skip_grad_norm_clip"] is True
    old.step()


def test_names_are_compared_only_where_both_have_them():
    saved = stepped(weight(2, 3)).state_dict()
    named = Muon([("w", weight(2, 3))])
    named.load_state_dict(saved)
    assert named.param_groups[0]["param_names"] == ["w"]
    broken = stepped(("v", weight(2, 3))).state_dict()
    broken["state"][0]["momentum_buffer"] = torch.ones(3, 2)
    with pytest.raises(ValueError, match="state 'momentum_buffer' of parameter v"):
        Muon([weight(2, 3)]).load_state_dict(broken)
    other = stepped(("a", weight(2, 3)), ("b", weight(2, 3))).state_dict()
    with pytest.raises(ValueError, match=r"names its parameters otherwise: 'b' where the optimizer has 'c'$"):
        Muon([("a", weight(2, 3)), ("c", weight(2, 3))]).load_state_dict(other)


def test_a_step_may_be_a_number():
    """As torch.optim.AdamW's was, once."""
    saved = stepped(weight(3), algorithm="adamw").state_dict()
    saved["state"][0]["step"] = 7
    optimizer = Muon([weight(3)], algorithm="adamw")
    optimizer.load_state_dict(saved)
    (state,) = optimizer.state.values()
    assert state["step"].dtype == torch.float32 and state["step"].item() == 7


def test_a_parameter_that_waits_for_its_first_gradient_has_no_steps_yet():
    first, second = weight(3), weight(3)
    optimizer, other = Muon([first, second], algorithm="adamw"), Muon([weight(3), weight(3)], algorithm="adamw")
    first.grad = torch.ones(3)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    assert [state["step"].item() for state in other.state.values()] == [1, 0]


def test_adamw_has_no_variance_of_rows():
    (state,) = stepped(weight(3), algorithm="adamw", normuon_beta2=0.95).state.values()
    assert state.keys() == {"exp_avg", "exp_avg_sq", "step"}


def test_what_is_loaded_has_no_graph():
    saved = stepped(weight(2, 3)).state_dict()
    saved["state"][0]["momentum_buffer"].requires_grad_()
    optimizer = Muon([weight(2, 3)])
    optimizer.load_state_dict(saved)
    assert not any(T.requires_grad for state in optimizer.state.values() for T in state.values())


def test_what_is_no_state_is_told_by_its_type_and_groups_by_their_sizes():
    saved = stepped(weight(2, 3)).state_dict()
    saved["state"][0]["momentum_buffer"] = 7
    with pytest.raises(ValueError, match=r"state 'momentum_buffer' of parameter 0\.0 should have shape \(2, 3\) but is: int"):
        Muon([weight(2, 3)]).load_state_dict(saved)
    with pytest.raises(ValueError, match="group 0 of the state dict has 1 parameters but the optimizer's has 2"):
        Muon([weight(2, 3), weight(2, 3)]).load_state_dict(saved)


def test_a_state_of_half_precision_is_widened():
    """As torch.optim.Muon makes it for such a weight."""
    p, q = (nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16)) for _ in range(2))
    theirs, ours = torch.optim.Muon([p]), Muon([q])
    p.grad = torch.full_like(p, 0.3)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    accept.same_bits(actual=ours.state[q]["momentum_buffer"], expected=theirs.state[p]["momentum_buffer"].float())


@pytest.mark.parametrize("state", [None, [], [3]], ids=str)
def test_what_is_no_dict_of_states_is_refused(state):
    optimizer = Muon([weight(2, 3)])
    with pytest.raises(ValueError, match="state"):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def test_a_learning_rate_without_a_value_is_refused():
    optimizer = stepped(weight(2, 3))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = torch.empty((), device="meta")
    with pytest.raises(ValueError, match="state dict is not that of an optimizer"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (float("nan"), r"state 'step' of parameter 0\.0 should be a count >= 0 but is: nan"),
        (1j, r"state 'step' of parameter 0\.0 should be a count >= 0 but is: 1j"),
        ([3.0], r"state 'step' of parameter 0\.0 should be a count >= 0 but is: tensor\(\[3\.\]\)"),
        ([1.0, 2.0], r"state 'step' of parameter 0\.0 should be a count >= 0"),
    ],
)
def test_a_count_of_steps_is_a_count(count, message):
    saved = stepped(weight(3), algorithm="adamw").state_dict()
    saved["state"][0]["step"] = torch.tensor(count)
    with pytest.raises(ValueError, match=message):
        Muon([weight(3)], algorithm="adamw").load_state_dict(saved)


def test_averages_are_looked_at_also_after_the_count_of_steps():
    """As torch.optim.AdamW has them."""
    saved = stepped(weight(3), algorithm="adamw").state_dict()
    saved["state"][0] = {"step": torch.tensor(1.0), "exp_avg": torch.full((3,), float("nan")), "exp_avg_sq": torch.ones(3)}
    with pytest.raises(ValueError, match=r"state 'exp_avg' of parameter 0\.0 is not finite"):
        Muon([weight(3)], algorithm="adamw").load_state_dict(saved)


@pytest.mark.parametrize("key", ["momentum_buffer", "step"])
@pytest.mark.parametrize("far", [torch.Tensor.to_sparse, lambda T: T.to("meta")], ids=["sparse", "meta"])
def test_a_state_has_values(far, key):
    saved = stepped(weight(4, 3), layout=Layout(sections=(Section(2), Section(2, "adamw")))).state_dict()
    saved["state"][0][key] = far(saved["state"][0][key])
    with pytest.raises(ValueError, match=rf"state '{key}' of parameter 0\.0 should be a dense tensor with values but"):
        Muon([weight(4, 3)], layout=Layout(sections=(Section(2), Section(2, "adamw")))).load_state_dict(saved)


@pytest.mark.parametrize(("order", "group"), [([[0, 0], [2]], 0), ([[0, 1], [1]], 1)])
def test_no_state_is_for_two_parameters(order, group):
    def optimizer() -> Muon:
        return Muon([{"params": [weight(2, 3), weight(2, 3)]}, {"params": [weight(2, 3)]}])

    saved = optimizer().state_dict()
    for each, ids in zip(saved["param_groups"], order, strict=True):
        each["params"] = ids
    with pytest.raises(ValueError, match=rf"group {group} of the state dict has parameters that came before"):
        optimizer().load_state_dict(saved)


def test_a_layout_of_other_things_than_sections_is_refused_by_name():
    optimizer = stepped(("w", weight(4, 3)), layout=Layout(blocks=2))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["layout"] = Layout(sections=(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layout of parameter w with shape \(4, 3\) does not fit: sections should be Section"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    "options",
    [
        {"adamw_betas": (np.float64(0.5), np.float32(0.75))},
        {"adamw_betas": [0.5, 0.75]},
        {"ns_coefficients": [tuple(np.array([3.4445, -4.7750, 2.0315]))] * 5},
        {"layout": {"sections": [Section(2), Section(2, "adamw")]}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_inside_others_are_saved_as_plain_data(options):
    """NumPy's numbers and sections among them (STATE-3), and they are read again as what they were."""
    file = io.BytesIO()
    optimizer = stepped(weight(4, 3), **options)
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Muon([weight(4, 3)], **options)
    other.load_state_dict(saved)
    (option,) = options
    (was,), (now,) = ([group[option] for group in each.param_groups] for each in (optimizer, other))
    assert Layout.of(now) == Layout.of(was) if option == "layout" else now == was
