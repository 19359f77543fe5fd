# SPDX-License-Identifier: Apache-2.0
"""From a model to parameter groups: which weights are orthogonalized, and as which matrices.   [SPEC: ROUTE]

It fails closed. A weight whose meaning is not known here is an error that says what to write, because a wrong guess
(an embedding orthogonalized, experts taken as one matrix) trains on without a sign.
"""

import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from impl.layout import Layout, check_layout
from impl.options import OPTIONS, algorithms

CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
EMBEDDING = (nn.Embedding, nn.EmbeddingBag)
NORM = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")
TAGS = {"skip_orthogonalization": True, "is_embedding_or_output_parameter": True, "use_muon": False}  # for AdamW
ADVICE = (
    "say what it is: overrides={{'{0}': {{'algorithm': 'adamw'}}}} or {{'layout': Layout(...)}}, or set the attribute "
    "muon_layout or use_muon on the parameter"
)


class Route(NamedTuple):
    """Where a parameter goes, and the rule that says so."""

    rule: str
    algorithm: str
    layout: Layout | None = None


def param_groups(
    model: nn.Module,
    *,
    head: str | Sequence[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Divide a model's parameters into groups for `Muon`.   [SPEC: ROUTE-1 to ROUTE-8]

    In order: an override; a tag on the parameter (`skip_orthogonalization`, `is_embedding_or_output_parameter`,
    `use_muon`); its role (embedding, output head, fewer than two dimensions, depthwise); its `muon_layout`, an attribute of
    its own or of its module (a Layout for `weight`, or a dict of them by name, which is also there after `fully_shard`);
    `num_experts`; its module. Only parameters that require a gradient are routed, tied ones once.

    Args:
        model: any module. A weight of a module that torch does not ship needs a tag, a layout or an override.
        head: name pattern(s) of the output head's weights; () if the model has none; None to find it: HuggingFace's
            `get_output_embeddings()`, or the one Linear with as many outputs as the largest Embedding has entries.
        overrides: name pattern (as in a shell, * and ?) -> options of the group, such as {"algorithm": "adamw"},
            {"layout": Layout(blocks=8)}, {"lr": 1e-3}.

    Returns:
        Groups of (name, parameter) pairs with "algorithm", "layout", "rule" and the overrides' options, one for each
        combination, in the model's order.

    Raises:
        ValueError: a pattern that matches nothing, a parameter that two match, a weight that no rule knows, an output head
            that cannot be found, or a model in which nothing is orthogonalized; with the names.
    """
    aliases, parameters = _parameters(model)
    declared = _declared(model)
    heads = _heads(model, aliases, head)
    chosen = _match(overrides or {}, aliases)
    if not overrides:
        _warn_of_lost_tags(model, parameters)
    experts = num_experts(model)
    groups: dict[Any, dict[str, Any]] = {}
    for key, names in aliases.items():
        p, options = parameters[key], dict(chosen.get(names[0], {}))
        if not p.requires_grad:
            continue
        owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        route = _override(options) or _route(names, p, owners, declared[key], key in heads, experts)
        if route.layout is not None:
            check_layout(route.layout, p.shape, names[0])
        group = {"algorithm": route.algorithm, "layout": route.layout, "rule": route.rule, **options}
        like = tuple((k, id(v) if isinstance(v, Tensor) else repr(v)) for k, v in group.items())
        same = groups.setdefault(like, {"params": [], **group})
        same["params"].append((names[0], p))
    if not any("muon" in algorithms(group) for group in groups.values()):
        raise ValueError(f"nothing in this model would be orthogonalized; it has {[name for name, *_ in aliases.values()]}")
    return list(groups.values())


def num_experts(model: nn.Module) -> int | None:
    """The number of experts that the model's config declares, or None.   [SPEC: ROUTE-4]"""
    config = getattr(model, "config", None)
    found = {}
    for prefix, where in (("", config), ("text_config.", _get(config, "text_config"))):
        for key in COUNTS:
            count = _get(where, key)
            if isinstance(count, int) and not isinstance(count, bool) and count > 0:
                found[prefix + key] = count
    if len(set(found.values())) > 1:
        raise ValueError(f"the model's config contradicts itself about the number of experts: {found}")
    return next(iter(found.values()), None)


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _parameters(model: nn.Module) -> tuple[dict[int, list[str]], dict[int, Tensor]]:
    """All names of every parameter, and the parameters, by identity, in the model's order."""
    aliases: dict[int, list[str]] = {}
    parameters: dict[int, Tensor] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if isinstance(p, nn.UninitializedParameter):
            raise ValueError(f"parameter {name} has no shape yet; run the model once before routing it")
        aliases.setdefault(id(p), []).append(name)
        parameters[id(p)] = p
    return aliases, parameters


def _match(overrides: Mapping[str, Mapping[str, Any]], aliases: Mapping[int, list[str]]) -> dict[str, Mapping[str, Any]]:
    """The options that the overrides give, by a parameter's first name.   [SPEC: ROUTE-5]"""
    chosen: dict[str, Mapping[str, Any]] = {}
    by: dict[str, str] = {}
    for pattern, options in overrides.items():
        if unknown := options.keys() - set(OPTIONS):
            raise ValueError(f"override {pattern!r} has options {sorted(unknown)} that a group does not have: {OPTIONS}")
        for key in _matches(pattern, aliases, "override"):
            name = aliases[key][0]
            if name in by:
                raise ValueError(f"parameter {name} is matched by two overrides, {by[name]!r} and {pattern!r}")
            by[name], chosen[name] = pattern, options
    return chosen


def _override(options: dict[str, Any]) -> Route | None:
    """The route that an override's options decide, taken out of them; None if they leave it open."""
    if "algorithm" not in options and "layout" not in options:
        return None
    layout = options.pop("layout", None)
    return Route("override", options.pop("algorithm", "muon"), None if layout is None else Layout.of(layout))


def _heads(model: nn.Module, aliases: Mapping[int, list[str]], head: str | Sequence[str] | None) -> set[int]:
    """The output head's weights, by identity.   [SPEC: ROUTE-6]"""
    if head is not None:
        patterns = [head] if isinstance(head, str) else list(head)
        return {key for pattern in patterns for key in _matches(pattern, aliases, "head")}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        return {id(p) for p in output.parameters()}
    sizes = {module.num_embeddings for module in model.modules() if isinstance(module, EMBEDDING)}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    candidates = {id(module.weight): module.out_features for module in linear if module.out_features in sizes}
    # One weight, and of the largest embedding, which is the vocabulary: anything else would be a guess.
    if sizes and list(candidates.values()) != [max(sizes)]:
        names = [aliases[key][0] for key in candidates]
        raise ValueError(
            f"no output head was recognised: embeddings have {sorted(sizes)} entries and as many outputs have {names}; say "
            "head='name.weight', or head=() if the model has none"
        )
    return set(candidates)


def _matches(pattern: str, aliases: Mapping[int, list[str]], what: str) -> list[int]:
    """The parameters, by identity, that have a name of this pattern; at least one."""
    found = [key for key, names in aliases.items() if any(fnmatchcase(name, pattern) for name in names)]
    if not found:
        raise ValueError(f"{what} {pattern!r} matches no parameter; there are {[name for name, *_ in aliases.values()]}")
    return found


def _route(
    names: list[str], p: Tensor, owners: list[nn.Module], declared: set[Layout], is_head: bool, experts: int | None
) -> Route:
    """The first rule that knows the parameter. A tied parameter has several owners, and the strictest decides."""
    for tag, value in TAGS.items():
        if getattr(p, tag, None) is not None and bool(getattr(p, tag)) is value:
            return Route(f"{tag}={value}", "adamw")
    if any(isinstance(owner, EMBEDDING) for owner in owners):
        return Route("embedding", "adamw")
    if is_head:
        return Route("output head", "adamw")
    if p.ndim < 2:
        return Route("vector", "adamw")
    if any(isinstance(owner, NORM) for owner in owners):
        return Route("norm", "adamw")
    if any(isinstance(owner, CONVOLUTION) and 1 < owner.groups == owner.in_channels for owner in owners):
        return Route("depthwise", "adamw")
    if len(declared) > 1:
        raise ValueError(f"parameter {names} has several layouts, {sorted(map(str, declared))}; {ADVICE.format(names[0])}")
    if declared:
        return Route("muon_layout", "muon", *declared)
    routes = {_route_matrix(name, p, owner, experts) for name, owner in zip(names, owners, strict=True)}
    if len(routes) > 1:
        raise ValueError(f"parameter {names} is tied and has several meanings; {ADVICE.format(names[0])}")
    return routes.pop()


def _declared(model: nn.Module) -> dict[int, set[Layout]]:
    """The layouts that parameters have as an attribute, or their module has for its `weight` or by name; by identity."""
    layouts: dict[int, set[Layout]] = {}
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        # Wrappers (torch.compile, checkpointing) answer with what they wrap, whose attribute is not for them.
        found = vars(module).get("muon_layout", getattr(type(module), "muon_layout", None))
        by_name = found if isinstance(found, Mapping) else {} if found is None else {"weight": found}
        if unknown := by_name.keys() - own.keys():
            what = f"muon_layout of module {prefix!r}, {type(module).__name__}, is for {sorted(unknown)}"
            raise ValueError(f"{what}, but its own parameters are {list(own)}; put it on the module that has the weight")
        for name, p in own.items():
            said = [layout for layout in (getattr(p, "muon_layout", None), by_name.get(name)) if layout is not None]
            layouts.setdefault(id(p), set()).update(map(Layout.of, said))
    return layouts


def _warn_of_lost_tags(model: nn.Module, parameters: Mapping[int, Tensor]) -> None:
    """Say that a parameter's attributes are gone once it is a DTensor, unless something shows that they are not needed."""
    tags = (*TAGS, "muon_layout", "num_experts")
    kept = any(hasattr(p, tag) for p in parameters.values() for tag in tags)
    kept = kept or any(hasattr(module, "muon_layout") for module in model.modules())
    if not kept and any(isinstance(p, DTensor) for p in parameters.values()):
        warnings.warn(
            "parameters are DTensors and none has a tag. fully_shard and parallelize_module make new parameters, without "
            "the attributes of the old ones: if there were any, put muon_layout on the module instead, or use overrides; "
            "report() shows how every parameter is stepped",
            RuntimeWarning,
            stacklevel=3,
        )


def _route_matrix(name: str, p: Tensor, owner: nn.Module, experts: int | None) -> Route:
    """The rule for a parameter of two dimensions and more that one owner's kind decides."""
    count = getattr(p, "num_experts", None)
    if count is not None:
        return Route(f"num_experts={count}", "muon", Layout(blocks=count))
    if isinstance(owner, CONVOLUTION):
        return Route("convolution", "muon", Layout(blocks=owner.groups, flatten=True))
    if isinstance(owner, nn.MultiheadAttention):
        if p.ndim > 2:  # bias_k, bias_v: vectors in a tensor's clothes
            return Route("vector", "adamw")
        fused = p is owner.in_proj_weight
        return Route("fused q, k, v", "muon", Layout(blocks=3)) if fused else Route("matrix", "muon")
    if p.ndim == 2 and (isinstance(owner, nn.Linear) or getattr(p, "use_muon", None)):
        return Route("matrix", "muon")
    torchs = type(owner).__module__.startswith("torch.nn.")
    if experts is not None and p.ndim == 3 and experts == p.shape[0] and not torchs:
        return Route(f"config: {experts} experts", "muon", Layout(blocks=experts))
    shape = tuple(p.shape)
    raise ValueError(f"parameter {name} {shape} of {type(owner).__name__} is not recognised; {ADVICE.format(name)}")
