# SPDX-License-Identifier: Apache-2.0
"""MOM, STEP, SCALE, DECAY and VAR gone wrong: what a step does around the orthogonalization."""

from functools import partial

from tests.mutants import Mutant

muon = partial(Mutant, path="impl/muon.py")
options = partial(Mutant, path="impl/options.py")
stages = partial(Mutant, path="impl/stages.py")
state = partial(Mutant, path="impl/state.py")

MUTANTS = (
    stages(
        name="momentum as a sum",
        old="    new = G * (1 - beta)\n",
        new="    new = G.clone()\n",
        source="dion, xtuner, Moonlight; Emerging-Optimizers#166: the same updates, and checkpoints 20 times too large",
        clauses=("MOM-1",),
    ),
    stages(
        name="sum and average mixed",
        old="    M = (M * beta).add_(new)\n",
        new="    M = (M * beta).add_(G)\n",
        source="Emerging-Optimizers#166: one convention for the momentum, another for the look-ahead",
        clauses=("MOM-1", "MOM-2", "STEP-1"),
    ),
    stages(
        name="momentum only with nesterov",
        old="if nesterov else M\n",
        new="if nesterov else new\n",
        source="KellerJordan/Muon#4: without nesterov the direction was the gradient",
        clauses=("MOM-2", "STEP-1"),
    ),
    stages(
        name="lerp",
        old="    M = (M * beta).add_(new)\n",
        new="    M = torch.lerp(M, G, 1 - beta)\n",
        source="torch.optim.Muon: where huge gradients change sign, the difference inside overflows",
        clauses=("MOM-1",),
    ),
    state(
        name="state in the dtype of the weight",
        old="    return torch.float64 if p.dtype == torch.float64 else torch.float32\n",
        new="    return p.dtype\n",
        source="torch.optim.Muon, dion, NorMuon#7: momentum in bfloat16 forgets small gradients",
        clauses=("MOM-3", "STATE-1", "VAR-5", "STEP-11"),
    ),
    stages(
        name="gradients negated in place",
        old='    return -G if group["maximize"] else G\n',
        new='    return G.neg_() if group["maximize"] else G\n',
        source="ours: AdamW asks for the gradient twice and gets its opposite",
        clauses=("MOM-5", "STEP-4"),
    ),
    stages(
        name="gradients scaled in place",
        old="    new = G * (1 - beta)\n",
        new="    new = G.mul_(1 - beta)\n",
        source="KellerJordan/Muon: `grad.lerp_` looks ahead in the gradient itself",
        clauses=("STEP-4",),
    ),
    muon(
        name="a missing gradient is zero",
        old='for p in group["params"] if p.grad is not None]\n',
        new="""for p in group["params"]]
        for _, p in every:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
""",
        source="KellerJordan/Muon: weights that took no part decay all the same",
        clauses=("STEP-2", "MOM-4"),
    ),
    muon(
        name="a zero gradient is missing",
        old="if p.grad is not None]\n",
        new="if p.grad is not None and p.grad.any()]\n",
        source="ours: momentum stands still, and the host waits to learn it",
        clauses=("STEP-3", "SKIP-7"),
    ),
    muon(
        name="the closure is not called",
        old="            loss = None if closure is None else closure()\n",
        new="            loss = None\n",
        source="Emerging-Optimizers and torchtitan: 'closure is not supported'",
        clauses=("STEP-5",),
    ),
    stages(
        name="a tensor learning rate is read once",
        old='    lr = number(group["lr"])\n',
        new='    lr = group.setdefault("rate", float(group["lr"])) if isinstance(group["lr"], Tensor) else group["lr"]\n',
        source="dion: a captured step went on with the learning rate of its capture",
        clauses=("STEP-6", "SKIP-7"),
    ),
    muon(
        name="weights in another order than their updates",
        old="in zip(rest, prepared, strict=True):\n            apply(",
        new="in zip(sorted(rest, key=lambda ready: ready[1].numel()), prepared, strict=True):\n            apply(",
        source="KellerJordan/Muon: sorted by size, which pairs what belongs together only if both lists are",
        clauses=("STEP-7", "LAYOUT-2"),
    ),
    muon(
        name="the first group's learning rate for all",
        old="            apply(group, p,",
        new='            apply({**group, "lr": self.param_groups[0]["lr"]}, p,',
        source="DeepSpeed#7713: a scheduler wrote one learning rate into all groups",
        clauses=("STEP-9",),
    ),
    stages(
        name="AdamW at Muon's learning rate",
        old='number(group["lr"]) * group["adamw_lr_ratio"]',
        new='number(group["lr"])',
        source="optax#1563, Moonlight: no learning rate of its own for what is not orthogonalized",
        clauses=("STEP-8", "STEP-9"),
    ),
    stages(
        name="half precision rounded twice",
        old="    W = p.to(state_dtype(p)).contiguous()\n",
        new="    W = p.contiguous()\n",
        source="torch.optim.Muon: decay and update are rounded one after the other",
        clauses=("STEP-11",),
    ),
    stages(
        name="never orthogonalized",
        old='orthogonalize(matrices(section, U), group["ns_coefficients"], group["ns_steps"], group["eps"])',
        new="matrices(section, U)",
        source="DeepSpeed#8441: under ZeRO-0 the optimizer was SGD; its tests asked only whether weights change",
        clauses=("STEP-1", "STEP-10", "LAYOUT-3"),
    ),
    stages(
        name="the update is clipped",
        old='            scale = lr_scale(O.shape[-2], O.shape[-1], group["adjust_lr_fn"])\n',
        new="""            scale = lr_scale(O.shape[-2], O.shape[-1], group["adjust_lr_fn"])
            O = O / torch.linalg.vector_norm(O).clamp(min=1)
""",
        source="DeepSpeed#7776, #8439: clipping came after the orthogonalization",
        clauses=("STEP-1", "LAYOUT-2"),
    ),
    options(
        name="rows and columns exchanged in the scale",
        old="ratio = m / n if n",
        new="ratio = n / m if m",
        source="maxtext#4798: input and output dimensions mistaken for one another",
        clauses=("SCALE-1", "SCALE-4", "STEP-1"),
    ),
    options(
        name="a scale below one",
        old='ratio if adjust_lr_fn == "unit_rms_norm" else max(1.0, ratio)',
        new="ratio",
        source="`spectral_norm` of dion and xtuner: the same name for another rule",
        clauses=("SCALE-1", "STEP-1"),
    ),
    options(
        name="AdamW's scale without 0.2",
        old='(0.2 if adjust_lr_fn == "match_rms_adamw" else 1.0)',
        new="1.0",
        source="Emerging-Optimizers#80, Megatron-LM: `spectral` needs a factor that its users forget",
        clauses=("SCALE-2", "STEP-1"),
    ),
    options(
        name="AdamW's 0.2 in every scale",
        old='(0.2 if adjust_lr_fn == "match_rms_adamw" else 1.0)',
        new="0.2",
        source="ours: `spectral` taken for `match_rms_adamw`",
        clauses=("SCALE-4",),
    ),
    options(
        name="a ratio that is kept above one",
        old='ratio if adjust_lr_fn == "unit_rms_norm" else max(1.0, ratio)',
        new="max(1.0, ratio)",
        source="dion, xtuner: `spectral_norm` is not torch's `original`",
        clauses=("SCALE-4",),
    ),
    stages(
        name="decay by the scaled learning rate",
        old='(W * (1 - lr * number(group["weight_decay"]))).sub_',
        new='(W * (1 - lr * scale * number(group["weight_decay"]))).sub_',
        source="ours: tall matrices decay faster than wide ones",
        clauses=("DECAY-1", "STEP-1"),
    ),
    stages(
        name="decay without the learning rate",
        old='(W * (1 - lr * number(group["weight_decay"]))).sub_',
        new='(W * (1 - group["weight_decay"])).sub_',
        source="Emerging-Optimizers, `independent`: saving a checkpoint takes a step with lr=0 and changes the weights",
        clauses=("DECAY-1", "STATE-6", "STEP-1"),
    ),
    stages(
        name="decay after the update",
        old='(W * (1 - lr * number(group["weight_decay"]))).sub_(O * (lr * scale))',
        new='(W - O * (lr * scale)).mul_(1 - lr * number(group["weight_decay"]))',
        source="ours: decay takes a part of the update back",
        clauses=("DECAY-1", "STEP-1"),
    ),
    stages(
        name="decay only where it agrees with the update",
        old='(W * (1 - lr * number(group["weight_decay"])))',
        new='(W * (1 - (W * O >= 0) * (lr * number(group["weight_decay"]))))',
        source="dion, `cautious_wd`: an option there, and another optimizer",
        clauses=("DECAY-1", "STEP-1"),
    ),
    stages(
        name="rows normalized after the scale",
        old='group["normuon_beta2"])\n                write(',
        new='group["normuon_beta2"])\n'
        '                O = O * lr_scale(O.shape[-2], O.shape[-1], group["adjust_lr_fn"])\n                write(',
        source="Megatron-LM, TensorParallelAdaptiveMuon: the scale is applied twice, 11 times too much for 128 columns",
        clauses=("VAR-1", "VAR-2"),
    ),
    stages(
        name="one mean square for a whole matrix",
        old="o.square().mean(-1, keepdim=True)",
        new="o.square().mean()",
        source="ours: that evens out nothing",
        clauses=("VAR-1", "VAR-3"),
    ),
    stages(
        name="rows brought to a norm of their own",
        old="torch.linalg.vector_norm(o) / size)",
        new="0.2 * o.numel() ** 0.5 / size)",
        source="arXiv:2510.05491 as printed: with 0.2 sqrt(m n) the learning rate is scaled a second time",
        clauses=("VAR-1", "VAR-2"),
    ),
    stages(
        name="zero over zero",
        old="torch.where(size == 0, size, torch.linalg.vector_norm(o) / size)",
        new="torch.linalg.vector_norm(o) / size",
        source="dion#24: NaN from a zero gradient, after the decision that all is finite",
        clauses=("VAR-4",),
    ),
    stages(
        name="variance of a skipped step",
        old='write(part["variance_buffer"], V.reshape(part["variance_buffer"].shape), skip)',
        new='write(part["variance_buffer"], V.reshape(part["variance_buffer"].shape), hold)',
        source="dion#79: an update that is not taken must leave no trace in the average of its squares",
        clauses=("VAR-6", "SKIP-2"),
    ),
)
