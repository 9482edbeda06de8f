"""A stand-in for a Kubernetes API server with Volcano, on loopback: what the real client sends is answered as there.

Real are the REST interface, the checks of a manifest by the client's own types, and the containers' command lines,
which run as processes of this machine. There are no images, nodes, DNS, rights or scheduling: this is no cluster.
"""

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.helpers.kubernetes.jobs import IndexedJob, Pod, VolcanoJob, admission_errors

VOLCANO = "/apis/batch.volcano.sh/v1alpha1/namespaces/(?P<namespace>[^/]+)/jobs"
ROUTES = {
    ("POST", VOLCANO): "create_volcano_job",
    ("GET", VOLCANO): "list_volcano_jobs",
    ("GET", f"{VOLCANO}/(?P<name>[^/]+)(?:/status)?"): "get_volcano_job",
    ("DELETE", f"{VOLCANO}/(?P<name>[^/]+)"): "delete_volcano_job",
    ("POST", "/apis/bus.volcano.sh/v1alpha1/namespaces/(?P<namespace>[^/]+)/commands"): "command",
    ("GET", "/apis/scheduling.volcano.sh/v1beta1/queues"): "list_queues",
    ("GET", "/api/v1/namespaces/(?P<namespace>[^/]+)/pods/(?P<name>[^/]+)"): "get_pod",
    ("GET", "/api/v1/namespaces/(?P<namespace>[^/]+)/pods/(?P<name>[^/]+)/log"): "get_log",
    ("POST", "/api/v1/namespaces/(?P<namespace>[^/]+)/services"): "create_service",
    ("POST", "/apis/batch/v1/namespaces/(?P<namespace>[^/]+)/jobs"): "create_indexed_job",
    ("GET", "/apis/batch/v1/namespaces/(?P<namespace>[^/]+)/jobs/(?P<name>[^/]+)"): "get_indexed_job",
}


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class StandIn:
    """The cluster. Use it in a `with` block; on leaving it every process it started is gone.

    `forbidden` holds names of routes that answer 403, as to a user without that right.
    """

    def __init__(self, folder: Path, env: dict[str, str], queues: tuple[str, ...] = ("default", "research")) -> None:
        self.folder = folder
        self.env = env
        self.queues = queues
        self.forbidden: set[str] = set()
        self.volcano_jobs: dict[tuple[str, str], VolcanoJob] = {}
        self.indexed_jobs: dict[tuple[str, str], IndexedJob] = {}
        self.services: dict[tuple[str, str], dict[str, Any]] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.cluster = self  # pyrefly: ignore[missing-attribute]
        self.kubeconfig = folder / "kubeconfig"
        self._write_kubeconfig()

    def _write_kubeconfig(self) -> None:
        address = f"http://127.0.0.1:{self.server.server_port}"
        context = {"cluster": "stand-in", "user": "somebody", "namespace": "team"}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "stand-in",
            "clusters": [{"name": "stand-in", "cluster": {"server": address}}],
            "users": [{"name": "somebody", "user": {}}],
            "contexts": [{"name": "stand-in", "context": context}],
        }  # fmt: skip
        self.kubeconfig.write_text(yaml.safe_dump(config))

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for job in [*self.volcano_jobs.values(), *self.indexed_jobs.values()]:
            job.close()
        self.server.shutdown()
        self.server.server_close()

    def pod(self, namespace: str, name: str) -> Pod:
        for job in [*self.volcano_jobs.values(), *self.indexed_jobs.values()]:
            if job.namespace == namespace and name in job.pods:
                return job.pods[name]
        raise Refused(404, "NotFound", f'pods "{name}" not found')

    def create_volcano_job(self, body: dict[str, Any], namespace: str) -> dict[str, Any]:
        name = body["metadata"]["name"]
        errors = admission_errors(body)
        if errors:
            raise Refused(422, "Invalid", "; ".join(errors))
        queue = body["spec"]["queue"]
        if queue not in self.queues:
            webhook = 'admission webhook "validatejob.volcano.sh" denied the request'
            raise Refused(400, "BadRequest", f"{webhook}: unable to find job queue: {queue!r} not found")
        job = self.volcano_jobs[namespace, name] = VolcanoJob(namespace, body, self.folder, self.env)
        job.start()
        return job.resource()

    def list_volcano_jobs(self, body: dict[str, Any], namespace: str) -> dict[str, Any]:
        return {"items": [job.resource() for (of, _), job in self.volcano_jobs.items() if of == namespace]}

    def get_volcano_job(self, body: dict[str, Any], namespace: str, name: str) -> dict[str, Any]:
        return self._known(self.volcano_jobs, namespace, name).resource()

    def delete_volcano_job(self, body: dict[str, Any], namespace: str, name: str) -> dict[str, Any]:
        self._known(self.volcano_jobs, namespace, name).close()
        del self.volcano_jobs[namespace, name]
        return {"kind": "Status", "status": "Success"}

    def command(self, body: dict[str, Any], namespace: str) -> dict[str, Any]:
        job = self._known(self.volcano_jobs, namespace, body["target"]["name"])
        if body["target"]["uid"] != job.uid or body["action"] != "AbortJob":
            raise Refused(422, "Invalid", f"command {body}")
        job.abort()
        return body

    def list_queues(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"items": [{"metadata": {"name": queue}} for queue in self.queues]}

    def get_pod(self, body: dict[str, Any], namespace: str, name: str) -> dict[str, Any]:
        return self.pod(namespace, name).resource()

    def create_service(self, body: dict[str, Any], namespace: str) -> dict[str, Any]:
        errors = admission_errors(body)
        if errors:
            raise Refused(422, "Invalid", "; ".join(errors))
        self.services[namespace, body["metadata"]["name"]] = body
        return body

    def create_indexed_job(self, body: dict[str, Any], namespace: str) -> dict[str, Any]:
        errors = admission_errors(body)
        if errors:
            raise Refused(422, "Invalid", "; ".join(errors))
        # A host name of a pod leads to it only where a service of the pod's subdomain selects the pod.
        template = body["spec"]["template"]
        service = self.services[namespace, template["spec"]["subdomain"]]
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        job = self.indexed_jobs[namespace, body["metadata"]["name"]] = IndexedJob(
            namespace, body, self.folder, self.env
        )
        job.start()
        return job.resource()

    def get_indexed_job(self, body: dict[str, Any], namespace: str, name: str) -> dict[str, Any]:
        return self._known(self.indexed_jobs, namespace, name).resource()

    @staticmethod
    def _known(jobs: dict[tuple[str, str], Any], namespace: str, name: str) -> Any:
        if (namespace, name) not in jobs:
            raise Refused(404, "NotFound", f'"{name}" not found in namespace {namespace!r}')
        return jobs[namespace, name]


