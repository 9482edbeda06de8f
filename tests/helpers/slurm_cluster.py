"""A real Slurm on this machine: a controller and two nodes on the loopback device, without any privilege.

Two partitions: `main`, whose jobs can be preempted, and `high`, whose jobs preempt them. Optionally with accounts.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
ACCOUNT_PROGRAMS = ("slurmdbd", "sacctmgr", "sacct", "mariadbd", "mariadb", "mariadb-install-db")
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
NODES = 2
START_TIMEOUT_S = 30
STOP_TIMEOUT_S = 10
CONFIG = """\
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{accounting}
MpiDefault=none
SwitchType=switch/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MinJobAge=300
KillWait=5
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=40
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} RealMemory=20000 Sockets=1 CoresPerSocket=16 "
    "ThreadsPerCore=1 Gres=gpu:8 State=UNKNOWN"
)
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePass={folder}/munge/socket
AccountingStoragePort={accounts_port}"""
ACCOUNTS_CONFIG = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={accounts_port}
SlurmUser={user}
PidFile={folder}/slurmdbd.pid
LogFile={folder}/log/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_accounts
"""
GRANTS = (
    "create database if not exists slurm_accounts; create user 'slurm'@'%' identified by 'slurm'; "
    "create user 'slurm'@'localhost' identified by 'slurm'; grant all on *.* to 'slurm'@'%'; "
    "grant all on *.* to 'slurm'@'localhost';"
)


def missing_programs(accounting: bool = False) -> list[str]:
    """What a cluster needs and this machine does not have."""
    names = PROGRAMS + ACCOUNT_PROGRAMS * accounting
    return [name for name in names if shutil.which(name, path=SEARCHED) is None]


class SlurmCluster:
    """A cluster of two nodes that lives for the length of a `with` block.

    Args:
        folder: An empty folder with a short path: sockets lie in it.
        accounting: Whether it keeps accounts, in a database of its own.
    """

    def __init__(self, folder: Path, accounting: bool = False) -> None:
        self.folder = folder
        self.accounting = accounting
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCHED}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmCluster:
        for name in ("state", "spool", "log", "munge"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o755)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if shutil.which("scancel", path=SEARCHED) and self._daemons:
            subprocess.run(["scancel", "--me"], env=self.env, capture_output=True, timeout=STOP_TIMEOUT_S)
            self._wait("jobs to end", lambda: not self.call("squeue", "--noheader"), strict=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def call(self, *command: str) -> str:
        """Run one of Slurm's programs; returns what it says."""
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60).stdout.strip()

    def _start(self) -> None:
        ports = free_ports(NODES + 3)
        host = socket.gethostname().split(".")[0]
        names = [host, *(f"{host}-{k}" for k in range(1, NODES))]
        facts: dict[str, Any] = {
            "folder": self.folder,
            "host": host,
            "user": getpass.getuser(),
            "controller_port": ports[0],
            "accounts_port": ports[1],
            "database_port": ports[2],
        }
        nodes = "\n".join(NODE.format(name=name, port=port) for name, port in zip(names, ports[3:]))
        accounting = ACCOUNTING.format(**facts) if self.accounting else "AccountingStorageType=accounting_storage/none"
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/tty[10-17]\n")
        (self.folder / "slurm.conf").write_text(CONFIG.format(**facts, nodes=nodes, accounting=accounting))
        self._start_munge()
        if self.accounting:
            self._start_accounts(facts)
        self._daemon("slurmctld", "-D", "-c")
        for name in names:
            self._daemon("slurmd", "-D", "-N", name)
        idle = ("sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D")
        self._wait("idle nodes", lambda: self.call(*idle) == str(NODES))

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        files = [f"--{what}={folder}/{what.split('-')[0]}" for what in ("key-file", "socket", "pid-file", "log-file")]
        self._daemon("munged", "--foreground", "--force", *files, f"--seed-file={folder}/seed", "--num-threads=2")
        self._wait("munge", (folder / "socket").exists)

    def _start_accounts(self, facts: dict[str, Any]) -> None:
        folder, user = self.folder / "database", getpass.getuser()
        place = ("--no-defaults", f"--datadir={folder}/data", f"--user={user}")
        (folder / "data").mkdir(parents=True)
        install = ("mariadb-install-db", *place, "--auth-root-authentication-method=normal", "--skip-test-db")
        subprocess.run(install, env=self.env, check=True, capture_output=True, timeout=60)
        socket_file = f"--socket={folder}/socket"
        self._daemon(
            *("mariadbd", *place, socket_file, f"--pid-file={folder}/pid", f"--port={facts['database_port']}"),
            *("--bind-address=127.0.0.1", "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"),
        )
        client = ("mariadb", "--no-defaults", socket_file, "--user=root")
        self._wait("the database", lambda: self.call(*client, "--skip-column-names", "--execute=select 7") == "7")
        subprocess.run([*client, f"--execute={GRANTS}"], env=self.env, check=True, timeout=60)
        config = self.folder / "slurmdbd.conf"
        config.write_text(ACCOUNTS_CONFIG.format(**facts))
        config.chmod(0o600)
        self._daemon("slurmdbd", "-D")
        self._wait("accounts", lambda: "Cluster" in self.call("sacctmgr", "show", "cluster"))
        self.call("sacctmgr", "--immediate", "add", "cluster", "loop")

    def _daemon(self, *command: str) -> None:
        with (self.folder / "log" / "daemons").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True, preexec_fn=_end_with_parent,
                )
            )  # fmt: skip

    def _wait(self, what: str, condition: Callable[[], bool], strict: bool = True) -> None:
        end = time.monotonic() + START_TIMEOUT_S
        while not condition():
            if time.monotonic() > end:
                assert not strict, f"no {what}: {self.logs()}"
                return
            time.sleep(0.1)

    def logs(self) -> str:
        """The last words of every daemon."""
        files = sorted((self.folder / "log").iterdir())
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-1500:]}" for file in files)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _end_with_parent() -> None:
    """In the new process: be told to end when the tests are gone, however they ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
