"""Before anything is queued: does the job fit the machines it asks for, and can its program do what it is told?

What a role says by itself is looked at here. Its program is looked at by a module that the component names, in a
process of its own: launching stands apart from everything that trains, and reading a configuration, a data set and a
plan takes what trains.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from torchx.specs import Role, runopts

from mufasa_rec.launch.notes import Notes, notes_of
from mufasa_rec.launch.refusal import LaunchRefusedError

logger = logging.getLogger(__name__)
ACCELERATOR = "mufasa_rec.accelerator"  # capability of a named machine: the make of its GPUs
PATIENCE_ENV = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # how long a component lets torchrun wait for its processes
TIMEOUT_S = 300
REFUSED = 1
SKIP = "start it without these checks by `-cfg preflight=False`, or `--no_preflight True` of the component"


@dataclass(frozen=True, kw_only=True)
class Site:
    """What is known here of the place where a job is to run.

    Attributes:
        same_paths: Whether paths of this machine are those of the job.
        folder: Folder that relative paths start from, where it is one of this machine.
        mounts: Folders of a container that outlive it, with `:ro` behind those that are read only.
        save_s: Seconds from the request to end until the job is killed; None where nobody can tell.
    """

    same_paths: bool
    folder: str = "."
    mounts: tuple[str, ...] = ()
    save_s: float | None = None


def add_option(opts: runopts) -> None:
    """Add the option that switches the checks off."""
    opts.add("preflight", type_=bool, default=True, help="check program, data, plan and paths before the job is queued")


def is_wanted(role: Role, cfg: Mapping[str, object]) -> bool:
    """Whether a role is to be checked: its component names a module that does, and nobody has switched it off."""
    return bool(notes_of(role).preflight) and cfg.get("preflight") is not False


def check_role(role: Role, site: Site) -> None:
    """Check a role and its program; what was found and what cannot be seen from here is logged.

    Args:
        role: What is to be started.
        site: Where.

    Raises:
        LaunchRefusedError: Something is wrong, with a line for each thing; or the check itself broke down.
    """
    notes = notes_of(role)
    _refuse_more_processes_than_gpus(role, notes)
    logger.info("pre-flight: looking at %s ...", notes.program[0])
    ran = run_check(_command(role, notes, site), role.env, site.folder)
    for line in ran.stdout.splitlines():
        logger.log(logging.WARNING if line.startswith("not checked") else logging.INFO, "pre-flight: %s", line)
    if ran.returncode == REFUSED and ran.stderr.strip():
        problems = "\n".join(f"  {line}" for line in ran.stderr.strip().splitlines())
        raise LaunchRefusedError(f"pre-flight: nothing was queued, since the job would fail:\n{problems}\n  ({SKIP})")
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LaunchRefusedError(f"pre-flight: broke down itself (exit code {ran.returncode}: {last}); {SKIP}")


def run_check(command: list[str], env: Mapping[str, str], folder: str) -> subprocess.CompletedProcess[str]:
    """Run the check of a program.

    Args:
        command: What to run.
        env: Variables of the job: what it is told by them, such as an object store's address, its check is told too.
        folder: Where it runs.

    Raises:
        LaunchRefusedError: It cannot be run, or gives no answer.
    """
    env = {**os.environ, **env, "CUDA_VISIBLE_DEVICES": ""}  # no GPU is touched
    try:
        return subprocess.run(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise LaunchRefusedError(f"pre-flight: no answer within {TIMEOUT_S} s (storage that hangs?); {SKIP}") from None
    except OSError as error:
        raise LaunchRefusedError(f"pre-flight: cannot be run in {folder!r} ({error}); {SKIP}") from error


def patience_s(env: Mapping[str, str]) -> int | None:
    """How long a role's launcher waits for its processes to end; None where the component says nothing."""
    text = env.get(PATIENCE_ENV, "")
    return int(text) if text.isdecimal() else None


def _refuse_more_processes_than_gpus(role: Role, notes: Notes) -> None:
    gpus = role.resource.gpu
    if 0 < gpus < notes.processes:
        raise LaunchRefusedError(
            f"j is {role.num_replicas}x{notes.processes}: {notes.processes} processes per node, but a node has {gpus} "
            f"GPU(s) (--gpu, or the machine -h), and each process needs its own; give -j {role.num_replicas}x{gpus}, or"
            " ask for more GPUs"
        )


def _command(role: Role, notes: Notes, site: Site) -> list[str]:
    resource = role.resource
    known = {
        "nodes": role.num_replicas,
        "processes": notes.processes,
        "gpus": max(resource.gpu, 0),
        "accelerator": resource.capabilities.get(ACCELERATOR),
        "memory-mb": max(resource.memMB, 0),
        "patience-s": patience_s(role.env),
        "save-s": site.save_s,
        "mounts": ",".join(site.mounts) or None,
    }
    options = [f"--{name}={value}" for name, value in known.items() if value is not None]
    elsewhere = [] if site.same_paths else ["--elsewhere"]
    return [sys.executable, "-m", notes.preflight, *options, *elsewhere, "--", *notes.program]
