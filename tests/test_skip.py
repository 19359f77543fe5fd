# SPDX-License-Identifier: Apache-2.0
"""Skipped steps from inside impl: counters, the dump, copies, and what an optimizer with ranks is made of."""

import copy
import pickle
import warnings
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from impl import ChainedOptimizer, Layout, Muon, Section, skip, stages

pytestmark = pytest.mark.filterwarnings("ignore:Muon has skipped:RuntimeWarning")
NAN = float("nan")


def one_step(optimizer: Muon, G: torch.Tensor) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = G.clone()
    optimizer.step()


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=10))
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("magnitudes", "bad"), [([], False), ([0.0, 3e38], False), ([1.0, NAN], True), ([float("inf")], True), ([-1.0], False)]
)
def test_nonfinite(magnitudes, bad):
    found = skip.nonfinite([torch.tensor(m) for m in magnitudes], torch.device("cpu"))
    assert (found.shape, found.dtype, bool(found)) == ((), torch.bool, bad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
def test_the_largest_magnitude_shows_what_is_not_finite(dtype, value):
    T = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert skip.largest(T).isfinite() and skip.largest(torch.zeros(0, 3)) == 0
    T[1, 7] = value
    assert not skip.largest(T).isfinite() and not skip.largest(T.mT).isfinite()


@pytest.mark.parametrize("group", [None, "alone"])
@pytest.mark.parametrize("code", range(4))
def test_agreeing_alone_is_ones_own_opinion(group, code, request):
    process_group = request.getfixturevalue(group) if group else None
    result = skip.agree(torch.tensor(code, dtype=torch.uint8), process_group)
    assert (result.dtype, result.nbytes, int(result)) == (torch.uint8, 1, code)


def test_counters_are_tensors():
    optimizer = Muon([nn.Parameter(torch.ones(2, 3))])
    one_step(optimizer, torch.full((2, 3), NAN))
    assert {reason: (count.dtype, int(count)) for reason, count in optimizer.skipped.items()} == {
        "orthogonalization": (torch.int64, 0),
        "gradient": (torch.int64, 1),
        "found_inf": (torch.int64, 0),
    }


def test_copies_keep_the_guard(alone):
    optimizer = Muon([nn.Parameter(torch.ones(2, 3))], process_group=alone, skip_nonfinite=True)
    one_step(optimizer, torch.full((2, 3), NAN))
    twin = copy.deepcopy(optimizer)
    one_step(twin, torch.full((2, 3), NAN))
    assert (int(optimizer.skipped["gradient"]), int(twin.skipped["gradient"])) == (1, 2)
    assert twin.guard.process_group is alone


def test_a_pickle_keeps_the_guard():
    optimizer = Muon([nn.Parameter(torch.ones(2, 3))], skip_nonfinite=False)
    again = pickle.loads(pickle.dumps(optimizer))  # noqa: S301
    one_step(again, torch.full((2, 3), NAN))
    assert again.param_groups[0]["params"][0].isnan().any()


@pytest.mark.parametrize("value", ["yes", None, 1])
def test_what_is_no_flag_is_refused(value):
    with pytest.raises(ValueError, match=f"skip_nonfinite should be True or False but is: {value!r}"):
        Muon([nn.Parameter(torch.ones(2, 3))], skip_nonfinite=value)


def test_an_exception_in_a_step_changes_nothing(monkeypatch):
    from impl import stages

    p, q = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    optimizer = Muon([p, q])
    one_step(optimizer, torch.ones(2, 3))
    before = copy.deepcopy([p, q, *(state["momentum_buffer"] for state in optimizer.state.values())])
    calls = iter([stages.orthogonalize])

    def out_of_memory(*args):
        if (healthy := next(calls, None)) is not None:
            return healthy(*args)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(stages, "orthogonalize", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        one_step(optimizer, torch.ones(2, 3))
    after = [p, q, *(state["momentum_buffer"] for state in optimizer.state.values())]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_muon_declares_what_it_exempts_from_clipping():
    sections = Layout(sections=(Section(1), Section(1, algorithm="adamw")))
    groups = [{"params": [nn.Parameter(torch.ones(2, 3))]}]
    assert Muon(groups).skip_grad_norm_clip
    groups += [{"params": [nn.Parameter(torch.ones(2, 3))], "layout": sections}]
    groups += [{"params": [nn.Parameter(torch.ones(2))], "algorithm": "adamw"}]
    groups += [{"params": [nn.Parameter(torch.ones(2, 3))], "skip_grad_norm_clip": False}]
    optimizer = Muon(groups)
    assert not optimizer.skip_grad_norm_clip
    assert [group["skip_grad_norm_clip"] for group in optimizer.param_groups] == [True, False, False, False]
    last = [line.split()[-1] for line in optimizer.report().splitlines()[2:6]]
    assert last == ["none", "adamw", "all", "all"]
    saved = optimizer.state_dict()
    assert saved["param_groups"][1]["layout"] == asdict(sections)
    for group in saved["param_groups"]:
        del group["skip_grad_norm_clip"]  # a checkpoint from before there was such a thing
    optimizer.load_state_dict(saved)
    assert [group["skip_grad_norm_clip"] for group in optimizer.param_groups] == [True, False, False, False]


@pytest.mark.parametrize(("before", "after"), [(None, 0.95), (0.95, None)])
def test_options_that_would_need_other_state_are_refused_in_the_step(before, after):
    p = nn.Parameter(torch.ones(2, 3))
    optimizer = Muon([p], normuon_beta2=before)
    one_step(optimizer, torch.ones(2, 3))
    optimizer.param_groups[0]["normuon_beta2"], W = after, p.detach().clone()
    with pytest.raises(RuntimeError, match="variance_buffer"):
        one_step(optimizer, torch.ones(2, 3))
    assert torch.equal(p, W)


def test_a_full_disk_does_not_stop_the_training(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    optimizer = Muon([nn.Parameter(torch.ones(2, 3))], dump_nonfinite=tmp_path / "dump.pt")
    with pytest.warns(RuntimeWarning, match="dump_nonfinite could not be written: no space left"):
        one_step(optimizer, torch.full((2, 3), NAN))
    assert int(optimizer.skipped["gradient"]) == 1


def test_a_step_does_not_wait_for_the_counters_and_a_state_dict_does(monkeypatch):
    waits = []
    monkeypatch.setattr(skip.Tally, "look", lambda self, wait, speak=True: waits.append(wait))
    optimizer = Muon([nn.Parameter(torch.ones(2, 3))])
    chain = ChainedOptimizer([optimizer])
    one_step(optimizer, torch.ones(2, 3))
    assert waits and not any(waits)
    waits.clear()
    optimizer.state_dict()
    optimizer.report()
    assert waits == [True, True]
    waits.clear()
    chain.step()
    assert waits and not any(waits)
    waits.clear()
    chain.state_dict()
    chain.report()
    assert waits == [True, True, True]


def test_counters_that_were_read_stay_as_they_were():
    optimizer = Muon([nn.Parameter(torch.ones(2, 3))])
    before = optimizer.skipped["gradient"]
    one_step(optimizer, torch.full((2, 3), NAN))
    assert (int(before), int(optimizer.skipped["gradient"])) == (0, 1)


def test_a_loss_scaler_may_say_zero_as_a_number():
    """As GradScaler does for an optimizer without gradients beside one that has some."""
    p, q = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    with_gradient, without = Muon([p]), Muon([q])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(p.sum()).backward()
    scaler.step(with_gradient)
    scaler.step(without)
    scaler.update()
    assert not torch.equal(p, q)
    assert torch.equal(q, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("option", "value", "word"), [("lr", NAN, "nan"), ("lr", None, "None"), ("adjust_lr_fn", "match_rms", "match_rms")]
)
def test_options_spoilt_after_construction_stop_the_step_before_anything_moves(option, value, word):
    groups = [{"params": [nn.Parameter(torch.ones(2, 3))]} for _ in range(2)]
    optimizer = Muon(groups)
    optimizer.param_groups[1][option] = value
    with pytest.raises(ValueError, match=word):
        one_step(optimizer, torch.ones(2, 3))
    assert all(torch.equal(p, torch.ones(2, 3)) for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("shape", [(4, 0), (0, 4), (0, 0)])
def test_normuon_has_nothing_to_say_of_empty_matrices(shape):
    optimizer = Muon([nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(3, 3))], normuon_beta2=0.95)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert [tuple(state["variance_buffer"].shape) for state in optimizer.state.values()] == [(shape[0], 1), (3, 1)]
    assert all(state["variance_buffer"].isfinite().all() for state in optimizer.state.values())


def test_an_embedding_row_without_gradient_stays_finite():
    table = nn.Embedding(4, 2)
    optimizer = Muon(table.parameters(), algorithm="adamw", adamw_eps=2.0**-126)
    table(torch.tensor([0])).sum().backward()
    optimizer.step()
    assert table.weight.isfinite().all()


def warnings_of(optimizer: Muon, G: torch.Tensor) -> list[str]:
    """What a step and the look after it say."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        one_step(optimizer, G)
        optimizer.state_dict()
    return [str(each.message) for each in found]


def test_a_warning_is_of_the_line_that_looks():
    optimizer = Muon([nn.Parameter(torch.ones(2, 3))])
    one_step(optimizer, torch.full((2, 3), NAN))
    with pytest.warns(RuntimeWarning, match="has skipped 1 step") as found:
        optimizer.state_dict()
    assert found[0].filename == __file__


def test_a_warning_counts_each_reason_by_itself(monkeypatch):
    optimizer = Muon([nn.Parameter(torch.ones(2, 3))])
    warnings_of(optimizer, torch.full((2, 3), NAN))
    healthy = stages.orthogonalize
    monkeypatch.setattr(stages, "orthogonalize", lambda *args: healthy(*args) * NAN)
    (message,) = warnings_of(optimizer, torch.ones(2, 3))
    assert message == (
        "Muon has skipped 2 steps: in 1 an orthogonalized update was not finite, and no weight has changed; in 1 a gradient, "
        "or an average made of it, was not finite, and nothing has changed (see Muon.skipped)"
    )


def test_a_warning_tells_what_happened_and_a_copy_does_not_repeat_it():
    optimizer = Muon([nn.Parameter(torch.ones(2, 3))])
    (message,) = warnings_of(optimizer, torch.full((2, 3), NAN))
    assert message.startswith("Muon has skipped 1 step: in 1 a gradient") and ";" not in message and " 0 " not in message
    for each in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):  # noqa: S301
        assert warnings_of(each, torch.ones(2, 3)) == []
        (message,) = warnings_of(each, torch.full((2, 3), NAN))
        assert "has skipped 2 steps" in message


def test_a_loss_scale_may_be_a_large_number():
    found = []
    for scale in (None, 2.0**20):
        p = nn.Parameter(torch.ones(2, 3))
        optimizer = Muon([p])
        optimizer.grad_scale = scale
        one_step(optimizer, torch.arange(6.0).view(2, 3) * (scale or 1.0))
        found.append(p.detach())
    assert found[0].equal(found[1]) and not found[0].eq(1).all()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_what_loss_scalers_tell_is_one_element(shape):
    p = nn.Parameter(torch.ones(()))
    optimizer = Muon([p], algorithm="adamw")
    for found, moves in ((0.0, True), (1.0, False), (0.0, True)):
        optimizer.grad_scale, optimizer.found_inf, before = torch.full(shape, 4.0), torch.full(shape, found), p.detach().clone()
        one_step(optimizer, torch.tensor(4.0))
        assert (p < before) == moves
        assert all(T.shape == () for T in optimizer.state[p].values())


@pytest.mark.parametrize("told", [NAN, -1.0, torch.tensor(NAN)], ids=str)
@pytest.mark.parametrize("guarded", [True, False])
def test_whatever_is_not_zero_is_found(told, guarded):
    p = nn.Parameter(torch.ones(2, 3))
    optimizer = Muon([p], skip_nonfinite=guarded)
    optimizer.found_inf = told
    one_step(optimizer, torch.ones(2, 3))
    assert int(optimizer.skipped["found_inf"]) == 1 and p.eq(1).all()


def test_a_late_look_counts_powers_of_two():
    """With 3, 4, 5, 6, 7 and 8 failures."""
    tally, heard = skip.Tally("Test", {1: "in {}"}, 2), []
    for _ in range(2):
        tally.count(torch.tensor(1))
    for _ in range(6):
        tally.count(torch.tensor(1))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            tally.look(wait=True)
        heard.append(len(found))
    assert heard == [1, 1, 0, 0, 0, 1]


def test_numbers_are_told_in_full():
    p = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    optimizer = Muon([p], momentum=0.0)
    optimizer.grad_scale = 0.1
    one_step(optimizer, torch.ones(2, 3, dtype=torch.float64))
    assert optimizer.state[p]["momentum_buffer"].eq(1 / 0.1).all()
    optimizer.found_inf = 1e-50  # not zero
    one_step(optimizer, torch.ones(2, 3, dtype=torch.float64))
    assert int(optimizer.skipped["found_inf"]) == 1


def test_what_others_have_not_found_we_find_still():
    optimizer = Muon([nn.Parameter(torch.ones(2, 3))])
    optimizer.found_inf = torch.zeros(())
    one_step(optimizer, torch.full((2, 3), NAN))
    assert {reason: int(count) for reason, count in optimizer.skipped.items() if count} == {"gradient": 1}


@pytest.mark.parametrize("where", [0, 1])
def test_weights_of_two_dtypes_are_one_decision(where):
    ps = [nn.Parameter(torch.ones(2, 3, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer = Muon(ps)
    for i, p in enumerate(ps):
        p.grad = torch.full_like(p, NAN if i == where else 1.0)
    optimizer.step()
    assert int(optimizer.skipped["gradient"]) == 1 and all(p.eq(1).all() for p in ps)


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_step_asks_no_tensor_whether_it_is_true(algorithm, monkeypatch):
    """Which on a GPU would wait for it."""
    p = nn.Parameter(torch.ones(2, 3))
    options = {name: torch.tensor(value) for name, value in (("lr", 0.1), ("weight_decay", 0.1), ("momentum", 0.9))}
    optimizer = Muon([p], algorithm=algorithm, **options)
    p.grad, optimizer.grad_scale, optimizer.found_inf = torch.ones(2, 3), torch.tensor(4.0), torch.tensor(0.0)

    def asked(T: torch.Tensor) -> bool:
        raise AssertionError(f"asked whether {T!r} is true")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", asked)
        optimizer.step()
    assert p.ne(1).all()
