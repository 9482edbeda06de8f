"""Whole runs by each id policy: any number of ranks, interrupted, evaluated, exported."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mufasa_rec.config import RunConfig, load_config
from mufasa_rec.data.batch import Batch
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.id_policy import IdPolicyConfig, IdsConfig, ManagedIdsConfig
from mufasa_rec.training.accounting import train_line
from mufasa_rec.training.preemption import Preempted
from mufasa_rec.training.saver import CheckpointConfig
from mufasa_rec.training.warm_start_plan import WarmStartConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, small_config, train_in, weights_of
from torchx_apps import id_policies
from torchx_apps.evaluate import evaluate
from torchx_apps.export import export
from torchx_apps.train import train

POLICIES = {
    "hash": IdPolicyConfig(policy="hash", rows=50, salts=2),
    "managed_collision": IdPolicyConfig(
        policy="managed_collision",
        rows=64,
        managed=ManagedIdsConfig(buckets=4, interval=4, min_count=2, fallback_share=0.25),
    ),
}
STEPS = 14


def config_of(dataset: str, policy: str, **trainer: Any) -> RunConfig:
    """A run whose events are all looked up, so that counts do not depend on how rows are dealt to ranks."""
    config = small_config(dataset, softmax="sampled", **{"max_steps": STEPS, "log_every": 7, **trainer})
    return replace(
        config,
        ids=IdsConfig(item=POLICIES[policy]),
        data=replace(config.data, dedup=False),
        checkpoint=CheckpointConfig(every_minutes=None, keep_last=50),
    )


def stopped_at(env: DistributedEnv, config: RunConfig, folder: Path, step: int | None) -> bool:
    """Train until SIGTERM at a step of this attempt, or to the end; returns whether it was stopped."""
    steps = 0

    def watch(batch: Batch) -> None:
        nonlocal steps
        steps += 1
        if steps == step and env.is_main:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(config, folder, env, watch)
    except Preempted:
        return True
    return False


def ids_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What says which ids have which rows."""
    return {name: value for name, value in weights.items() if "_managed_collision_modules" in name}


