"""Two nodes on the stand-in for a Kubernetes cluster: they meet, and after a loss all start again and go on."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchx import specs

from components.train import train
from mufasa_rec.config import save_config
from mufasa_rec.launch.kubernetes.cluster import Cluster
from mufasa_rec.launch.schedulers.kubernetes import create_scheduler
from mufasa_rec.training.checkpoint import find_checkpoint, list_checkpoints
from mufasa_rec.training.saver import CheckpointConfig
from tests.helpers.kubernetes.api import StandIn, wait_for
from tests.helpers.kubernetes.running import free_port, start, wait_for_end
from tests.helpers.runs import metrics_of, small_config
from torchx_apps.benchmarks._same_run import differences_of_checkpoints


def two_nodes(tmp_path: Path, **options: Any) -> specs.AppDef:
    """The train component on two nodes, with a short program in the place of training."""
    job = train(
        str(tmp_path),
        no_preflight=True,
        j="2x1",
        image="image",
        rdzv_port=free_port(),
        python=sys.executable,
        **options,
    )
    job.roles[0].args = [part.replace("torchx_apps.train", "tests.helpers.short_run") for part in job.roles[0].args]
    return job


def events(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    return [one for one in map(json.loads, (line for line in lines if line.endswith("\n"))) if one["event"] == event]


@pytest.mark.slow
def test_the_same_job_as_plain_yaml_runs_and_starts_again(stand_in: StandIn, tmp_path: Path) -> None:
    from kubernetes import utils

    scheduler = create_scheduler("test")
    cfg: Any = {}
    shown = str(scheduler.submit_dryrun(two_nodes(tmp_path, max_retries=1), cfg))
    manifests = list(yaml.safe_load_all(shown.partition("\n---\n")[2]))
    connected = Cluster()
    for manifest in manifests:
        utils.create_from_dict(connected.client, manifest, namespace="team")
    job = stand_in.indexed_jobs["team", manifests[1]["metadata"]["name"]]
    wait_for(lambda: len(events(tmp_path, "training")) == 2, lambda: job.pods[f"{job.name}-0"].log.read_text())
    os.kill(events(tmp_path, "training")[0]["pid"], signal.SIGKILL)
    wait_for(lambda: len(events(tmp_path, "training")) == 4, lambda: job.pods[f"{job.name}-0"].log.read_text())
    (tmp_path / "finish").touch()
    wait_for(lambda: job.finished, lambda: str(job.resource()))
    assert job.finished == "Complete"
    assert {one["rank"] for one in events(tmp_path, "finished")} == {0, 1}


def training(dataset: str, folder: Path) -> specs.AppDef:
    """A small run on two nodes that saves every five of its 40 steps."""
    config = small_config(dataset, softmax="sampled", max_steps=40, validate_every=2, log_every=3)
    save_config(replace(config, checkpoint=CheckpointConfig(every_steps=5, every_minutes=None)), folder)
    arguments = ("--config", str(folder / "config.yaml"), "--run", str(folder / "run"))
    job: dict[str, Any] = {
        "j": "2x1",
        "image": "image",
        "rdzv_port": free_port(),
        "python": sys.executable,
        "max_retries": 1,
    }
    # The stand-in's containers are this machine's processes, which a pre-flight cannot know.
    return train(*arguments, **job, no_preflight=True)


@pytest.mark.slow
def test_training_whose_node_is_lost_resumes_and_ends_as_the_undisturbed_one(
    stand_in: StandIn, dataset: str, tmp_path: Path
) -> None:
    undisturbed, attacked = tmp_path / "undisturbed", tmp_path / "attacked"
    scheduler, app_id = start(training(dataset, undisturbed))
    assert wait_for_end(scheduler, app_id).state == specs.AppState.SUCCEEDED
    scheduler, app_id = start(training(dataset, attacked))
    wait_for(
        lambda: list_checkpoints(str(attacked / "run/checkpoints")),
        lambda: "".join(scheduler.log_iter(app_id, "train")),
        timeout_s=180,
    )
    os.killpg(stand_in.pod("team", f"{app_id.partition(':')[2]}-train-1-0").process.pid, signal.SIGKILL)
    ended = wait_for_end(scheduler, app_id)
    assert (ended.state, ended.num_restarts) == (specs.AppState.SUCCEEDED, 1)
    assert "continues from checkpoint step-" in "".join(scheduler.log_iter(app_id, "train"))
    for which in ("newest", "best"):
        places = [find_checkpoint(str(folder / "run/checkpoints"), which) for folder in (attacked, undisturbed)]
        assert differences_of_checkpoints(*places) == []
    lines = [metrics_of(folder / "run", "validation") for folder in (attacked, undisturbed)]
    assert [{**line, "time_s": 0} for line in lines[0]] == [{**line, "time_s": 0} for line in lines[1]]
