# SPDX-License-Identifier: Apache-2.0
"""CLIP: chains, whose members may be sharded over process groups."""

import copy
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conformance import accept
from conformance.strategies import HYPER, seeds, shapes, tensor
from conformance.target import Target, Unsupported, load
from conformance.test_clip import ADAMW, INF, NAN, Layerwise, Watch, Wrapper, close, exempt, norm, sgd, weight

pytestmark = pytest.mark.filterwarnings("ignore:.*has skipped:RuntimeWarning")


def muon(target, W):
    return target.optimizer([("w", W)], HYPER)


DECLARING = {
    "attribute": lambda _, W: exempt(W),
    "group": lambda _, W: torch.optim.SGD([{"params": [W], "skip_grad_norm_clip": True}], lr=0.125),
    "muon": muon,
    "in wrappers": lambda target, W: Wrapper(Wrapper(muon(target, W))),
    "of a wrapper": lambda _, W: Wrapper(Wrapper(sgd(W)), skip_grad_norm_clip=True),
    "in a container": lambda target, W: Layerwise([Wrapper(muon(target, W))]),
    "in a container of another kind": lambda _, W: Layerwise([exempt(W)], "chained_optimizers", skip_grad_norm_clip=True),
    "in chains": lambda target, W: target.chain([Wrapper(target.chain([Layerwise([exempt(W)])]))]),
}
SILENT = {
    "sgd": lambda _, W: sgd(W),
    "adamw": lambda _, W: torch.optim.AdamW([W]),
    "torch's": lambda _, W: torch.optim.Muon([W]),
    "denied": lambda _, W: sgd(W, skip_grad_norm_clip=False),
    "a name": lambda _, W: Wrapper(type("MuonLike", (torch.optim.SGD,), {})([W], lr=0.125)),
    "in a container": lambda _, W: Layerwise([sgd(W)], "chained_optimizers"),
}


@pytest.mark.clause("CLIP-3")
@pytest.mark.parametrize("inside", ["a chain", "a container", "a chain in a chain"])
@pytest.mark.parametrize(("declares", "who"), [(True, who) for who in DECLARING] + [(False, who) for who in SILENT])
def test_what_declares_is_exempt_and_nothing_else(target: Target, device, inside, declares, who):
    G, H = tensor((4, 6), 0), tensor((4, 6), 1)
    free, clipped = weight(G, device), weight(H, device)
    members = [DECLARING[who](target, free), sgd(clipped)] if declares else [exempt(free), SILENT[who](target, clipped)]
    if inside != "a chain":
        members = [Layerwise(members) if inside == "a container" else target.chain(members)]
    target.chain(members, clip_grad=0.5).step()
    accept.same_bits(actual=free.grad, expected=G)
    close(clipped.grad, H.double() * (0.5 / norm(H)), torch.float32)
    assert free.detach().any() and clipped.detach().any(), "not every member was stepped"


STEPPED = {
    "sgd": lambda _, named: torch.optim.SGD(named, lr=0.1, momentum=0.9),
    "adamw": lambda _, named: torch.optim.AdamW(named),
    "fused adamw": lambda _, named: torch.optim.AdamW(named, fused=True),
    "the target's": lambda target, named: target.optimizer(named, ADAMW),
}
stepped = pytest.mark.parametrize("kind", STEPPED)


class Scene:
    """A chain of a target's Muon, an optimizer of some kind and, before them, an exempt one; a weight each."""

    def __init__(self, target: Target, kind: str, device, seed: int, shape=(4, 6), **policy):
        self.named = [(f"w{i}", nn.Parameter(tensor(shape, seed + i).to(device))) for i in range(3)]
        first, second, third = ([each] for each in self.named)
        self.members = [target.optimizer(first, HYPER), STEPPED[kind](target, second), exempt(third[0][1])]
        # SGD cannot be told to skip a step; without it a chain may leave the decision on the device.
        self.chain = target.chain(self.members[::-1] if kind == "sgd" else self.members[:2], **policy)

    def step(self, gradients):
        for (_, p), G in zip(self.named, gradients, strict=True):
            p.grad = G.clone().to(p.device)
        return self.chain.step(lambda: 7.0)

    def bits(self):
        states = [copy.deepcopy(dict(o.state.get(p, {}))) for o, (_, p) in zip(self.members, self.named, strict=True)]
        return [p.detach().clone() for _, p in self.named], states