class Handler(BaseHTTPRequestHandler):
    """Finds the route of a request, and puts what it gives into an answer."""

    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        cluster: StandIn = self.server.cluster  # pyrefly: ignore[missing-attribute]
        url = urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        try:
            for (method, pattern), route in ROUTES.items():
                found = re.fullmatch(pattern, url.path)
                if method == self.command and found:
                    if route in cluster.forbidden:
                        raise Refused(403, "Forbidden", f"somebody may not {method} {url.path}")
                    if route == "get_log":
                        return self._send_log(cluster.pod(**found.groupdict()), parse_qs(url.query))
                    return self._send(200, getattr(cluster, route)(body, **found.groupdict()))
            raise Refused(404, "NotFound", f"the server could not find {self.command} {url.path}")
        except Refused as refused:
            status = {"kind": "Status", "status": "Failure", "message": str(refused), "reason": refused.reason}
            self._send(refused.status, {**status, "code": refused.status})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_log(self, pod: Pod, query: dict[str, list[str]]) -> None:
        follow = query.get("follow", ["false"])[0].lower() == "true"
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with pod.log.open("rb") as log:
            while True:
                ended = not follow or not pod.running()
                content = log.read()
                if content:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
                    self.wfile.flush()
                if ended:
                    break
                time.sleep(0.05)
        self.wfile.write(b"0\r\n\r\n")


def wait_for(condition: Callable[[], Any], what: Callable[[], str] = str, timeout_s: float = 60) -> None:
    """Wait until something holds; the bound is of a hang only."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.05)
