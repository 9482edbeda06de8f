"""Train a retriever or a ranker on a prepared data set, or continue an interrupted run.

    python -m torchx_apps.train --preset demo --data.dataset DATASET --run RUN [--trainer.epochs 5 ...]
    python -m torchx_apps.train --run RUN

Under torchrun or the component, one process per rank; alone, one rank. A run folder that holds a run is continued from
its newest checkpoint, on any number of ranks. Asked to stop (SIGTERM, SIGUSR1) it saves and ends with exit code 75.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mufasa_rec.config import RunConfig, save_config
from mufasa_rec.data import paths
from mufasa_rec.data.batch import Batch
from mufasa_rec.data.ranking_loader import load_users
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv, distributed
from mufasa_rec.distributed.host_memory import keep_freed_memory
from mufasa_rec.distributed.sharding import sync_of
from mufasa_rec.planning.start_table import plan_lines
from mufasa_rec.training.checkpoint_manifest import Manifest
from mufasa_rec.training.optim import TrainOptimizer
from mufasa_rec.training.saver import Saver
from mufasa_rec.training.tracker import Tracker
from mufasa_rec.training.trainer import Surroundings, Trainer
from mufasa_rec.training.trainer_config import MONITORS
from torchx_apps import assembly, command_line, fusion_tuning, id_policies, run_folder, tables, tasks

logger = logging.getLogger(__name__)


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, train, and write the run folder."""
    try:
        folder, config = parse(argv)
        with distributed() as env:
            torch.set_num_threads(config.threads)
            if env.device.type == "cpu":
                keep_freed_memory()
            train(config, folder, env)
    except (ValueError, OSError) as error:
        raise SystemExit(f"train: {error}") from error


def make_parser() -> argparse.ArgumentParser:
    """The program's own options; the others are fields of the configuration."""
    parser = command_line.parser("train", __doc__)
    parser.add_argument("--run", metavar="FOLDER", help="run folder to write, or to continue the run that it holds")
    return parser


def parse(
    argv: Sequence[str] | None, saved: Callable[[str | None], str | None] = run_folder.saved_config
) -> tuple[Path, RunConfig]:
    """Read a command line.

    Args:
        argv: The command line.
        saved: Gives the configuration that a run folder holds.

    Returns:
        The run folder, and the run's configuration.

    Raises:
        ValueError: For a field or value that is refused, or a run folder that is missing or a URL.
    """

    def saved_of(given: argparse.Namespace) -> str | None:
        return saved(str(run_folder.local_folder(given.run))) if given.run else None

    options, config = command_line.parse(make_parser(), argv, saved_of)
    if not options.run:
        raise ValueError("--run: missing; give a folder for this run's configuration, logs and checkpoints.")
    return run_folder.local_folder(options.run), config


def train(config: RunConfig, folder: Path, env: DistributedEnv, watch: Callable[[Batch], None] | None = None) -> dict:
    """Train a run to its end, from its first step or from where it was interrupted.

    Args:
        config: The run.
        folder: Run folder.
        env: This process among its peers; the process group must be up.
        watch: Called with each batch of this rank once its step is done.

    Returns:
        The best validation metrics, steps and seconds.

    Raises:
        ValueError: When the folder holds another run, or the config does not fit the data set.
        Preempted: When the run was asked to stop and has been saved.
    """
    refuse_on(config, env)
    exchange = RankExchange()
    config, continues = run_folder.claim(folder, config, exchange)
    run_folder.refuse_unwritable(config.checkpoint.location(str(folder)), exchange)
    with run_folder.held(folder, exchange, patience_s=config.checkpoint.grace_s + 5.0):
        return _train(config, folder, continues, exchange, env, watch)


def refuse_on(config: RunConfig, env: DistributedEnv) -> None:
    """Refuse what this world's devices cannot do, before anything is written.

    Raises:
        ValueError: Names the field and what to choose instead.
    """
    config.optimizer.tables.refuse_on(env.device.type)
    config.tables.refuse_on(env.device.type)
    config.ids.refuse_on(env.device.type)
    config.sharding.refuse_on(env.device.type, env.world_size)


