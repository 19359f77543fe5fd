# SPDX-License-Identifier: Apache-2.0
"""ORTH gone wrong."""

from functools import partial

from tests.mutants import Mutant

orthogonalize = partial(Mutant, path="impl/orthogonalize.py")
schedules = partial(Mutant, path="impl/schedules.py")

MUTANTS = (
    orthogonalize(
        name="a hidden epsilon",
        old="X.detach()[None], plan, eps).view(X.shape)",
        new="X.detach()[None], plan, eps or 1e-7).view(X.shape)",
        source="torch.optim.Muon, and Emerging-Optimizers#229: 1e-7 under the norm; a small gradient's update all but vanishes",
        clauses=("ORTH-3", "ORTH-4", "ORTH-5", "ORTH-12", "STEP-10"),
        seed="scale",
    ),
    orthogonalize(
        name="an epsilon whose square underflows",
        old="    k = torch.where(norm == 0, norm, 1 / norm)\n",
        new="    k = norm.square().clamp(min=1e-30 * 1e-30).rsqrt()\n",
        source="Emerging-Optimizers#230, the first fix: eps=1e-30 is squared to zero in float32, and zero over zero is NaN",
        clauses=("ORTH-5", "LAYOUT-3"),
        seed="scale",
    ),
    orthogonalize(
        name="the norm of what was not rescaled",
        old="    lift, factor = unit_scale(X.abs().amax(dim=(-2, -1), keepdim=True))\n",
        new="    lift = factor = torch.ones_like(X[:, :1, :1])\n",
        source="Emerging-Optimizers#238, torch.optim.Muon: squares overflow float32 at 1e20, and zero comes out",
        clauses=("ORTH-3", "ORTH-4", "ORTH-5"),
        seed="scale",
    ),
    orthogonalize(
        name="rescaled by one factor",
        old="    lift = torch.where(largest < 1, torch.full_like(largest, torch.finfo(largest.dtype).tiny ** -0.5), one)\n",
        new="    lift = one\n",
        source="ours: the inverse of a subnormal number overflows",
        clauses=("ORTH-3", "ORTH-5"),
        seed="scale",
    ),
    orthogonalize(
        name="rescaled by the largest entry instead of the largest magnitude",
        old="X.abs().amax(dim=(-2, -1), keepdim=True)",
        new="X.amax(dim=(-2, -1), keepdim=True)",
        source="ours: a huge negative entry next to small positive ones overflows",
        clauses=("ORTH-5",),
        seed="scale",
    ),
    orthogonalize(
        name="a guard that turns NaN into zero",
        old="    return torch.stack([x.mT for x in done] if tall else done)\n",
        new="    return torch.nan_to_num(torch.stack([x.mT for x in done] if tall else done))\n",
        source="dion#79: a zeroed update hides what went wrong and decays the weights nevertheless",
        clauses=("SKIP-4",),
        seed="scale",
    ),
    orthogonalize(
        name="one norm for the whole batch",
        old="        norm = torch.stack([torch.linalg.vector_norm(x) for x in alone])\n",
        new="        norm = torch.linalg.vector_norm(torch.stack(alone)).repeat(len(alone))\n",
        source="Emerging-Optimizers, distributed_normalize_p2: a slice 1000 times smaller than the others comes out at 1/20",
        clauses=("ORTH-7", "LAYOUT-2", "LAYOUT-3"),
        seed="scale",
    ),
    orthogonalize(
        name="epsilon added to the norm",
        old="norm.maximum((eps * lift * factor).flatten())",
        new="(norm + (eps * lift * factor).flatten())",
        source="KellerJordan/Muon, dion, optax: an epsilon moves every result, not only the smallest",
        clauses=("ORTH-12", "STEP-9"),
        seed="scale",
    ),
    orthogonalize(
        name="the norm in half precision",
        old="torch.stack([torch.linalg.vector_norm(x) for x in alone])",
        new="torch.stack([torch.linalg.vector_norm(x.half()) for x in alone]).to(X.dtype)",
        source="Emerging-Optimizers#228: float16 all the way",
        clauses=("ORTH-1", "STEP-1"),
    ),
    orthogonalize(
        name="iterated in bfloat16",
        old="to(torch.float64 if X.dtype == torch.float64 else torch.float32)",
        new="to(torch.bfloat16)",
        source="torch.optim.Muon, KellerJordan/Muon, xtuner: float32 and float64 weights get an update of three digits",
        clauses=("ORTH-1", "ORTH-4", "ORTH-8", "STEP-1"),
    ),
    orthogonalize(
        name="one quintic fewer",
        old="in enumerate(coefficients):",
        new="in enumerate(coefficients[:-1]):",
        source="ours: the first product is made outside the loop",
        clauses=("ORTH-1", "ORTH-2", "ORTH-9"),
    ),
    orthogonalize(
        name="b and c exchanged",
        old="beta=b, alpha=c)",
        new="beta=c, alpha=b)",
        source="ours: torch's beta belongs to the term that is added to",
        clauses=("ORTH-1", "ORTH-9", "STEP-1"),
    ),
    orthogonalize(
        name="the Schatten norm without its fourth root",
        old="[torch.linalg.vector_norm(A) for A in gram]).sqrt()",
        new="[torch.linalg.vector_norm(A) for A in gram])",
        source="ours: the norm of the Gram matrix is the square of the Schatten norm",
        clauses=("ORTH-1", "ORTH-2", "ORTH-9"),
    ),
    orthogonalize(
        name="no margin",
        old=" if eps else norm) * plan.margin",
        new=" if eps else norm)",
        source="Polar Express has 1.01 in Emerging-Optimizers, 1.02 in dion, 1.05 in gram-newton-schulz",
        clauses=("ORTH-1", "ORTH-12"),
    ),
    orthogonalize(
        name="a tall result not transposed back",
        old="[x.mT for x in done] if tall else done",
        new="done",
        source="ours: a view of the asked shape takes it without a word",
        clauses=("ORTH-1", "ORTH-8", "STEP-1"),
    ),
    orthogonalize(
        name="a tall matrix never transposed",
        old="    tall = X.shape[-2] > X.shape[-1]\n",
        new="    tall = False\n",
        source="xtuner#1582, in review: the same numbers from the larger of two Gram matrices",
        clauses=("ORTH-13",),
    ),
    orthogonalize(
        name="strides left as they are",
        old="x.clone(memory_format=torch.contiguous_format)",
        new="x",
        source="ultralytics#26035: the order in memory changes the update",
        clauses=("ORTH-11",),
    ),
    orthogonalize(
        name="rescaled in place",
        old="    X = (X * lift) * factor\n",
        new="    X = X.mul_(lift).mul_(factor)\n",
        source="pytorch#194664, gram-newton-schulz: without nesterov the direction is the momentum, which is overwritten",
        clauses=("ORTH-11", "MOM-1", "MOM-4"),
    ),
    orthogonalize(
        name="an epsilon added to the entries",
        old="    X = (X * lift) * factor\n",
        new="    X = (X * lift) * factor + 1e-4\n",
        source="ours: a guard against zero in the wrong place",
        clauses=("ORTH-1", "ORTH-5", "ORTH-6", "LAYOUT-3"),
    ),
    schedules(
        name="any coefficients at any number of steps",
        old="    _check(quintics)\n",
        new="",
        source="Emerging-Optimizers: `aol` at 5 steps ascends, with a cosine of -0.998 to the polar factor",
        clauses=("ORTH-10",),
    ),
    schedules(
        name="a schedule cycled beyond its end",
        old="    if len(quintics) != ns_steps:\n",
        new="    quintics = (quintics * ns_steps)[:ns_steps]\n    if len(quintics) != ns_steps:\n",
        source="Emerging-Optimizers: `quintic` at 6 steps begins again and leaves singular values of 0.06 to 0.17",
        clauses=("ORTH-10",),
    ),
)