@pytest.fixture(scope="module")
def alone(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of one rank by each policy."""
    folders = {policy: tmp_path_factory.mktemp(policy) / "run" for policy in POLICIES}
    for policy, folder in folders.items():
        run_ranks(train_in, 1, config_of(dataset, policy), folder)
    return folders


@pytest.mark.parametrize("policy", POLICIES)
def test_run_on_two_ranks_learns_what_one_rank_learns(dataset: str, tmp_path: Path, alone: Any, policy: str) -> None:
    run_ranks(train_in, 2, config_of(dataset, policy), tmp_path / "run")
    one, two = (metrics_of(folder, "train") for folder in (alone[policy], tmp_path / "run"))
    np.testing.assert_allclose([a["loss"] for a in one], [a["loss"] for a in two], rtol=1e-4)
    assert one[-1]["loss"] < 0.9 * one[0]["loss"]
    names = [name for name in one[0] if name.startswith("item_")]
    assert [[line[name] for name in names] for line in one] == [[line[name] for name in names] for line in two]
    assert bool(names) == (policy == "managed_collision")
    first, second = weights_of(alone[policy]), weights_of(tmp_path / "run")
    assert all(torch.equal(value, second[name]) for name, value in ids_of(first).items())


def test_figures_of_intervals_add_up_to_what_is_in_the_table(alone: Any) -> None:
    lines = metrics_of(alone["managed_collision"], "train")
    last = ids_of(weights_of(alone["managed_collision"]))
    (counts,) = (value for name, value in last.items() if name.endswith("_mch_counts"))
    admitted, evicted = (sum(line[f"item_{name}"] for line in lines) for name in ("admitted", "evicted"))
    assert admitted - evicted == int((counts > 0).sum()) > 0
    for line in lines:
        assert line["item_hit_share"] + line["item_fallback_share"] == pytest.approx(1.0, abs=0.1)
        assert line["item_lookups"] > line["item_counted"] > 0
    assert lines[-1]["item_hit_share"] > lines[0]["item_hit_share"]


def test_interrupted_run_ends_as_if_it_had_not_been(dataset: str, tmp_path: Path, alone: Any) -> None:
    """It stops within an interval, so that what was seen since the last round must survive."""
    config, folder = config_of(dataset, "managed_collision"), tmp_path / "run"
    assert run_ranks(stopped_at, 1, config, folder, 6) == [True]
    assert run_ranks(stopped_at, 1, config, folder, None) == [False]
    assert_same(folder, alone["managed_collision"], exact=True)


def test_run_goes_on_on_other_numbers_of_ranks(dataset: str, tmp_path: Path, alone: Any) -> None:
    config, folder = config_of(dataset, "managed_collision"), tmp_path / "run"
    for world, step, stops in ((2, 5, True), (1, 5, True), (2, None, False)):
        assert run_ranks(stopped_at, world, config, folder, step) == [stops] * world
    assert_same(folder, alone["managed_collision"], exact=False)


def assert_same(run: Path, undisturbed: Path, *, exact: bool) -> None:
    """The same ids in the same rows; the same weights, or close ones."""
    mine, wanted = weights_of(run), weights_of(undisturbed)
    assert {name for name in mine if name.startswith("model.")} == {n for n in wanted if n.startswith("model.")}
    assert ids_of(mine)
    for name, value in wanted.items():
        if not name.startswith("model."):
            continue
        if exact or name in ids_of(wanted):
            assert torch.equal(mine[name], value), name
        else:
            torch.testing.assert_close(mine[name], value, rtol=1e-2, atol=1e-4)
    losses = [[line["loss"] for line in metrics_of(folder, "train")] for folder in (run, undisturbed)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0 if exact else 1e-4)


def evaluated(env: DistributedEnv, run: Path, output: Path) -> list[dict[str, Any]]:
    return evaluate({"model": str(run)}, output, "validation", env)


def test_a_run_of_one_rank_is_evaluated_on_two(tmp_path: Path, alone: Any) -> None:
    for policy, run in alone.items():
        rows, _ = run_ranks(evaluated, 2, run, tmp_path / policy)
        (model,) = (row for row in rows if row["row"] == "model")
        (validated,) = metrics_of(run, "validation")
        assert model["hr@10"] == pytest.approx(validated["hr@10"], abs=1e-6)


def test_policy_of_the_data_set_holds_where_the_configuration_names_none(dataset: str) -> None:
    manifest = DatasetManifest.load(dataset)
    hashed = replace(
        manifest, features={**manifest.features, "item": replace(manifest.features["item"], id_policy="hash")}
    )
    config = replace(small_config(dataset), ids=IdsConfig(item=IdPolicyConfig(rows=77)))
    found = [id_policies.policies(config, one)["item"] for one in (manifest, hashed)]
    assert [one.policy for one in found] == ["vocabulary", "hash"]
    assert found[1].rows == 77
    own = replace(config, ids=IdsConfig(item=POLICIES["managed_collision"]))
    assert id_policies.policies(own, hashed)["item"].policy == "managed_collision"


def test_a_retriever_has_no_policy_for_users(dataset: str) -> None:
    with pytest.raises(ValueError, match=r"ids.user.policy='hash': a retriever has no table of users"):
        replace(small_config(dataset), ids=IdsConfig(user=IdPolicyConfig(policy="hash")))


def refusal(env: DistributedEnv, config: RunConfig, folder: Path) -> str:
    try:
        train(config, folder, env)
    except ValueError as error:
        return str(error)
    return ""


def exported(env: DistributedEnv, run: str, output: str, tables: tuple[str, ...] | None) -> str:
    try:
        export(run, output, RankExchange(), tables=tables)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("policy", POLICIES)
def test_tables_without_names_are_neither_imported_nor_exported(
    dataset: str, tmp_path: Path, alone: Any, policy: str
) -> None:
    run = str(alone[policy])
    (told,) = run_ranks(exported, 1, run, str(tmp_path / "one"), ("item",))
    assert "--tables item: no item; there are " in told
    assert run_ranks(exported, 1, run, str(tmp_path / "all"), None) == [""]
    config = replace(config_of(dataset, policy), warm_start=WarmStartConfig(source=run, tables=("item",)))
    (told,) = run_ranks(refusal, 1, config, tmp_path / "run")
    assert f"table 'item' cannot be filled by id, its policy is {policy!r} (ids.item.policy)" in told


def test_examples_of_the_documentation_are_configurations(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "ids.md").read_text().split("```yaml\n")[1].split("```")[0]
    found = []
    for number, part in enumerate(text.split("---\n")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(part)
        found.append(load_config(str(file)).ids.item)
    assert [one.policy for one in found] == ["vocabulary", "hash", "managed_collision"]
    assert found[2].managed.min_count == 2


def test_accounting_line_says_what_became_of_the_ids(alone: Any) -> None:
    line = metrics_of(alone["managed_collision"], "train")[-1]
    told = train_line(line["step"], line)
    assert f"item hit {line['item_hit_share']:.1%}, fallback {line['item_fallback_share']:.1%}, admitted" in told
    assert "item" not in train_line(1, metrics_of(alone["hash"], "train")[-1])
