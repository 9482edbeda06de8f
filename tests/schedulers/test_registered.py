"""A user who has only installed the package: which schedulers, machines and components TorchX finds then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torchx.schedulers import DEFAULT_SCHEDULER_MODULES
from torchx.specs import named_resources

from mufasa_rec.launch.component_files import get_file_contents
from tests.helpers.installed import ROOT, torchx
from tests.helpers.slurm_cluster import free_ports
from tests.test_components import PROGRAM

COMPONENTS = ("prepare", "train", "fuse", "evaluate", "export", "doctor", "plan", "benchmark", "chain")


def entry_points(site: Path, group: str) -> dict[str, str]:
    (file,) = site.glob("mufasa_rec-*.dist-info/entry_points.txt")
    section = file.read_text().split(f"[{group}]\n")[1].split("\n\n")[0]
    return dict(line.split(" = ") for line in section.strip().splitlines())


def test_no_scheduler_of_torchx_is_lost(site: Path) -> None:
    named = entry_points(site, "torchx.schedulers")
    own = {f"{module}:create_scheduler" for module in DEFAULT_SCHEDULER_MODULES.values()}
    assert own <= set(named.values())
    assert DEFAULT_SCHEDULER_MODULES.keys() <= named.keys()
    assert named["slurm"] == "mufasa_rec.launch.schedulers.slurm:create_scheduler"
    assert named["kubernetes"] == "mufasa_rec.launch.schedulers.kubernetes:create_scheduler"
    assert named["torchx_slurm"] == "torchx.schedulers.slurm_scheduler:create_scheduler"


@pytest.mark.parametrize("scheduler", ["slurm", "torchx_slurm", "local_cwd", "lsf"])
def test_torchx_explains_the_options_of_a_scheduler(site: Path, tmp_path: Path, scheduler: str) -> None:
    shown = torchx(site, "runopts", scheduler, cwd=tmp_path).stdout
    assert shown.startswith(f"{scheduler}:")
    assert ("reservation=RESERVATION" in shown) == (scheduler == "slurm")


@pytest.mark.parametrize(("name", "gpus"), [("h100x8", 8), ("h200x8", 8), ("a100x8", 8), ("cpu", 0)])
def test_common_machines_have_names(site: Path, tmp_path: Path, name: str, gpus: int) -> None:
    options = ("--dryrun", "-cfg", "preflight=False")
    shown = torchx(site, "run", "-s", "slurm", *options, "components.train:train", "-h", name, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert (f"--gpus-per-node={gpus}" in shown.stdout) == (gpus > 0)


def test_machines_that_torchx_names_stay() -> None:
    assert named_resources["aws_p4d.24xlarge"].gpu == 8


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("form", ["components/{0}.py:{0}", "components.{0}:{0}"])
def test_component_is_found_by_path_and_by_module_from_an_empty_folder(
    site: Path, tmp_path: Path, component: str, form: str
) -> None:
    shown = torchx(site, "run", "-s", "local_cwd", form.format(component), "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert f"torchx_apps.{component}" in shown.stdout


def test_component_of_the_working_folder_comes_first(site: Path, tmp_path: Path) -> None:
    (tmp_path / "components").mkdir()
    source = (ROOT / "components" / "train.py").read_text()
    (tmp_path / "components" / "train.py").write_text(source.replace("Train a model", "Train my own model"))
    shown = torchx(site, "run", "-s", "local_cwd", "components/train.py:train", "--help", cwd=tmp_path)
    assert "Train my own model" in shown.stdout


def test_component_that_is_not_there_is_said_so(site: Path, tmp_path: Path) -> None:
    shown = torchx(site, "run", "-s", "local_cwd", "components.trian:train", cwd=tmp_path)
    assert shown.returncode == 1
    assert "components.trian does not exist" in shown.stderr


@pytest.mark.parametrize("name", ["components/../train.py", "components.a.b", "other/train.py", "components"])
def test_nothing_else_is_taken_for_a_component(name: str) -> None:
    assert get_file_contents(name) is None


def test_file_that_torchx_brings_along_is_still_found() -> None:
    assert get_file_contents("torchx/version.py")


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("j", ["1x1", "1x2", "2x1"])
def test_component_runs_on_this_machine_in_every_shape(site: Path, tmp_path: Path, component: str, j: str) -> None:
    """Two nodes here are two launchers that meet; the program behind them writes what it was told."""
    source = (ROOT / "components" / f"{component}.py").read_text().replace(f"torchx_apps.{component}", "tiny")
    (tmp_path / "job.py").write_text(source)
    (tmp_path / "tiny.py").write_text(PROGRAM)
    options = [
        "-cfg",
        f"log_dir={tmp_path / 'logs'}",
        f"job.py:{component}",
        "-j",
        j,
        "--rdzv_port",
        str(free_ports(1)[0]),
    ]
    ran = torchx(site, "run", "-s", "local_cwd", *options, "--", "--run", "a b", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    told = [json.loads(file.read_text()) for file in tmp_path.glob("rank-*")]
    assert [one["argv"] for one in told] == [["--run", "a b"]] * (1 if j == "1x1" else 2)
