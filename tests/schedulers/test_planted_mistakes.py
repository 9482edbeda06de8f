"""Mistakes in a launch: each is refused by name before anything reaches a cluster, and nothing wrong is refused.

The check of a program is a process of its own; here it runs in this one, but for the tests that say so.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torchx import specs

from components.chain import chain
from components.train import train
from mufasa_rec.launch import preflight
from mufasa_rec.launch.refusal import LaunchRefusedError
from mufasa_rec.launch.resources import h100x8
from mufasa_rec.launch.schedulers import kubernetes, slurm
from tests.helpers import object_store  # noqa: F401  knows bucket://
from tests.helpers.installed import torchx
from tests.helpers.kubernetes.api import StandIn
from torchx_apps import preflight as program_check
from torchx_apps.preflight_findings import Findings, Machines


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the check of the program here, where everything it imports is there already."""

    def run(command: list[str], env: Mapping[str, str], folder: str) -> subprocess.CompletedProcess[str]:
        assert folder == "."
        assert command[1:3] == ["-m", "torchx_apps.preflight"]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = program_check.main(command[3:])
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    monkeypatch.setattr(preflight, "run_check", run)


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of a cluster whose sbatch writes what it was given; the file is there once it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    given = tmp_path / "given"
    (folder / "sbatch").write_text(f'#!/bin/sh\n/bin/cp "$2" {given}\necho 17\n')
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))  # none of a real Slurm's programs
    monkeypatch.chdir(tmp_path)
    return given


def to_slurm(app: specs.AppDef, **cfg: Any) -> str:
    return slurm.create_scheduler("test").submit(app, cfg)  # pyrefly: ignore[bad-argument-type]


def to_kubernetes(app: specs.AppDef, **cfg: Any) -> str:
    return kubernetes.create_scheduler("test").submit(app, cfg)  # pyrefly: ignore[bad-argument-type]


def job(dataset: str, *arguments: str, gpus: bool = False, **options: Any) -> specs.AppDef:
    """A training of the demo's preset that would run."""
    told = ("--preset", "demo", "--data.dataset", dataset, *arguments)
    given: dict[str, Any] = {"j": "1x2", "image": "registry/mufasa:1", "max_retries": 1, **options}
    app = train(*told, python="python", **given)
    if gpus:
        app.roles[0].resource = h100x8()
    return app


@pytest.mark.usefixtures("in_this_process")
def test_job_without_a_mistake_is_queued_on_slurm(sbatch: Path, dataset: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert to_slurm(job(dataset, "--run", "runs/a")) == "17"
    assert "torchx_apps.train --preset demo" in sbatch.read_text()
    assert "the first row group has its" in caplog.text
    assert "--run runs/a can be written" in caplog.text
    assert not Path("runs").exists()


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["--data.dataset", "gone"], {}, r"data.dataset gone: there is nothing; give the folder that `prepare` wrote"),
        (["--run", "given/run"], {}, r"--run given/run: cannot be written, .*given: no folder; choose a folder that"),
        (["--checkpoint.folder", "/proc/c"], {}, r"checkpoint.folder /proc/c: cannot be written, /proc: .*; choose"),
        ([], {"j": "1x9", "gpus": True}, r"j is 1x9: 9 processes per node, but a node has 8 GPU\(s\) .* give -j 1x8"),
        (["--checkpoint.grace-s", "60"], {}, r"checkpoint.grace_s is 60: torchrun kills its processes 60 s after"),
        (["--data.split", "tiem"], {}, r"split 'tiem' is not in data set .*; there are: leave_one_out"),
        (["--data.num-readers", "1", "--data.batch-size", "8"], {}, r"data.num_readers=1: fewer than the 2 ranks"),
        (["--model.widht", "3"], {}, r"arguments of torchx_apps.train: .*--model.widht"),
        (["--config", "gone.yaml"], {}, r"--config gone.yaml: there is nothing; check the path"),
        (["--optimizer.tables.name", "adam"], {}, r"optimizer.tables.name='adam': FBGEMM has no fused Adam on a CPU"),
        (
            ["--data.modalities", "smell"],
            {},
            r"modalities: 'smell' is not in data set .*; there are \['image', 'title'\]",
        ),
    ],
)
def test_mistake_is_refused_before_sbatch(
    sbatch: Path, dataset: str, arguments: list[str], options: dict[str, Any], message: str
) -> None:
    Path("given").touch()
    with pytest.raises(LaunchRefusedError, match=message):
        to_slurm(job(dataset, "--run", "runs/a", *arguments, **options))
    assert sbatch.read_text() == ""


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {"image": "mufasa_rec"}, r"image is 'mufasa_rec', the component's default, .* give --image REGISTRY/"),
        ([], {"image": ""}, r"image is '': give the component an --image"),
        (
            [],
            {"image": "Registry/My Image"},
            r"image is 'Registry/My Image': no name of an image; give REGISTRY/NAME:TAG",
        ),
        (["--data.dataset", "memory://gone"], {}, r"data.dataset memory://gone: there is nothing; give the folder"),
        (["--data.dataset", ""], {}, r"data.dataset: missing; give the folder that `prepare` wrote"),
        (["--run", "/in/run"], {}, r"--run /in/run: lies on /in, which is mounted read only; choose another folder"),
        ([], {"j": "2x9", "gpus": True}, r"j is 2x9: 9 processes per node, but a node has 8 GPU\(s\) .* give -j 2x8"),
        (
            ["--checkpoint.grace-s", "59"],
            {"cfg": {"grace_s": 59}, "grace_s": 60},
            r"grace_s is 59: the launcher waits 60",
        ),
    ],
)
def test_mistake_is_refused_before_the_cluster_is_asked(
    stand_in: StandIn, arguments: list[str], options: dict[str, Any], message: str
) -> None:
    stand_in.forbidden = {"create_volcano_job"}  # the answer would be another one
    cfg = options.pop("cfg", {}) if "cfg" in options else {}
    mounts = ["type=bind", "src=/data", "dst=/in", "readonly", "type=volume", "src=runs", "dst=/out"]
    with pytest.raises(LaunchRefusedError, match=message):
        to_kubernetes(job("/in/shop", "--run", "/out/run", *arguments, mounts=mounts, **options), **cfg)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("scheduler", ["slurm", "kubernetes"])
