"""What the stand-in runs: pods as processes, and the two kinds of jobs as their controllers treat them."""

import os
import re
import signal
import subprocess
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from kubernetes import client

from mufasa_rec.launch.kubernetes.rules import problems

MAX_POD_S = 300  # a bound of a hang
MAX_GRACE_S = 20
_INDEX_FIELD = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def admission_errors(manifest: dict[str, Any]) -> list[str]:
    """Hold a manifest against this project's rules, and its pods against what the client makes of them and sends."""
    spec = manifest["spec"]
    templates = [task["template"] for task in spec.get("tasks", [])] or [spec.get("template", {"spec": None})]
    lost = [template for template in templates if template != _through_the_client(template)]
    return [*problems(manifest), *(f"the client would not send all of {template}" for template in lost)]


def _through_the_client(template: dict[str, Any]) -> Any:
    api = client.ApiClient(client.Configuration())
    typed = api._ApiClient__deserialize_model(template, client.V1PodTemplateSpec)  # pyrefly: ignore[missing-attribute]
    return api.sanitize_for_serialization(typed) or template


def expand(text: str, env: dict[str, str]) -> str:
    """Fill in `$(NAME)` and make one `$` of two, as a kubelet does with a command line."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda found: "$" if found[0] == "$$" else env.get(found[1], found[0]), text)


class Pod:
    """A pod: the process that its only container's command line is, in a session of its own."""

    def __init__(self, namespace: str, name: str, template: dict[str, Any], folder: Path, env: dict[str, str]) -> None:
        self.uid = str(uuid.uuid4())
        self.name = name
        self.log = folder / f"{name}.{self.uid}.log"
        self.template = template
        self.namespace = namespace
        container = template["spec"]["containers"][0]
        inside = dict(env)
        for variable in container.get("env", []):
            value = expand(variable.get("value", ""), inside)
            if "valueFrom" in variable:
                assert variable["valueFrom"]["fieldRef"]["fieldPath"] == _INDEX_FIELD
                value = env["JOB_COMPLETION_INDEX"]
            inside[variable["name"]] = value
        # Every pod's host is this machine.
        inside = {key: "127.0.0.1" if key.endswith("_HOST") else value for key, value in inside.items()}
        command = [expand(part, inside) for part in container["command"]]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=inside, start_new_session=True
            )
        self.kill_at = time.monotonic() + MAX_POD_S

    def running(self) -> bool:
        if time.monotonic() > self.kill_at:
            self._signal(signal.SIGKILL)
        return self.process.poll() is None

    @property
    def phase(self) -> str:
        return "Running" if self.running() else "Failed" if self.process.returncode else "Succeeded"

    def ask_to_end(self) -> None:
        """Ask the container's first process, as Kubernetes does, and set the end of its grace."""
        if self.running():
            grace_s = min(self.template["spec"]["terminationGracePeriodSeconds"], MAX_GRACE_S)
            self.kill_at = min(self.kill_at, time.monotonic() + grace_s)
            self.process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """With a container's first process all others go."""
        while self.running():
            time.sleep(0.02)
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def resource(self) -> dict[str, Any]:
        metadata = {**self.template["metadata"], "name": self.name, "namespace": self.namespace, "uid": self.uid}
        return {
            "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
            "spec": self.template["spec"], "status": {"phase": self.phase},
        }  # fmt: skip


