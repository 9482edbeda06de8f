"""The Kubernetes scheduler against a stand-in for a cluster: what `torchx run` and its sisters do there."""

import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchx import specs

from mufasa_rec.launch.kubernetes.cluster import Cluster
from mufasa_rec.launch.refusal import LaunchRefusedError
from tests.helpers.installed import torchx as installed_torchx
from tests.helpers.kubernetes.api import StandIn, wait_for
from tests.helpers.kubernetes.running import free_port, start, wait_for_end

ROOT = Path(__file__).resolve().parent.parent.parent
ENDED = (specs.AppState.SUCCEEDED, specs.AppState.FAILED, specs.AppState.CANCELLED)


def app(line: str, nodes: int = 1, **options: Any) -> specs.AppDef:
    """A job whose every node runs a shell line."""
    role = specs.Role(
        name="train", image="image", entrypoint="sh", args=["-c", line], num_replicas=nodes,
        retry_policy=specs.RetryPolicy.APPLICATION, resource=specs.Resource(cpu=1, gpu=0, memMB=2048), **options,
    )  # fmt: skip
    return specs.AppDef(name="job", roles=[role])


def test_job_runs_to_its_end_with_status_logs_and_list(stand_in: StandIn) -> None:
    scheduler, app_id = start(app("echo here $$$$ is '$(HOME)' $0; echo second", nodes=2), queue="research")
    ended = wait_for_end(scheduler, app_id)
    assert app_id.startswith("team:job-")  # the namespace of the current context
    assert (ended.state, ended.num_restarts) == (specs.AppState.SUCCEEDED, 0)
    (role,) = ended.roles_statuses
    assert [(one.id, one.state) for one in role.replicas] == [(0, specs.AppState.SUCCEEDED), (1, ended.state)]
    first, second = scheduler.log_iter(app_id, "train", 1)
    # The line as the app has it: TorchX makes one `$` of two, Kubernetes none of what is meant for the shell.
    pid = stand_in.pod("team", f"{app_id.partition(':')[2]}-train-1-0").process.pid
    assert (first, second) == (f"here {pid} is $(HOME) sh\n", "second\n")
    assert list(scheduler.log_iter(app_id, "train", 1, regex="sec")) == ["second\n"]
    assert [(one.app_id, one.state) for one in scheduler.list()] == [(app_id, specs.AppState.SUCCEEDED)]


def test_wrong_queue_is_refused_with_the_queues_there_are(stand_in: StandIn) -> None:
    with pytest.raises(LaunchRefusedError, match=r"queue is 'typo': give .*there are: default, research"):
        start(app("true"), queue="typo")
    assert not stand_in.volcano_jobs
    stand_in.forbidden = {"list_queues"}
    with pytest.raises(LaunchRefusedError, match=r"queue is 'typo': give .*see `kubectl get queues`"):
        start(app("true"), queue="typo")


def test_missing_right_and_silent_cluster_are_named(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.forbidden = {"create_volcano_job"}
    with pytest.raises(LaunchRefusedError, match=r"ask for the right to create jobs.batch.volcano.sh in namespace 'n'"):
        start(app("true"), namespace="n")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        config = yaml.safe_load(stand_in.kubeconfig.read_text())
        config["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{unused.getsockname()[1]}"
        (tmp_path / "elsewhere").write_text(yaml.safe_dump(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "elsewhere"))
        with pytest.raises(LaunchRefusedError, match="does not answer"):
            start(app("true"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    with pytest.raises(LaunchRefusedError, match=r"no cluster is known: .*missing.* set KUBECONFIG"):
        Cluster()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"priority": "high"}, "spec.priority: VolcanoSpec has no such field"),
        ({"tasks": []}, "spec.tasks is empty"),
        ({"queue": "closed"}, "unable to find job queue"),
    ],
)
def test_stand_in_refuses_what_a_cluster_would(stand_in: StandIn, wrong: dict[str, Any], message: str) -> None:
    scheduler, app_id = start(app("true"))
    wait_for_end(scheduler, app_id)
    job = stand_in.volcano_jobs["team", app_id.partition(":")[2]].manifest
    with pytest.raises(LaunchRefusedError, match=message):
        Cluster().create_job("team", {**job, "spec": {**job["spec"], **wrong}})


