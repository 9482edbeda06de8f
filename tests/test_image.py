"""The Dockerfile against this tree: no Docker daemon is needed, and none of it is built here."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()


def lines_of(instruction: str) -> list[str]:
    return [line.partition(" ")[2] for line in LINES if line.startswith(f"{instruction} ")]


@pytest.mark.parametrize("lock", ["cpu", "cuda"])
def test_what_the_image_copies_is_there_and_not_ignored(lock: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for line in lines_of("COPY") if "--from" not in line for word in line.split()[:-1]]
    assert copied
    for name in (word.replace("${LOCK}", lock) for word in copied):
        assert (ROOT / name).exists(), name
        assert name.partition("/")[0] in allowed, name


def test_image_runs_as_a_numbered_user_that_is_not_root() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", lines_of("USER")[-1])


def test_image_installs_the_torch_of_the_locks() -> None:
    (version,) = {found for line in lines_of("RUN") for found in re.findall(r" (torch==\S+)", line)}
    assert f"\n{version}\n" in (ROOT / "requirements" / "cuda.txt").read_text()
