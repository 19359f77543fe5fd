# SPDX-License-Identifier: Apache-2.0
"""Routing where modules, names, configs or tensors are unusual, and the report to the letter; see conformance/ for ROUTE."""

import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from conformance.worlds import threads
from impl import Layout, Muon, param_groups
from impl.routing import num_experts


def routed(model: nn.Module, **options: object) -> dict[str, tuple[str, str]]:
    """Of every parameter, its rule and its algorithm."""
    groups = param_groups(model, **{"head": (), **options})
    return {name: (group["rule"], group["algorithm"]) for group in groups for name, _ in group["params"]}


def test_projections_of_attention_that_are_apart_are_matrices():
    found = routed(nn.MultiheadAttention(8, 2, kdim=6, vdim=4, bias=False))
    assert found == dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"), ("matrix", "muon"))


def test_vectors_of_attention_are_adamws():
    groups = param_groups(nn.MultiheadAttention(8, 2, add_bias_kv=True), head=())
    of = {name: group["algorithm"] for group in groups for name, _ in group["params"]}
    assert of["bias_k"] == of["bias_v"] == "adamw" and of["in_proj_weight"] == "muon"


def test_a_tied_parameter_is_found_by_each_of_its_names():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model = nn.ModuleDict({"a": first, "b": second, "c": nn.Linear(4, 4, bias=False)})
    for pattern in ("a.*", "b.*", "[ab].weight"):
        groups = param_groups(model, head=(), overrides={pattern: {"lr": 0.5}})
        assert type(groups) is list
        assert [[name for name, _ in group["params"]] for group in groups if group.get("lr") == 0.5] == [["a.weight"]]


def test_messages_name_tied_parameters_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    with pytest.raises(ValueError, match=r"\['0\.weight', '2\.weight'\]"):
        param_groups(nn.Sequential(first, second, nn.Linear(4, 4, bias=False)), head=(), overrides={"nothing": {"lr": 0.1}})


def test_a_module_may_declare_a_layout_by_either_name_of_its_parameter():
    layer = nn.Linear(4, 4, bias=False)
    layer.same, layer.muon_layout = layer.weight, {"same": Layout(blocks=2)}
    (group,) = param_groups(layer, head=())
    assert (group["layout"], [name for name, _ in group["params"]]) == (Layout(blocks=2), ["weight"])


def test_sections_that_adamw_steps_are_not_orthogonalized():
    """So that a model of nothing else is an error."""
    sections = {"layout": {"sections": [{"rows": 4, "algorithm": "adamw"}]}}
    with pytest.raises(ValueError, match="nothing in this model would be orthogonalized"):
        param_groups(nn.Linear(4, 4), head=(), overrides={"weight": sections})


def test_what_torchs_own_modules_stack_is_not_taken_for_experts():
    """nn.Bilinear has a weight of three dimensions."""
    model = nn.Sequential(nn.Bilinear(4, 5, 3, bias=False))
    model.config = SimpleNamespace(num_experts=3)
    with pytest.raises(ValueError, match=r"parameter 0.weight \(3, 4, 5\) of Bilinear is not recognised"):
        routed(model)


def test_what_others_modules_stack_is_taken_for_experts():
    """Also where their package is called like torch."""
    model = type("GroupedExperts", (nn.Module,), {"__module__": "torchtitan.models.moe"})()
    model.w1, model.config = nn.Parameter(torch.ones(4, 6, 8)), SimpleNamespace(num_experts=4)
    (group,) = param_groups(model, head=())
    assert group["layout"] == Layout(blocks=4)


@pytest.mark.parametrize(
    ("tag", "value"), [("skip_orthogonalization", 1), ("use_muon", 0), ("is_embedding_or_output_parameter", np.True_)]
)
def test_a_tag_is_true_or_false_in_any_type(tag, value):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    setattr(model[0].weight, tag, value)
    assert routed(model) == {"0.weight": (f"{tag}={bool(value)}", "adamw"), "1.weight": ("matrix", "muon")}


def test_what_no_rule_knows_is_stepped_as_its_override_says():
    model = nn.Sequential(nn.Bilinear(4, 5, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[0].weight.use_muon = True
    # A tag does not tell which dimensions are the matrices'.
    with pytest.raises(ValueError, match=r"0\.weight .* is not recognised"):
        routed(model)
    assert routed(model, overrides={"0.weight": {"algorithm": "adamw"}})["0.weight"] == ("override", "adamw")
    assert routed(model, overrides={"0.weight": {"layout": {"blocks": 3}}})["0.weight"] == ("override", "muon")


def test_an_override_is_for_all_that_its_pattern_matches():
    """And is not used up."""
    overrides = {"[01].weight": {"algorithm": "adamw"}}
    found = routed(nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))), overrides=overrides)
    assert found == {"0.weight": ("override", "adamw"), "1.weight": ("override", "adamw"), "2.weight": ("matrix", "muon")}
    assert overrides == {"[01].weight": {"algorithm": "adamw"}}


