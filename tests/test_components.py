"""The components: what they ask of a scheduler, and that what follows `--` reaches the program."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from torchx import specs
from torchx.specs.file_linter import validate

ROOT = Path(__file__).resolve().parent.parent
TORCHX = str(Path(sysconfig.get_path("scripts")) / "torchx")
COMPONENTS = ("prepare", "train", "fuse", "evaluate", "export", "doctor", "plan", "benchmark", "chain")
# What a program does not begin without.
NEEDED = {
    "prepare": ("--input", "I", "--output", "O"),
    "train": ("--run", "R"),
    "fuse": ("--run", "R"),
    "evaluate": ("--run", "R", "--output", "O"),
    "export": ("--run", "R", "--output", "O"),
    "doctor": ("--preset", "demo"),
    "plan": ("--preset", "demo"),
    "benchmark": ("attention",),
    "chain": ("--run", "R", "--input", "I"),
}
# Writes what each process was told and where it stands.
PROGRAM = """
import json, os, pathlib, sys
place = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "MASTER_ADDR")}
told = {"argv": sys.argv[1:], "extra": os.environ.get("X"), **place}
pathlib.Path("rank-" + os.environ["RANK"]).write_text(json.dumps(told))
"""


def make_app(component: str, *script_args: str, **options: object) -> specs.AppDef:
    """Call a component as TorchX does."""
    return getattr(importlib.import_module(f"components.{component}"), component)(*script_args, **options)


def torchx_run(*arguments: str, cwd: Path = ROOT, scheduler: str = "local_cwd") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TORCHX, "run", "-s", scheduler, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("component", COMPONENTS)
def test_job_runs_its_app_by_torchrun_of_the_same_python(component: str) -> None:
    app = make_app(component, "--run", "a b", j="1x3", threads=2, env={"X": "1"})
    (role,) = app.roles
    assert (app.name, role.name, role.entrypoint, role.num_replicas) == (component, component, "sh", 1)
    flag, line = role.args
    assert flag == "-c"
    assert f" exec {sys.executable} -m torch.distributed.run --nnodes 1 --nproc_per_node 3 " in line
    assert " --max_restarts 0 " in line
    assert line.endswith(f" -m -- torchx_apps.{component} --run 'a b'")
    assert "--rdzv_endpoint localhost:0" in line
    assert {"OMP_NUM_THREADS": "2", "LOGLEVEL": "WARNING", "X": "1"}.items() <= role.env.items()
    assert role.min_replicas is None


@pytest.mark.parametrize("component", COMPONENTS)
def test_several_nodes_meet_at_the_first_one(component: str) -> None:
    (role,) = make_app(component, j="4x8", rdzv_port=1234, python="python").roles
    values = specs.macros.Values(img_root="", app_id="app", replica_id="0", rank0_env="FIRST_HOST")
    line = values.apply(role).args[1]
    assert role.num_replicas == 4
    assert "exec python -m torch.distributed.run --nnodes 4 --nproc_per_node 8" in line
    assert "--rdzv_id app --rdzv_endpoint ${FIRST_HOST:=localhost}:1234" in line


@pytest.mark.parametrize("component", COMPONENTS)
def test_resources_retries_and_image_reach_the_role(component: str) -> None:
    (role,) = make_app(component, cpu=8, gpu=2, memMB=999, image="registry/image:1", max_retries=3).roles
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (8, 2, 999)
    assert (role.image, role.max_retries, role.retry_policy) == ("registry/image:1", 3, specs.RetryPolicy.APPLICATION)


@pytest.mark.parametrize("component", COMPONENTS)
def test_mounts_and_ports_reach_the_role(component: str) -> None:
    mounts = ["type=bind", "src=/data", "dst=/in", "readonly", "type=volume", "src=runs", "dst=/out"]
    (role,) = make_app(component, mounts=mounts, ports={"tensorboard": 6006}, rdzv_port=1234).roles
    assert role.mounts == [
        specs.BindMount(src_path="/data", dst_path="/in", read_only=True),
        specs.VolumeMount(src="runs", dst_path="/out"),
    ]
    assert role.port_map == {"c10d": 1234, "tensorboard": 6006}
    assert make_app(component).roles[0].mounts == []


@pytest.mark.parametrize("component", COMPONENTS)
def test_network_is_named_and_env_wins_over_what_it_sets(component: str) -> None:
    (role,) = make_app(component, network="ib", env={"NCCL_IB_HCA": "mlx5_0"}).roles
    assert (role.env["NCCL_NET"], role.env["NCCL_IB_HCA"]) == ("IB", "mlx5_0")
    assert not [name for name in make_app(component).roles[0].env if name.startswith(("NCCL", "FI_"))]
    with pytest.raises(ValueError, match="network is 'wifi': choose one of none, tcp, ib, roce, efa"):
        make_app(component, network="wifi")


@pytest.mark.parametrize("component", COMPONENTS)
def test_what_our_schedulers_read_stands_beside_the_role(component: str) -> None:
    (role,) = make_app(component, "--run", "a b", j="2x3", secrets=["TOKEN"]).roles
    noted = {"program": [f"torchx_apps.{component}", "--run", "a b"], "processes": 3, "secrets": ["TOKEN"]}
    assert role.metadata == {"mufasa_rec": {**noted, "preflight": "torchx_apps.preflight"}}
    assert not make_app(component, no_preflight=True).roles[0].metadata["mufasa_rec"]["preflight"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_names_suit_every_scheduler(component: str) -> None:
    app = make_app(component)
    for name in (app.name, app.roles[0].name):
        assert re.fullmatch(r"[a-z][a-z0-9_]{0,29}", name)
    with pytest.raises(ValueError, match="31 characters: schedulers take 1 to 30; give a shorter --name"):
        make_app(component, name="a" * 31)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("j", ["2", "0x2", "1:2:3x4", ":2x1", "1x2x3", "1x2:3", "x", "-1x2", "axb", ""])
def test_wrong_shape_of_the_job_is_named(component: str, j: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"j is {j!r}: give nodes x processes per node")):
        make_app(component, j=j)


def test_refused_argument_is_shown_without_a_traceback() -> None:
    ran = torchx_run("components/train.py:train", "-j", "2")
    assert ran.returncode == 1
    assert "j is '2': give nodes x processes per node, such as 1x2, or least:most" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_elastic_job_asks_for_the_least_and_takes_the_most_nodes() -> None:
    (role,) = make_app("train", j="2:4x8", max_restarts=3).roles
    assert (role.min_replicas, role.num_replicas) == (2, 4)
    assert " --nnodes 2:4 --nproc_per_node 8 " in role.args[1]
    assert " --max_restarts 3 " in role.args[1]
    assert ":29500 " in role.args[1]


def test_equal_bounds_are_a_fixed_size() -> None:
    assert make_app("train", j="1:1x2") == make_app("train", j="1x2")


@pytest.mark.parametrize(
    ("j", "max_restarts", "message"),
    [
        ("2:1x4", 1, "give it as 1:2x4"),
        ("1:2x4", 0, "max_restarts is 0: an elastic job restarts in place; give 1 or more"),
    ],
)
def test_elastic_job_that_cannot_be_is_refused(j: str, max_restarts: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_app("train", j=j, max_restarts=max_restarts)


@pytest.mark.parametrize("component", COMPONENTS)
def test_no_variable_of_a_role_holds_a_comma(component: str) -> None:
    """Slurm's `srun --export` takes them apart there."""
    (role,) = make_app(component).roles
    assert not [name for name, value in role.env.items() if "," in value]


