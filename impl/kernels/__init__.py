# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file each: kernel, launcher, and what it computes in plain torch. Nothing else imports triton."""
