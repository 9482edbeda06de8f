"""Evaluate trained runs: retrievers by full ranking, beside popularity and a first-order Markov chain.

    python -m torchx_apps.evaluate --run RUN [--compare NAME=RUN,NAME=RUN] --output FOLDER

Writes evaluation.json, summary.json, report.html, and the rank of every user's target in ranks.safetensors. With
several runs they must use one data set and one split. Rankers: see `torchx_apps.evaluate_ranking`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch.distributed.elastic.multiprocessing.errors import record

from mufasa_rec.config import CONFIG_FILE, RunConfig, load_config
from mufasa_rec.data import paths
from mufasa_rec.data.content import ContentStore
from mufasa_rec.data.item_columns import ItemColumn
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv, distributed
from mufasa_rec.evaluation.baselines import MarkovScorer, PopularityScorer
from mufasa_rec.evaluation.ranks import Ranked
from mufasa_rec.evaluation.report import write_report
from mufasa_rec.evaluation.summary import histograms, paired, summarise
from mufasa_rec.models.baselines import Transitions, count_transitions
from torchx_apps import assembly, fusion_tuning, judged_run
from torchx_apps.evaluate_ranking import evaluate_ranking

logger = logging.getLogger(__name__)
MODEL = "model"
ORACLE_FILE = "oracle.safetensors"
RANKS_FILE = "ranks.safetensors"


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and evaluate."""
    options = make_parser().parse_args(argv)
    try:
        runs = runs_of(options)
        with distributed() as env:
            evaluate(
                runs, Path(options.output), options.part, env, dataset=options.dataset, checkpoint=options.checkpoint
            )
    except (ValueError, OSError) as error:
        raise SystemExit(f"evaluate: {error}") from error


def make_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(
        prog="evaluate", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="FOLDER", help="run folder of the model")
    parser.add_argument("--name", default=MODEL, help=f"name of its row ({MODEL})")
    parser.add_argument("--compare", default="", metavar="NAME=FOLDER,...", help="more runs, each a row of its own")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the results are written")
    parser.add_argument("--part", default="test", choices=("validation", "test"), help="part of the split (test)")
    parser.add_argument("--dataset", metavar="FOLDER", help="where the data set lies now, if it was moved")
    parser.add_argument(
        "--checkpoint", default="best", metavar="WHICH", help="of --run: best (by validation), newest, or a step (best)"
    )
    return parser


def runs_of(options: argparse.Namespace) -> dict[str, str]:
    """Run folders by row name, the model first.

    Raises:
        ValueError: For an entry of `--compare` that is no NAME=FOLDER.
    """
    return _runs(options.run, options.compare, options.name)


def _runs(run: str, compare: str, name: str = MODEL) -> dict[str, str]:
    """Run folders by row name, the model first."""
    runs = {name: run}
    for pair in filter(None, compare.split(",")):
        name, sign, folder = pair.partition("=")
        if not sign or not name or not folder or name in runs:
            raise ValueError(f"--compare {pair!r}: write NAME=FOLDER with a name of its own.")
        runs[name] = folder
    return runs