@pytest.mark.parametrize("component", COMPONENTS)
def test_slurm_leaves_the_shell_line_as_it_is(component: str) -> None:
    job = (f"components/{component}.py:{component}", "-j", "2x2", "--no_preflight", "True")
    shown = torchx_run("--dryrun", *job, "--", "--run", "R", scheduler="slurm")
    assert shown.returncode == 0, shown.stderr
    assert (
        "sh -c 'export LAUNCHER_PID=$$ PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1; exec "
        in shown.stdout
    )


@pytest.mark.parametrize("component", ["prepare", "evaluate"])
def test_only_training_is_elastic(component: str) -> None:
    with pytest.raises(ValueError, match="j is '1:2x4': give nodes x processes per node, such as 1x2"):
        make_app(component, j="1:2x4")


def test_training_has_time_to_save_and_to_start_again_with_a_clean_store() -> None:
    (role,) = make_app("train", grace_s=90, max_restarts=1).roles
    assert role.env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "90"
    assert role.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert make_app("train").roles[0].env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "0"
    assert (
        make_app("train", env={"PET_SIGNALS_TO_HANDLE": "SIGTERM"}).roles[0].env["PET_SIGNALS_TO_HANDLE"] == "SIGTERM"
    )


@pytest.mark.parametrize("component", COMPONENTS)
def test_torchx_finds_nothing_to_complain_about(component: str) -> None:
    assert validate(str(ROOT / "components" / f"{component}.py"), component) == []