def test_plan_that_does_not_fit_is_refused_with_what_would_help(
    scheduler: str, sbatch: Path, stand_in: StandIn, dataset: str
) -> None:
    stand_in.forbidden = {"create_volcano_job"}
    submit, where = (to_slurm, dataset) if scheduler == "slurm" else (to_kubernetes, f"bucket://{dataset}")
    wide = ("--data.batch-size", "16384", "--model.width", "4096")
    with pytest.raises(LaunchRefusedError) as refused:
        submit(job(where, "--run", "run", *wide, gpus=True))
    found = re.search(r"plan of the tables on 1x2xH100: does not fit: (.*)", str(refused.value))
    assert found
    assert re.search("the fullest rank needs .* of device memory and has 73.5 GiB", found[1])
    assert "It fits with 16 ranks instead of 2: -j 2x8" in found[1]
    assert not sbatch.exists()


def test_plan_of_machines_that_nobody_has_described_is_not_guessed(dataset: str) -> None:
    findings = Findings(Machines(nodes=1, processes=2, gpus=2))
    program_check.check("torchx_apps.train", ["--data.dataset", dataset, "--run", "/tmp/run"], findings)
    assert findings.problems == []
    assert any("the make of the GPUs is not known; ask for a machine by its name" in one for one in findings.unseen)


def test_dash_in_the_name_of_the_role_is_refused_before_the_cluster_is_asked(stand_in: StandIn) -> None:
    stand_in.forbidden = {"create_volcano_job"}
    app = job("/in/shop")
    app.roles[0].name = "train-all"
    with pytest.raises(LaunchRefusedError, match=r"role is 'train-all': .*; give letters, digits and underscores"):
        to_kubernetes(app)


