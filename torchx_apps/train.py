"""Train a retriever on a prepared data set.

    python -m torchx_apps.train --preset demo --data.dataset DATASET --run RUN [--trainer.epochs 5 ...]

Under torchrun or the component, one process per rank; alone, one rank.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mufasa_rec.config import CONFIG_FILE, RunConfig, save_config
from mufasa_rec.data import paths
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv, distributed
from mufasa_rec.training.optim import TrainOptimizer
from mufasa_rec.training.tracker import Tracker
from mufasa_rec.training.trainer import Trainer
from torchx_apps import assembly, command_line

logger = logging.getLogger(__name__)


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, train, and write the run folder."""
    parser = command_line.parser("train", __doc__)
    parser.add_argument("--run", metavar="FOLDER", help="run folder to write; must not hold another run")
    try:
        options, config = command_line.parse(parser, argv)
        if not options.run:
            raise ValueError("--run: missing; give a folder for this run's configuration, logs and checkpoint.")
        folder = assembly.run_folder(options.run)
        with distributed() as env:
            torch.set_num_threads(config.threads)
            train(config, folder, env)
    except (ValueError, OSError) as error:
        raise SystemExit(f"train: {error}") from error


def train(config: RunConfig, folder: Path, env: DistributedEnv) -> dict:
    """Train a run from its first step to its end.

    Args:
        config: The run.
        folder: Run folder.
        env: This process among its peers; the process group must be up.

    Returns:
        The best validation metrics, steps and seconds.

    Raises:
        ValueError: When the folder holds another run, or the config does not fit the data set.
    """
    config.optimizer.tables.refuse_on(env.device)
    exchange = RankExchange()
    data = assembly.open_dataset(config)
    _claim(folder, env, exchange)
    train_loader = assembly.make_loader(config, data, "train", env)
    evaluator = assembly.make_evaluator(config, data, "validation", env, exchange)
    retriever = assembly.build_retriever(config, data, exchange)
    model = assembly.shard_retriever(config, data, retriever, env.device)
    scorer = assembly.make_scorer(config, data, model, env, exchange)
    steps = config.trainer.epochs * train_loader.order(0).num_steps
    steps = min(steps, config.trainer.max_steps or steps)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    optimizer = TrainOptimizer(dense, model.fused_optimizer, config.optimizer, steps)
    if env.is_main:
        save_config(config, folder)
        data.catalog.vocabulary.save(folder)
        _describe(data, dense, steps)
    torch.manual_seed(config.seed + 1 + env.rank)  # dropout differs between ranks
    trainer = Trainer(
        model,
        optimizer,
        train_loader,
        lambda: evaluator.metrics(scorer),
        config.trainer,
        tracker=Tracker(folder if env.is_main else None, steps),
        exchange=exchange,
        checkpoint=folder / "checkpoint",
        frozen=assembly.content_tables(data),
        manifest={"split": data.catalog.split, "dataset": data.manifest.name, "world_size": env.world_size},
    )
    result = trainer.fit()
    if env.is_main:
        with paths.atomic_write(folder / "summary.json") as path:
            path.write_text(json.dumps(result, indent=2))
        best = result["best"]
        logger.info(
            "done: %d steps in %.0f s; best validation HR@10 %.4f, NDCG@10 %.4f at step %d; run folder %s",
            result["steps"], result["seconds"], best["hr@10"], best["ndcg@10"], best["step"], folder,
        )  # fmt: skip
    return result


def _claim(folder: Path, env: DistributedEnv, exchange: RankExchange) -> None:
    """Refuse a folder that holds something else, on all ranks alike, before anything is written."""
    problem = None
    if env.is_main and (folder / CONFIG_FILE).exists():
        problem = f"--run {folder}: already holds a run; choose another folder, or remove that one."
    elif env.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"--run {folder}: cannot be made ({error.strerror}); choose a folder that this user may write."
    problem = exchange.objects(problem)[0]
    if problem:
        raise ValueError(problem)


def _describe(data: assembly.OpenDataset, dense: dict, steps: int) -> None:
    catalog = data.catalog
    logger.info(
        "data set %s: %d items, %d with an embedding of their own, modalities %s; "
        "%d data-parallel weights; %d steps at most",
        data.manifest.name, len(catalog), catalog.vocabulary.size - 1, sorted(catalog.stores) or "none",
        sum(p.numel() for p in dense.values()), steps,
    )  # fmt: skip


if __name__ == "__main__":
    main()