@pytest.mark.clause("CLIP-7")
@stepped
@given(shape=shapes, seed=seeds, bad=st.sampled_from([1e9, NAN, INF, -INF]))
def test_a_step_above_the_threshold_is_none(target: Target, device, kind, shape, seed, bad):
    skipping, other = (Scene(target, kind, device, seed, shape, clip_grad=0.5, grad_norm_skip_threshold=1e6) for _ in range(2))
    G, H, spoiled = ([tensor(shape, seed + 3 * i + j) for j in range(3)] for i in (1, 2, 3))
    spoiled[1].view(-1)[0] = bad
    skipping.step(G), other.step(G)
    before = skipping.bits()
    assert skipping.step(spoiled) == 7.0 and target.skipped(skipping.chain) == {"threshold": 1}
    assert accept.equal(skipping.bits(), before)
    for (_, p), expected in zip(skipping.named, spoiled, strict=True):
        accept.same_bits(actual=p.grad, expected=expected)
    assert skipping.step(H) == other.step(H) == 7.0 and target.skipped(skipping.chain) == {"threshold": 1}
    assert accept.equal(skipping.bits(), other.bits()) and not accept.equal(skipping.bits(), before)


@pytest.mark.clause("CLIP-7")
@stepped
@given(seed=seeds, size=st.sampled_from([1e-40, 1e-20, 1.0, 3e20]))
def test_a_step_at_the_threshold_is_taken(target: Target, device, kind, seed, size):
    G = torch.zeros(4, 6)
    G[1, 2] = size  # the norm, exactly
    for threshold, skipped in ((G.max().item(), 0), (math.nextafter(G.max().item(), 0.0), 1)):
        scene = Scene(target, kind, device, seed, grad_norm_skip_threshold=threshold)
        before = scene.bits()[0]
        scene.step([tensor((4, 6), seed), G, tensor((4, 6), seed)])
        assert target.skipped(scene.chain) == {"threshold": skipped}
        assert accept.equal(scene.bits()[0][:2], before[:2]) == bool(skipped)


@pytest.mark.clause("CLIP-5", "CLIP-7")
@pytest.mark.filterwarnings("ignore:.*skipped:RuntimeWarning")
@stepped
@pytest.mark.parametrize("bad", [1e30, NAN, INF])
def test_exempt_gradients_have_no_part_in_the_threshold(target: Target, device, kind, bad):
    G, results = [tensor((4, 6), i) for i in range(3)], []
    for factor in (1.0, bad):
        scene = Scene(target, kind, device, 0, clip_grad=0.5, grad_norm_skip_threshold=1e6)
        for _ in range(2):
            scene.step([G[0] * factor, G[1], G[2] * factor])
        assert target.skipped(scene.chain) == {"threshold": 0}
        results.append((scene.bits()[0][1], scene.bits()[1][1], scene.named[1][1].grad))
    assert accept.equal(*results)


# What a chain is told, and whether it needs a norm where something is not exempt, and where nothing is.
POLICIES = [
    ({"clip_grad": 0.5, "grad_norm_skip_threshold": 1e9}, True, False),
    ({"clip_grad": 0.5, "clip_norm": "global"}, True, False),
    ({"grad_norm_skip_threshold": 1e9}, True, False),
    ({"grad_norm_skip_threshold": INF}, False, False),
    ({"log_grad_norm": True}, True, True),
]


