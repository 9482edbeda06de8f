"""The program `plan`: what it prints, its exit codes, and plans that training uses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mufasa_rec.config import RunConfig, load_config, save_config
from mufasa_rec.data.schema import DATASET_FILE
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.sharding_config import ShardingConfig, TableSharding
from mufasa_rec.distributed.table_config import TablesConfig, TableSettings
from mufasa_rec.distributed.table_rows import local_shards
from mufasa_rec.planning.topology import Topology
from mufasa_rec.presets import PRESETS, preset
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import small_config, train_in, weights_of
from torchx_apps import assembly, command_line, plan
from torchx_apps.evaluate import evaluate
from torchx_apps.plan_remedies import changes


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit code and output."""
    code: Any = 0
    try:
        plan.main(list(argv))
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().out


def test_billion_items_fit_a_thousand_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = planned(capsys, "--preset", "billion", "--topology", "128x8xH100", "--json")
    said = json.loads(out)
    assert (code, said["fits"], said["topology"]["world_size"]) == (0, True, 1024)
    tables = {table["name"]: table for table in said["tables"]}
    assert tables["item"]["rows"] == 4_000_000_001
    assert tables["item"]["bytes"] == 4_000_000_001 * (128 * 4 + 4)
    assert tables["content.fused"]["bytes"] == 4_000_000_000 * 128 * 2
    for name in ("rows", "dim", "dtype", "sharding_type", "compute_kernel", "bytes"):
        assert all(name in table for table in tables.values())
    assert len(said["ranks"]) == 1024
    assert all(rank["hbm_bytes"] > 2e9 and rank["ddr_bytes"] == 0 for rank in said["ranks"])
    assert said["step_time_ms"] > 0
    assert said["bottleneck"] in said["step_parts"]
    assert said["remedies"] == []


def test_billion_items_do_not_fit_a_node_and_remedies_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = planned(capsys, "--preset", "billion", "--topology", "8xH100", "--json")
    said = json.loads(out)
    assert (code, said["fits"]) == (2, False)
    assert any(remedy["fits"] for remedy in said["remedies"])
    code, out = planned(capsys, "--preset", "billion", "--topology", "8xH100")
    assert code == 2
    assert "does not fit" in out


@pytest.mark.parametrize("name", [name for name in PRESETS if preset(name).task == "retrieval"])
def test_options_of_a_remedy_make_the_configuration_that_was_planned(name: str) -> None:
    config = preset(name)
    for change in changes(config, Topology.parse("2xH100")):
        parser = command_line.parser("plan", None)
        _, parsed = command_line.parse(parser, ["--preset", name, *change.options.split()], lambda _: None)
        assert parsed == change.config, change.words


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--topology", "8xB9"], "128x8xH100"),
        (["--topology", "8xH100"], "--items"),
        ([], "--topology: missing"),
        (["--topology", "8xH100", "--items", "10", "--hardware", "hbm_byte=1"], "did you mean hbm_bytes"),
        (["--topology", "8xH100", "--items", "10", "--hardware", "hbm_bytes"], "NAME=NUMBER"),
        (["--topology", "8xH100", "--items", "0"], "items=0"),
        (["--topology", "1xH100", "--items", "1e9", "--save", "plan.json"], "no plan to save"),
    ],
)
def test_what_cannot_be_planned_ends_with_the_remedy(
    capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    code, _ = planned(capsys, *argv)
    assert said in str(code)


def test_unknown_option_does_not_look_like_a_plan_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, "--preset", "demo", "--topology", "2xCPU", "--no-such-option", "1")[0] == 1