def test_components_share_their_private_helpers_word_for_word() -> None:
    helpers: dict[str, set[str]] = {}
    for component in COMPONENTS:
        tree = ast.parse((ROOT / "components" / f"{component}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
                helpers.setdefault(node.name, set()).add(ast.unparse(node))
            elif isinstance(node, ast.AnnAssign):
                helpers.setdefault(ast.unparse(node.target), set()).add(ast.unparse(node))
    assert {"_torchrun", "_checked_name", "NETWORKS"} <= helpers.keys()
    assert [name for name, forms in helpers.items() if len(forms) > 1] == []


@pytest.mark.parametrize("component", COMPONENTS)
def test_help_explains_every_argument(component: str) -> None:
    shown = torchx_run(f"components/{component}.py:{component}", "--help").stdout
    assert f"torchx_apps.{component}" in shown
    for argument in ("--name", "--gpu", "--memMB", "--max_retries", "--rdzv_port", "--threads"):
        assert argument in shown


@pytest.mark.parametrize("component", COMPONENTS)
def test_dryrun_passes_the_arguments_of_the_program_through(component: str) -> None:
    arguments = ["--run", "here", "--model.use_content", "False", "--compare", "b=c"]
    shown = torchx_run("--dryrun", f"components/{component}.py:{component}", "-j", "1x2", "--", *arguments)
    # TorchX prints the request as a Python literal, strings broken over lines.
    joined = re.sub(r"['\"]\s+['\"]", "", shown.stdout)
    assert shown.returncode == 0, shown.stderr
    assert f"torchx_apps.{component} {' '.join(arguments)}" in joined


def program_of(component: str, *script_args: str) -> tuple[str, list[str]]:
    """The module that a job starts and what it is told, as the shell and torchrun take the line apart."""
    words = shlex.split(make_app(component, *script_args).roles[0].args[1])
    module, *arguments = words[words.index("--") + 1 :]
    return module, arguments


@pytest.mark.parametrize("component", COMPONENTS)
def test_arguments_are_read_by_the_parser_of_the_program_itself(
    component: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module, arguments = program_of(component, *NEEDED[component], "--no-such-flag", "a b")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(arguments)
    said = f"{ended.value.code} {capsys.readouterr().err}"
    assert ended.value.code not in (0, None)
    assert "--no-such-flag" in said


def test_fields_of_the_configuration_reach_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, arguments = program_of(
        "train",
        *("--preset", "demo", "--run", str(tmp_path / "a b"), "--data.dataset", "D", "--trainer.epochs", "7"),
        *("--model.width", "48", "--optimizer.learning-rate", "0.5"),
    )
    program = importlib.import_module(module)
    got: list[Any] = []
    monkeypatch.setattr(program, "train", lambda config, folder, env: got.extend((config, folder)))
    program.main(arguments)
    config, folder = got
    assert folder == tmp_path / "a b"
    assert (config.data.dataset, config.trainer.epochs, config.model.width) == ("D", 7, 48)
    assert config.optimizer.learning_rate == 0.5


@pytest.mark.parametrize("processes", [1, 2])
def test_real_run_reaches_every_process_with_the_arguments_as_given(tmp_path: Path, processes: int) -> None:
    source = (ROOT / "components" / "train.py").read_text().replace("torchx_apps.train", "tiny")
    (tmp_path / "train.py").write_text(source)
    (tmp_path / "tiny.py").write_text(PROGRAM)
    # --run, --log and -m would mean something to torchrun too; the quotes and the dollar to a shell.
    arguments = ["--run", "a b", "--log", "'x'", "-m", "$HOME", "--flag=1"]
    options = ["-cfg", f"log_dir={tmp_path / 'logs'}", "train.py:train", "-j", f"1x{processes}", "--env", "X=5"]
    ran = torchx_run(*options, "--", *arguments, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    told = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(processes)]
    assert [one["argv"] for one in told] == [arguments] * processes
    assert {(one["WORLD_SIZE"], one["OMP_NUM_THREADS"], one["extra"]) for one in told} == {(str(processes), "1", "5")}
    assert list((tmp_path / "logs").rglob("stdout.log"))


def test_failing_program_fails_the_job(tmp_path: Path) -> None:
    source = (ROOT / "components" / "train.py").read_text().replace("torchx_apps.train", "tiny")
    (tmp_path / "train.py").write_text(source)
    (tmp_path / "tiny.py").write_text("import sys; sys.exit('field is 3: give 4')")
    ran = torchx_run("-cfg", f"log_dir={tmp_path / 'logs'}", "train.py:train", "-j", "1x1", cwd=tmp_path)
    assert ran.returncode == 1
    assert "field is 3: give 4" in ran.stderr
    assert os.listdir(tmp_path / "logs")
