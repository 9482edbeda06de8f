"""What a pre-flight finds: what is wrong, what was looked at, and what cannot be seen from the machine that submits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from mufasa_rec.data import paths


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What a job asks for, and what is known of the place where it gets it.

    Attributes:
        nodes: Number of nodes.
        processes: Processes of a node; 0 when it is not known.
        gpus: GPUs of a node.
        accelerator: Make of the GPUs, such as H100; None when it is not known.
        memory_mb: Memory of a node; 0 when it is not known.
        patience_s: Seconds that the launcher waits for a process to save; None when it is not known.
        save_s: Seconds that the cluster waits; None when it is not known.
        elsewhere: Whether paths of this machine are not those of the job, which runs in a container or another cluster.
        mounts: Folders of the container that outlive it, with `:ro` behind those that are read only.
    """

    nodes: int = 1
    processes: int = 1
    gpus: int = 0
    accelerator: str | None = None
    memory_mb: int = 0
    patience_s: float | None = None
    save_s: float | None = None
    elsewhere: bool = False
    mounts: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.processes


@dataclass
class Findings:
    """Collects findings; paths are looked at as far as they are those of the job.

    Attributes:
        machines: What the job asks for.
        coming: Folders that earlier steps of the same job write.
        problems: What would make the job fail, with the remedy.
        checked: What was looked at.
        unseen: What cannot be seen from here.
        later: What is not there yet: a step of the same job writes it.
    """

    machines: Machines
    coming: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    later: list[str] = field(default_factory=list)

    def is_coming(self, url: str) -> bool:
        """Whether an earlier step of the same job writes a file or folder."""
        return any(url == folder or url.startswith(f"{folder.rstrip('/')}/") for folder in self.coming)

    @contextmanager
    def guard(self, before: str = "") -> Iterator[None]:
        """What a block refuses is a problem."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.problems.append(f"{before}{error}")

    def readable(self, name: str, url: str, remedy: str) -> bool:
        """Whether a file or folder of the job can be looked at from here.

        Args:
            name: Option or field that names it.
            url: Path or URL.
            remedy: What to do when there is nothing.
        """
        if self.is_coming(url):
            self.later.append(f"{name} {url}: a step before writes it")
        elif paths.is_remote(url):
            return self._reachable(name, url, remedy)
        elif self.machines.elsewhere:
            self.unseen.append(f"{name} {url}: lies where the job runs{self._on_which(url)}")
        elif not paths.exists(url):
            self.problems.append(f"{name} {url}: there is nothing; {remedy}")
        elif not os.access(paths.local_path(url), os.R_OK):
            self.problems.append(f"{name} {url}: may not be read by this user; {remedy}")
        else:
            return True
        return False

    def writable(self, name: str, url: str) -> None:
        """Find out whether the job can write into a folder, which need not be there yet."""
        if self.machines.elsewhere and not paths.is_remote(url):
            mount = self._mount_of(url)
            if mount is not None and mount.endswith(":ro"):
                self.problems.append(
                    f"{name} {url}: lies on {mount.removesuffix(':ro')}, which is mounted read only; choose another "
                    "folder, or mount it without readonly"
                )
            else:
                self.unseen.append(f"{name} {url}: lies where the job runs{self._on_which(url)}")
        else:
            self._try_to_write(name, url)

    def _reachable(self, name: str, url: str, remedy: str) -> bool:
        try:
            there = paths.exists(url)
        except Exception as error:  # of whichever client: missing, no credentials, no network
            self._unreachable(name, url, error)
            return False
        if not there:
            self.problems.append(f"{name} {url}: there is nothing; {remedy}")
        return there

    def _try_to_write(self, name: str, url: str) -> None:
        try:
            paths.try_to_write(url)
        except ImportError as error:
            self._unreachable(name, url, error)
        except Exception as error:  # of whichever client
            reason = error.strerror if isinstance(error, OSError) and error.strerror else _one_line(error)
            if self.machines.elsewhere:  # the job has credentials of its own
                self.unseen.append(f"{name} {url}: cannot be written from here ({reason})")
            else:
                self.problems.append(f"{name} {url}: {reason}; choose a folder that this user may write")
        else:
            self.checked.append(f"{name} {url} can be written")

    def _unreachable(self, name: str, url: str, error: Exception) -> None:
        if isinstance(error, ImportError) and not self.machines.elsewhere:  # the job's Python is this one
            self.problems.append(f"{name} {url}: {_one_line(error)}")
        else:
            self.unseen.append(f"{name} {url}: cannot be reached from here ({_one_line(error)})")

    def _mount_of(self, url: str) -> str | None:
        """The innermost mount that a path lies on."""
        place = PurePosixPath(url)
        found = [one for one in self.machines.mounts if place.is_relative_to(one.removesuffix(":ro"))]
        return max(found, key=len, default=None)

    def _on_which(self, url: str) -> str:
        if not self.machines.mounts and not self.machines.gpus and self.machines.nodes == 1:
            return ""
        if self._mount_of(url) is not None:
            return ""
        return " and on no volume: each node has its own, which goes with the container"


def _one_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def lines(title: str, texts: Sequence[str]) -> list[str]:
    """Each text once, behind a title."""
    return [f"{title}: {text}" for text in dict.fromkeys(texts)]
