"""Memory that a process frees stays with it, so that the next step need not have it cleared again."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mufasa_rec.distributed.host_memory import use_large_pages

_PROGRAM = """
import sys
from pathlib import Path
import torch
from mufasa_rec.distributed.host_memory import keep_freed_memory
print(int(keep_freed_memory() if sys.argv[1] == "keep" else True))
pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])
before = pages()
torch.ones(256 << 18)
print((pages() - before) * 4096 >> 20)
"""


def _run(what: str) -> tuple[bool, int]:
    command = [sys.executable, "-c", _PROGRAM, what]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    taken, kept = done.stdout.split()
    return bool(int(taken)), int(kept)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/statm").exists(),
    reason="the settings are glibc's, and the account of a process's memory is Linux's",
)
def test_a_large_block_that_was_freed_stays_with_the_process() -> None:
    (_, given_back), (taken, kept) = _run("leave"), _run("keep")
    assert taken
    assert given_back < 64  # of 256 MiB
    assert kept > 192


_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not _LARGE_PAGES.exists() or "[never]" in _LARGE_PAGES.read_text() or platform.release() < "6.1",
    reason="the system gives no large pages to memory that was touched before",
)
def test_a_large_table_moves_into_large_pages_with_its_numbers() -> None:
    table = torch.arange(1 << 24, dtype=torch.float32)
    expected = table.clone()
    assert use_large_pages(table)
    assert torch.equal(table, expected)


def test_a_small_tensor_is_left_where_it_is() -> None:
    assert not use_large_pages(torch.zeros(1000))
