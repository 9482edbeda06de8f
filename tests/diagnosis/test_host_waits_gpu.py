"""Where a GPU is really waited for, as PyTorch tells it."""

from __future__ import annotations

import pytest
import torch

from mufasa_rec.diagnosis.host_waits import HostWaits
from mufasa_rec.ops import host_reads

pytestmark = pytest.mark.gpu


def test_lines_that_wait_for_the_gpu_are_named_and_others_are_not() -> None:
    device = torch.device("cuda")
    x = torch.arange(6.0, device=device)
    waits = HostWaits(device)
    before = torch.cuda.get_sync_debug_mode()
    with waits.watching():
        float(x.sum())  # waits
        y = torch.where(x > 2, x, 0.0) * 2
        with host_reads.argued("meant"):
            y[y > 2]  # waits, meant
    found = {finding.where.rsplit("# ", 1)[-1].rstrip("`"): finding.is_fault for finding in waits.findings()}
    assert found == {"waits": True, "waits, meant": False}
    assert torch.cuda.get_sync_debug_mode() == before
