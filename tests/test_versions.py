"""The check of matching versions, with made-up metadata."""

from importlib import metadata

import pytest

from mufasa_rec.versions import TORCH_OF, VersionMismatchError, check_versions


def check(**versions: str) -> None:
    """Check a made-up environment; keyword names use `_` for `-`."""
    known = {name.replace("_", "-"): version for name, version in versions.items()}

    def version_of(name: str) -> str:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    check_versions(version_of)


def test_installed_versions_belong_together() -> None:
    check_versions()


@pytest.mark.parametrize(("torchrec", "torch"), TORCH_OF.items())
def test_every_known_pair_passes(torchrec: str, torch: str) -> None:
    check(torch=f"{torch}.0+cpu", fbgemm_gpu_cpu=f"{torchrec}.0", torchrec=f"{torchrec}.1")
    check(torch=f"{torch}.1", fbgemm_gpu=f"{torchrec}.0", torchrec=f"{torchrec}.0")


def test_cpu_fbgemm_beside_cuda_torch_passes() -> None:
    check(torch="2.13.0", fbgemm_gpu_cpu="1.8.0", torchrec="1.8.0")


def test_wrong_fbgemm_names_the_pair_and_the_command() -> None:
    with pytest.raises(VersionMismatchError) as error:
        check(torch="2.13.0+cpu", fbgemm_gpu_cpu="1.7.0", torchrec="1.8.0")
    message = str(error.value)
    assert "fbgemm-gpu-cpu 1.7.0 is built for torch 2.12, but torch 2.13.0+cpu is installed" in message
    assert "pip install --no-deps 'fbgemm-gpu-cpu==1.8.*' 'torchrec==1.8.*'" in message


def test_wrong_torchrec_is_named() -> None:
    with pytest.raises(VersionMismatchError, match=r"torchrec 1\.9\.0 is built for torch 2\.14"):
        check(torch="2.13.0", fbgemm_gpu="1.8.0", torchrec="1.9.0")


def test_unknown_torch_lists_the_pairs() -> None:
    with pytest.raises(VersionMismatchError, match=r"torch 2\.9\.1 is not supported.*torch 2\.13 goes with .* 1\.8"):
        check(torch="2.9.1", fbgemm_gpu_cpu="1.4.0", torchrec="1.4.0")


def test_unknown_torchrec_is_not_supported() -> None:
    with pytest.raises(VersionMismatchError, match=r"torchrec 1\.10\.0 is not supported"):
        check(torch="2.13.0", fbgemm_gpu="1.8.0", torchrec="1.10.0")


def test_cuda_fbgemm_beside_cpu_torch_is_refused() -> None:
    with pytest.raises(VersionMismatchError, match=r"uninstall -y .* && pip install --no-deps 'fbgemm-gpu-cpu==1\.8"):
        check(torch="2.13.0+cpu", fbgemm_gpu="1.8.0", torchrec="1.8.0")


def test_both_builds_of_fbgemm_are_refused() -> None:
    with pytest.raises(VersionMismatchError, match="overwrite each other"):
        check(torch="2.13.0", fbgemm_gpu="1.8.0", fbgemm_gpu_cpu="1.8.0", torchrec="1.8.0")


@pytest.mark.parametrize("missing", ["torch", "fbgemm-gpu-cpu", "torchrec"])
def test_missing_package_is_named(missing: str) -> None:
    versions = {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"}
    del versions[missing]
    with pytest.raises(VersionMismatchError, match=f"{missing} is not installed"):
        check(**versions)
