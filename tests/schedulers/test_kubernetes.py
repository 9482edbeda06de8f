"""Manifests for Kubernetes: what the scheduler makes of a component, and what of it a cluster would refuse.

The manifests of every component are kept in `golden/kubernetes/`; `REWRITE_GOLDEN=1` writes them anew, to be read
in the diff.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchx import specs

from mufasa_rec.launch.kubernetes.overlay import apply_overlay
from mufasa_rec.launch.kubernetes.rules import problems, quantity
from mufasa_rec.launch.refusal import LaunchRefusedError
from mufasa_rec.launch.schedulers.kubernetes import create_scheduler

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden" / "kubernetes"
COMPONENTS = ("prepare", "train", "fuse", "evaluate", "export", "doctor", "plan", "benchmark", "chain")
APP_ID = "name-of-the-job"
# The overlay that the page gives as an example.
OVERLAY = (ROOT / "docs" / "kubernetes.md").read_text().partition("```yaml\n")[2].partition("```")[0]


def make_app(component: str, *script_args: str, **options: Any) -> specs.AppDef:
    """Call a component as TorchX does, for a job of two nodes in a container."""
    function = getattr(importlib.import_module(f"components.{component}"), component)
    options = {"j": "2x8", "gpu": 8, "cpu": 96, "memMB": 1_000_000, "image": "registry/mufasa:1", **options}
    return function(*script_args, python="python", **{"no_preflight": True, **options})


@pytest.fixture
def dry_run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make manifests, with the same name every time."""
    import torchx.schedulers.kubernetes_scheduler as of_torchx

    monkeypatch.setattr(of_torchx, "make_unique", lambda name: APP_ID)

    def run(app: specs.AppDef, **cfg: Any) -> Any:
        return create_scheduler("test").submit_dryrun(app, cfg).request  # pyrefly: ignore[bad-argument-type]

    return run


@pytest.fixture
def overlay(tmp_path: Path) -> str:
    (tmp_path / "overlay.yaml").write_text(OVERLAY)
    return str(tmp_path / "overlay.yaml")


