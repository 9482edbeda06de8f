"""`torchx run -s kubernetes`: TorchX's scheduler for Volcano with what clusters need beyond it.

    torchx run -s kubernetes -cfg queue=research,overlay=pods.yaml components/train.py:train -j 2x8 -- --run s3://...

A dry run prints the job that is sent, and the same job for a cluster without Volcano. See docs/kubernetes.md.
"""

import logging
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import yaml
from torchx.schedulers.api import AppDryRunInfo, DescribeAppResponse, ListAppResponse, Stream, filter_regex
from torchx.schedulers.kubernetes_scheduler import KubernetesJob, KubernetesScheduler, app_to_resource
from torchx.specs import AppDef, is_terminal, runopts
from torchx.util.strings import normalize_str

from mufasa_rec.launch import preflight
from mufasa_rec.launch.kubernetes import sites
from mufasa_rec.launch.kubernetes.cluster import Cluster, ClusterRefusedError
from mufasa_rec.launch.kubernetes.indexed_job import indexed_jobs
from mufasa_rec.launch.kubernetes.options import pod_options
from mufasa_rec.launch.kubernetes.pods import refuse_unusable_names, warn_of_local_python
from mufasa_rec.launch.kubernetes.rules import refuse_if_wrong
from mufasa_rec.launch.kubernetes.status import describe_job, state_of
from mufasa_rec.launch.kubernetes.volcano import volcano_job
from mufasa_rec.launch.refusal import LaunchRefusedError

logger = logging.getLogger(__name__)
_NOT_FOUND, _FORBIDDEN = 404, 403
_POLL_S = 1.0
_NO_WORKSPACE = (
    'add --workspace="" to run the image as it is (or, in .torchxconfig under [cli:run], a line `workspace =`)'
)