def test_an_override_may_exempt_from_clipping():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    optimizer = Muon(param_groups(model, head=(), overrides={"0.weight": {"skip_grad_norm_clip": False}}))
    assert [group["skip_grad_norm_clip"] for group in optimizer.param_groups] == [False, True]


def test_no_experts_are_no_count():
    model = nn.Linear(4, 4, bias=False)
    model.weight.num_experts = 0
    with pytest.raises(ValueError, match=r"layout of parameter weight .* blocks should be an integer >= 1 but is 0"):
        param_groups(model, head=())


def test_a_module_declares_layouts_of_its_own_parameters_alone():
    model = nn.MultiheadAttention(8, 2, bias=False)
    model.muon_layout = {"out_proj.weight": Layout(blocks=2)}
    with pytest.raises(ValueError, match=r"MultiheadAttention, is for \['out_proj.weight'\], but its own parameters"):
        param_groups(model, head=())


def test_the_report_of_weights_that_lie_across():
    convolution = nn.Parameter(torch.ones(8, 3, 2, 2).to(memory_format=torch.channels_last))
    groups = [{"params": [convolution], "layout": Layout(flatten=True)}, {"params": [nn.Parameter(torch.ones(6, 8).T)]}]
    lines = Muon(groups).report().splitlines()
    assert "1x8x12" in lines[2] and "1x8x6" in lines[3]


@pytest.mark.parametrize("value", [True, 0, -1, "4", 4.0, None], ids=repr)
def test_what_is_no_count_is_no_number_of_experts(value):
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(num_experts=value, num_local_experts=6)
    assert num_experts(model) == 6


def test_a_config_that_contradicts_itself_is_told_with_its_keys():
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(num_experts=4, text_config=SimpleNamespace(num_experts=8))
    model.config.text_config.num_experts = 4
    assert num_experts(model) == 4
    model.config.text_config.num_experts = 8
    with pytest.raises(ValueError, match=r"\{'num_experts': 4, 'text_config.num_experts': 8\}"):
        num_experts(model)


def warned(rank: int, declare: Callable[[nn.Linear], None], overrides: Mapping[str, Any] | None = None) -> list[str]:
    """What routing a layer says that has lost its attributes, if any."""
    model = nn.Linear(4, 6, bias=False)
    parallelize_module(model, init_device_mesh("cpu", (1,)), ColwiseParallel())
    declare(model)
    model = nn.Sequential(model, nn.Linear(6, 4))  # some weights are DTensors, not all
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        Muon(param_groups(model, head=(), overrides=overrides))
    assert all(each.filename == __file__ for each in found)
    return [str(each.message) for each in found]


def test_attributes_that_dtensors_have_lost_are_asked_for():
    """Unless some are there, of the parameter or of a module."""
    declarations = {
        "nothing": lambda model: None,
        "a tag": lambda model: setattr(model.weight, "use_muon", True),
        "experts": lambda model: setattr(model.weight, "num_experts", 2),
        "a layout": lambda model: setattr(model.weight, "muon_layout", Layout(blocks=2)),
        "a module's layout": lambda model: setattr(model, "muon_layout", Layout(blocks=2)),
    }
    found = {name: threads(1, warned, declare) for name, declare in declarations.items()}
    (message,) = found.pop("nothing")[0]
    assert threads(1, warned, lambda model: None, {}) == [[message]]
    assert message.startswith("parameters are DTensors and none has a tag") and "muon_layout on the module" in message
    found["overrides"] = threads(1, warned, lambda model: None, {"0.weight": {"lr": 0.1}})
    assert all(each == [[]] for each in found.values()), found


def test_the_report_to_the_letter():
    optimizer = Muon(param_groups(nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 5, bias=False))), lr=0.02)
    named = [("experts", nn.Parameter(torch.ones(12, 6)))]
    optimizer.add_param_group({"params": named, "layout": {"blocks": 2}, "lr": torch.tensor(0.5)})
    assert optimizer.report().splitlines() == [
        "parameter  shape  rule         algorithm  matrices  learning rate  clipped",
        "---------  -----  -----------  ---------  --------  -------------  -------",
        "0.weight   5x8    embedding    adamw      -         0.02           all",
        "1.weight   8x8    matrix       muon       1x8x8     0.02           none",
        "1.bias     8      vector       adamw      -         0.02           all",
        "2.weight   5x8    output head  adamw      -         0.02           all",
        "experts    12x6   -            muon       2x6x6     0.5            none",
        "",
        "muon: 136 parameters",
        "adamw: 88 parameters",
    ]
    fewest = {"sections": [{"rows": 8}, {"rows": 8, "head_dim": 4}]}
    line = Muon([nn.Parameter(torch.ones(16, 4))], layout=fewest, lr=0.02).report().splitlines()[2]
    assert line.split() == ["0.0", "16x4", "-", "muon", "1x8x4", "2x4x4", "0.0283", "0.02", "none"]
    scalar = Muon([nn.Parameter(torch.ones(()))], algorithm="adamw", lr=0.02)
    assert scalar.report().splitlines()[2].split() == ["0.0", "scalar", "-", "adamw", "-", "0.02", "all"]


