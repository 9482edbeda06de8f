"""Jobs on the stand-in by the scheduler: started, and waited for."""

import socket
from typing import Any

from torchx import specs

from mufasa_rec.launch.schedulers.kubernetes import Kubernetes, create_scheduler
from tests.helpers.kubernetes.api import wait_for

ENDED = (specs.AppState.SUCCEEDED, specs.AppState.FAILED, specs.AppState.CANCELLED)


def start(app: specs.AppDef, **cfg: Any) -> tuple[Kubernetes, str]:
    scheduler = create_scheduler("test")
    return scheduler, scheduler.submit(app, cfg)  # pyrefly: ignore[bad-argument-type]


def wait_for_end(scheduler: Kubernetes, app_id: str) -> Any:
    def described() -> Any:
        found = scheduler.describe(app_id)
        assert found is not None
        return found

    def logs() -> str:
        return f"{described()}\n" + "".join(scheduler.log_iter(app_id, "train"))

    wait_for(lambda: described().state in ENDED, logs, timeout_s=180)
    return described()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return sock.getsockname()[1]
