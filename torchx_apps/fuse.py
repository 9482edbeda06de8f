"""Train the multimodal fusion layer on a prepared data set, and write a fused vector for every item of the catalog.

    python -m torchx_apps.fuse [--preset NAME] --dataset DATASET --run RUN [--trainer.epochs 50 ...]
    python -m torchx_apps.fuse --run RUN
    python -m torchx_apps.fuse --run RUN --items new.parquet

The vectors are a new generation of the content modality `fused` (--output), which dataset.json pins. A run folder that
holds a run is continued. With --items a trained layer encodes new items only, and appends them to that generation.
Asked to stop (SIGTERM, SIGUSR1) it saves and ends with exit code 75.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.distributed.elastic.multiprocessing.errors import record

from mufasa_rec.data import paths
from mufasa_rec.distributed.agreement import on_all_ranks
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv, distributed
from mufasa_rec.training.checkpoint_manifest import Manifest
from mufasa_rec.training.fusion_file import LAYER_FILE, TrainedLayer
from mufasa_rec.training.fusion_items import FusionItems
from mufasa_rec.training.fusion_trainer import FusionSurroundings, FusionTrainer, NoTables
from mufasa_rec.training.optim import TrainOptimizer
from mufasa_rec.training.preemption import Preempted, StopAgreed, StopSignals
from mufasa_rec.training.saver import Saver
from mufasa_rec.training.tracker import Tracker
from mufasa_rec.versions import code_versions
from torchx_apps import fuse_assembly as assembly
from torchx_apps import fuse_catalog, fuse_report, run_folder
from torchx_apps.assembly import OpenDataset
from torchx_apps.fuse_config import PRESETS, FuseConfig, load_config, preset, refuse_changes, save_config

logger = logging.getLogger(__name__)


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line; train and encode the catalog, or encode new items."""
    try:
        options, config = parse(argv)
        folder = run_folder.local_folder(options.run)
        with distributed() as env:
            torch.set_num_threads(config.threads)
            if options.items:
                fuse_catalog.encode_new(config, folder, options.items, RankExchange())
            else:
                fuse(config, folder, env)
    except (ValueError, OSError) as error:
        raise SystemExit(f"fuse: {error}") from error