class Job:
    """What both kinds share: pods, and a thread that looks after them."""

    def __init__(self, namespace: str, manifest: dict[str, Any], folder: Path, env: dict[str, str]) -> None:
        self.namespace, self.manifest, self.folder, self.env = namespace, manifest, folder, env
        self.name = manifest["metadata"]["name"]
        self.uid = str(uuid.uuid4())
        self.pods: dict[str, Pod] = {}
        self.aborted = threading.Event()
        self.thread = threading.Thread(target=self.control, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        self.aborted.set()
        self.thread.join(MAX_GRACE_S + 5)
        for pod in self.pods.values():
            pod.kill_at = 0
            pod.end()

    def control(self) -> None:
        raise NotImplementedError

    def end_pods(self, keep_ended: bool) -> None:
        """End all pods; those that ended by themselves stay, if asked, with their logs."""
        running = [pod for pod in self.pods.values() if pod.running()]
        for pod in running:
            pod.ask_to_end()
        for pod in self.pods.values():
            pod.end()
        self.pods = {pod.name: pod for pod in self.pods.values() if keep_ended and pod not in running}


class VolcanoJob(Job):
    """A job as Volcano's controller (pkg/controllers/job/state) treats it."""

    phase = "Pending"
    restarts = 0

    def resource(self) -> dict[str, Any]:
        tasks = self.manifest["spec"]["tasks"]
        pods = {task["name"]: self.pods.get(f"{self.name}-{task['name']}-0") for task in tasks}
        counts = {name: {"phase": {pod.phase: 1}} for name, pod in pods.items() if pod}
        status = {"state": {"phase": self.phase}, "retryCount": self.restarts, "taskStatusCount": counts}
        metadata = {**self.manifest["metadata"], "namespace": self.namespace, "uid": self.uid}
        return {**self.manifest, "metadata": metadata, "status": status}

    def control(self) -> None:
        self._start_pods()
        while True:
            time.sleep(0.05)
            if self.aborted.is_set():
                return self._finish("Aborting", "Aborted")
            failed = [task for task in self.manifest["spec"]["tasks"] if self._pod(task).phase == "Failed"]
            actions = {policy["action"] for task in failed for policy in task.get("policies", [])}
            if "RestartJob" in actions:
                self.restarts += 1
                self.phase = "Restarting"
                self.end_pods(keep_ended=False)
                # The controller counts first and compares then.
                if self.restarts >= (self.manifest["spec"]["maxRetry"] or 3):
                    return self._finish("Restarting", "Failed")
                self._start_pods()
            elif "TerminateJob" in actions:
                return self._finish("Terminating", "Terminated")
            elif not any(pod.running() for pod in list(self.pods.values())):
                return self._finish("Running", "Failed" if failed else "Completed")

    def _pod(self, task: dict[str, Any]) -> Pod:
        return self.pods[f"{self.name}-{task['name']}-0"]

    def _finish(self, meanwhile: str, phase: str) -> None:
        self.phase = meanwhile
        self.end_pods(keep_ended=True)
        self.phase = phase

    def _start_pods(self) -> None:
        tasks = self.manifest["spec"]["tasks"]
        hosts = {f"VC_{task['name'].replace('-', '_').upper()}_HOSTS": "127.0.0.1" for task in tasks}
        for task in tasks:
            name = f"{self.name}-{task['name']}-0"
            self.pods[name] = Pod(self.namespace, name, task["template"], self.folder, {**self.env, **hosts})
        self.phase = "Running"


class IndexedJob(Job):
    """An indexed Job: a failed pod starts again alone, as long as the job may have failures."""

    failures = 0
    finished = ""

    def resource(self) -> dict[str, Any]:
        conditions = [{"type": self.finished, "status": "True"}] if self.finished else []
        return {**self.manifest, "status": {"failed": self.failures, "conditions": conditions}}

    def control(self) -> None:
        spec = self.manifest["spec"]
        for index in range(spec["completions"]):
            self._start_pod(index)
        while not self.finished:
            time.sleep(0.05)
            pods = [self.pods[f"{self.name}-{index}"] for index in range(spec["completions"])]
            failed = [index for index, pod in enumerate(pods) if pod.phase == "Failed"]
            self.failures += len(failed)
            if self.aborted.is_set() or self.failures > spec["backoffLimit"]:
                self.end_pods(keep_ended=True)
                self.finished = "Failed"
            elif all(pod.phase == "Succeeded" for pod in pods):
                self.finished = "Complete"
            else:
                for index in failed:
                    self._start_pod(index)

    def _start_pod(self, index: int) -> None:
        name = f"{self.name}-{index}"
        env = {**self.env, "JOB_COMPLETION_INDEX": str(index)}
        self.pods[name] = Pod(self.namespace, name, self.manifest["spec"]["template"], self.folder, env)