def evaluate(
    runs: dict[str, str],
    output: Path,
    part: str,
    env: DistributedEnv,
    *,
    dataset: str | None = None,
    checkpoint: str = "best",
) -> list[dict[str, Any]]:
    """Rank every run, the baselines and, for generated data, the oracle.

    Args:
        runs: Run folders by row name; the first decides data set and split.
        output: Where results are written.
        part: `validation` or `test`.
        env: This process among its peers; the process group must be up.
        dataset: Where the data set lies now; None for where the runs read it.
        checkpoint: Which checkpoint of the first run: `best`, `newest` or a step; of the others it is the best.

    Returns:
        The rows of `summary.json`.
    """
    exchange = RankExchange()
    configs = {name: _config(folder, dataset, env) for name, folder in runs.items()}
    tasks = {config.task for config in configs.values()}
    if len(tasks) > 1:
        raise ValueError(f"--compare: runs of different tasks ({', '.join(sorted(tasks))}); compare those of one.")
    torch.set_num_threads(next(iter(configs.values())).threads)
    if tasks == {"ranking"}:
        return evaluate_ranking(runs, configs, output, part, env, checkpoint=checkpoint)
    if MODEL not in runs:
        raise ValueError(f"--name {next(iter(runs))}: rows of rankers have names; a retriever's is {MODEL!r}.")
    first = configs[MODEL]
    data = assembly.open_dataset(first, assembly.load_vocabulary(runs[MODEL]))
    evaluator = assembly.make_evaluator(first, data, part, env, exchange)
    ranked: dict[str, Ranked] = {}
    seconds: dict[str, float] = {}
    begin = time.perf_counter()
    ranked["popularity"] = evaluator.rank(PopularityScorer(data.catalog.counts))
    seconds["popularity"], begin = time.perf_counter() - begin, time.perf_counter()
    ranked["markov"] = evaluator.rank(MarkovScorer(_transitions(first, data, env, exchange), data.catalog.counts))
    seconds["markov"] = time.perf_counter() - begin
    for name, folder in runs.items():
        which = checkpoint if name == MODEL else "best"
        ranked[name], seconds[name] = _rank_run(folder, which, configs[name], data, part, env, exchange)
    oracle = _oracle(data, part, ranked[MODEL], evaluator.mask_seen)
    if oracle is not None:
        ranked["oracle"], seconds["oracle"] = oracle, 0.0
    if not env.is_main:
        return []
    stores = _content_rows(data)
    rows = [summarise(name, found, data.catalog, stores, seconds[name]) for name, found in ranked.items()]
    evaluation = {
        "dataset": _facts(data, ranked[MODEL], evaluator.mask_seen, part),
        "rows": rows,
        "pairs": [paired(f"{MODEL} - {name}", ranked[MODEL], r) for name, r in ranked.items() if name != MODEL],
        "histograms": histograms(ranked[MODEL], data.catalog.counts),
        "runs": {name: str(folder) for name, folder in runs.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    _write_ranks(ranked, data.catalog.counts, output)
    return _write(evaluation, runs, output)


def _config(folder: str, dataset: str | None, env: DistributedEnv) -> RunConfig:
    """The configuration of a run, its data set where it lies now, its tables spread over the ranks that there are."""
    if not paths.exists(paths.join(folder, CONFIG_FILE)):
        raise ValueError(
            f"{folder}: holds no run ({CONFIG_FILE} is missing); give the folder that `train --run` wrote."
        )
    config = load_config(paths.join(folder, CONFIG_FILE))
    config = replace(config, sharding=config.sharding.for_judging(env.device.type))
    if dataset is None:
        return config
    return replace(config, data=replace(config.data, dataset=dataset))


def _rank_run(
    folder: str,
    which: str,
    config: RunConfig,
    first: assembly.OpenDataset,
    part: str,
    env: DistributedEnv,
    exchange: RankExchange,
) -> tuple[Ranked, float]:
    """Load a run's checkpoint on this world's ranks and rank with it; also returns training plus ranking seconds."""
    data = judged_run.open_beside(folder, config, first)
    begin = time.perf_counter()
    retriever = assembly.build_retriever(config, data, exchange, fusion_tuning.of_run(config, folder))
    model = assembly.shard_retriever(config, data, retriever, env.device)
    judged_run.load_weights(folder, which, config, data, model, exchange)
    evaluator = assembly.make_evaluator(config, data, part, env, exchange)
    ranked = evaluator.rank(assembly.make_scorer(config, data, model, env, exchange))
    trained = Path(folder) / "summary.json"
    before = json.loads(trained.read_text())["seconds"] if trained.exists() else 0.0
    return ranked, before + time.perf_counter() - begin


def _transitions(
    config: RunConfig, data: assembly.OpenDataset, env: DistributedEnv, exchange: RankExchange
) -> Transitions:
    """Count the training transitions, each rank its readers' rows, and add them up."""
    whole = replace(config, data=replace(config.data, max_history=1 << 30))  # every transition, not the model's window
    loader = assembly.make_loader(whole, data, "train", env)
    return Transitions.merge(exchange.objects(count_transitions(loader.batches(0))))


def _oracle(data: assembly.OpenDataset, part: str, like: Ranked, mask_seen: bool) -> Ranked | None:
    """The generator's own ranks of the test targets, where the data set was generated."""
    file = paths.join(data.folder, ORACLE_FILE)
    if part != "test" or not mask_seen or data.split.id != "leave_one_out" or not paths.exists(file):
        return None
    found = load_file(paths.local_copy(file))
    place = np.searchsorted(found["user"], like.user)
    top = data.catalog.rows_of(found["top"].reshape(-1)).reshape(found["top"].shape)
    return Ranked(like.user, like.target_row, found["rank"][place], top[place], like.history_length)


def _content_rows(data: assembly.OpenDataset) -> dict[str, ItemColumn]:
    """Content row of every item for all modalities of the data set, those that the model does not use included."""
    ids = np.asarray(data.catalog.items.ids)
    return {
        name: ItemColumn(ids, ContentStore.open(data.folder, name, ref.generation, checksum=ref.checksum).rows_of)
        for name, ref in data.manifest.content.items()
    }


def _facts(data: assembly.OpenDataset, ranked: Ranked, mask_seen: bool, part: str) -> dict[str, Any]:
    manifest = data.manifest
    return {
        "name": manifest.name,
        "users": len(ranked.user),
        "items": len(data.catalog),
        "events": sum(partition.events for partition in manifest.partitions),
        "split": data.split.id,
        "split_hash": data.split.hash,
        "part": part,
        "repeat_share": manifest.repeat_share,
        "mask_seen": mask_seen,
        "cold_items": int((data.catalog.counts == 0).sum()),
    }


def _write_ranks(ranked: dict[str, Ranked], counts: np.ndarray, output: Path) -> None:
    """Write what paired comparisons with other evaluations of the split need: users, targets, and each row's ranks."""
    model = ranked[MODEL]
    columns = {name: getattr(model, name) for name in ("user", "target_row", "history_length")}
    columns["target_events"] = counts[model.target_row]
    columns["cold_items"] = np.array([(counts == 0).sum()])
    for name, found in ranked.items():
        columns |= {f"rank.{name}": found.rank, f"cold_rank.{name}": found.cold_rank}
    with paths.atomic_write(output / RANKS_FILE) as path:
        save_file({name: np.ascontiguousarray(values) for name, values in columns.items()}, path)


def _write(evaluation: dict[str, Any], runs: dict[str, str], output: Path) -> list[dict[str, Any]]:
    """Write evaluation.json, summary.json and report.html."""
    summary = [{key: value for key, value in row.items() if key != "slices"} for row in evaluation["rows"]]
    for name, content in (("evaluation.json", evaluation), ("summary.json", summary)):
        with paths.atomic_write(output / name) as path:
            path.write_text(json.dumps(content, indent=2))
    write_report(output / "evaluation.json", runs, output / "report.html")
    for row in summary:
        logger.info(
            "%-24s HR@10 %.4f · NDCG@10 %.4f [%.4f, %.4f] · MRR %.4f",
            row["row"], row["hr@10"], row["ndcg@10"], row["ndcg@10_low"], row["ndcg@10_high"], row["mrr"],
        )  # fmt: skip
    return summary


if __name__ == "__main__":
    main()
