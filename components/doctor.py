"""The job that looks at a model before it trains for days: two steps on the machines it will train on.

    torchx run -s local_cwd components/doctor.py:doctor -j 1x2 -- --preset demo --data.dataset DATASET

TorchX runs this file by its path, outside of any package: it is complete by itself.
Copy it to change how the job starts.
"""

import shlex
import sys
from typing import Any, Dict, List, Optional

import torchx.specs as specs

try:
    from torchx.specs.finder import ComponentValidationException as Shown
except ImportError:  # a TorchX that has renamed it shows a traceback above the message
    Shown = Exception

# What NCCL is told about the network between nodes. Each names its transport: where that is missing the job fails at
# once, instead of going on by the slow way. `--env` adds to it and wins.
NETWORKS: Dict[str, Dict[str, str]] = {
    "none": {},
    "tcp": {"NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1"},
    "ib": {"NCCL_NET": "IB", "NCCL_IB_HCA": "mlx5"},
    "roce": {"NCCL_NET": "IB", "NCCL_IB_HCA": "mlx5", "NCCL_IB_ROCE_VERSION_NUM": "2"},
    "efa": {"NCCL_NET": "AWS Libfabric", "FI_PROVIDER": "efa", "FI_EFA_FORK_SAFE": "1"},
}


class WrongArgumentError(ValueError, Shown):  # pyrefly: ignore[invalid-inheritance]
    """An argument was refused; `torchx run` shows the message without a traceback."""


def doctor(
    *script_args: str,
    j: str = "1x1",
    name: str = "doctor",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    image: str = "mufasa_rec",
    python: str = sys.executable,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    ports: Optional[Dict[str, int]] = None,
    network: str = "none",
    secrets: Optional[List[str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    threads: int = 1,
    no_preflight: bool = False,
) -> specs.AppDef:
    """Build a model on all ranks and examine two steps: `python -m torchx_apps.doctor`, which ends with 1 on a fault.

    Args:
        script_args: what the program itself is told, after a `--`; `-- --help` lists it
        j: nodes x processes per node, such as 1x2
        name: name of the job, at most 30 characters
        h: named resource of a node, such as h100x8 or cpu; it takes precedence over cpu, gpu and memMB
        cpu: CPU cores per node
        gpu: GPUs per node
        memMB: memory per node in MB
        image: container image, where the scheduler runs containers
        python: Python interpreter on the nodes; `python` where the job runs in a container
        env: more environment variables, as NAME=value,NAME=value; what is secret goes into --secrets
        mounts: of the container, as type=bind,src=/host,dst=/container,readonly or type=volume,src=name,dst=/path
        ports: more ports of the container, as name=number,name=number
        network: how the GPUs of several nodes reach each other: none (NCCL finds out), tcp, ib, roce or efa
        secrets: NAME of a variable of your shell (Slurm); NAME=secret/key, /folder=secret (Kubernetes); never a value
        max_retries: how often the scheduler starts a failed job again
        rdzv_port: port of the first node on which several nodes meet; a single node takes any free port
        threads: OMP_NUM_THREADS of each process
        no_preflight: True starts the job without the checks that slurm and kubernetes make before
    """
    nodes, processes = _nodes_and_processes(j)
    program = ["torchx_apps.doctor", *script_args]
    return specs.AppDef(
        name=_checked_name(name),
        roles=[
            specs.Role(
                name="doctor",
                image=image,
                entrypoint="sh",
                args=["-c", _torchrun(python, str(nodes), processes, rdzv_port, 0, program)],
                env={"OMP_NUM_THREADS": str(threads), "LOGLEVEL": "WARNING", **_network(network), **(env or {})},
                num_replicas=nodes,
                max_retries=max_retries,
                retry_policy=specs.RetryPolicy.APPLICATION,
                resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h),
                port_map={"c10d": rdzv_port, **(ports or {})},
                mounts=specs.parse_mounts(mounts or []),
                metadata=_for_schedulers(program, processes, secrets, no_preflight),
            )
        ],
    )


def _torchrun(python: str, nodes: str, processes: int, rdzv_port: int, max_restarts: int, program: List[str]) -> str:
    """The shell line of one node: only a shell knows the first node's host, in a variable that each scheduler names."""
    # After `--` torchrun does not take the program's --run for a short form of its own --run_path.
    # `$$` is a `$` that TorchX leaves alone when it fills in its own macros.
    meeting_point = "localhost:0 --local_addr localhost"
    if nodes != "1":
        meeting_point = f"$${{{specs.macros.rank0_env}:=localhost}}:{rdzv_port}"
    # torchrun keeps the shell's id, by which a process sees that torchrun was gone before it could ask to die with it.
    # (Kubernetes makes one `$` of two: there torchrun is the container's first process, with which all others die.)
    # Slurm warns by SIGUSR1, which would kill torchrun: it is to pass it on like the rest. The variable, not the flag,
    # also starts a torchrun that has neither; it is set here, since Slurm takes a role's variables apart at commas.
    return (
        "export LAUNCHER_PID=$$$$ PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1;"
        f" exec {shlex.quote(python)} -m torch.distributed.run"
        f" --nnodes {nodes} --nproc_per_node {processes}"
        f" --rdzv_backend c10d --rdzv_id {specs.macros.app_id} --rdzv_endpoint {meeting_point}"
        f" --max_restarts {max_restarts} --tee 3 --role '' -m -- {shlex.join(program)}"
    )


def _nodes_and_processes(j: str) -> List[int]:
    parts = j.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise WrongArgumentError(f"j is {j!r}: give nodes x processes per node, such as 1x2")
    return [int(part) for part in parts]


def _checked_name(name: str) -> str:
    if not 0 < len(name) <= 30:
        raise WrongArgumentError(
            f"name is {name!r}, {len(name)} characters: schedulers take 1 to 30; give a shorter --name"
        )
    return name


def _for_schedulers(
    program: List[str], processes: int, secrets: Optional[List[str]], no_preflight: bool
) -> Dict[str, Dict[str, Any]]:
    """What the schedulers `slurm` and `kubernetes` of this project read beside the role; all others pass over it."""
    return {
        "mufasa_rec": {
            "program": program,
            "processes": processes,
            "secrets": secrets or [],
            "preflight": "" if no_preflight else "torchx_apps.preflight",
        }
    }


def _network(name: str) -> Dict[str, str]:
    if name not in NETWORKS:
        raise WrongArgumentError(f"network is {name!r}: choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name]
