"""What `torchx run -s slurm` hands to sbatch, without a cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torchx import specs
from torchx.schedulers.api import Stream

from components.train import NETWORKS, train
from mufasa_rec.launch.refusal import LaunchRefusedError
from mufasa_rec.launch.resources import h100x8
from mufasa_rec.launch.schedulers.slurm import SlurmScheduler, create_scheduler
from mufasa_rec.launch.slurm.jobs import find_job, list_jobs, node_memory_mb
from mufasa_rec.launch.slurm.script import ENDING, quoted

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmScheduler:
    """The scheduler on a machine without Slurm."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return create_scheduler("torchx", cache_size=3)


def script_of(scheduler: SlurmScheduler, app: specs.AppDef, **options: Any) -> str:
    return scheduler.submit_dryrun(app, options).request.script()


def app_of(*arguments: str, **options: Any) -> specs.AppDef:
    given: dict[str, Any] = {"no_preflight": True, **options}
    app = train(*arguments, python="python", **given)
    app.roles[0].resource = h100x8() if options.get("gpu") is None else app.roles[0].resource
    return app


def test_script_is_the_one_on_file(scheduler: SlurmScheduler) -> None:
    script = script_of(
        scheduler,
        app_of(
            *("--run", "/shared/runs/a b"),
            j="2x8",
            name="night",
            max_retries=3,
            network="ib",
            env={"NCCL_SOCKET_IFNAME": "ib0,ib1"},
            secrets=["WANDB_API_KEY"],
        ),
        partition="gpu",
        account="rec",
        qos="high",
        reservation="july",
        constraint="h100&nvlink",
        time="4:00:00",
        exclusive=True,
        extra="--nice=10 --exclude=n7",
        log_dir="/shared/logs",
    )
    assert_as_on_file(script, "train_2x8.sbatch")


def test_variables_of_every_network_are_those_on_file(scheduler: SlurmScheduler) -> None:
    lines = []
    for network in NETWORKS:
        exported = [line for line in script_of(scheduler, app_of(network=network)).splitlines() if "export " in line]
        lines += [f"# {network}", *(line for line in exported if line.partition(" ")[2].startswith(("NCCL", "FI_")))]
    assert_as_on_file("\n".join([*lines, ""]), "networks.sh")


def assert_as_on_file(text: str, name: str) -> None:
    """Compare with a golden file, or write it anew with REWRITE_GOLDEN=1, to be read in the diff."""
    file = GOLDEN / name
    if os.environ.get("REWRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), f"if that is meant, REWRITE_GOLDEN=1 writes {file.name} anew; read the diff"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("requeue", [True, False])
def test_script_is_one_that_bash_reads(scheduler: SlurmScheduler, requeue: bool) -> None:
    script = script_of(scheduler, app_of("it's", "$HOME", '"'), requeue=requeue)
    subprocess.run(["/bin/bash", "-n"], input=script, text=True, check=True)


def test_job_of_one_node_names_no_gpus_memory_or_signal_that_it_does_not_need(scheduler: SlurmScheduler) -> None:
    script = script_of(scheduler, app_of(j="1x1", cpu=3, gpu=0, memMB=500), signal="", requeue=False)
    options = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        "#SBATCH --job-name=train",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=3",
        "#SBATCH --mem=500M",
        "#SBATCH --no-requeue",
        f"#SBATCH --output={os.getcwd()}/slurm-%j.out",
        "#SBATCH --open-mode=append",
    ]
    assert "scontrol requeue" not in script


def test_elastic_job_asks_for_a_range_of_nodes(scheduler: SlurmScheduler) -> None:
    assert "#SBATCH --nodes=2-4\n" in script_of(scheduler, app_of(j="2:4x8", max_restarts=1))


def test_variable_with_a_comma_and_the_number_of_the_job_reach_the_program(scheduler: SlurmScheduler) -> None:
    app = app_of(env={"LIST": "a,b c", "JOB": f"job-{specs.macros.app_id}"})
    lines = script_of(scheduler, app).splitlines()
    assert "export LIST='a,b c'" in lines
    assert """export JOB=job-"$SLURM_JOB_ID\"""" in lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "''"),
        ("a", "a"),
        ("a b", "'a b'"),
        ("${app_id}", '"$SLURM_JOB_ID"'),
        ("x ${app_id}", """'x '"$SLURM_JOB_ID\""""),
    ],
)
def test_text_is_quoted_but_for_the_number_of_the_job(text: str, shown: str) -> None:
    assert quoted(text) == shown


def test_dry_run_shows_the_script_as_one_for_sbatch_alone(scheduler: SlurmScheduler) -> None:
    info = scheduler.submit_dryrun(app_of(), {})
    assert str(info).startswith(
        "$ sbatch --parsable FILE\n\nFILE, which sbatch takes without TorchX too:\n\n#!/bin/bash\n"
    )
    assert str(info).endswith(info.request.script())


