"""Which torch, fbgemm-gpu and torchrec belong together, checked from package metadata before any of them is imported.

The three are built against one another minor by minor. A wrong pair fails deep inside an import with a missing symbol;
this check fails first and says which package is wrong, which one is right, and the pip command that brings it.
"""

import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# torchrec and fbgemm-gpu share a version number; the value is the torch they are built for.
TORCH_OF = {"1.6": "2.11", "1.7": "2.12", "1.8": "2.13", "1.9": "2.14"}
TORCHREC_OF = {torch: torchrec for torchrec, torch in TORCH_OF.items()}
FBGEMM_CPU, FBGEMM_CUDA = "fbgemm-gpu-cpu", "fbgemm-gpu"


class VersionMismatchError(RuntimeError):
    """The installed torch, fbgemm-gpu and torchrec do not belong together."""


@dataclass(frozen=True, kw_only=True)
class Installed:
    """Versions as the packages' metadata state them; None where a package is not installed."""

    torch: str | None
    torchrec: str | None
    fbgemm_cpu: str | None
    fbgemm_cuda: str | None


def check_versions(version_of: Callable[[str], str] = metadata.version) -> None:
    """Raise unless torch, fbgemm-gpu and torchrec are installed in versions that belong together.

    Args:
        version_of: Gives a distribution's version or raises `PackageNotFoundError`; tests pass their own.

    Raises:
        VersionMismatchError: A package is missing or of the wrong minor version, both builds of fbgemm-gpu are
            installed, or the CUDA build of fbgemm-gpu stands beside a CPU build of torch.
    """
    installed = Installed(
        torch=_version(version_of, "torch"),
        torchrec=_version(version_of, "torchrec"),
        fbgemm_cpu=_version(version_of, FBGEMM_CPU),
        fbgemm_cuda=_version(version_of, FBGEMM_CUDA),
    )
    if problem := find_mismatch(installed):
        raise VersionMismatchError(problem)


def find_mismatch(installed: Installed) -> str | None:
    """Say what is wrong with a set of versions, and the remedy; None when they belong together."""
    torch = installed.torch
    if torch is None:
        return "torch is not installed. Remedy: pip install torch==2.13.0, then a lock of requirements/"
    minor = TORCHREC_OF.get(_minor(torch))
    if minor is None:
        remedy = "Remedy: pip install torch==2.13.0, then a lock of requirements/"
        return f"torch {torch} is not supported: {_pairs()}. {remedy}"
    wanted = FBGEMM_CPU if _is_cpu_build(torch) or installed.fbgemm_cpu else FBGEMM_CUDA
    return _wrong_build(installed, minor, wanted) or _wrong_minor(installed, minor, wanted)


def _wrong_build(installed: Installed, minor: str, wanted: str) -> str | None:
    if not installed.fbgemm_cuda or not (installed.fbgemm_cpu or _is_cpu_build(installed.torch or "")):
        return None
    problem = (
        f"{FBGEMM_CUDA} {installed.fbgemm_cuda} (the CUDA build) stands beside torch {installed.torch} (a CPU build)"
    )
    if installed.fbgemm_cpu:
        problem = f"{FBGEMM_CPU} and {FBGEMM_CUDA} are both installed and overwrite each other"
    return f"{problem}. Remedy: pip uninstall -y {FBGEMM_CPU} {FBGEMM_CUDA} && {_install(minor, wanted)}"


def _wrong_minor(installed: Installed, minor: str, wanted: str) -> str | None:
    remedy = f"Remedy: {_install(minor, wanted)}"
    for name, version in ((wanted, installed.fbgemm_cpu or installed.fbgemm_cuda), ("torchrec", installed.torchrec)):
        if version is None:
            return f"{name} is not installed, torch {installed.torch} is. {remedy}"
        found = _minor(version)
        if found != minor:
            fits = f"is built for torch {TORCH_OF[found]}" if found in TORCH_OF else "is not supported"
            return (
                f"{name} {version} {fits}, but torch {installed.torch} is installed: it needs {name} {minor}. {remedy}"
            )
    return None


def code_versions() -> dict[str, str]:
    """Versions of the packages that a program's numbers depend on, and the commit of a checkout."""
    names = ("mufasa_rec", "torch", "torchrec", FBGEMM_CPU, FBGEMM_CUDA, "pyarrow", "numpy")
    found = {"python": platform.python_version()}
    found |= {name: version for name in names if (version := _version(metadata.version, name))}
    if commit := checkout_commit():
        found["commit"] = commit
    return found


def checkout_commit() -> str | None:
    """The commit of the checkout that this file lies in, with a `+` when files were changed; None outside one."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent.parent
        if not (folder / ".git").exists():  # an installed package may lie in somebody else's checkout
            raise FileNotFoundError(folder)
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(version_of: Callable[[str], str], name: str) -> str | None:
    try:
        return version_of(name)
    except metadata.PackageNotFoundError:
        return None


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _is_cpu_build(torch: str) -> bool:
    return torch.endswith("+cpu")


def _install(torchrec_minor: str, fbgemm_name: str) -> str:
    return f"pip install --no-deps '{fbgemm_name}=={torchrec_minor}.*' 'torchrec=={torchrec_minor}.*'"


def _pairs() -> str:
    return ", ".join(
        f"torch {torch} goes with fbgemm-gpu and torchrec {torchrec}" for torchrec, torch in TORCH_OF.items()
    )