def test_the_report_tells_the_scale_of_the_group():
    groups = [{"params": [nn.Parameter(torch.ones(16, 100))], "adjust_lr_fn": name} for name in ("match_rms_adamw", "spectral")]
    lines = [line.split() for line in Muon(groups, lr=0.02).report().splitlines()[2:4]]
    assert [(line[0], line[-2]) for line in lines] == [("0.0", "0.04"), ("1.0", "0.2")]


def test_a_model_may_have_several_heads():
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    found = routed(model, head=["1.weight", "2.*"])
    assert found["1.weight"] == found["2.weight"] == ("output head", "adamw") and found["0.weight"] == ("matrix", "muon")


def test_a_model_may_say_that_it_knows_no_head():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    model.get_output_embeddings = lambda: None
    assert routed(model, head=None)["2.weight"] == ("output head", "adamw")


def test_a_layout_of_a_module_is_its_weights():
    layer = nn.Linear(4, 6)
    layer.muon_layout = Layout(blocks=3)
    group, _ = param_groups(layer, head=())
    assert (group["rule"], group["layout"], group["params"][0][0]) == ("muon_layout", Layout(blocks=3), "weight")


def test_norms_of_two_dimensions_are_adamws():
    found = routed(nn.Sequential(nn.Linear(4, 4), nn.RMSNorm((2, 4)), nn.LayerNorm((2, 4))))
    assert found["1.weight"] == found["2.weight"] == ("norm", "adamw")


def test_a_tied_weight_is_a_norms_or_an_embeddings_by_any_owner():
    norm, linear, table = nn.LayerNorm((4, 4)), nn.Linear(4, 4, bias=False), nn.Embedding(4, 4)
    for owner, rule in ((norm, "norm"), (table, "embedding")):
        linear.weight = owner.weight
        for pair in ((linear, owner), (owner, linear)):
            assert routed(nn.Sequential(*pair, nn.Linear(4, 4)))["0.weight"] == (rule, "adamw")


def test_a_tied_weight_is_depthwise_by_any_owner():
    deep, conv = nn.Conv1d(4, 4, 3, groups=4, bias=False), nn.Conv1d(1, 4, 3, bias=False)
    conv.weight = deep.weight
    for pair in ((deep, conv), (conv, deep)):
        found = routed(nn.Sequential(*pair, nn.Linear(4, 4, bias=False)))
        assert found == {"0.weight": ("depthwise", "adamw"), "2.weight": ("matrix", "muon")}


def test_what_is_derived_from_an_embedding_is_one():
    table = type("Scaled", (nn.Embedding,), {})(5, 4)
    assert routed(nn.Sequential(table, nn.Linear(4, 4)))["0.weight"] == ("embedding", "adamw")


def test_layouts_that_agree_are_one():
    """On a module that is used twice, and on a module and its weight."""
    layer = nn.Linear(4, 6, bias=False)
    layer.muon_layout, layer.weight.muon_layout = Layout(blocks=3), {"blocks": 3}
    (group,) = param_groups(nn.ModuleList([layer, nn.ModuleList([layer])]), head=())
    assert group["layout"] == Layout(blocks=3)


def test_a_wrapper_does_not_declare_what_the_wrapped_module_does():
    """It answers with the attributes of what it wraps; those of a class are its own."""
    layer = type("Fused", (nn.Linear,), {"muon_layout": Layout(blocks=3)})(4, 6, bias=False)
    wrapped = checkpoint_wrapper(layer)
    assert wrapped.muon_layout == Layout(blocks=3)
    (group,) = param_groups(nn.Sequential(wrapped), head=())
    assert group["layout"] == Layout(blocks=3)
    wrapped.muon_layout = Layout(blocks=2)
    with pytest.raises(ValueError, match="muon_layout of module '0', CheckpointWrapper"):
        param_groups(nn.Sequential(wrapped), head=())


def test_a_head_may_have_several_weights():
    model = nn.ModuleDict({"body": nn.Linear(4, 4, bias=False), "head": nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))})
    model.get_output_embeddings = lambda: model["head"]
    found = routed(model, head=None)
    assert found["head.0.weight"] == found["head.1.weight"] == ("output head", "adamw")
    assert found["body.weight"] == ("matrix", "muon")


def test_the_head_of_a_bag_of_embeddings_is_found():
    model = nn.Sequential(nn.EmbeddingBag(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    assert routed(model, head=None)["2.weight"] == ("output head", "adamw")
