"""The components: what they ask of a scheduler, and that what follows `--` reaches the program."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from torchx import specs
from torchx.specs.file_linter import validate

ROOT = Path(__file__).resolve().parent.parent
TORCHX = str(Path(sysconfig.get_path("scripts")) / "torchx")
COMPONENTS = ("prepare", "train", "evaluate")
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


def torchx_run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TORCHX, "run", "-s", "local_cwd", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("component", COMPONENTS)
def test_job_runs_its_app_by_torchrun_of_the_same_python(component: str) -> None:
    app = make_app(component, "--run", "a b", j="1x3", threads=2, env={"X": "1"})
    (role,) = app.roles
    assert (app.name, role.name, role.entrypoint, role.num_replicas) == (component, component, "sh", 1)
    flag, line = role.args
    assert flag == "-c"
    assert line.startswith(f"exec {sys.executable} -m torch.distributed.run --nnodes 1 --nproc_per_node 3 ")
    assert line.endswith(f" -m -- torchx_apps.{component} --run 'a b'")
    assert "--rdzv_endpoint localhost:0" in line
    assert role.env == {"OMP_NUM_THREADS": "2", "LOGLEVEL": "WARNING", "X": "1"}


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
def test_names_suit_every_scheduler(component: str) -> None:
    app = make_app(component)
    for name in (app.name, app.roles[0].name):
        assert re.fullmatch(r"[a-z][a-z0-9_]{0,29}", name)
    with pytest.raises(ValueError, match="31 characters: schedulers take 1 to 30; give a shorter --name"):
        make_app(component, name="a" * 31)


@pytest.mark.parametrize("j", ["2", "0x2", "1:2x4", "1x2x3", "x", "-1x2", "axb"])
def test_wrong_shape_of_the_job_is_named(j: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"j is {j!r}: give nodes x processes per node")):
        make_app("train", j=j)


@pytest.mark.parametrize("component", COMPONENTS)
def test_torchx_finds_nothing_to_complain_about(component: str) -> None:
    assert validate(str(ROOT / "components" / f"{component}.py"), component) == []


def test_components_share_their_private_helpers_word_for_word() -> None:
    helpers = []
    for component in COMPONENTS:
        tree = ast.parse((ROOT / "components" / f"{component}.py").read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("_")]
        helpers.append([ast.unparse(function) for function in functions])
    assert helpers[0] == helpers[1] == helpers[2]


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