@pytest.mark.clause("CLIP-8")
@pytest.mark.parametrize("all_exempt", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_no_norm_that_nothing_uses(target: Target, device, all_exempt, policy):
    reads = []
    for chained in (False, True):
        W, V = weight(tensor((4, 6), 0), device), weight(tensor((4, 6), 1), device)
        members = [muon(target, W), exempt(V) if all_exempt else sgd(V)]
        chain = target.chain(members, **policy[0])
        with Watch([W, V]) as watch:
            for each in [chain] if chained else members:
                each.step()
        reads.append(watch.reads)
    assert W.detach().any() and V.detach().any() and reads[0] > 0
    assert (reads[1] > reads[0]) == policy[1 + all_exempt], f"read {reads[1]} times in a chain, {reads[0]} without"
    assert policy[1 + all_exempt] or all(each is None for each in target.norms(chain)), "a norm of nothing was computed"


REFUSED = [
    (ValueError, ["norm", "-1.0"], lambda t, o, _: t.clip(o, -1.0, "own", 0.0)),
    (ValueError, ["floor", "1.5"], lambda t, o, _: t.clip(o, 1.0, "own", 1.5)),
    (ValueError, ["clip_norm", "both"], lambda t, o, _: t.clip(o, 1.0, "both", 0.0)),
    (TypeError, ["optimizer"], lambda t, _, W: t.clip([W], 1.0, "own", 0.0)),
    (TypeError, ["optimizer"], lambda t, o, W: t.chain([o, [W]])),
    (ValueError, ["clip_grad", "nan"], lambda t, o, _: t.chain([o], clip_grad=NAN)),
    (ValueError, ["grad_norm_skip_threshold", "-1.0"], lambda t, o, _: t.chain([o], grad_norm_skip_threshold=-1.0)),
    (ValueError, ["grad_norm_skip_threshold", "nan"], lambda t, o, _: t.chain([o], grad_norm_skip_threshold=NAN)),
    (ValueError, ["floor", "-0.5"], lambda t, o, _: t.chain([o], floor=-0.5)),
    (ValueError, ["floor", "nan"], lambda t, o, _: t.chain([o], floor=NAN)),
    (ValueError, ["clip_norm", "both"], lambda t, o, _: t.chain([o], clip_norm="both")),
    (ValueError, ["parameter", "more than one"], lambda t, o, W: t.chain([o, Wrapper(Layerwise([sgd(W)]))])),
    (ValueError, ["chain", "clip_grad"], lambda t, o, _: t.chain([t.chain([o], clip_grad=1.0)])),
    (ValueError, ["chain", "clip_grad"], lambda t, o, _: t.chain([Wrapper(t.chain([o], grad_norm_skip_threshold=1.0))])),
    (ValueError, ["chain", "clip_grad"], lambda t, o, _: t.chain([Layerwise([t.chain([t.chain([o], clip_grad=1.0)])])])),
]


@pytest.mark.clause("CLIP-9")
@pytest.mark.parametrize(("error", "words", "call"), REFUSED)
def test_what_means_nothing_is_refused(validating: Target, error, words, call):
    W = weight(tensor((4, 6), 0))
    optimizer = sgd(W)
    accept.refuses(
        lambda: call(validating, optimizer, W), error, *words, unchanged=lambda: (W.detach().clone(), W.grad.clone())
    )


# Rank -> its members without gradients.
ABSENT = ({}, {0: [1, 2], 2: [3]}, {rank: range(5) for rank in range(3)})
CASES = [
    (policy, absent) for policy, *_ in [*POLICIES, ({"clip_grad": 0.5, "grad_norm_skip_threshold": 7.0},)] for absent in ABSENT
]


def gradients(rank: int, absent) -> list[torch.Tensor | None]:
    """Of the five members on one of three ranks."""
    drawn = [tensor((3, 2 + i), 10 * rank + i) * (1.0 if i else 1e30) for i in range(5)]
    return [None if i in absent.get(rank, ()) else G for i, G in enumerate(drawn)]


def sharded(rank: int, path: str, folder: str) -> None:
    """What one of three processes finds: norms, gradients, collectives and skipped steps for each case."""
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=20), rank=rank, world_size=3)
    pair, alone, silent = dist.new_group([0, 1]), dist.new_group([2]), dist.new_group([1, 2])
    groups = [*[dist.group.WORLD] * 2, alone if rank == 2 else pair, None, silent if rank else None]
    torch.set_num_threads(1)
    target, found = load(path), []
    for policy, absent in CASES:
        weights = [weight(tensor((3, 2 + i), 0)) for i in range(5)]
        for W, G in zip(weights, gradients(rank, absent), strict=True):
            W.grad = G
        members = muon(target, weights[0]), *map(sgd, weights[1:4]), exempt(weights[4])
        chain = target.chain(members, **policy, process_groups=groups)
        with Watch() as watch:
            chain.step()
        found.append((tuple(target.norms(chain)), [W.grad for W in weights], watch.collectives, target.skipped(chain)))
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.clause("CLIP-10")
def test_shards_count_as_one(target: Target, request, tmp_path):
    try:
        target.chain([sgd(weight(tensor((4, 6), 0)))], process_groups=[None])
    except TypeError as error:
        raise Unsupported("its chains have no process groups") from error
    torch.multiprocessing.spawn(sharded, (request.config.getoption("--target"), str(tmp_path)), nprocs=3)
    for rank, partners in ((0, [0, 1]), (1, [0, 1]), (2, [2])):
        for (policy, absent), (norms, after, collectives, skipped) in zip(CASES, torch.load(tmp_path / str(rank)), strict=True):
            every = [gradients(r, absent) for r in range(3)]
            own = [every[r][i] for i, ranks in ((1, range(3)), (2, partners), (3, [rank])) for r in ranks]
            others = [every[r][i] for i, ranks in ((0, range(3)), (4, [1, 2] if rank else [0])) for r in ranks]
            threshold, total = (norm(*(G for G in some if G is not None)) for some in (own, own + others))
            clipped = total if policy.get("clip_norm") == "global" else threshold
            limit, logs = policy.get("grad_norm_skip_threshold"), policy.keys() & {"log_grad_norm", "clip_norm"}
            assert collectives == 2 * (limit != INF) + bool(rank and logs), f"{collectives} on rank {rank}: {policy}"
            assert skipped == {"threshold": int(threshold > (limit or INF))}
            for actual, expected in zip(norms, (total, clipped, threshold), strict=True):
                if actual is not None:
                    close(actual, expected, torch.float32)
            factor = min(1.0, policy.get("clip_grad", INF) / clipped) if clipped and not skipped["threshold"] else 1.0
            for G, before in zip(after[1:4], every[rank][1:4], strict=True):
                if before is not None:
                    close(G, before.double() * factor, torch.float32)