def test_app_of_several_roles_is_refused_with_the_scheduler_that_takes_it(scheduler: SlurmScheduler) -> None:
    app = app_of()
    app.roles *= 2
    with pytest.raises(LaunchRefusedError, match=r"app train: has 2 roles.* use the scheduler torchx_slurm"):
        scheduler.submit_dryrun(app, {})


@pytest.mark.parametrize("name", ["a b", "a.b", "a/b", ""])
def test_name_that_would_not_come_back_from_slurm_is_refused(scheduler: SlurmScheduler, name: str) -> None:
    app = app_of()
    app.roles[0].name = name
    with pytest.raises(LaunchRefusedError, match=r"role name .*: use letters, digits, _ and - only"):
        scheduler.submit_dryrun(app, {})


def test_number_of_the_replica_is_refused_with_what_to_use(scheduler: SlurmScheduler) -> None:
    with pytest.raises(LaunchRefusedError, match="use the variable SLURM_NODEID"):
        scheduler.submit_dryrun(app_of(specs.macros.replica_id), {})


def test_mounts_are_refused_where_there_is_no_container(scheduler: SlurmScheduler) -> None:
    with pytest.raises(LaunchRefusedError, match=r"role train: has mounts, .* leave --mounts away"):
        scheduler.submit_dryrun(app_of(mounts=["type=bind", "src=/a", "dst=/b"]), {})


def test_job_runs_in_the_folder_that_the_code_was_copied_to(scheduler: SlurmScheduler, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    app = app_of()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text("x = 1")
    scheduler.build_workspace_and_update_role(app.roles[0], f"file://{tmp_path}/code", {"job_dir": str(copied)})
    script = script_of(scheduler, app, job_dir=str(copied))
    assert f"#SBATCH --chdir={copied}\n" in script
    assert f"#SBATCH --output={copied}/slurm-%j.out\n" in script
    assert (copied / "mine.py").exists()


def test_folder_for_code_without_code_is_refused(scheduler: SlurmScheduler) -> None:
    with pytest.raises(LaunchRefusedError, match=r"job_dir is 'new': .* add --workspace file://\$PWD"):
        scheduler.submit_dryrun(app_of(), {"job_dir": "new"})


def test_without_slurm_a_submission_says_where_to_go(scheduler: SlurmScheduler, tmp_path: Path) -> None:
    with pytest.raises(
        LaunchRefusedError, match=r"'sbatch' is not on the PATH; give the command on a machine that has"
    ):
        scheduler.schedule(scheduler.submit_dryrun(app_of(), {"log_dir": str(tmp_path / "logs")}))


def test_without_slurm_nothing_is_known(scheduler: SlurmScheduler) -> None:
    assert (find_job("1"), list_jobs(), node_memory_mb(None), scheduler.describe("1")) == (None, [], None, None)
    assert scheduler.describe("no number") is None


@pytest.mark.parametrize("stream", [Stream.STDOUT, Stream.STDERR])
def test_one_stream_alone_is_refused(scheduler: SlurmScheduler, stream: Stream) -> None:
    with pytest.raises(LaunchRefusedError, match="a node's log holds both; leave --streams away"):
        scheduler.log_iter("1", "train", streams=stream)


def test_log_that_is_not_there_says_where_to_look(scheduler: SlurmScheduler) -> None:
    with pytest.raises(LaunchRefusedError, match=r"job 1: no log 'slurm-1-train-0.log'; see by `torchx status`"):
        list(scheduler.log_iter("1", "train"))


@pytest.mark.parametrize(
    ("state", "preempted", "restarts", "again"),
    [
        ("RUNNING", "None", 0, "retry"),
        ("SIGNALING", "None", 0, "retry"),  # warned ahead of its end, saved and ended before Slurm took the flag away
        ("RUNNING", "None", 1, "no"),
        ("RUNNING", "2026-01-01T00:00:00", 1, "preempted"),
        ("TIMEOUT", "None", 0, "no"),
        ("CANCELLED", "None", 0, "no"),
    ],
)
def test_end_of_a_job_decides_by_its_state_whether_it_starts_again(
    state: str, preempted: str, restarts: int, again: str
) -> None:
    slurm = f"scontrol() {{ echo JobId=7 JobState={state} PreemptTime={preempted} Reason=None; }}\n(exit 75)\n"
    done = subprocess.run(
        ["bash", "-c", slurm + ENDING.format(max_retries=1)],
        env={**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 75
    assert f"state {state}, preempted {preempted}; again: {again}\n" in done.stdout
    assert done.stdout.count("JobId=7") == (again != "no")  # what the stand-in says to a requeue
