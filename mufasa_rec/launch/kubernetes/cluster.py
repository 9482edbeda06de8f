"""The cluster that jobs go to: which one, in which namespace, and what it answers, in words."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mufasa_rec.launch.kubernetes.volcano import GROUP, PLURAL, VERSION
from mufasa_rec.launch.refusal import LaunchRefusedError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# A machine that does not answer is to be noticed; the log of a running pod may be silent for hours.
_TIMEOUT_S = 60
_Result = TypeVar("_Result")


def _readable(request: Callable[..., _Result]) -> Callable[..., _Result]:
    """Turn what the client raises into one line."""

    @functools.wraps(request)
    def asked(cluster: "Cluster", *args: Any, **kwargs: Any) -> _Result:
        from kubernetes.client.rest import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return request(cluster, *args, **kwargs)
        except ApiException as error:
            raise ClusterRefusedError(error.status or 0, message_of(error)) from error
        except HTTPError as error:
            host = cluster.client.configuration.host
            raise LaunchRefusedError(
                f"cluster {host} does not answer ({error}): see whether `kubectl get jobs` does"
            ) from error

    return asked


class ClusterRefusedError(LaunchRefusedError):
    """The cluster said no; `status` is its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Cluster:
    """Volcano jobs and pods of one cluster.

    Args:
        client: A client of the cluster; none: the one of the current context of the kubeconfig, or, in a pod, of the
            cluster that the pod runs on.
    """

    def __init__(self, client: "ApiClient | None" = None) -> None:
        self._namespace = "default"
        self.client = client or self._connect()
        from kubernetes import client as api

        # Any: the client's types also speak of requests in other threads.
        self.objects: Any = api.CustomObjectsApi(self.client)
        self.pods: Any = api.CoreV1Api(self.client)

    @property
    def namespace(self) -> str:
        """The namespace of the current context."""
        return self._namespace

    def _connect(self) -> "ApiClient":
        try:
            from kubernetes import client, config
        except ImportError as error:
            raise LaunchRefusedError(
                "the Kubernetes client is not installed: pip install 'mufasa_rec[kubernetes]'"
            ) from error

        configuration = client.Configuration()
        files = os.environ.get("KUBECONFIG")  # the client itself looks only once, when it is imported
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ and not files:
                config.load_incluster_config(client_configuration=configuration)
                if _NAMESPACE_FILE.exists():
                    self._namespace = _NAMESPACE_FILE.read_text().strip()
            else:
                config.load_kube_config(files, client_configuration=configuration)
                _, context = config.list_kube_config_contexts(files)
                self._namespace = context["context"].get("namespace") or "default"
        except config.ConfigException as error:
            raise LaunchRefusedError(
                f"no cluster is known: {files or '~/.kube/config'} ({error}): see whether `kubectl get jobs` works,"
                " or set KUBECONFIG"
            ) from error
        return client.ApiClient(configuration)

    @_readable
    def create_job(self, namespace: str, job: dict[str, Any]) -> dict[str, Any]:
        """Submit a Volcano job."""
        return self.objects.create_namespaced_custom_object(
            GROUP, VERSION, namespace, PLURAL, job, _request_timeout=_TIMEOUT_S
        )

    @_readable
    def get_job(self, namespace: str, name: str) -> dict[str, Any]:
        """Read a Volcano job."""
        return self.objects.get_namespaced_custom_object(
            GROUP, VERSION, namespace, PLURAL, name, _request_timeout=_TIMEOUT_S
        )

    @_readable
    def list_jobs(self, namespace: str) -> list[dict[str, Any]]:
        """Read all Volcano jobs of a namespace."""
        found = self.objects.list_namespaced_custom_object(
            GROUP, VERSION, namespace, PLURAL, _request_timeout=_TIMEOUT_S
        )
        return found["items"]

    @_readable
    def delete_job(self, namespace: str, name: str) -> None:
        """Take a Volcano job and its pods away."""
        self.objects.delete_namespaced_custom_object(
            GROUP, VERSION, namespace, PLURAL, name, _request_timeout=_TIMEOUT_S
        )

    @_readable
    def abort_job(self, namespace: str, job: dict[str, Any]) -> None:
        """Tell Volcano to end a job's pods and keep the job, as its own command line does."""
        owner = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "Job",
            "name": job["metadata"]["name"],
            "uid": job["metadata"]["uid"],
            "controller": True,
        }
        command = {
            "apiVersion": "bus.volcano.sh/v1alpha1",
            "kind": "Command",
            "metadata": {"generateName": f"{owner['name']}-abort-", "ownerReferences": [owner]},
            "target": owner,
            "action": "AbortJob",
        }
        self.objects.create_namespaced_custom_object(
            "bus.volcano.sh", "v1alpha1", namespace, "commands", command, _request_timeout=_TIMEOUT_S
        )

    def queues(self) -> list[str]:
        """Return the names of Volcano's queues; none where they may not be listed."""
        try:
            return [queue["metadata"]["name"] for queue in self._list_queues()]
        except LaunchRefusedError:
            return []

    @_readable
    def _list_queues(self) -> list[dict[str, Any]]:
        found = self.objects.list_cluster_custom_object(
            "scheduling.volcano.sh", "v1beta1", "queues", _request_timeout=_TIMEOUT_S
        )
        return found["items"]

    @_readable
    def get_pod(self, namespace: str, name: str) -> Any:
        """Read a pod."""
        return self.pods.read_namespaced_pod(name, namespace, _request_timeout=_TIMEOUT_S)

    @_readable
    def open_log(self, namespace: str, name: str, follow: bool, since_s: int | None) -> Any:
        """Open the log of a pod's only container as a stream of bytes."""
        options = {} if since_s is None else {"since_seconds": since_s}
        # Read as it comes: the client's own reading has lost lines and types from version to version.
        return self.pods.read_namespaced_pod_log(name, namespace, follow=follow, _preload_content=False, **options)


def message_of(error: Any) -> str:
    """Return what the cluster said, without HTTP around it.

    Args:
        error: The client's `ApiException`.

    Returns:
        Its message.
    """
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or ""
    try:
        return json.loads(body)["message"]
    except (ValueError, KeyError, TypeError):
        return f"{error.status} {error.reason}: {body}".strip(": ")
