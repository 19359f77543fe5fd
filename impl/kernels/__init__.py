# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file each: kernel, launcher, and what it computes in plain torch. Nothing else imports triton."""

import triton

# Older ones compile kernels that do not fit, and have another Gluon.
NEW_ENOUGH = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