def container_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return pod_of(manifest)["containers"][0]


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return (spec["tasks"][0] if "tasks" in spec else spec)["template"]["spec"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_manifests_of_a_component_are_as_written_down(component: str, dry_run: Any, overlay: str) -> None:
    cfg = {"overlay": overlay, "shm_size": "64Gi", "pull_secret": "registry"}
    secrets = ["TOKEN=store/token", "/var/keys=keys"]
    app = make_app(component, "--run", "s3://b/a run $(x)", max_retries=2, network="efa", secrets=secrets)
    request = dry_run(app, **cfg)
    for manifest in (request.resource, *request.plain):
        assert problems(manifest) == []
    path, found = GOLDEN / f"{component}.yaml", f"{request}"
    if os.environ.get("REWRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found)
    assert found == path.read_text(), "REWRITE_GOLDEN=1 writes the files anew; read the diff"


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("j", ["1x1", "1x2", "2x1"])
def test_smaller_jobs_pass_the_checks_too(component: str, j: str, dry_run: Any) -> None:
    request = dry_run(make_app(component, j=j, gpu=0, cpu=2, memMB=8192))
    assert len(request.resource["spec"]["tasks"]) == request.plain[1]["spec"]["completions"] == int(j[0])
    shown = list(yaml.safe_load_all(str(request)))
    assert shown == [request.resource, *request.plain]


def test_overlay_reaches_every_pod_beside_what_was_there(dry_run: Any, overlay: str) -> None:
    request = dry_run(make_app("train"), overlay=overlay)
    for task in request.resource["spec"]["tasks"]:
        pod = task["template"]["spec"]
        assert [volume["name"] for volume in pod["volumes"]] == ["dshm", "data"]
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        limits = pod["containers"][0]["resources"]["limits"]
        assert (limits["nvidia.com/gpu"], limits["vpc.amazonaws.com/efa"]) == ("8", "32")
        assert task["template"]["metadata"]["labels"]["torchx.pytorch.org/role-name"] == "train"


def test_null_in_an_overlay_takes_away() -> None:
    template = {"spec": {"hostNetwork": True, "containers": [{"name": "a", "resources": {"limits": {"cpu": "1"}}}]}}
    changed = apply_overlay(template, {"spec": {"hostNetwork": None}, "container": {"resources": {"limits": None}}})
    assert changed["spec"] == {"containers": [{"name": "a", "resources": {}}]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spec: {toleration: []}", r"toleration: V1PodSpec has no such field"),
        ("spec: {tolerations: [{key: a, operater: Exists}]}", r"tolerations\[0\].operater: V1Toleration has no such"),
        ("spec: {priority: high}", r"priority is 'high': int is expected"),
        ("spec: {containers: []}", r"change it under `container`"),
        ("spec: {volumes: [{persistentVolumeClaim: {claimName: a}}]}", r"an entry of volumes is .*: give it a name"),
        ("container: {volumeMounts: [{name: dat, mountPath: /d}]}", r"name is 'dat': the pod has no such volume"),
        ("container: {env: [{name: A, value: 1}]}", r"env\[\d\].value is 1: str is expected, in quotes"),
        ("container: {env: [{name: a b, value: '1'}]}", r"'a b' is no name of a variable"),
        ("container: {resources: {limits: {cpu: 4 cores}}}", r"limits.cpu is '4 cores': give a number and a unit"),
        ("container: {resources: {limits: {rdma/ib: 500m}}}", r"devices are whole"),
        ("container: {resources: {limits: {cpu: '1'}}}", r"the request of cpu is 95900m, above its limit 1"),
        ("container: {resources: {requests: {rdma/ib: '1'}}}", r"rdma/ib has a request and no limit"),
        ("container: {ports: [{name: rendezvous-of-nodes, containerPort: 1}]}", r"is no name of a port"),
        ("metadata: {labels: {a: b c}}", r"metadata.labels.a is 'b c'"),
        ("pod: {}", r"pod: no part of an overlay; give metadata, spec, container"),
        ("[1]", r"is a list: give a map"),
        ("a: b: c", r"cannot be read as YAML"),
    ],
)
def test_mistake_in_an_overlay_is_refused_by_name(text: str, message: str, tmp_path: Path, dry_run: Any) -> None:
    (tmp_path / "overlay.yaml").write_text(text)
    with pytest.raises(LaunchRefusedError, match=message):
        dry_run(make_app("train"), overlay=str(tmp_path / "overlay.yaml"))


def test_missing_overlay_is_refused(dry_run: Any) -> None:
    with pytest.raises(LaunchRefusedError, match=r"overlay is 'nowhere': cannot be read"):
        dry_run(make_app("train"), overlay="nowhere")


def test_pods_live_longer_than_their_launcher_waits(dry_run: Any) -> None:
    assert pod_of(dry_run(make_app("train", grace_s=90)).resource)["terminationGracePeriodSeconds"] == 105
    assert pod_of(dry_run(make_app("prepare")).plain[1])["terminationGracePeriodSeconds"] == 30
    assert pod_of(dry_run(make_app("train", grace_s=90), grace_s=300).resource)["terminationGracePeriodSeconds"] == 300
    with pytest.raises(LaunchRefusedError, match=r"grace_s is 60: the launcher waits 90 s .* give at least 105"):
        dry_run(make_app("train", grace_s=90), grace_s=60)


def test_shared_memory_is_as_large_as_asked(dry_run: Any) -> None:
    (volume,) = pod_of(dry_run(make_app("train"), shm_size="64Gi").resource)["volumes"]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    with pytest.raises(LaunchRefusedError, match="sizeLimit of 'dshm' is '64 GB': give one such as 16Gi"):
        dry_run(make_app("train"), shm_size="64 GB")


def test_mounts_of_a_role_are_volumes_beside_those_of_the_overlay(dry_run: Any, overlay: str) -> None:
    app = make_app("train")
    app.roles[0].mounts = specs.parse_mounts(
        ["type=bind", "src=/host", "dst=/in", "readonly", "type=volume", "src=claim", "dst=/runs"]
    )
    request = dry_run(app, overlay=overlay)
    for manifest in (request.resource, *request.plain[1:]):
        assert {volume["name"] for volume in pod_of(manifest)["volumes"]} == {"dshm", "mount-0", "mount-1", "data"}
        mounts = {mount["mountPath"]: mount.get("readOnly") for mount in container_of(manifest)["volumeMounts"]}
        assert mounts == {"/dev/shm": None, "/in": True, "/runs": False, "/data": None}


def test_interpreter_of_this_machine_is_warned_of(dry_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    app = make_app("train")
    dry_run(app)
    assert not caplog.records
    app.roles[0].args = [part.replace("exec python ", f"exec {sys.executable} ") for part in app.roles[0].args]
    dry_run(app)
    assert "image 'registry/mufasa:1' has to have; `--python python` starts the image's own" in caplog.text


def test_workspace_without_a_docker_daemon_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    with pytest.raises(LaunchRefusedError, match='add --workspace="" to run the image as it is'):
        create_scheduler("test").build_workspace_and_update_role(make_app("train").roles[0], f"file://{tmp_path}", {})


@pytest.mark.parametrize("retries", [0, 3])
def test_retries_are_counted_as_the_clusters_count_them(retries: int, dry_run: Any) -> None:
    request = dry_run(make_app("train", max_retries=retries))
    assert request.resource["spec"]["maxRetry"] == retries + 1
    actions = {policy["action"] for task in request.resource["spec"]["tasks"] for policy in task["policies"]}
    assert actions == {"RestartJob" if retries else "TerminateJob"}
    assert request.plain[1]["spec"]["backoffLimit"] == 2 * retries


def test_elastic_job_goes_on_without_a_lost_node(dry_run: Any) -> None:
    request = dry_run(make_app("train", j="1:2x8", max_restarts=3))
    assert [task["minAvailable"] for task in request.resource["spec"]["tasks"]] == [1, 0]
    assert not any(task.get("policies") for task in request.resource["spec"]["tasks"])


def test_plain_job_finds_the_first_pod_by_its_name(dry_run: Any) -> None:
    service, job = dry_run(make_app("train", "--run", "R")).plain
    assert {"name": "RANK0_HOST", "value": f"{APP_ID}-0.{APP_ID}"} in container_of(job)["env"]
    assert "--rdzv_endpoint ${RANK0_HOST:=localhost}:29500" in container_of(job)["command"][2]
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert pod_of(job)["subdomain"] == service["metadata"]["name"]


def test_plain_job_of_two_roles_is_two_jobs_with_their_own_index(dry_run: Any) -> None:
    def role(name: str) -> specs.Role:
        return specs.Role(
            name=name, image="i", entrypoint="sh", args=["-c", f"echo {specs.macros.replica_id} $$(date)"],
            num_replicas=2, env={"WHO": specs.macros.replica_id}, resource=specs.Resource(cpu=1, gpu=0, memMB=2000),
        )  # fmt: skip

    _, first, second = dry_run(specs.AppDef(name="a", roles=[role("read_all"), role("write")])).plain
    assert (first["metadata"]["name"], second["metadata"]["name"]) == (f"{APP_ID}-0", f"{APP_ID}-1")
    for job in (first, second):
        container = container_of(job)
        assert container["command"] == ["sh", "-c", "echo $(POD_INDEX) $$(date)"]
        assert container["env"][0]["name"] == "POD_INDEX"
        assert {"name": "WHO", "value": "$(POD_INDEX)"} in container["env"]
        assert {"name": "RANK0_HOST", "value": f"{APP_ID}-0-0.{APP_ID}"} in container["env"]
    assert container_of(first)["name"] == "read-all"


def test_role_and_names_that_no_cluster_takes_are_refused(dry_run: Any) -> None:
    app = make_app("train")
    app.roles[0].name = "train-all"
    with pytest.raises(LaunchRefusedError, match="role is 'train-all': the first node's host comes in a variable"):
        dry_run(app)
    with pytest.raises(LaunchRefusedError, match=r"containers\[0\].image is '': give the component an --image"):
        dry_run(make_app("train", image=""))
    with pytest.raises(LaunchRefusedError, match=r"app-name is 'a b'"):
        dry_run(make_app("train", name="a b"))


def test_missing_client_is_named_with_the_remedy(dry_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(LaunchRefusedError, match=r"pip install 'mufasa_rec\[kubernetes\]'"):
        dry_run(make_app("train"))


@pytest.mark.parametrize("text", ["", "1.5.2", "10 GB", "-1", "1gi", "1e"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give a number and a unit"):
        quantity(text)


def test_problems_name_a_kind_nobody_sends() -> None:
    assert problems({"apiVersion": "v1", "kind": "Secret"})[0].startswith("apiVersion and kind are 'v1 Secret'")
    found = problems({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {}})
    assert found == ["spec.containers is missing: V1PodSpec needs it"]