def _train(
    config: RunConfig,
    folder: Path,
    continues: bool,
    exchange: RankExchange,
    env: DistributedEnv,
    watch: Callable[[Batch], None] | None,
) -> dict:
    """Train in a folder that is this job's."""
    vocabulary = assembly.load_vocabulary(str(folder)) if continues else None
    layer = fusion_tuning.open_layer(config, folder, exchange)
    if layer is not None:
        config = run_folder.with_modalities(config, layer.widths)
    data = assembly.open_dataset(config, vocabulary)
    if layer is not None:
        fusion_tuning.check(config, layer, data)
    if config.uses_content:
        config = run_folder.with_modalities(config, data.catalog.stores)
    parts = tasks.build(config, data, env, exchange, layer)
    model = parts.model
    steps = config.trainer.epochs * parts.loader.order(0).num_steps
    steps = min(steps, config.trainer.max_steps or steps)
    dense = {name: p for name, p in in_backward_optimizer_filter(model.named_parameters()) if p.requires_grad}
    slow = fusion_tuning.slow_parameters(dense)
    optimizer = TrainOptimizer(dense, model.fused_optimizer, config.optimizer, steps, slow=slow)
    about = run_folder.describe_run(config, data, plan_lines(model.plan))  # type: ignore[arg-type]
    saver = Saver(config.checkpoint.location(str(folder)), config.checkpoint, about)
    newest = _newest(saver, data, continues)
    if newest is None:
        tables.start_warm(config, data, model, exchange)
    if env.is_main:
        data.catalog.vocabulary.save(folder)
        tables.save_row_ids(tables.row_ids(config, data), folder)
        if layer is not None:
            layer.save(folder / fusion_tuning.START_FILE)
        save_config(config, folder)  # last: from here on the folder holds a run
        _describe(data, dense, steps)
        id_policies.tell(known_ids(config, data), id_policies.policies(config, data.manifest))
    tracker = Tracker(
        folder if env.is_main else None,
        steps,
        first_step=newest.step if newest else 0,
        keep_bytes=newest.state["metrics_bytes"] if newest else 0,
    )
    trainer = Trainer(
        model,
        optimizer,
        parts.loader,
        parts.validate,
        config.trainer,
        Surroundings(
            tracker,
            exchange,
            saver,
            seed=config.seed,
            frozen=assembly.content_tables(data),
            watch=watch,
            prefetch=config.sharding.prefetch,
            sync=sync_of(model, config.sharding),
        ),
    )
    if newest:
        trainer.restore(newest)
        logger.info("continues from checkpoint %s, written by %d ranks", newest.name, newest.world_size)
    result = trainer.fit()
    if env.is_main:
        _report(result, folder, MONITORS[config.task])
    return result


def _newest(saver: Saver, data: assembly.OpenDataset, continues: bool) -> Manifest | None:
    """The checkpoint to continue from, None for a run that has none.

    Raises:
        ValueError: When a new run finds checkpoints, or the checkpoint was written on other data.
    """
    newest = saver.newest()
    if newest is None:
        if continues:
            logger.warning("the run was interrupted before its first checkpoint: it begins anew")
        return None
    if not continues:
        raise ValueError(
            f"checkpoint.folder={saver.location}: holds checkpoints of another run; choose a folder of its own."
        )
    run_folder.refuse_other_data(newest, data)
    return newest


def _report(result: dict, folder: Path, figures: Sequence[str]) -> None:
    with paths.atomic_write(folder / "summary.json") as path:
        path.write_text(json.dumps(result, indent=2))
    best = result["best"]
    found = ", ".join(f"{name.upper()} {best[name]:.4f}" for name in figures)
    logger.info(
        "done: %d steps in %.0f s; best validation %s at step %d; run folder %s",
        result["steps"], result["seconds"], found, best["step"], folder,
    )  # fmt: skip


def _describe(data: assembly.OpenDataset, dense: dict, steps: int) -> None:
    catalog = data.catalog
    logger.info(
        "data set %s: %d items, %d with an embedding of their own, modalities %s; "
        "%d data-parallel weights; %d steps at most",
        data.manifest.name, len(catalog), catalog.vocabulary.size - 1, sorted(catalog.stores) or "none",
        sum(p.numel() for p in dense.values()), steps,
    )  # fmt: skip


def known_ids(config: RunConfig, data: assembly.OpenDataset) -> dict[str, np.ndarray]:
    """Raw ids that the data set tells, by feature."""
    known = {"item": np.asarray(data.catalog.items.ids)}
    if config.task == "ranking":
        known["user"] = load_users(data.folder, data.split, 1).ids
    return known


if __name__ == "__main__":
    main()