def test_data_set_and_its_manifest_are_planned_with_their_own_tables(
    dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--topology", "2xCPU", "--data.num-readers", "8", "--data.batch-size", "16", "--json")
    rows: dict[str, dict[str, int]] = {}
    sources = {"folder": ("--data.dataset", dataset), "file": ("--manifest", f"{dataset}/{DATASET_FILE}")}
    for name, source in sources.items():
        code, out = planned(capsys, *source, *small)
        assert code == 0
        rows[name] = {table["name"]: table["rows"] for table in json.loads(out)["tables"]}
    assert rows["folder"].keys() == rows["file"].keys() >= {"item", "content.title"}
    assert rows["file"].pop("item") == 91  # every item has a row
    assert rows["folder"].pop("item") <= 91  # those with few events share one
    assert rows["folder"] == rows["file"]


def shards(env: DistributedEnv, config: RunConfig) -> dict[str, list[tuple[int, int]]]:
    data = assembly.open_dataset(config)
    model = assembly.shard_retriever(config, data, assembly.build_retriever(config, data, RankExchange()), env.device)
    return {name: [(part.first, len(part.weight)) for part in parts] for name, parts in local_shards(model).items()}


@pytest.fixture
def saved(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[RunConfig, Path]:
    """A run, and its plan for two ranks."""
    config = small_config(dataset, max_steps=3)
    save_config(config, tmp_path)
    file = tmp_path / "plan.json"
    code, _ = planned(capsys, "--config", str(tmp_path / "config.yaml"), "--topology", "2xCPU", "--save", str(file))
    assert code == 0
    return replace(config, sharding=ShardingConfig(plan=str(file))), file


def test_training_uses_the_saved_plan(saved: tuple[RunConfig, Path]) -> None:
    config, file = saved
    document = json.loads(file.read_text())
    table = document["modules"]["sparse.ids"]["t_item"]
    assert table["sharding_type"] == "row_wise"
    rows, columns = table["shards"][0][2] + table["shards"][1][2], table["shards"][0][3]
    table["sharding_type"], table["shards"] = "table_wise", [[0, 0, rows, columns, 1]]
    file.write_text(json.dumps(document))
    found = run_ranks(shards, 2, config)
    assert "t_item" not in found[0]
    assert found[1]["t_item"] == [(0, rows)]
    assert found[0]["t_content_title"] != found[1]["t_content_title"]


def test_run_by_a_saved_plan_is_the_run_without(saved: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, _ = saved
    for name, one in (("with", config), ("without", replace(config, sharding=ShardingConfig()))):
        run_ranks(train_in, 2, one, tmp_path / name)
    whole = weights_of(tmp_path / "without")
    assert all(tensor.equal(whole[name]) for name, tensor in weights_of(tmp_path / "with").items())


def judged(env: DistributedEnv, run: Path, output: Path) -> None:
    evaluate({"model": str(run)}, output, "test", env)


def test_run_by_a_saved_plan_is_judged_on_any_number_of_ranks(saved: tuple[RunConfig, Path], tmp_path: Path) -> None:
    run_ranks(train_in, 2, saved[0], tmp_path / "run")
    for world in (1, 2):
        run_ranks(judged, world, tmp_path / "run", tmp_path / f"on {world}")
    found = []
    for world in (1, 2):
        rows = json.loads((tmp_path / f"on {world}" / "summary.json").read_text())
        found.append({row["row"]: (row["hr@10"], row["ndcg@10"]) for row in rows}["model"])
    assert found[0] == pytest.approx(found[1])


def refused(env: DistributedEnv, config: RunConfig) -> str:
    try:
        shards(env, config)
    except ValueError as error:
        return str(error)
    return ""


def test_plan_of_another_world_model_or_device_is_refused(saved: tuple[RunConfig, Path]) -> None:
    config, file = saved
    assert "world_size 2, this run has 1" in run_ranks(refused, 1, config)[0]
    wider = replace(config, model=replace(config.model, width=32))
    assert "sparse.ids.t_item of " in run_ranks(refused, 2, wider)[0]
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "device_type": "cuda"}))
    assert "device_type cuda, this run has cpu" in run_ranks(refused, 2, config)[0]
    file.write_text("{}")
    assert "damaged" in run_ranks(refused, 2, config)[0]


def test_settings_of_tables_come_back_from_a_file_and_from_the_command_line(tmp_path: Path) -> None:
    config = RunConfig(
        tables=TablesConfig(weight_dtype="fp16", each={"item.brand": TableSettings(frozen=True, learning_rate=0.1)}),
        sharding=ShardingConfig(
            types=("row_wise", "column_wise"), tables={"content.title": TableSharding(kernels=("fused_uvm",))}
        ),
    )
    save_config(config, tmp_path)
    assert load_config(str(tmp_path / "config.yaml")) == config
    argv = [
        "--config",
        str(tmp_path / "config.yaml"),
        "--tables.weight-dtype",
        "bf16",
        "--sharding.kernels",
        "fused_uvm",
    ]
    _, parsed = command_line.parse(command_line.parser("plan", None), argv, lambda _: None)
    assert parsed.tables == replace(config.tables, weight_dtype="bf16")
    assert parsed.sharding == replace(config.sharding, kernels=("fused_uvm",))
