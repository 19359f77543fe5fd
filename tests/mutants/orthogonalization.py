# SPDX-License-Identifier: Apache-2.0
"""ORTH, MOM, SCALE, DECAY, STEP and VAR gone wrong."""

from tests.mutants import Mutant

MUTANTS = (
    Mutant(
        name="epsilon added to the norm",
        path="impl/orthogonalize.py",
        old="k = torch.where(norm == 0, norm, 1 / norm)",
        new="k = torch.where(norm == 0, norm, 1 / (norm + 1e-7))",
        source="KellerJordan/Muon and NVIDIA-NeMo/Emerging-Optimizers#230: a small gradient's update all but vanishes",
        clauses=("ORTH-3", "ORTH-12", "STEP-10"),
        seed="scale",
    ),
)