@dataclass(repr=False, kw_only=True)
class KubernetesRequest(KubernetesJob):
    """What a dry run shows: the job that is sent, and its form for a cluster without Volcano."""

    plain: list[dict[str, Any]]
    namespace: str | None

    def __str__(self) -> str:
        job, plain = _yaml([self.resource]), _yaml(self.plain)
        return (
            f"# With Volcano; this is what `torchx run` sends.\n{job}"
            f"\n# The same job without TorchX and Volcano: save it and `kubectl apply -f` it.\n---\n{plain}"
        )

    __repr__ = __str__


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write what several pods share into each of them."""
        return True


def _yaml(manifests: list[dict[str, Any]]) -> str:
    # No line is broken: the command lines are to be read and searched.
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, width=float("inf"))


class Kubernetes(KubernetesScheduler):
    """Volcano jobs of this project; options and manifests are checked before anything is sent."""

    def __init__(self, session_name: str, cluster: Cluster | None = None) -> None:
        super().__init__(session_name)
        self._cluster = cluster

    @property
    def cluster(self) -> Cluster:
        """The cluster, looked up when it is first needed: a dry run needs none."""
        if self._cluster is None:
            self._cluster = Cluster()
        return self._cluster

    def _run_opts(self) -> runopts:
        opts = super()._run_opts()
        opts.add("namespace", type_=str, default=None, help="Namespace; default: that of the current context")
        opts.add("queue", type_=str, default="default", help="Volcano queue to schedule job in")
        opts.add("overlay", type_=str, default=None, help="YAML file merged into every pod: see docs/kubernetes.md")
        opts.add("shm_size", type_=str, default=None, help="Size of /dev/shm; default: as much as the memory")
        opts.add("pull_secret", type_=str, default=None, help="Secret that the image is pulled with")
        opts.add("grace_s", type_=int, default=None, help="Seconds to end in; default: the launcher's own, and 15")
        opts.add("ttl_s", type_=int, default=None, help="Seconds that a finished job is kept; default: 7 days")
        preflight.add_option(opts)
        return opts

    def _submit_dryrun(self, app: AppDef, cfg: Any) -> AppDryRunInfo[KubernetesJob]:
        refuse_unusable_names(app)
        warn_of_local_python(app)
        options = pod_options(app, cfg)
        images_to_push = self.dryrun_push_images(app, cfg)
        with warnings.catch_warnings():
            # It warns that Volcano miscounts retries; `volcano_job` sees to that.
            warnings.filterwarnings("ignore", message=r"\s*Role .* configured with restarts")
            # The function, not the base class: later versions of that ask the cluster, which a dry run may not have.
            made = app_to_resource(app, cfg.get("queue"), cfg.get("service_account"), cfg.get("priority_class"))
        resource = _plain_values(made)
        request = KubernetesRequest(
            resource=volcano_job(resource, app, options),
            plain=indexed_jobs(resource, app, options),
            images_to_push=images_to_push,
            namespace=cfg.get("namespace"),
        )
        for manifest in (request.resource, *request.plain):
            refuse_if_wrong(manifest)
        for role in app.roles:
            if preflight.is_wanted(role, cfg):
                preflight.check_role(role, sites.site_of(role, sites.pod_of(role, request.resource), options))
        return AppDryRunInfo(request, str)

    def build_workspace_and_update_role(self, role: Any, workspace: str, cfg: Any) -> None:
        """Put the files of a folder into the image, if a Docker daemon is there to do it."""
        from docker.errors import DockerException

        try:
            super().build_workspace_and_update_role(role, workspace, cfg)
        except DockerException as error:
            raise LaunchRefusedError(
                f"workspace is {workspace!r}: an image with it cannot be built ({error}); {_NO_WORKSPACE}"
            ) from error

    def schedule(self, dryrun_info: AppDryRunInfo[KubernetesJob]) -> str:
        """Send a job."""
        request: Any = dryrun_info.request
        namespace = request.namespace or self.cluster.namespace
        self.push_images(request.images_to_push)
        try:
            created = self.cluster.create_job(namespace, request.resource)
        except ClusterRefusedError as error:
            remedy = self._remedy(error, namespace, request.resource["spec"]["queue"])
            raise LaunchRefusedError(f"{error}; {remedy}") from error
        return f"{namespace}:{created['metadata']['name']}"

    def _remedy(self, error: ClusterRefusedError, namespace: str, queue: str) -> str:
        if "queue" in str(error):
            there = ", ".join(self.cluster.queues()) or "see `kubectl get queues`"
            return f"queue is {queue!r}: give -cfg queue=NAME of a queue that is open (there are: {there})"
        if error.status == _NOT_FOUND:
            return f"namespace {namespace!r} or Volcano is missing; without Volcano apply what --dryrun prints last"
        if error.status == _FORBIDDEN:
            return f"ask for the right to create jobs.batch.volcano.sh in namespace {namespace!r}"
        return "nothing was started"

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Describe a job; none if the cluster does not know it (any more)."""
        namespace, name = _split(app_id)
        try:
            return describe_job(app_id, self.cluster.get_job(namespace, name))
        except ClusterRefusedError as error:
            if error.status != _NOT_FOUND:
                raise
            return None

    def list(self, cfg: Any = None) -> list[ListAppResponse]:
        """List the jobs of a namespace: the current one, where nothing else is said (later versions hand options)."""
        namespace = (cfg or {}).get("namespace") or self.cluster.namespace
        jobs = self.cluster.list_jobs(namespace)
        return [ListAppResponse(app_id=f"{namespace}:{job['metadata']['name']}", state=state_of(job)) for job in jobs]

    def _cancel_existing(self, app_id: str) -> None:
        namespace, name = _split(app_id)
        try:
            self.cluster.abort_job(namespace, self.cluster.get_job(namespace, name))
        except ClusterRefusedError as error:
            if error.status not in (_NOT_FOUND, _FORBIDDEN):
                raise
            logger.warning("%s is deleted, its status with it: Volcano's commands may not be used (%s)", app_id, error)
            self.cluster.delete_job(namespace, name)

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        should_tail: bool = False,
        streams: Stream | None = None,
    ) -> Iterable[str]:
        """Give the lines of a replica; while it is followed, also those after the job has started again."""
        if until is not None:
            raise LaunchRefusedError(f"until is {until}: a pod's log is read to its end; cut it afterwards")
        if streams not in (None, Stream.COMBINED):
            raise LaunchRefusedError(f"streams is {streams}: a pod has one log; leave --streams out")
        namespace, name = _split(app_id)
        pod = normalize_str(f"{name}-{role_name}-{k}-0")
        lines = self._follow(app_id, namespace, pod) if should_tail else self._log(namespace, pod, False, since)
        return filter_regex(regex, lines) if regex else lines

    def _log(self, namespace: str, pod: str, follow: bool, since: datetime | None = None) -> Iterator[str]:
        since_s = None if since is None else max(1, int((datetime.now(since.tzinfo) - since).total_seconds()))
        try:
            response = self.cluster.open_log(namespace, pod, follow, since_s)
        except ClusterRefusedError as error:
            raise LaunchRefusedError(f"no log of pod {pod}: {error}; see `kubectl -n {namespace} get pods`") from error
        for line in response:  # urllib3 gives whole lines
            yield line.decode(errors="replace")

    def _follow(self, app_id: str, namespace: str, name: str) -> Iterator[str]:
        """A pod that starts again has another id under the same name."""
        seen = None
        while True:
            described = self.describe(app_id)
            ended = described is None or is_terminal(described.state)
            pod = self._pod_with_log(namespace, name)
            if pod is not None and pod.metadata.uid != seen:
                seen = pod.metadata.uid
                yield from self._log(namespace, name, follow=True)
            elif ended:
                return
            else:
                time.sleep(_POLL_S)

    def _pod_with_log(self, namespace: str, name: str) -> Any:
        try:
            pod = self.cluster.get_pod(namespace, name)
        except ClusterRefusedError as error:
            if error.status != _NOT_FOUND:
                raise
            return None
        return pod if pod.status.phase in ("Running", "Succeeded", "Failed") else None


def create_scheduler(session_name: str, **kwargs: Any) -> Kubernetes:
    """Make the scheduler, as TorchX asks for it."""
    return Kubernetes(session_name, cluster=kwargs.get("cluster"))


def _split(app_id: str) -> tuple[str, str]:
    namespace, separator, name = app_id.partition(":")
    if not separator:
        raise LaunchRefusedError(f"app id is {app_id!r}: give namespace:name, as `torchx list` shows it")
    return namespace, name


def _plain_values(resource: Any) -> dict[str, Any]:
    """Turn the client's objects into maps and lists without what is unset."""
    try:
        from kubernetes import client
    except ImportError as error:
        raise LaunchRefusedError(
            "the Kubernetes client is not installed: pip install 'mufasa_rec[kubernetes]'"
        ) from error
    return client.ApiClient(client.Configuration()).sanitize_for_serialization(resource)
