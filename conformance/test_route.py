# SPDX-License-Identifier: Apache-2.0
"""ROUTE: which algorithm steps which parameter."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conformance import accept
from conformance.target import Target

MUON, ADAMW = ("muon", None), ("adamw", None)
PLAIN = {"blocks": 1, "columns": 1, "groups": 1, "sections": (), "flatten": False}


class Language(nn.Module):
    """An embedding, a body and a head over 11 symbols."""

    def __init__(self, body: nn.Module, tied: bool = False, config: object = None) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 8), body, nn.Linear(8, 11)
        if tied:
            self.head.weight = self.embed.weight
        self.config = config


class Owner(nn.Module):
    """A module that nobody knows, with one weight."""

    def __init__(self, *shape: int, **attributes: object) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape))
        for name, value in attributes.items():
            setattr(self.w, name, value)


def body(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), *modules)


OUTSIDE = {"embed.weight": ADAMW, "head.weight": ADAMW, "head.bias": ADAMW, "body.0.weight": MUON, "body.0.bias": ADAMW}


def layout(**fields: object) -> tuple[str, dict]:
    return "muon", {**PLAIN, **fields}


@pytest.mark.clause("ROUTE-1", "ROUTE-2", "ROUTE-8")
def test_roles(target: Target):
    model = Language(
        body(
            nn.LayerNorm(8),
            nn.Conv2d(8, 6, (3, 2)),
            nn.Conv1d(8, 8, 4, groups=8),
            nn.Conv1d(8, 4, 3, groups=2),
            nn.MultiheadAttention(8, 2),
            nn.RMSNorm(8),
            nn.Conv3d(8, 6, (1, 2, 3), bias=False),
            nn.LayerNorm((4, 8), bias=False),
            Owner(8, 8, use_muon=True),
            nn.Conv2d(1, 6, 3, bias=False),  # as many groups as channels, and yet it mixes
        )
    )
    expected = OUTSIDE | {
        "body.1.weight": ADAMW,
        "body.1.bias": ADAMW,
        "body.2.weight": layout(flatten=True),
        "body.2.bias": ADAMW,
        "body.3.weight": ADAMW,
        "body.3.bias": ADAMW,
        "body.4.weight": layout(flatten=True, blocks=2),
        "body.4.bias": ADAMW,
        "body.5.in_proj_weight": layout(blocks=3),
        "body.5.in_proj_bias": ADAMW,
        "body.5.out_proj.weight": MUON,
        "body.5.out_proj.bias": ADAMW,
        "body.6.weight": ADAMW,
        "body.7.weight": layout(flatten=True),
        "body.8.weight": ADAMW,
        "body.9.w": MUON,
        "body.10.weight": layout(flatten=True),
    }
    accept.routes(actual=target.routes(model), expected=expected)


@pytest.mark.clause("ROUTE-1", "ROUTE-2")
def test_a_tied_weight_is_routed_once_by_its_strictest_role(target: Target):
    expected = {name: route for name, route in OUTSIDE.items() if name != "head.weight"}
    accept.routes(actual=target.routes(Language(body(), tied=True)), expected=expected)
    head_first = nn.Sequential(nn.Linear(8, 11, bias=False), nn.EmbeddingBag(11, 8), nn.Linear(8, 8, bias=False))
    head_first[1].weight = head_first[0].weight
    accept.routes(actual=target.routes(head_first, head=()), expected={"0.weight": ADAMW, "2.weight": MUON})
    reused = nn.Linear(8, 8, bias=False)
    model = Language(body(reused, nn.ReLU(), reused))
    accept.routes(actual=target.routes(model), expected=OUTSIDE | {"body.1.weight": MUON})


@pytest.mark.clause("ROUTE-1")
def test_only_what_requires_a_gradient_is_routed(target: Target):
    model = Language(body(nn.Linear(8, 8, bias=False)))
    model.body[1].weight.requires_grad_(False)
    accept.routes(actual=target.routes(model), expected=OUTSIDE)


@pytest.mark.clause("ROUTE-2")
def test_the_head_is_found_or_said(target: Target):
    model = Language(body())
    model.head = nn.Linear(8, 3)
    expected = {**OUTSIDE, "body.0.weight": ADAMW, "head.weight": MUON}
    accept.routes(actual=target.routes(model, head="body.*.weight"), expected=expected)
    accept.routes(actual=target.routes(model, head=()), expected=OUTSIDE | {"head.weight": MUON})
    model.get_output_embeddings = lambda: model.head
    accept.routes(actual=target.routes(model), expected=OUTSIDE)


@pytest.mark.clause("ROUTE-3")
@pytest.mark.parametrize(
    "tag", [{"skip_orthogonalization": True}, {"is_embedding_or_output_parameter": True}, {"use_muon": False}], ids=str
)
def test_tags_send_to_adamw(target: Target, tag):
    model = Language(body(nn.Linear(8, 8, bias=False), Owner(20, 8, **tag)))
    accept.routes(actual=target.routes(model), expected=OUTSIDE | {"body.1.weight": MUON, "body.2.w": ADAMW})
    for said, route in ((False, MUON), (True, ADAMW)):
        for name, value in tag.items():
            setattr(model.body[1].weight, name, value is said)
        accept.routes(actual=target.routes(model), expected=OUTSIDE | {"body.1.weight": route, "body.2.w": ADAMW})


@pytest.mark.clause("ROUTE-4")
def test_experts_are_counted_by_layout_attribute_or_config(target: Target):
    declared = body(
        Owner(24, 8, muon_layout={"blocks": 6}),
        Owner(24, 8, num_experts=4),
        Owner(4, 6, 8, num_experts=4),
    )
    expected = {"body.1.w": layout(blocks=6), "body.2.w": layout(blocks=4), "body.3.w": layout(blocks=4)}
    accept.routes(actual=target.routes(Language(declared)), expected=OUTSIDE | expected)
    for config in (
        SimpleNamespace(n_routed_experts=4),
        {"num_experts": 4},
        SimpleNamespace(num_local_experts=4),
        SimpleNamespace(text_config=SimpleNamespace(n_routed_experts=4)),
        {"text_config": {"num_experts": 4}},
    ):
        model = Language(body(Owner(4, 6, 8)), config=config)
        accept.routes(actual=target.routes(model), expected=OUTSIDE | {"body.1.w": layout(blocks=4)})


@pytest.mark.clause("ROUTE-4")
def test_a_module_may_have_the_layouts_of_its_parameters(target: Target):
    model = Language(body(nn.Linear(8, 24, bias=False), Owner(24, 8)))
    model.body[1].muon_layout, model.body[2].muon_layout = {"weight": {"blocks": 3}}, {"w": {"blocks": 6}}
    expected = {"body.1.weight": layout(blocks=3), "body.2.w": layout(blocks=6)}
    accept.routes(actual=target.routes(model), expected=OUTSIDE | {"body.0.weight": MUON} | expected)
    model.body[1].muon_layout = {"bias": {"blocks": 3}}
    accept.refuses(lambda: target.routes(model), ValueError, "body.1", "bias")


@pytest.mark.clause("ROUTE-4")
@pytest.mark.parametrize("said", [{"weight": {"blocks": 3}}, {"0.weight": {"blocks": 3}}], ids=["for weight", "by path"])
def test_a_layout_on_a_module_around_the_weight_is_refused(target: Target, said):
    """Nothing would read it, and the weight would be orthogonalized whole."""
    model = Language(body(nn.Sequential(nn.Linear(8, 24, bias=False))))
    model.body[1].muon_layout = said
    accept.refuses(lambda: target.routes(model), ValueError, "body.1", "weight")


@pytest.mark.clause("ROUTE-4", "ROUTE-6")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Language(body(Owner(4, 6, 8))), ["body.1.w", "(4, 6, 8)", "layout"]),
        (Language(body(Owner(5, 6, 8)), config={"num_experts": 4}), ["body.1.w", "(5, 6, 8)"]),
        (Language(body(Owner(24, 8)), config={"num_experts": 4}), ["body.1.w", "(24, 8)", "layout"]),
        (Language(body(Owner(25, 8, num_experts=4))), ["body.1.w", "25", "4"]),
        (Language(body(Owner(4, 6, 8)), config={"num_experts": 4, "n_routed_experts": 8}), ["num_experts", "4", "8"]),
    ],
    ids=["no count", "another count", "fused in two dimensions", "does not divide", "config contradicts itself"],
)
def test_fused_weights_without_a_count_are_refused(target: Target, model, words):
    accept.refuses(lambda: target.routes(model), ValueError, *words)


@pytest.mark.clause("ROUTE-5")
def test_overrides(target: Target):
    model = Language(body(Owner(24, 8), nn.Linear(8, 8)))
    overrides = {"body.1.*": {"layout": {"blocks": 3}}, "*.2.weight": {"algorithm": "adamw"}}
    expected = {"body.1.w": layout(blocks=3), "body.2.weight": ADAMW, "body.2.bias": ADAMW}
    accept.routes(actual=target.routes(model, overrides=overrides), expected=OUTSIDE | expected)
    known = Language(body())
    for overrides, words in (
        ({"body.9.*": {"algorithm": "adamw"}}, ["body.9.*", "matches no"]),
        ({"body.0.weight": {"lr": 1.0}, "body.*": {"lr": 2.0}}, ["body.0.weight", "body.*", "two"]),
        ({"body.0.weight": {"layout": {"blocks": 3}}}, ["body.0.weight", "8", "3"]),
        ({"body.0.weight": {"learning_rate": 3.0}}, ["body.0.weight", "learning_rate"]),
    ):
        accept.refuses(lambda overrides=overrides: target.routes(known, overrides=overrides), ValueError, *words)


@pytest.mark.clause("ROUTE-6")
@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (nn.Sequential(nn.LayerNorm(8)), {}, ["nothing", "0.weight"]),
        (nn.Sequential(Owner(8, 8), nn.Linear(8, 8)), {}, ["0.w", "Owner", "override"]),
        (nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 3)), {}, ["head", "5"]),
        (Language(body()), {"head": "lm_head.weight"}, ["lm_head.weight", "matches no"]),
        (Language(body(nn.Embedding(8, 8))), {}, ["head", "body.0.weight", "8", "11"]),
        (nn.Sequential(nn.Embedding(9, 4), nn.Embedding(6, 4), nn.Linear(4, 6), nn.Linear(6, 10)), {}, ["head", "6", "9"]),
        (Language(body(nn.Bilinear(4, 4, 8))), {}, ["body.1.weight", "Bilinear"]),
    ],
    ids=[
        "nothing to orthogonalize",
        "unknown owner",
        "no head",
        "head matches nothing",
        "two heads",
        "padded head",
        "bilinear",
    ],
)
def test_what_is_not_recognised_is_refused(target: Target, model, options, words):
    accept.refuses(lambda: target.routes(model, **options), ValueError, *words)


@pytest.mark.clause("ROUTE-7")
def test_report_has_every_parameter_and_exact_totals(target: Target):
    model = Language(body(Owner(24, 8, num_experts=4)))
    report = target.report(model)
    for name, p in model.named_parameters():
        (line,) = [line for line in report.splitlines() if line.startswith(name + " ")]
        assert "x".join(map(str, p.shape)) in line
        assert ("adamw" if target.routes(model)[name][0] == "adamw" else "muon") in line
    assert "4x6x8" in report
    totals = {algorithm: int(n.replace(",", "")) for algorithm, n in re.findall(r"^(\w+): ([\d,]+) parameters", report, re.M)}
    assert totals == {"muon": 64 + 192, "adamw": 88 + 8 + 88 + 11}


@pytest.mark.clause("ROUTE-7")
def test_report_tells_sections_and_learning_rates(target: Target):
    sections = ({"rows": 16}, {"rows": 16}, {"rows": 2, "algorithm": "adamw"})
    model = Language(body(Owner(34, 4, muon_layout={"sections": sections})))
    report = target.report(model)
    (line,) = [line for line in report.splitlines() if line.startswith("body.1.w ")]
    # lr is 1e-3, the default; a 16 x 4 matrix has twice that.
    assert re.search(r"muon\+adamw\s+2x16x4\s+0.002 0.001\s+adamw$", line), line
    totals = {algorithm: int(n.replace(",", "")) for algorithm, n in re.findall(r"^(\w+): ([\d,]+) parameters", report, re.M)}
    assert totals == {"muon": 64 + 128, "adamw": 88 + 8 + 88 + 11 + 8}
