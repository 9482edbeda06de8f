"""Secrets of a job: their names reach it, their values are nowhere in what describes it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from components.train import train
from mufasa_rec.launch.refusal import LaunchRefusedError
from mufasa_rec.launch.schedulers import kubernetes, slurm
from mufasa_rec.launch.secrets import parse_secrets


def manifest_of(*secrets: str) -> dict[str, Any]:
    app = train("--run", "r", image="i:1", python="python", secrets=list(secrets), no_preflight=True)
    scheduler: Any = kubernetes.create_scheduler("test")
    return scheduler.submit_dryrun(app, {}).request.resource


def slurm_request(*secrets: str) -> Any:
    app = train("--run", "r", python="python", secrets=list(secrets), no_preflight=True)
    return slurm.create_scheduler("test").submit_dryrun(app, {}).request


def test_every_pod_gets_keys_as_variables_and_secrets_as_folders() -> None:
    for task in manifest_of("TOKEN=store/a.b_c", "/var/keys=keys")["spec"]["tasks"]:
        pod = task["template"]["spec"]
        (container,) = pod["containers"]
        source = {"valueFrom": {"secretKeyRef": {"name": "store", "key": "a.b_c"}}}
        assert {"name": "TOKEN", **source} in container["env"]
        (mount,) = [one for one in container["volumeMounts"] if one["mountPath"] == "/var/keys"]
        assert mount["readOnly"] is True
        assert {"name": mount["name"], "secret": {"secretName": "keys"}} in pod["volumes"]


@pytest.mark.parametrize(
    "entry", ["TOKEN=hunter2!", "TOKEN=store", "TOKEN=", "/keys=a/b", "/=a", "a b", "1A", "", "=s/k"]
)
def test_what_names_no_secret_is_refused_without_repeating_a_value(entry: str) -> None:
    with pytest.raises(
        LaunchRefusedError, match=r"names no secret; give NAME of a variable .* A value goes in no"
    ) as one:
        parse_secrets([entry])
    assert "hunter2" not in str(one.value)


def test_target_given_twice_is_refused() -> None:
    with pytest.raises(LaunchRefusedError, match="secrets: TOKEN is given twice"):
        parse_secrets(["TOKEN", "TOKEN=store/key"])


def test_variable_of_the_shell_would_be_shown_by_a_manifest() -> None:
    with pytest.raises(LaunchRefusedError, match=r"kubectl create secret generic .* give TOKEN=NAME/KEY"):
        manifest_of("TOKEN")


def test_secret_of_kubernetes_is_none_on_slurm() -> None:
    with pytest.raises(LaunchRefusedError, match=r"TOKEN=store/key is one of Kubernetes; on Slurm give the NAME"):
        slurm_request("TOKEN=store/key")


def test_variable_that_is_not_set_is_refused_before_sbatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # where sbatch would be missing
    scheduler: Any = slurm.create_scheduler("test")
    app = train("--run", "r", python="python", secrets=["TOKEN"], no_preflight=True)
    with pytest.raises(LaunchRefusedError, match=r"secrets: TOKEN not set in this shell, .*; export it first"):
        scheduler.submit(app, {"log_dir": str(tmp_path)})


@pytest.mark.parametrize("value", ["", "hunter2"])
def test_script_goes_on_only_with_its_secrets(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", value)
    script = slurm_request("TOKEN").script()
    (line,) = [line for line in script.splitlines() if "TOKEN" in line]
    ran = subprocess.run(["bash", "-c", f"{line}\necho on"], capture_output=True, text=True)
    assert (ran.stdout, "export it before sbatch" in ran.stderr) == (("on\n", False) if value else ("", True))
    assert "hunter2" not in script
