"""Which torch, fbgemm-gpu and torchrec belong together, checked from package metadata before any of them is imported.

The three are built against one another minor by minor. A wrong pair fails deep inside an import with a missing symbol; this
check fails first and says which package is wrong, which one is right, and the pip command that brings it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

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
        VersionMismatchError: A package is missing or of the wrong minor version, both builds of fbgemm-gpu are installed, or
            the CUDA build of fbgemm-gpu stands beside a CPU build of torch.
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
        return "torch is not installed. Remedy: pip install torch==2.13.0, then the lock: see requirements/cpu.txt"
    torchrec_minor = TORCHREC_OF.get(_minor(torch))
    if torchrec_minor is None:
        return f"torch {torch} is not supported ({_pairs()}). Remedy: pip install torch==2.13.0 and {_install('1.8', FBGEMM_CPU)}"
    wanted = FBGEMM_CPU if _is_cpu_build(torch) or installed.fbgemm_cpu else FBGEMM_CUDA
    remedy = f"Remedy: {_install(torchrec_minor, wanted)}"
    if installed.fbgemm_cpu and installed.fbgemm_cuda:
        return (
            f"both {FBGEMM_CPU} {installed.fbgemm_cpu} and {FBGEMM_CUDA} {installed.fbgemm_cuda} are installed and overwrite each "
            f"other. Remedy: pip uninstall -y {FBGEMM_CPU} {FBGEMM_CUDA} && {_install(torchrec_minor, wanted)}"
        )
    if installed.fbgemm_cuda and _is_cpu_build(torch):
        return (
            f"{FBGEMM_CUDA} {installed.fbgemm_cuda} (the CUDA build) stands beside torch {torch} (a CPU build). "
            f"Remedy: pip uninstall -y {FBGEMM_CUDA} && {_install(torchrec_minor, FBGEMM_CPU)}"
        )
    fbgemm_name = FBGEMM_CPU if installed.fbgemm_cpu else FBGEMM_CUDA
    found = {fbgemm_name: installed.fbgemm_cpu or installed.fbgemm_cuda, "torchrec": installed.torchrec}
    for name, version in found.items():
        if version is None:
            return f"{wanted if name != 'torchrec' else name} is not installed (torch {torch} is). {remedy}"
        if _minor(version) != torchrec_minor:
            belongs = (
                f"is built for torch {TORCH_OF[_minor(version)]}" if _minor(version) in TORCH_OF else "is not supported"
            )
            return f"{name} {version} {belongs}, but torch {torch} is installed; the right one is {name} {torchrec_minor}.*. {remedy}"
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