def make_parser() -> argparse.ArgumentParser:
    """The program's own options; the others are fields of the configuration."""
    parser = argparse.ArgumentParser(prog="fuse", description=__doc__, allow_abbrev=False, add_help=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-h", "--help", action="store_true", help="show this, and every field of the configuration")
    parser.add_argument("--run", metavar="FOLDER", help="run folder to write, or to continue the run that it holds")
    parser.add_argument("--preset", metavar="NAME", help=f"start from one of {', '.join(PRESETS)}")
    parser.add_argument("--config", metavar="FILE", help="a YAML file with some or all fields of the configuration")
    parser.add_argument("--items", metavar="FILE", help="Parquet file of new items to encode with a trained run")
    return parser


def parse(
    argv: Sequence[str] | None, saved: Callable[[str | None], str | None] = run_folder.saved_config
) -> tuple[argparse.Namespace, FuseConfig]:
    """Read a command line: own options, and the remaining ones as fields of the configuration.

    Args:
        argv: The command line.
        saved: Gives the configuration that a run folder holds.

    Raises:
        ValueError: For a field or value that is refused, a missing run folder, or `--items` without a trained run.
    """
    parser = make_parser()
    options, rest = parser.parse_known_args(argv)
    if options.help:
        parser.print_help()
        print()
        rest = ["--help"]
    file = saved(str(run_folder.local_folder(options.run))) if options.run else None
    if options.items and not file:
        raise ValueError(f"--run {options.run}: holds no trained run; --items needs one.")
    named = options.preset or options.config
    config = load_config(file) if file and not named else preset(options.preset or "default")
    if options.config:
        config = load_config(options.config, config)
    config = tyro.cli(FuseConfig, args=rest, default=config, prog="fuse", config=(tyro.conf.FlagConversionOff,))
    if not options.run:
        raise ValueError("--run: missing; give a folder for this run's configuration, logs and checkpoints.")
    return options, config


def fuse(
    config: FuseConfig, folder: Path, env: DistributedEnv, watch: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Train a run to its end, from its first step or from where it was interrupted, and encode the catalog; collective.

    Args:
        config: The run.
        folder: Run folder, which all ranks share.
        env: This process among its peers; the process group must be up.
        watch: Called with the number of steps after each.

    Returns:
        The best validation, steps, seconds, and the generation that was written.

    Raises:
        ValueError: When the folder holds another run, or the config does not fit the data set.
        Preempted: When the run was asked to stop and has been saved.
    """
    exchange = RankExchange()
    continues = _claim(folder, config, exchange)
    run_folder.refuse_unwritable(config.checkpoint.location(str(folder)), exchange)
    with run_folder.held(folder, exchange, patience_s=config.checkpoint.grace_s + 5.0):
        return _fuse(config, folder, continues, exchange, env, watch)


def _claim(folder: Path, config: FuseConfig, exchange: RankExchange) -> bool:
    """Make the run folder, or find that it holds this run already; refused on all ranks alike."""

    def check() -> bool:
        file = run_folder.saved_config(str(folder))
        if exchange.rank == 0:
            if file:
                refuse_changes(load_config(file), config, folder)
            folder.mkdir(parents=True, exist_ok=True)
        return file is not None

    return exchange.objects(on_all_ranks(exchange, check))[0]


def _fuse(
    config: FuseConfig,
    folder: Path,
    continues: bool,
    exchange: RankExchange,
    env: DistributedEnv,
    watch: Callable[[int], None] | None,
) -> dict[str, Any]:
    """Train and encode in a folder that is this job's."""
    data = on_all_ranks(exchange, lambda: assembly.open_dataset(config))
    genres = on_all_ranks(exchange, lambda: assembly.genres_of(config, data))
    if not continues and env.is_main:
        assembly.forget_behaviour(folder)
    vectors, pairs = assembly.learn_behaviour(config, data, folder, exchange)
    items = FusionItems(data.catalog, genres, vectors, pairs, env.device)
    feed, threshold = assembly.make_feed(config, items, env)
    module = assembly.build_fuser(config, items, threshold, exchange)
    steps = config.trainer.epochs * feed.steps_per_epoch
    steps = min(steps, config.trainer.max_steps or steps)
    optimizer = TrainOptimizer(dict(module.named_parameters()), NoTables(), config.optimizer, steps)
    saver = Saver(config.checkpoint.location(str(folder)), config.checkpoint, _about(config, data, module))
    newest = _newest(saver, data, continues)
    if env.is_main:
        save_config(config, folder)  # from here on the folder holds a run
    tracker = Tracker(
        folder if env.is_main else None,
        steps,
        first_step=newest.step if newest else 0,
        keep_bytes=newest.state["metrics_bytes"] if newest else 0,
    )
    around = FusionSurroundings(tracker, exchange, saver, seed=config.seed, watch=watch)
    trainer = FusionTrainer(module, assembly.wrap(module, env), optimizer, feed, config.trainer, around)
    if newest:
        trainer.restore(newest)
        logger.info("continues from checkpoint %s, written by %d ranks", newest.name, newest.world_size)
    result = trainer.fit()
    result["threshold"] = threshold
    with StopSignals(config.checkpoint.grace_s) as signals:
        try:
            where = (config, folder, items, module, data, exchange)
            result["fused"] = fuse_catalog.encode_all(*where, lambda: signals.received is not None)
        except StopAgreed:
            logger.info("asked to stop while encoding: what is encoded is kept; start the same command again")
            raise Preempted from None
        if env.is_main:
            _finish(config, folder, items, module, data, result)
    return result


def _finish(
    config: FuseConfig,
    folder: Path,
    items: FusionItems,
    module: assembly.Fuser,
    data: OpenDataset,
    result: dict[str, Any],
) -> None:
    """Write the layer, the report, and last the summary, by which others see that the run has ended."""
    layer = TrainedLayer.of(module.layer, assembly.genre_name(config, data), run_folder.dataset_facts(data))
    layer.save(folder / LAYER_FILE)
    if config.report:
        fuse_report.write_report(config, folder, items, module.layer, data, result)
    with paths.atomic_write(folder / "summary.json") as path:
        path.write_text(json.dumps(result, indent=2))
    logger.info("done: best loss on held-out items %.4f at step %d; run folder %s",
                result["best"]["loss"], result["best"]["step"], folder)  # fmt: skip


def _about(config: FuseConfig, data: OpenDataset, module: assembly.Fuser) -> dict[str, Any]:
    """What every checkpoint says about its run."""
    layer = module.layer
    return {
        "config": dataclasses.asdict(config),
        "layer": {"widths": layer.widths, "num_genres": layer.num_genres, "genre": assembly.genre_name(config, data)},
        "dataset": run_folder.dataset_facts(data),
        "versions": code_versions(),
    }


def _newest(saver: Saver, data: OpenDataset, continues: bool) -> Manifest | None:
    """The checkpoint to continue from, None for a run that has none.

    Raises:
        ValueError: When a new run finds checkpoints, or the checkpoint was written on other data.
    """
    newest = saver.newest()
    if newest is None:
        return None
    if not continues:
        raise ValueError(f"checkpoint.folder={saver.location}: holds checkpoints of another run; choose another.")
    run_folder.refuse_other_data(newest, data)
    return newest


if __name__ == "__main__":
    main()
