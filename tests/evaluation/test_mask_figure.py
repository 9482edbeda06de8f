"""The drawing of the mask shows what the pattern says."""

from __future__ import annotations

from pathlib import Path

import torch

from mufasa_rec.evaluation.mask_figure import EXAMPLE, branch_masks, draw_mask
from mufasa_rec.ops.sparse_attention.projected import BLOCK, SELECTED, WINDOW


def test_masks_are_those_of_the_pattern() -> None:
    masks, block = branch_masks(EXAMPLE, 40), EXAMPLE.block
    for t in range(40):
        assert torch.nonzero(masks[WINDOW][t]).squeeze(1).tolist() == list(range(max(0, t - 11), t + 1))
        assert torch.nonzero(masks[BLOCK][t]).squeeze(1).tolist() == list(range((t + 1) // block * block))
        selected = masks[SELECTED][t]
        assert selected[: min(block, t + 1)].all()
        assert selected[t // block * block : t + 1].all()
        assert not selected[t + 1 :].any()
        assert len(set((torch.nonzero(selected).squeeze(1) // block).tolist())) == min(t // block + 1, 4)


def test_drawing_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw_mask(tmp_path / f"{name}.svg", num_events=20)
        draw_mask(tmp_path / f"{name}.png", num_events=20)
    for suffix in ("svg", "png"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
