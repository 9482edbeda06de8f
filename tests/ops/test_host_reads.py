"""Code that looks at values only where that is free, run as it would on an accelerator: the same results."""

from __future__ import annotations

import pytest
import torch

from mufasa_rec.modules.candidate_pairs import plan_pairs
from mufasa_rec.modules.history import Candidates, History
from mufasa_rec.ops import host_reads
from mufasa_rec.ops.attention import candidate_attention
from mufasa_rec.ops.jagged import plan_groups
from mufasa_rec.ops.sparse_attention.api import attend_and_select
from tests.sparse import LENGTHS, PATTERNS, as_leaves, copies_of, make_layout, make_rows, make_tokens
from tests.tensors import gradient, offsets_of


def everywhere(tensor: torch.Tensor) -> bool:
    return True


def test_only_tensors_that_lie_elsewhere_are_not_free() -> None:
    here, there = torch.zeros(1), torch.zeros(1)
    with host_reads.as_on_accelerator(lambda tensor: tensor is there):
        assert host_reads.free(here)
        assert not host_reads.free(there)
    assert host_reads.free(there)
    assert not host_reads.free(torch.zeros(1, device="meta"))


def test_an_argument_ends_with_its_block_also_after_an_error() -> None:
    with pytest.raises(KeyError), host_reads.argued("outer"):
        with host_reads.argued("inner"):
            assert host_reads.argument() == "inner"
        assert host_reads.argument() == "outer"
        raise KeyError
    assert host_reads.argument() == ""


@pytest.mark.parametrize("name", ["tiles of a block", "timegap", "overlapping tokens"])
def test_tiles_are_cleared_by_masks_as_by_index(name: str) -> None:
    torch.manual_seed(0)
    layout = make_layout(LENGTHS, PATTERNS[name])
    x, tokens = make_rows(sum(LENGTHS), 4, 2), make_tokens(layout, 2)
    weight = torch.randn(x.q.shape)
    found = []
    for lies_there in (lambda tensor: False, everywhere):
        mine, own = as_leaves(x), copies_of(tokens, torch.float32)
        with host_reads.as_on_accelerator(lies_there):
            out, _ = attend_and_select(mine, *own, layout)
            (out * weight).sum().backward()
        found.append([out.detach(), *(gradient(t) for t in (*mine.tensors().values(), *own))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_padded_group_attends_as_several_do() -> None:
    torch.manual_seed(0)
    offsets, owner = offsets_of([0, 3, 9, 1]), torch.tensor([0, 1, 1, 2, 3])
    qkv, events = torch.randn(5, 3, 2, 4), torch.randn(13, 2, 2, 4)
    here = candidate_attention(qkv, events, owner, plan_groups(offsets, 13))
    with host_reads.as_on_accelerator(everywhere):
        plan = plan_groups(offsets, 13, max_length=10)
        there = candidate_attention(qkv, events, owner, plan)
    assert len(plan.groups) == 1
    assert torch.allclose(here, there, atol=1e-6)


def test_values_are_checked_only_where_that_is_free() -> None:
    wrong = {"embedded": torch.zeros(3, 4), "offsets": torch.tensor([0, 5]), "start_position": torch.tensor([0])}
    with pytest.raises(ValueError, match="end at the number of rows"):
        History(**wrong)
    with host_reads.as_on_accelerator(everywhere):
        History(**wrong)


def test_most_candidates_of_a_user_is_a_wait_that_is_argued(monkeypatch: pytest.MonkeyPatch) -> None:
    users, items = torch.tensor([0, 3, 3]), torch.tensor([0, 2, 3])
    history = History(embedded=torch.zeros(3, 4), offsets=users, start_position=torch.zeros(2).long(), max_length=3)
    said: list[str] = []
    argued = host_reads.argued
    monkeypatch.setattr(host_reads, "argued", lambda reason: said.append(reason) or argued(reason))
    with host_reads.as_on_accelerator(everywhere):
        (group,) = plan_pairs(history, Candidates(embedded=torch.zeros(3, 4), offsets=items))
    assert group.slot.tolist() == [0, 1, 0]
    assert "once a batch" in said[0]
