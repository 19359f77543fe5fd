# SPDX-License-Identifier: Apache-2.0
"""Are the reference's layouts right? Every check here is against something that is not the reference."""

import numpy as np
import pytest
import torch

from reference import Section, matrices


def index_sets(shape, **layout):
    return [index for _, index in matrices(shape, **layout)]


def test_plain_matrix():
    assert torch.equal(index_sets((3, 4))[0], torch.arange(12).view(1, 3, 4))


def test_experts_by_rows_by_columns_and_three_dimensional():
    by_rows = torch.arange(6 * 5).view(6, 5)
    assert torch.equal(index_sets((6, 5), blocks=3)[0], torch.stack([by_rows[0:2], by_rows[2:4], by_rows[4:6]]))
    by_columns = torch.arange(2 * 6).view(2, 6)
    expected = torch.stack([by_columns[:, 0:2], by_columns[:, 2:4], by_columns[:, 4:6]])
    assert torch.equal(index_sets((2, 6), columns=3)[0], expected)
    cube = torch.arange(4 * 2 * 6).view(4, 2, 6)
    assert torch.equal(index_sets((4, 2, 6), blocks=4)[0], cube)
    halves = torch.stack([half for expert in cube for half in (expert[:, :3], expert[:, 3:])])
    assert torch.equal(index_sets((4, 2, 6), blocks=4, columns=2)[0], halves)


def test_gate_above_up_in_every_expert():
    gate, up = index_sets((3, 4, 2), blocks=3, sections=(Section(1), Section(3)))
    cube = torch.arange(24).view(3, 4, 2)
    assert torch.equal(gate, cube[:, :1])
    assert torch.equal(up, cube[:, 1:])


def test_grouped_qkv_with_heads():
    # Megatron: for each of 2 groups 2 query heads, one key head and one value head of 3 rows each.
    grouped = torch.arange(2 * 4 * 3 * 5).view(2, 4, 3, 5)
    sections = (Section(6, head_dim=3), Section(3), (3, "adamw"))
    q, k, v = matrices((24, 5), groups=2, sections=sections)
    assert [algorithm for algorithm, _ in (q, k, v)] == ["muon", "muon", "adamw"]
    assert torch.equal(q[1], grouped[:, :2].reshape(4, 3, 5))
    assert torch.equal(k[1], grouped[:, 2].reshape(1, 6, 5))
    assert torch.equal(v[1], grouped[:, 3].reshape(1, 6, 5))


def test_heads_of_every_block():
    indices = index_sets((8, 2), blocks=2, sections=[{"rows": 4, "head_dim": 2}])[0]
    assert torch.equal(indices, torch.arange(16).view(4, 2, 2))


def test_flattened_convolution():
    assert torch.equal(index_sets((4, 3, 2, 2), flatten=True)[0], torch.arange(48).view(1, 4, 12))
    assert torch.equal(index_sets((4, 3, 2), flatten=True)[0], torch.arange(24).view(1, 4, 6))


def test_written_out_case():
    layout = dict(blocks=2, columns=2, groups=2, sections=(Section(1), Section(2, head_dim=2)))
    one, two = index_sets((12, 2), **layout)
    assert one[..., 0].tolist() == [[0, 6], [1, 7], [12, 18], [13, 19]]
    assert two[..., 0].tolist() == [[2, 4], [8, 10], [3, 5], [9, 11], [14, 16], [20, 22], [15, 17], [21, 23]]


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((6, 4), dict(blocks=3, columns=2)),
        ((24, 4), dict(blocks=2, groups=3, sections=((1,), (3,)))),
        ((24, 4), dict(groups=2, sections=((8, "muon", 4), (4, "adamw")))),
        ((2, 12, 4), dict(blocks=2, columns=2, groups=3, sections=((4, "muon", 2),))),
        ((0, 4), dict(blocks=3)),
        ((4, 0), {}),
        ((5, 1, 3, 3), dict(flatten=True)),
    ],
)
def test_matrices_are_disjoint_and_cover_the_parameter(shape, layout):
    found = torch.cat([index.flatten() for index in index_sets(shape, **layout)])
    assert torch.equal(found.sort().values, torch.arange(np.prod(shape)))


@pytest.mark.parametrize(
    ("shape", "layout", "words"),
    [
        ((6, 4), dict(blocks=4), "blocks=4"),
        ((6, 4), dict(columns=3), "columns=3"),
        ((6, 4), dict(groups=4), "groups=4"),
        ((6, 4), dict(blocks=0), "blocks=0"),
        ((6, 4), dict(sections=(Section(2), Section(3))), "6 rows"),
        ((6, 4), dict(sections=(Section(8), Section(-2))), "6 rows"),
        ((6, 4), dict(sections=(Section(6, head_dim=4),)), "head_dim=4"),
        ((6,), {}, "shape"),
        ((2, 2, 2, 2), {}, "shape"),
    ],
)
def test_layouts_that_do_not_fit(shape, layout, words):
    with pytest.raises(ValueError, match=words):
        matrices(shape, **layout)