def test_pod_with_a_service_account_starts_jobs_on_its_own_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes.config import incluster_config

    for name, text in (("token", "secret"), ("cert", "a certificate"), ("namespace", "ours\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "cert"))
    monkeypatch.setattr("mufasa_rec.launch.kubernetes.cluster._NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setattr("kubernetes.client.rest.RESTClientObject", lambda configuration: None)
    found = Cluster()
    assert (found.client.configuration.host, found.namespace) == ("https://10.0.0.1:443", "ours")


def test_cancelled_job_saves_and_keeps_its_status(stand_in: StandIn) -> None:
    scheduler, app_id = start(app("trap 'echo saved; exit 75' TERM; echo up; while :; do sleep 0.1; done"))
    lines: list[str] = []
    follower = threading.Thread(target=lambda: lines.extend(scheduler.log_iter(app_id, "train", should_tail=True)))
    follower.start()
    wait_for(lambda: "up\n" in lines)
    scheduler.cancel(app_id)
    assert wait_for_end(scheduler, app_id).state == specs.AppState.CANCELLED
    follower.join(20)
    assert lines == ["up\n", "saved\n"]
    scheduler.cancel(app_id)


def test_job_is_deleted_where_commands_are_forbidden(stand_in: StandIn) -> None:
    stand_in.forbidden = {"command"}
    scheduler, app_id = start(app("sleep 60"))
    scheduler.cancel(app_id)
    assert scheduler.describe(app_id) is None
    with pytest.raises(LaunchRefusedError, match=r"no log of pod .* not found"):
        list(scheduler.log_iter(app_id, "train"))


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_job_starts_again_as_often_as_asked(stand_in: StandIn, tmp_path: Path, retries: int) -> None:
    scheduler, app_id = start(app(f"echo >> {tmp_path}/starts; exit 1", max_retries=retries))
    assert wait_for_end(scheduler, app_id).state == specs.AppState.FAILED
    assert len((tmp_path / "starts").read_text()) == 1 + retries


def test_lost_node_without_retries_ends_the_job_at_once(stand_in: StandIn, tmp_path: Path) -> None:
    line = f"mkdir {tmp_path}/first 2>/dev/null && exit 3; exec sleep 60"  # whichever node is first
    scheduler, app_id = start(app(line, nodes=2), grace_s=15)
    ended = wait_for_end(scheduler, app_id)
    assert (ended.state, ended.msg) == (specs.AppState.FAILED, "Terminated")


def test_followed_log_goes_on_after_the_job_has_started_again(stand_in: StandIn, tmp_path: Path) -> None:
    line = f"echo start; sleep 1; mkdir {tmp_path}/first 2>/dev/null && exit 1; echo done"
    scheduler, app_id = start(app(line, max_retries=1))
    assert [*scheduler.log_iter(app_id, "train", should_tail=True)] == ["start\n", "start\n", "done\n"]
    ended = wait_for_end(scheduler, app_id)
    assert (ended.state, ended.num_restarts) == (specs.AppState.SUCCEEDED, 1)


@pytest.mark.slow
def test_torchx_itself_runs_shows_lists_and_cancels_a_job(stand_in: StandIn, site: Path, tmp_path: Path) -> None:
    def torchx(*arguments: str) -> subprocess.CompletedProcess[str]:
        return installed_torchx(site, *arguments, cwd=tmp_path)

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        program = ("components.train:train", "-j", "1x1", "--python", sys.executable, "--rdzv_port", str(free_port()))
        program = (*program, "--no_preflight", "True")
        return torchx("run", "-s", "kubernetes", "--workspace=", *options, *program, "--", "--no-such-flag")

    refused = run("-cfg", "queue=typo")
    assert refused.returncode == 1
    assert (
        "queue is 'typo': give -cfg queue=NAME of a queue that is open (there are: default, research)" in refused.stderr
    )
    assert "Traceback" not in refused.stderr
    started = run("-cfg", "queue=research")
    assert started.returncode == 0, started.stderr
    handle = started.stdout.strip()
    assert handle.startswith("kubernetes://torchx/team:train-")
    shown = torchx("log", "--tail", f"{handle}/train/0")
    assert "no-such-flag" in shown.stdout + shown.stderr
    assert "FAILED" in torchx("status", handle).stdout
    assert "FAILED" in torchx("list", "-s", "kubernetes").stdout
    assert torchx("cancel", handle).returncode == 0
    gone = torchx("status", "kubernetes://torchx/team:gone")
    assert "does not exist or has been removed" in gone.stderr
    assert "Traceback" not in gone.stderr
