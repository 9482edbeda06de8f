"""What a component notes beside a role for our schedulers: its program, its secrets, what checks it beforehand.

A component imports TorchX alone, so it says all this in the role's metadata, under a name of ours. Other schedulers
pass over it; a component of somebody else's that says nothing is started as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchx.specs import Role, macros

from mufasa_rec.launch.secrets import Secret, parse_secrets

KEY = "mufasa_rec"


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What is noted beside a role.

    Attributes:
        program: Module that every process runs, and its arguments; empty when it is not known.
        processes: Processes of a node; 0 when it is not known.
        secrets: What the job is given and no description of it shows.
        preflight: Module that checks the program before the job is queued; empty for no checks at all.
    """

    program: tuple[str, ...] = ()
    processes: int = 0
    secrets: tuple[Secret, ...] = ()
    preflight: str = ""


def notes_of(role: Role) -> Notes:
    """Read what is noted beside a role.

    Raises:
        LaunchRefusedError: A secret is not written as one.
    """
    # Arguments are read as the program gets them; what only the scheduler knows stays as it is written.
    same = {name: getattr(macros, name) for name in ("img_root", "app_id", "replica_id", "rank0_env")}
    noted = macros.Values(**same).apply(role).metadata.get(KEY, {})
    return Notes(
        program=tuple(noted.get("program", ())),
        processes=noted.get("processes", 0),
        secrets=parse_secrets(noted.get("secrets", ())),
        preflight=noted.get("preflight", ""),
    )
