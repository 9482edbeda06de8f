"""The program `doctor`: planted faults are found and named, and what is healthy passes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from mufasa_rec.diagnosis.report import Report
from mufasa_rec.distributed.env import DistributedEnv
from tests.helpers import subjects
from tests.helpers.broken_data import copy_of, with_other_content, without_column
from tests.helpers.impressions import prepare_impressions
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import small_config
from torchx_apps import doctor, plan
from torchx_apps.doctor_config import ready as config_ready
from torchx_apps.doctor_factory import ready as factory_ready
from torchx_apps.doctor_room import Room

SOURCE = Path(subjects.__file__)


def diagnosed(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    """Exit code and what `--json` says."""
    code: Any = 0
    try:
        doctor.main([*argv, "--json"])
    except SystemExit as stop:
        code = stop.code
    return code, json.loads(capsys.readouterr().out)


def of_factory(capsys: pytest.CaptureFixture[str], name: str) -> tuple[int, dict[str, Any]]:
    return diagnosed(capsys, "--factory", f"tests.helpers.subjects:{name}")


def faults_of(said: dict[str, Any]) -> list[dict[str, Any]]:
    return [finding for finding in said["findings"] if finding["is_fault"]]


def line_of(marker: str) -> str:
    """Where a fault is planted."""
    lines = SOURCE.read_text().splitlines()
    (number,) = (i for i, text in enumerate(lines, start=1) if f"# planted: {marker}" in text)
    return f"tests/helpers/subjects.py:{number}"


@pytest.mark.parametrize(
    ("factory", "modules"),
    [
        ("spliced", ["dlrm.sparse_arch.embedding_bag_collection", "history"]),
        ("stock", ["model.sparse_arch.embedding_bag_collection"]),
    ],
)
def test_stock_dlrm_is_healthy_with_our_extractor_and_without(
    factory: str, modules: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = of_factory(capsys, factory)
    assert (code, said["healthy"], said["steps"], said["findings"]) == (0, True, 2, [])
    assert sorted(module["name"] for module in said["modules"]) == modules
    assert all(module["pipelined"] for module in said["modules"])
    assert {check["state"] for check in said["checks"].values()} == {"ok"}


@pytest.mark.parametrize(("factory", "marker"), [("permuting", "changed in forward"), ("rebuilding", "built")])
def test_line_that_changes_or_builds_the_features_in_forward_is_named(
    factory: str, marker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = of_factory(capsys, factory)
    (fault,) = faults_of(said)
    assert (code, fault["check"], fault["where"]) == (1, "pipeline", line_of(marker))
    assert fault["what"].startswith("history is not pipelined")
    assert "collate" in fault["remedy"]
    pipelined = {module["name"]: module["pipelined"] for module in said["modules"]}
    assert pipelined == {"history": False, "dlrm.sparse_arch.embedding_bag_collection": True}


def test_line_that_cannot_be_traced_is_named_and_the_other_checks_are_made(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = of_factory(capsys, "branching")
    pipeline, wait = faults_of(said)
    assert (code, said["steps"]) == (1, 2)
    assert (pipeline["check"], pipeline["where"]) == ("pipeline", line_of("an `if` on a tensor"))
    assert wait["where"].startswith(line_of("an `if` on a tensor"))


def test_parameters_without_gradient_are_named_with_the_line_that_makes_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, said = of_factory(capsys, "unused")
    assert (code, said["parameters_without_gradient"]) == (1, ["forgotten.weight", "forgotten.bias"])
    for fault, name in zip(faults_of(said), ("forgotten.weight", "forgotten.bias"), strict=True):
        assert fault["check"] == "gradients"
        assert fault["where"].startswith(f"{name} ({line_of('an unused parameter')} ")


def test_data_parallel_table_on_a_cpu_is_named_before_its_lookup_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = of_factory(capsys, "on_every_rank")
    (fault,) = faults_of(said)
    assert (code, said["steps"], fault["check"]) == (1, 0, "tables")
    assert fault["where"] == "table t_history of history (constraints['t_history'])"
    assert "data_parallel" in fault["what"]
    assert "'row_wise'" in fault["remedy"]


def test_lines_where_the_host_waits_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = of_factory(capsys, "waiting")
    faults = faults_of(said)
    assert (code, {fault["check"] for fault in faults}) == (1, {"host waits"})
    assert sorted(fault["where"].split(" `")[0] for fault in faults) == sorted(
        map(line_of, ("a read", "a mask", "a copy"))
    )


def test_line_at_which_a_step_fails_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = of_factory(capsys, "failing")
    (fault,) = faults_of(said)
    assert (code, fault["check"]) == (1, "step")
    assert "shapes cannot be multiplied" in fault["what"]
    assert re.fullmatch(r"tests/helpers/subjects.py:\d+", fault["where"])


def test_feature_of_a_table_that_the_batch_lacks_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = of_factory(capsys, "lacking")
    (fault,) = faults_of(said)
    assert (code, fault["check"]) == (1, "data")
    assert fault["where"] == "feature item of table t_item (dlrm.sparse_arch.embedding_bag_collection)"


@pytest.mark.parametrize("name", ["nothing", "no_subject"])
def test_factory_that_is_none_is_a_finding(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = of_factory(capsys, name)
    (fault,) = faults_of(said)
    assert (code, fault["check"], fault["where"]) == (1, "configuration", f"--factory tests.helpers.subjects:{name}")
    assert fault["remedy"].startswith(("give package.module:function", "return (model, make_batch)"))


def test_demo_retriever_is_healthy_and_its_meant_waits_are_listed(
    dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = diagnosed(capsys, "--preset", "demo", "--data.dataset", dataset)
    assert (code, said["healthy"], faults_of(said)) == (0, True, [])
    assert {finding["where"].split(":")[0] for finding in said["findings"]} == {
        "mufasa_rec/ops/sparse_attention/layout.py"
    }
    (memory,) = said["memory"]
    assert memory["dense"] == memory["gradients"] > 2**20
    assert memory["optimizer"] > 2 * memory["dense"]  # AdamW's two states, and the tables'
    assert memory["tables"] > 0


def test_demo_ranker_is_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = diagnosed(capsys, "--preset", "demo-ranking", "--data.dataset", prepare_impressions(tmp_path))
    assert (code, faults_of(said)) == (0, [])
    assert {check["state"] for check in said["checks"].values()} == {"ok"}


@pytest.mark.parametrize(
    "argv",
    [
        ("--preset", "short", "--items", "500", "--content", "title=10", "--data.max-history", "20"),
        ("--preset", "demo-ranking", "--items", "300", "--users", "50", "--content", "title=10"),
    ],
)
def test_catalog_that_is_only_described_is_examined_on_drawn_batches(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = diagnosed(capsys, *argv)
    assert (code, said["steps"], faults_of(said), said["notes"]) == (0, 2, [], [])


def test_missing_column_is_a_finding_that_names_column_and_file(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(dataset, tmp_path)
    without_column(folder, "device")
    code, said = diagnosed(capsys, "--preset", "demo", "--data.dataset", str(folder))
    (fault,) = faults_of(said)
    assert (code, fault["check"]) == (1, "data")
    assert re.fullmatch(rf"column device of {re.escape(str(folder))}/events/.*\.parquet", fault["where"])
    assert "column 'device' is missing" in fault["what"]


def test_content_store_of_another_width_is_a_finding_that_names_both(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(dataset, tmp_path)
    before = with_other_content(folder, "title", 12)
    code, said = diagnosed(capsys, "--preset", "demo", "--data.dataset", str(folder))
    (fault,) = faults_of(said)
    assert (code, fault["check"]) == (1, "data")
    assert fault["where"].startswith("content.title (")
    assert f"width 12, the model is made for {before}" in fault["what"]


@pytest.mark.parametrize(
    ("argv", "where", "what"),
    [
        (("--preset", "demo"), "data.dataset", "missing"),
        (("--preset", "demo", "--data.dataset", "nowhere"), "", "nowhere"),
        (("--preset", "deno"), "preset='deno'", "unknown"),
        (("--model.width", "x"), "command line", "--model.width"),
        (("--preset", "demo", "--items", "0"), "items=0", "choose 1 or more"),
    ],
)
def test_what_is_refused_at_the_start_is_a_finding_and_no_traceback(
    argv: tuple[str, ...], where: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = diagnosed(capsys, *argv)
    (fault,) = faults_of(said)
    assert code == 1
    assert where in fault["where"]
    assert what in fault["where"] + fault["what"]


def test_data_parallel_in_a_configuration_is_refused_by_its_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text("sharding: {types: [data_parallel]}")
    code, said = diagnosed(capsys, "--config", str(file))
    (fault,) = faults_of(said)
    assert (code, fault["check"], fault["where"]) == (1, "configuration", str(file))
    assert 'field "sharding.types"' in fault["what"]
    assert "data_parallel" in fault["what"]


def test_data_parallel_table_of_a_saved_plan_is_named_before_its_lookup_fails(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ("--preset", "demo", "--data.dataset", dataset)
    file = tmp_path / "plan.json"
    plan.main([*config, "--topology", "1xCPU", "--save", str(file)])
    capsys.readouterr()
    saved = json.loads(file.read_text())
    saved["modules"]["sparse.ids"]["t_item"]["sharding_type"] = "data_parallel"
    file.write_text(json.dumps(saved))
    code, said = diagnosed(capsys, *config, "--sharding.plan", str(file))
    (fault,) = faults_of(said)
    assert (code, said["steps"], fault["check"]) == (1, 0, "tables")
    assert fault["where"] == "table t_item of sparse.ids"
    assert "data_parallel" in fault["what"]


def test_page_names_each_check_and_each_fault(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--factory", "tests.helpers.subjects:permuting"])
    page = capsys.readouterr().out
    assert stop.value.code == 1
    assert "FAULT   pipeline" in page
    assert f"1. {line_of('changed in forward')}" in page
    assert "remedy: " in page
    assert page.rstrip().endswith("1 fault")


def examine(env: DistributedEnv, dataset: str, factory: str) -> dict[str, Any]:
    report = Report(subject="", device="cpu", world_size=env.world_size)
    room = Room(env, report)
    if factory:
        room.examine(lambda: factory_ready(f"tests.helpers.subjects:{factory}", room))
    else:
        room.examine(lambda: config_ready(small_config(dataset), None, room))
    return report.as_json()


@pytest.mark.parametrize("factory", ["", "permuting"])
def test_two_ranks_are_examined_together(factory: str, dataset: str) -> None:
    said = run_ranks(examine, 2, dataset, factory)
    assert said[0]["findings"] == said[1]["findings"]
    assert [one["steps"] for one in said] == [2, 2]
    assert [one["rank"] for one in said[0]["memory"]] == [0, 1]
    faults = faults_of(said[0])
    assert len(faults) == (1 if factory else 0)
    assert all(fault["ranks"] == (0, 1) for fault in faults)


def test_model_of_the_page_is_healthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "doctor.md").read_text()
    (tmp_path / "shop_model.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    code, said = diagnosed(capsys, "--factory", "shop_model:make")
    assert (code, faults_of(said), said["steps"]) == (0, [], 2)
    assert len(said["modules"]) == 2
