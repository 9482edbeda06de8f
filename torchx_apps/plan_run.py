"""A run planned on a topology from its configuration and `dataset.json`: what it holds, what a step asks of a rank."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch
from torch import nn

from mufasa_rec.config import RunConfig
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.modules.segmentation import BorderConfig
from mufasa_rec.modules.sparse_arch import SparseArch
from mufasa_rec.modules.sparse_layer import SparseAttentionConfig
from mufasa_rec.planning.load import StepLoad
from mufasa_rec.planning.planner import TableRules, plan_model
from mufasa_rec.planning.report import PlanReport
from mufasa_rec.planning.topology import Topology
from torchx_apps import extractors, id_policies, model_facts, plan_remedies, ranking

logger = logging.getLogger(__name__)
_FORWARD_AND_BACKWARD = 3  # the backward of a matrix product is two of them


def plan_run(
    config: RunConfig,
    manifest: DatasetManifest,
    topology: Topology,
    *,
    item_rows: int | None = None,
    remedies: bool = True,
) -> PlanReport:
    """Plan a run; needs neither its data nor its devices.

    Args:
        config: The run.
        manifest: `dataset.json` of its data set.
        topology: What it is to run on.
        item_rows: Rows of the items' table; when None, every item has one (`data.min_count` may leave fewer).
        remedies: Whether changes are planned again when it does not fit.

    Returns:
        The report; `fits`, `verdict` and `remedies` are its gist.

    Raises:
        ValueError: For what the topology's devices cannot do, and a data set that the run cannot be made of.

    Example:
        >>> from mufasa_rec.presets import preset
        >>> from torchx_apps.imagined import imagined_manifest
        >>> report = plan_run(preset("demo"), imagined_manifest(items=100_000), Topology.parse("8xH100"))
        >>> report.fits, report.tables[0].name
        (True, 'item')
    """
    config.ids.refuse_on(topology.compute_device)
    model, load = describe(config, manifest, topology, item_rows)
    sparse = model.sparse
    assert isinstance(sparse, SparseArch)
    frozen = {t.feature_names[0] for c in sparse.untrained for t in c.embedding_configs()}  # type: ignore[operator]
    rules = TableRules(
        sharding=config.sharding,
        tables=config.tables,
        optimizer=config.optimizer.tables,
        frozen=frozenset(frozen),
        content={f"content.{content.modality}": content for content in sparse.contents},
        row_bytes={
            name: policy.managed.row_bytes
            for name, policy in id_policies.policies(config, manifest).items()
            if policy.policy == "managed_collision"
        },
    )
    report = plan_model(model, topology, rules, load)
    if report.fits or not remedies:
        return report

    def again(changed: RunConfig, where: Topology) -> PlanReport:
        return plan_run(changed, manifest, where, item_rows=item_rows, remedies=False)

    return replace(report, remedies=plan_remedies.find(config, topology, again, has_content=bool(sparse.contents)))


def describe(
    config: RunConfig, manifest: DatasetManifest, topology: Topology, item_rows: int | None = None
) -> tuple[nn.Module, StepLoad]:
    """The model of a run on `meta`, and what a step asks of one rank of a topology."""
    facts = model_facts.of_manifest(config, manifest, item_rows)
    rows = max(math.ceil(config.data.batch_size / topology.world_size), 1)
    with torch.device("meta"):
        if config.task == "ranking":
            info = ranking.impressions_in(manifest)
            features = model_facts.ranking_features(
                facts, info, config.data.max_history + ranking.alignment(config) - 1
            )
            users = facts.ids["user"]
            rows_of_users = info.users + 1 if users.policy == "vocabulary" else users.rows
            tables = model_facts.ranker_rows(facts, info, rows_of_users)
            model: nn.Module = model_facts.make_ranker(config, features, tables, facts)
            shown = max(math.ceil(rows * info.impressions / max(info.requests, 1)), rows)
            return model, _load(config, facts, model, rows * features.max_history, rows, shown)
        borders = _stand_in(config.model.extractor.borders)
        model = model_facts.make_retriever(config, facts, borders)
    return model, _load(config, facts, model, rows * extractors.max_events(config), rows, 0)


def _stand_in(borders: BorderConfig) -> BorderConfig:
    """Thresholds in place of those that the data would give; nothing that is planned depends on them."""
    return replace(
        borders,
        gap_seconds=borders.gap_seconds or 3600.0,
        cosine=0.5 if borders.cosine is None else borders.cosine,
    )


def _load(
    config: RunConfig, facts: model_facts.ModelFacts, model: nn.Module, events: int, rows: int, shown: int
) -> StepLoad:
    """What a step asks of a rank whose histories are all as long as they may be.

    Args:
        config: The run.
        facts: What its data has.
        model: The model.
        events: Events of a rank's histories.
        rows: Rows (or requests) of a rank's batch.
        shown: Candidates of its requests, for ranking.
    """
    retrieval = config.task == "retrieval"
    candidates = _candidates(config, facts) if retrieval else shown
    world_rows = config.data.batch_size
    own = math.ceil(candidates * rows / world_rows) if retrieval else shown  # each rank brings its part of them
    items = min(events + own, facts.num_available) if config.data.dedup else events + own
    by_level = {"item": items, "content": items, "event": events, "user": rows, "context": shown}
    names = [*facts.rows, *(f"content.{name}" for name in facts.widths), *_request_tables(model, facts)]
    ids = {name: max(by_level[name.split(".")[0]], 1) for name in names}
    dense = model.dense
    assert isinstance(dense, nn.Module)
    size = config.model.extractor if retrieval else config.ranker.sal
    width = config.model.width if retrieval else config.ranker.width
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in dense.named_children()}
    flops = (
        2
        * _FORWARD_AND_BACKWARD
        * sum(count * {"tower": items, "over_arch": shown}.get(name, events) for name, count in parameters.items())
    )
    sparse = retrieval and config.model.attention == "sparse"
    history = extractors.max_events(config) if retrieval else config.data.max_history
    return StepLoad(
        ids=ids,
        dense_parameters=sum(parameters.values()),
        dense_flops=float(flops),
        batches_ahead=config.data.prefetch,
        objective_flops=2.0 * _FORWARD_AND_BACKWARD * events * candidates * width if retrieval else 0.0,
        attention_flops=attention_flops(size, width, events, history, sparse=sparse),
        activation_bytes=_activation_bytes(config, facts, size, width, events=events, items=items),
    )


def _request_tables(model: nn.Module, facts: model_facts.ModelFacts) -> list[str]:
    """Features of requests and their context: all that are neither of items, nor of events, nor content."""
    known = {*facts.rows, *(f"content.{name}" for name in facts.widths)}
    sparse = model.sparse
    assert isinstance(sparse, SparseArch)
    tables = [t.feature_names[0] for c in sparse.trained for t in c.embedding_configs()]  # type: ignore[operator]
    return [name for name in tables if name not in known]


def _candidates(config: RunConfig, facts: model_facts.ModelFacts) -> int:
    """Candidates of a global batch."""
    negatives = config.data.negatives
    if negatives.is_full(facts.num_available):
        return facts.num_available
    return negatives.num_uniform + negatives.num_inbatch


def attention_flops(size: SparseAttentionConfig, width: int, events: int, history: int, *, sparse: bool) -> float:
    """Floating-point operations of attention over histories, forward and backward.

    Args:
        size: The extractor.
        width: Model width.
        events: Events of all histories.
        history: Events of each.
        sparse: Whether attention is sparse: then a query reads a window, selected blocks, and tokens of blocks.

    Example:
        >>> size = SparseAttentionConfig(num_layers=1)
        >>> attention_flops(size, 64, 1000, 500, sparse=False) == 12 * 1000 * 250.5 * 64
        True
    """
    keys = (history + 1) / 2  # of a causal query, on average
    if sparse:
        pattern = size.pattern.resolve(history)
        window = min(pattern.window or history, history)
        read = window * pattern.window_branch
        read += min(pattern.num_selected * pattern.selection_block, keys) * pattern.selected_branch
        read += history / pattern.token_stride / 2 * (pattern.block_branch or pattern.num_scored > 0)
        keys = min(read, 3 * keys)
    return 2.0 * 2 * _FORWARD_AND_BACKWARD * size.num_layers * events * keys * width


def _activation_bytes(
    config: RunConfig,
    facts: model_facts.ModelFacts,
    size: SparseAttentionConfig,
    width: int,
    *,
    events: int,
    items: int,
) -> int:
    """Activations that a backward needs, in fp32 (half of it under bf16): a count of the tensors that are kept.

    Per event and layer the projections (8 widths with the gates), the attended values, two norms, two sums and a gated
    block of three hidden widths; per item its vectors by table and modality and the tower's; per candidate a score.
    """
    number = 2 if config.trainer.bf16 else 4
    layer = (14 + 3 * size.ffn_ratio) * width
    layers = size.num_layers * 2 * width + layer if size.recompute else size.num_layers * layer
    tables = width * sum(name.split(".")[0] == "item" for name in facts.rows)
    content = sum(facts.widths.values()) + 2 * width * len(facts.widths)
    kept = events * (layers + 6 * width) + items * (tables + content + 6 * width)
    if config.task == "retrieval":
        # The softmax takes scores in chunks; the candidates of all ranks are gathered.
        kept += 2 * _candidates(config, facts) * width
    return int(number * kept)
