"""The package as a user has it: installed from a built wheel, and started from a folder that has nothing of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "mufasa_rec", "components", "torchx_apps")
TORCHX = str(Path(sysconfig.get_path("scripts")) / "torchx")


def install(folder: Path) -> Path:
    """Install this tree's package into a folder, without any download; returns where it lies."""
    source, site = folder / "source", folder / "site"
    source.mkdir(parents=True)
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, source / part)
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index")
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, "--target", site, source], check=True, timeout=300)
    return site


def torchx(
    site: Path, *arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout_s: int = 120
) -> subprocess.CompletedProcess[str]:
    """Run TorchX's program with the installed package and nothing else of ours."""
    return subprocess.run(
        [TORCHX, *arguments],
        cwd=cwd,
        env={**(env or os.environ), "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
