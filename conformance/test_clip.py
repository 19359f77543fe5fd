# SPDX-License-Identifier: Apache-2.0
"""CLIP: gradient clipping."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conformance import accept
from conformance.steps import parameters, separate, take
from conformance.strategies import DTYPES, HYPER, MIXED, seeds, shapes, tensor
from conformance.target import Target

NAN, INF = math.nan, math.inf
ADAMW = replace(HYPER, algorithm="adamw")
# Magnitudes of gradients that a dtype has; the first is subnormal.
MAGNITUDES = {
    torch.float64: (5e-324, 1e-309, 1e-300, 1e-160, 1.0, 1e160, 1e300),
    torch.float32: (1e-45, 1e-30, 1e-8, 1.0, 1e30, 3e38),
    torch.bfloat16: (1e-40, 1e-30, 1e-8, 1.0, 1e30, 3e38),
    torch.float16: (1e-7, 1e-2, 1.0, 6e4),
}
clip_norms = pytest.mark.parametrize("clip_norm", ["own", "global"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
max_norms = st.sampled_from([0.0, 1e-30, 2e-8, 1.0, 1e30, INF])
scales = st.sampled_from([1e-30, 2e-8, 1.0, 1e12, 1e30])
# torch has no floor; there should be something to say about its global norm all the same.
FLOOR = {"own": 0.01, "global": 0.0}


class Wrapper:
    """Forwards no attributes."""

    def __init__(self, optimizer, **declared):
        self.__dict__.update(declared, optimizer=optimizer, step=lambda: optimizer.step())


class Layerwise:
    """Steps its members directly."""

    def __init__(self, members, holder="optimizers", **declared):
        self.step = lambda: [member.step() for member in members]
        self.__dict__.update({holder: members, **declared})


class Watch(TorchDispatchMode):
    """Counts how often the gradients of some weights take part in an operation, and collectives."""

    def __init__(self, weights=()):
        super().__init__()
        self.storages, self.reads, self.collectives = {W.grad.untyped_storage().data_ptr() for W in weights}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = (each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor))
        self.reads += sum(each.untyped_storage().data_ptr() in self.storages for each in tensors)
        self.collectives += "c10d" in func.namespace
        return func(*args, **(kwargs or {}))


def weight(G: Tensor, device="cpu") -> nn.Parameter:
    """A weight of zeros with this gradient."""
    W = nn.Parameter(torch.zeros(G.shape, dtype=G.dtype, device=device))
    W.grad = G.clone().to(device)
    return W


def sgd(*weights, **declared):
    optimizer = torch.optim.SGD(weights, lr=0.125)
    optimizer.__dict__.update(declared)
    return optimizer


def exempt(*weights):
    return sgd(*weights, skip_grad_norm_clip=True)


def norm(*gradients: Tensor) -> float:
    return math.hypot(*(x for G in gradients for x in G.double().flatten().tolist()))


def close(actual: Tensor, expected: Tensor | float, dtype: torch.dtype) -> None:
    """accept.close, in a unit in which the squares of the largest entries are normal numbers."""
    __tracebackhide__ = True
    expected = torch.as_tensor(expected, dtype=torch.float64)
    unit = 2.0 ** (math.frexp(expected.abs().max().item())[1] - 1)
    accept.close(actual=torch.as_tensor(actual).cpu().double() / unit, expected=expected / unit, dtype=dtype)


@pytest.mark.clause("CLIP-1")
@clip_norms
@given(shape=shapes, seed=seeds, scale=scales, max_norm=max_norms)
def test_orthogonalized_parameters_are_out_of_reach(target: Target, device, clip_norm, shape, seed, scale, max_norm):
    named, others = (parameters([tensor(shape, seed)], device) for _ in range(2))
    clipped, free = (target.optimizer(each, HYPER) for each in (named, others))
    for i in range(2):
        G = tensor(shape, seed + 1 + i) * scale
        named[0][1].grad = G.clone().to(device)
        target.clip(clipped, max_norm, clip_norm, FLOOR[clip_norm])
        accept.same_bits(actual=named[0][1].grad, expected=G)
        clipped.step()
        take(free, others, [G])
        accept.same_bits(actual=named[0][1], expected=others[0][1])


@pytest.mark.clause("CLIP-1", "CLIP-2")
@pytest.mark.parametrize(("shape", "layout"), MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize("contiguous", [True, False])
@clip_norms
@given(seed=seeds, scale=scales, ratio=st.sampled_from([1e-3, 0.5, 2.0]))
def test_sections_are_exempt_one_by_one(target: Target, device, shape, layout, contiguous, clip_norm, seed, scale, ratio):
    G = tensor(shape, seed) * scale if contiguous else tensor(shape[::-1], seed).t() * scale
    own = [g for algorithm, g in separate(G, layout) if algorithm == "adamw"]
    W = weight(G, device)
    optimizer = target.optimizer([("w", W)], replace(HYPER, layout=layout))
    clipped = norm(*own) if clip_norm == "own" else norm(G)
    total, decisive, threshold = target.clip(optimizer, ratio * clipped, clip_norm, 0.0)
    for actual, expected in ((total, norm(G)), (decisive, clipped), (threshold, norm(*own))):
        close(actual, expected, torch.float32)
    for (algorithm, actual), (_, g) in zip(separate(W.grad.cpu(), layout), separate(G, layout), strict=True):
        if algorithm == "muon" or ratio > 1:
            accept.same_bits(actual=actual, expected=g)
        else:
            close(actual, g.double() * ratio, torch.float32)


@pytest.mark.clause("CLIP-2")
@dtypes
@clip_norms
@given(some=st.lists(shapes, min_size=1, max_size=3), seed=seeds, data=st.data())
def test_others_are_multiplied_by_the_coefficient(target: Target, device, dtype, clip_norm, some, seed, data):
    # The coefficient may be smaller than the numbers of the dtype, but gradients should not become so.
    pairs = [(m, ratio) for m in MAGNITUDES[dtype] for ratio in (1e-47, 1e-43, 1e-39, 1e-3, 0.1, 0.999, 2.0)]
    magnitude, ratio = data.draw(st.sampled_from([(m, r) for m, r in pairs if m * r > torch.finfo(dtype).smallest_normal]))
    floor = data.draw(st.sampled_from([0.0, 0.0, 0.25])) if clip_norm == "own" else 0.0
    gradients = [(tensor(shape, seed + i, torch.float64).clamp(-1, 1) * magnitude).to(dtype) for i, shape in enumerate(some)]
    weights, before = [weight(G, device) for G in gradients], norm(*gradients)
    for actual in target.clip(sgd(*weights), ratio * before, clip_norm, floor):
        close(actual, before, torch.float32)
    factor = max(floor, min(1.0, ratio))
    for W, G in zip(weights, gradients, strict=True):
        close(W.grad, G.double() * factor, dtype)
        if dtype.itemsize == 2 and factor == 0.999 and magnitude == 1:
            accept.rounded(before=G, actual=W.grad, expected=G.double() * factor)


@pytest.mark.clause("CLIP-2")
@dtypes
@clip_norms
@given(shape=shapes, seed=seeds, max_norm=max_norms, bad=st.sampled_from([NAN, INF, -INF]))
def test_without_a_finite_norm_nothing_is_scaled(target: Target, device, dtype, clip_norm, shape, seed, max_norm, bad):
    G, H = tensor(shape, seed, dtype), tensor(shape, seed + 1, dtype)
    G.view(-1)[-1] = bad
    W, V = weight(G, device), weight(H, device)
    target.clip(sgd(W, V), max_norm, clip_norm, FLOOR[clip_norm])
    accept.same_bits(actual=W.grad, expected=G)
    accept.same_bits(actual=V.grad, expected=H)


@pytest.mark.clause("CLIP-2")
@clip_norms
@given(shape=shapes, seed=seeds, scale=scales, max_norm=max_norms, floor=st.sampled_from([0.0, 0.01, 1.0]))
def test_a_chain_clips_alike(target: Target, device, clip_norm, shape, seed, scale, max_norm, floor):
    G, H = tensor(shape, seed), tensor(shape, seed + 1) * scale
    here, there = ((weight(G, device), weight(H, device)) for _ in range(2))
    chain = target.chain([sgd(here[0]), exempt(here[1])], clip_grad=max_norm, clip_norm=clip_norm, floor=floor)
    chain.step()
    target.clip(target.chain([sgd(there[0]), exempt(there[1])]), max_norm, clip_norm, floor)
    for a, b in zip(here, there, strict=True):
        accept.same_bits(actual=a.grad, expected=b.grad)
        accept.same_bits(actual=a, expected=-0.125 * b.grad)


@pytest.mark.clause("CLIP-3")
@pytest.mark.parametrize("holder", ["optimizers", "chained_optimizers"])
@pytest.mark.parametrize("where", ["among others", "alone", "in a wrapper"])
def test_a_container_that_says_more_than_its_members_is_refused(validating: Target, holder, where):
    W, V = weight(tensor((4, 6), 0)), weight(tensor((4, 6), 1))
    members, says = [sgd(W)] if where == "alone" else [exempt(V), sgd(W)], {"skip_grad_norm_clip": True}
    wrapped = where == "in a wrapper"
    it = Wrapper(Layerwise(members, holder), **says) if wrapped else Layerwise(members, holder, **says)
    for call in (lambda: validating.chain([it]), lambda: validating.clip(it, 0.5, "own", 0.0)):
        accept.refuses(call, ValueError, type(it).__name__, *says, unchanged=lambda: [W.grad.clone(), V.grad.clone()])


@pytest.mark.clause("CLIP-4")
@dtypes
@given(some=st.lists(shapes, min_size=1, max_size=3), seed=seeds, data=st.data())
def test_norms_neither_underflow_nor_overflow(target: Target, device, dtype, some, seed, data):
    signs = [tensor(shape, seed + i, torch.float64).sign() for i, shape in enumerate(some)]
    gradients = [(sign * data.draw(st.sampled_from([0.0, *MAGNITUDES[dtype]]))).to(dtype) for sign in signs]
    first, *others = (weight(G, device) for G in gradients)
    optimizer = sgd(*others, nn.Parameter(torch.zeros(3, 5, device=device)))
    optimizer.add_param_group({"params": [first], "skip_grad_norm_clip": True})
    total, clipped, threshold = target.clip(optimizer, INF, "global", 0.0)
    accuracy = torch.float64 if dtype == torch.float64 else torch.float32
    for actual, counted in ((total, gradients), (clipped, gradients), (threshold, gradients[1:])):
        close(actual, norm(*counted), accuracy)
    if dtype != torch.float64:  # whose squares torch lets overflow
        close(total, torch.nn.utils.get_total_norm([G.double() for G in gradients]), torch.float32)


@pytest.mark.clause("CLIP-5")
@pytest.mark.parametrize("together", ["in one optimizer", "in one parameter", "in a chain"])
@given(shape=shapes, seed=seeds, factor=st.sampled_from([0.0, 1e-30, 1e12, 1e30]), max_norm=max_norms)
def test_exempt_gradients_do_not_move_the_others(target: Target, device, together, shape, seed, factor, max_norm):
    def adamw(scale: float) -> list[Tensor]:
        W, G, H = tensor(shape, seed), tensor(shape, seed + 1) * scale, tensor(shape, seed + 2)
        if together == "in one parameter":
            named, gradients = parameters([torch.cat([W, W])], device), [torch.cat([G, H])]
            rows = [{"rows": len(W)}, {"rows": len(W), "algorithm": "adamw"}]
            optimizer = target.optimizer(named, replace(HYPER, layout={"sections": rows}))
        else:
            named, gradients = parameters([W, W], device), [G, H]
            optimizer = target.optimizer(named[:1], HYPER)
        if together == "in one optimizer":
            optimizer.add_param_group(target.group(named[1:], ADAMW))
        if together == "in a chain":
            optimizer = target.chain([optimizer, torch.optim.AdamW([named[1][1]])])
        for _ in range(2):
            for (_, p), each in zip(named, gradients, strict=True):
                p.grad = each.clone().to(device)
            target.clip(optimizer, max_norm, "own", 0.0)
            optimizer.step()
        last = named[-1][1]
        return [last.detach()[-len(W) :], last.grad[-len(W) :]]

    for actual, expected in zip(adamw(factor), adamw(1.0), strict=True):
        accept.same_bits(actual=actual, expected=expected)


@pytest.mark.clause("CLIP-6")
@clip_norms
@given(some=st.lists(shapes, min_size=1, max_size=3), seed=seeds, scale=scales)
def test_threshold_is_the_total_of_what_is_not_exempt(target: Target, device, clip_norm, some, seed, scale):
    weights = [weight(tensor(shape, seed + i) * scale, device) for i, shape in enumerate(some)]
    total, _, threshold = target.clip(exempt(*weights), 1.0, clip_norm, 0.0)
    accept.same_bits(actual=threshold, expected=torch.zeros_like(total))
    total, _, threshold = target.clip(sgd(*weights), 1.0, clip_norm, 0.0)
    accept.same_bits(actual=threshold, expected=total)
    chain = target.chain([sgd(W) for W in weights], grad_norm_skip_threshold=1e300, log_grad_norm=True)
    chain.step()
    total, _, threshold = target.norms(chain)
    accept.same_bits(actual=threshold, expected=total)