@pytest.mark.usefixtures("in_this_process")
def test_paths_of_a_container_are_said_to_be_unseen_and_not_refused(
    stand_in: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    arguments = ("--run", "/out/run", "--checkpoint.folder", "checkpoints")
    app = job("/in/shop", *arguments, mounts=["type=volume", "src=runs", "dst=/out"])
    scheduler: Any = kubernetes.create_scheduler("test")
    scheduler.submit_dryrun(app, {})
    assert "not checked: data.dataset /in/shop: lies where the job runs and on no volume" in caplog.text
    assert "not checked: --run /out/run: lies where the job runs\n" in caplog.text
    assert "not checked: checkpoint.folder checkpoints: lies where the job runs and on no volume: each" in caplog.text
    assert "a save may take 25 s; torchrun waits 60 s, the cluster 75 s" in caplog.text


@pytest.mark.usefixtures("in_this_process")
def test_machine_without_sbatch_does_not_take_its_paths_for_those_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    scheduler: Any = slurm.create_scheduler("test")
    assert scheduler.submit_dryrun(job("/shared/shop", "--run", "/shared/run"), {}).request.script()
    assert "not checked: data.dataset /shared/shop: lies where the job runs" in caplog.text


@pytest.mark.parametrize("how", ["of the component", "of the scheduler"])
def test_checks_can_be_left_out(how: str, sbatch: Path) -> None:
    skipped = {"no_preflight": True} if how == "of the component" else {}
    cfg = {} if skipped else {"preflight": False}
    assert to_slurm(job("gone", "--run", "runs/a", j="1x9", gpus=True, **skipped), **cfg) == "17"
    assert sbatch.exists()


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"nodeSelector": {"karpenter.sh/capacity-type": "spot"}}, "nodeSelector karpenter.sh/capacity-type: spot"),
        ({"tolerations": [{"key": "cloud.google.com/gke-spot", "operator": "Exists"}]}, "cloud.google.com/gke-spot"),
    ],
)
def test_nodes_that_are_taken_back_need_a_retry(
    spec: dict[str, Any], why: str, tmp_path: Path, stand_in: StandIn
) -> None:
    (tmp_path / "pods.yaml").write_text(f"spec: {spec}")
    scheduler: Any = kubernetes.create_scheduler("test")
    cfg = {"overlay": str(tmp_path / "pods.yaml")}
    with pytest.raises(LaunchRefusedError, match=rf"max_retries is 0, but .*{why} .*; give --max_retries 1 or more"):
        scheduler.submit_dryrun(job("/in/shop", "--run", "/out", max_retries=0), cfg)
    scheduler.submit_dryrun(job("/in/shop", "--run", "/out"), cfg)


@pytest.mark.usefixtures("in_this_process")
def test_partition_that_preempts_needs_a_requeue_and_the_time_to_save(
    sbatch: Path, dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = "PartitionName=low Default=YES GraceTime=20 PreemptMode=REQUEUE"
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/sh\necho {shown}\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    with pytest.raises(LaunchRefusedError, match=r"requeue is False, but jobs of partition 'low' may be preempted"):
        to_slurm(job(dataset, "--run", "r"), requeue=False)
    with pytest.raises(LaunchRefusedError, match=r"checkpoint.grace_s is 25: the cluster kills the job 20 s after"):
        to_slurm(job(dataset, "--run", "r"))
    assert not sbatch.exists()
    assert to_slurm(job(dataset, "--run", "r", "--checkpoint.grace-s", "15", max_retries=0)) == "17"
    assert "with --max_retries 0 any other failure ends it" in caplog.text


@pytest.mark.usefixtures("in_this_process")
def test_signal_that_comes_as_the_job_begins_is_refused(sbatch: Path, dataset: str) -> None:
    with pytest.raises(LaunchRefusedError, match=r"signal is 'USR1@120' and time is '2': .* -cfg signal=USR1@30"):
        to_slurm(job(dataset, "--run", "r"), time="2")
    assert to_slurm(job(dataset, "--run", "r"), time="3") == "17"


@pytest.mark.usefixtures("in_this_process")
def test_every_step_of_a_chain_is_looked_at(sbatch: Path, tmp_path: Path) -> None:
    told = ("--input", "gone", "--run", "runs/a", "--preset", "demo", "export:", "--tabels", "item")
    with pytest.raises(LaunchRefusedError) as refused:
        to_slurm(chain(*told))
    assert "--input gone: there is nothing; give a folder, an events file, or synthetic:<seed>" in str(refused.value)
    assert "unrecognized arguments: --tabels item" in str(refused.value)
    assert not sbatch.exists()
    assert to_slurm(chain("--input", "synthetic:0", "--run", "runs/a", "--preset", "demo")) == "17"


def test_check_that_breaks_down_is_no_silent_pass(sbatch: Path, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.sys, "executable", "/bin/false")
    with pytest.raises(
        LaunchRefusedError, match=r"broke down itself \(exit code 1: it said nothing\); start it without"
    ):
        to_slurm(job(dataset, "--run", "r"))
    assert not sbatch.exists()


@pytest.mark.slow
def test_torchx_shows_what_is_wrong_without_a_traceback(site: Path, sbatch: Path, tmp_path: Path) -> None:
    arguments = ("--preset", "demo", "--data.dataset", "gone", "--run", "given/run")
    (tmp_path / "given").touch()
    options = ("run", "-s", "slurm", "components.train:train", "-j", "1x2", "--", *arguments)
    ran = torchx(site, *options, cwd=tmp_path, env=dict(os.environ))
    assert ran.returncode == 1
    assert "pre-flight: nothing was queued, since the job would fail:" in ran.stderr
    assert "data.dataset gone: there is nothing; give the folder that `prepare` wrote" in ran.stderr
    assert "--run given/run: cannot be written" in ran.stderr
    assert "start it without these checks by `-cfg preflight=False`, or `--no_preflight True`" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert sbatch.read_text() == ""
