# SPDX-License-Identifier: Apache-2.0
"""ROUTE and LAYOUT gone wrong."""

from functools import partial

from tests.mutants import Mutant

layout = partial(Mutant, path="impl/layout.py")
options = partial(Mutant, path="impl/options.py")
orthogonalize = partial(Mutant, path="impl/orthogonalize.py")
report = partial(Mutant, path="impl/report.py")
routing = partial(Mutant, path="impl/routing.py")
stages = partial(Mutant, path="impl/stages.py")
state = partial(Mutant, path="impl/state.py")

MUTANTS = (
    layout(
        name="experts orthogonalized as one matrix",
        old="view.reshape(blocks * columns, groups * rows, n)",
        new="view.reshape(columns, blocks * groups * rows, n)",
        source="xtuner#1582: the fused weight of all experts was taken as it lay",
        clauses=("LAYOUT-1", "LAYOUT-2", "LAYOUT-3", "SCALE-3"),
        seed="experts",
    ),
    stages(
        name="the scale of the whole parameter",
        old='lr_scale(O.shape[-2], O.shape[-1], group["adjust_lr_fn"])',
        new='lr_scale(p.shape[:-1].numel(), p.shape[-1], group["adjust_lr_fn"])',
        source="xtuner#1582, in review: every expert's learning rate grew with the root of their number",
        clauses=("SCALE-3", "LAYOUT-2"),
        seed="experts",
    ),
    layout(
        name="gate and up not divided",
        old="    runs = T.view(layout.blocks, layout.groups, run,",
        new="""    blocks = len(T) if T.ndim == 3 and not layout.flatten else layout.blocks
    run = rows // (blocks * layout.groups)
    runs = T.view(blocks, layout.groups, run,""",
        source="Megatron-LM#7077, torchtitan#4531: a matrix for every expert, and two weights in it",
        clauses=("LAYOUT-1", "LAYOUT-2", "SCALE-3"),
        seed="experts",
    ),
    orthogonalize(
        name="transposed by the shape of the stack",
        old="    tall = X.shape[-2] > X.shape[-1]\n",
        new="    tall = X.shape[:-1].numel() > X.shape[-1]\n",
        source="xtuner#1582, in review: the shape of G decided, which X no longer had",
        clauses=("ORTH-13",),
        seed="experts",
    ),
    routing(
        name="the number of experts read from the model",
        old='    config = getattr(model, "config", None)\n',
        new="    config = model\n",
        source="xtuner#1582, in review: models have it in their config, and one was assumed where it was missing",
        clauses=("ROUTE-4",),
        seed="experts",
    ),
    routing(
        name="any first dimension is a number of experts",
        old="    if experts is not None and p.ndim == 3 and experts == p.shape[0] and not torchs:\n",
        new="    experts = p.shape[0]\n    if p.ndim == 3 and not torchs:\n",
        source="maxtext#4798: dimensions of experts' weights were guessed, and wrongly",
        clauses=("ROUTE-4", "ROUTE-6"),
        seed="experts",
    ),
    routing(
        name="experts wherever their number divides the rows",
        old="p.ndim == 3 and experts == p.shape[0]",
        new="p.shape[0] % experts == 0",
        source="xtuner#1582: the config's number for every weight with a certain name, 2 E for another",
        clauses=("ROUTE-4", "ROUTE-6"),
        seed="experts",
    ),
    layout(
        name="a wrong number of experts rounded down",
        old="    if rows % (layout.blocks * layout.groups):\n",
        new="    if rows < layout.blocks * layout.groups:\n",
        source="xtuner#1582: `//` in the learning rate took any number",
        clauses=("LAYOUT-4", "ROUTE-4", "ROUTE-5"),
        seed="experts",
    ),
    layout(
        name="experts beside each other dealt out by columns",
        old="""    runs = T.view(layout.blocks, layout.groups, run, layout.columns, columns // layout.columns)
    runs = runs.permute(0, 3, 1, 2, 4)
""",
        new="""    runs = T.view(layout.blocks, layout.groups, run, columns // layout.columns, layout.columns)
    runs = runs.permute(0, 4, 1, 2, 3)
""",
        source="xtuner#1582: columns by its docstring, rows by its code, and a silently wrong answer for who believes it",
        clauses=("LAYOUT-1", "LAYOUT-2", "VAR-4"),
        seed="experts",
    ),
    report(
        name="totals in whole millions",
        old='f"{algorithm}: {n:,} parameters"',
        new='f"{algorithm}: {n // 1_000_000:,} parameters"',
        source="xtuner#1582, in review: `// 1e6` reported 0.0M",
        clauses=("ROUTE-7",),
        seed="experts",
    ),
    report(
        name="every matrix counted once",
        old="sizes[m, n] += count",
        new="sizes[m, n] = count",
        source="ours: sections of one size are told by one key",
        clauses=("ROUTE-7",),
        seed="experts",
    ),
    stages(
        name="norms of all experts kept together",
        old="torch.linalg.vector_norm(o) / size)",
        new="torch.linalg.vector_norm(O) / size)",
        source="ours: what NorMuon keeps is the norm of a matrix, not of its parameter",
        clauses=("VAR-1", "VAR-4"),
        seed="experts",
    ),
    routing(
        name="a tag that nobody reads",
        old='TAGS = {"skip_orthogonalization": True, ',
        new="TAGS = {",
        source="Megatron-LM#5400: GatedDeltaNet's in_proj was orthogonalized as one matrix, gates and all",
        clauses=("ROUTE-3",),
        seed="fused",
    ),
    routing(
        name="a tag read by its presence",
        old="getattr(p, tag, None) is not None and bool(getattr(p, tag)) is value",
        new="getattr(p, tag, None) is not None",
        source="ours: use_muon=True would send to AdamW",
        clauses=("ROUTE-3",),
        seed="fused",
    ),
    layout(
        name="sections not divided",
        old="    sections = layout.sections or (Section(run),)\n",
        new="    sections = (Section(run),)\n",
        source="Megatron-LM: fused q, k, v that do not fit were orthogonalized whole, and only a debug log said so",
        clauses=("LAYOUT-1", "LAYOUT-2", "LAYOUT-5", "ROUTE-7"),
        seed="fused",
    ),
    layout(
        name="gated q, k, v as three sections",
        old="    sections = layout.sections or (Section(run),)\n",
        new="""    sections = layout.sections or (Section(run),)
    if len(sections) > 3:
        sections = (*sections[:2], Section(sum(s.rows for s in sections[2:]), sections[2].algorithm))
""",
        source="Megatron-LM#4731: an output gate makes four",
        clauses=("LAYOUT-1", "LAYOUT-2"),
        seed="fused",
    ),
    layout(
        name="sections of equal size",
        old="runs.split([s.rows for s in sections], dim=3)",
        new="runs.chunk(len(sections), dim=3)",
        source="DeepSpeed#8367: with grouped queries, thirds of q, k, v are none of them",
        clauses=("LAYOUT-1", "LAYOUT-2"),
        seed="fused",
    ),
    layout(
        name="interleaved groups taken as one after the other",
        old="    runs = runs.permute(0, 3, 1, 2, 4)\n",
        new="""    runs = T.view(layout.blocks, run, layout.groups, layout.columns, columns // layout.columns)
    runs = runs.permute(0, 3, 2, 1, 4)
""",
        source="torchtitan#4692: rows of q, k and v alternate, group by group",
        clauses=("LAYOUT-1", "LAYOUT-2"),
        seed="fused",
    ),
    layout(
        name="every group of queries by itself",
        old="view.reshape(blocks * columns, groups * rows, n)",
        new="view.reshape(blocks * columns * groups, rows, n)",
        source="Megatron-LM, qkv_split_shapes: a section's rows of all groups are one matrix",
        clauses=("LAYOUT-1", "LAYOUT-2"),
        seed="fused",
    ),
    layout(
        name="heads orthogonalized together",
        old="view.reshape(blocks * columns * groups * rows // section.head_dim, section.head_dim, n)",
        new="view.reshape(blocks * columns, groups * rows, n)",
        source="Megatron-LM#6326: no matrix for each head",
        clauses=("LAYOUT-1", "LAYOUT-2"),
        seed="fused",
    ),
    layout(
        name="AdamW's sections orthogonalized",
        old="    sections = layout.sections or (Section(run),)\n",
        new="    sections = tuple(Section(s.rows, head_dim=s.head_dim) for s in layout.sections) or (Section(run),)\n",
        source="Megatron-LM#2885: rows of gates among those of q, k, v",
        clauses=("LAYOUT-5", "ROUTE-7"),
        seed="fused",
    ),
    stages(
        name="AdamW's sections left alone",
        old='    return cut(Layout.of(group["layout"]), T)\n',
        new='    return [part for part in cut(Layout.of(group["layout"]), T) if part[0].algorithm == "muon"]\n',
        source="xtuner, muon_split_sizes: rows beyond the last section get a zero update",
        clauses=("LAYOUT-5",),
        seed="fused",
    ),
    stages(
        name="AdamW's learning rate over the root of the width",
        old='number(group["lr"]) * group["adamw_lr_ratio"]',
        new='number(group["lr"]) * group["adamw_lr_ratio"] / max(p.shape[-1:] or (1,)) ** 0.5',
        source="dion#94, OLMo-core#854: a rule made for one output head",
        clauses=("STEP-8", "STEP-9", "LAYOUT-5"),
        seed="fused",
    ),
    layout(
        name="sections need not add up",
        old="sum(s.rows for s in layout.sections) != run:",
        new="sum(s.rows for s in layout.sections) > run:",
        source="xtuner: extra rows belong to nobody",
        clauses=("LAYOUT-4",),
        seed="fused",
    ),
    routing(
        name="the output head found by its name",
        old="    if is_head:\n",
        new='    if any("head" in name for name in names):\n',
        source="marin#5645: routing by substring; a layer called overhead is no head, and a head called logits is",
        clauses=("ROUTE-2",),
        seed="fused",
    ),
    stages(
        name="the scale of a kernel's dimensions",
        old='lr_scale(O.shape[-2], O.shape[-1], group["adjust_lr_fn"])',
        new='lr_scale(*(p.shape[-2:] if p.ndim > 3 else O.shape[-2:]), group["adjust_lr_fn"])',
        source="KellerJordan/Muon, timm#2791, ultralytics#25846: sqrt(kh / kw) for a convolution",
        clauses=("SCALE-3", "LAYOUT-1", "LAYOUT-2"),
    ),
    stages(
        name="the scale of a group's first parameter",
        old='lr_scale(O.shape[-2], O.shape[-1], group["adjust_lr_fn"])',
        new='lr_scale(*group["params"][0].shape[-2:], group["adjust_lr_fn"])',
        source="xtuner: one lr_ratio for all parameters that are stepped together",
        clauses=("SCALE-3", "STEP-7"),
    ),
    state(
        name="a convolution's variance not flattened",
        old="*(p.shape[:1] if layout.flatten else p.shape[:-1])",
        new="*p.shape[:-1]",
        source="ours: one number for each kernel's row",
        clauses=("VAR-5", "VAR-4"),
    ),
    layout(
        name="convolutions flattened from the left",
        old="        return shape[0], math.prod(shape[1:])\n",
        new="        return math.prod(shape[:-1]), shape[-1]\n",
        source="dion#121: kernels orthogonalized with rows that are not theirs",
        clauses=("LAYOUT-1", "LAYOUT-2", "SCALE-3"),
    ),
    routing(
        name="only two-dimensional convolutions",
        old="CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)",
        new="CONVOLUTION = (nn.Conv2d,)",
        source="KellerJordan/Muon: `ndim == 4`",
        clauses=("ROUTE-8", "ROUTE-2"),
    ),
    routing(
        name="depthwise convolutions orthogonalized",
        old="1 < owner.groups == owner.in_channels",
        new="1 < owner.groups == p.shape[1]",
        source="timm#2580: rows of a depthwise kernel have nothing to do with each other",
        clauses=("ROUTE-2",),
    ),
    routing(
        name="a tied weight by its first role",
        old='[model.get_submodule(name.rpartition(".")[0]) for name in names]',
        new='[model.get_submodule(name.rpartition(".")[0]) for name in names[:1]] * len(names)',
        source="ours: an output head that comes before its embedding",
        clauses=("ROUTE-2",),
    ),
    routing(
        name="a layout on a container passed over",
        old="        if unknown := by_name.keys() - own.keys():\n",
        new="        if own and (unknown := by_name.keys() - own.keys()):\n",
        source="ours: a fused projection, wrapped after its layout was written down, was orthogonalized whole",
        clauses=("ROUTE-4",),
    ),
    routing(
        name="frozen weights routed",
        old="        if not p.requires_grad:\n            continue\n",
        new="",
        source="torchtitan: exactly one optimizer for every trainable parameter, and none for the others",
        clauses=("ROUTE-1",),
    ),
    routing(
        name="a pattern that matches nothing",
        old="    if not found:\n",
        new="    if not aliases:\n",
        source="verl#7120: a misspelt option changed nothing and nobody noticed",
        clauses=("ROUTE-5", "ROUTE-6"),
    ),
    routing(
        name="the last of two patterns wins",
        old="            if name in by:\n",
        new="            if name in by and by[name] == pattern:\n",
        source="ours: the order of a dict decides",
        clauses=("ROUTE-5",),
    ),
    routing(
        name="nothing orthogonalized",
        old='    if not any("muon" in algorithms(group) for group in groups.values()):\n',
        new="    if not groups:\n",
        source="LlamaFactory#8041, DeepSpeed#8438: 'muon params = 0' in a log, and AdamW trained the model",
        clauses=("ROUTE-6",),
    ),
    routing(
        name="every two-dimensional weight is a matrix",
        old='    if p.ndim == 2 and (isinstance(owner, nn.Linear) or getattr(p, "use_muon", None)):\n',
        new="    if p.ndim == 2:\n",
        source="KellerJordan/Muon, Moonlight, xtuner: `ndim >= 2`, fused or not",
        clauses=("ROUTE-6", "ROUTE-4"),
    ),
    routing(
        name="no output head, no question",
        old="    if sizes and list(candidates.values()) != [max(sizes)]:\n",
        new="    if len(candidates) > 1:\n",
        source="ours: a padded or factored head would be orthogonalized",
        clauses=("ROUTE-6",),
    ),
    Mutant(
        name="a convolution of one channel taken to be depthwise",
        path="impl/routing.py",
        old="any(isinstance(owner, CONVOLUTION) and 1 < owner.groups == owner.in_channels for owner in owners)",
        new="any(isinstance(owner, CONVOLUTION) and owner.groups == owner.in_channels for owner in owners)",
        source="ours: as many groups as channels, one, and yet it mixes what its kernel covers",
        clauses=("ROUTE-2",),
    ),
    Mutant(
        name="groups of a block that do not divide its rows accepted",
        path="impl/layout.py",
        old="    if rows % (layout.blocks * layout.groups):",
        new="    if rows % layout.blocks or rows % layout.groups:",
        source="ours: blocks divide the rows, and so do groups, but not one after the other",
        clauses=("LAYOUT-4",),
    ),
)
