"""One field chooses the extractor; histories are cut at its blocks; a data set without times or content is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mufasa_rec.config import RunConfig, load_config, save_config
from mufasa_rec.data.loader import Loader
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.models.retriever import RetrieverConfig
from mufasa_rec.modules.full_attention import FullAttentionExtractor
from mufasa_rec.modules.history import InterestExtractor
from mufasa_rec.modules.interest import SparseInterestExtractor
from mufasa_rec.modules.next_item import LocalExchange
from mufasa_rec.modules.sparse_layer import SparseAttentionConfig
from mufasa_rec.ops.sparse_attention.pattern import SparsePattern
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, small_config, train_in
from torchx_apps import assembly, command_line, extractors

ALONE = DistributedEnv(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def sparse_config(dataset: str, **pattern: Any) -> RunConfig:
    """The small run with sparse attention over blocks of four events."""
    config = small_config(dataset)
    sizes = replace(SparsePattern(window=4, block=4, num_selected=3), **pattern)
    extractor = replace(config.model.extractor, pattern=sizes)
    return replace(config, model=replace(config.model, attention="sparse", extractor=extractor))


def loader_of(config: RunConfig, part: str = "train") -> Loader:
    return assembly.make_loader(config, assembly.open_dataset(config), part, ALONE)


def extractor_of(config: RunConfig) -> InterestExtractor:
    retriever = assembly.build_retriever(config, assembly.open_dataset(config), LocalExchange())  # type: ignore[arg-type]
    return retriever.dense.extractor


@pytest.mark.parametrize("part", ["train", "test"])
def test_histories_are_cut_at_whole_blocks_with_sparse_attention_only(dataset: str, part: str) -> None:
    full, sparse = loader_of(small_config(dataset), part), loader_of(sparse_config(dataset), part)
    assert (full.align, sparse.align) == (1, 4)
    cut = 0
    for plain, aligned in zip(full.batches(0), sparse.batches(0), strict=True):
        more = torch.diff(aligned.offsets) - torch.diff(plain.offsets)
        assert torch.equal(plain.user, aligned.user)
        assert (aligned.start_position % 4 == 0).all()
        assert torch.equal(aligned.start_position, plain.start_position // 4 * 4)
        assert torch.equal(more, plain.start_position - aligned.start_position)
        assert torch.equal(plain.target_row, aligned.target_row)
        assert int(torch.diff(aligned.offsets).max()) <= extractors.max_events(sparse_config(dataset)) == 15
        cut += int((more > 0).sum())
    assert cut
    assert full.state(1, 2) == sparse.state(1, 2)


@pytest.mark.parametrize(
    ("change", "align"),
    [({}, 4), ({"max_blocks": 2}, 8), ({"segmentation": "timegap"}, 1), ({"stride": 2, "selected_block": 8}, 8)],
)
def test_cut_follows_the_resolved_pattern(dataset: str, change: dict[str, Any], align: int) -> None:
    assert extractors.alignment(sparse_config(dataset, **change)) == align


def test_one_field_chooses_the_extractor_and_survives_file_and_command_line(dataset: str, tmp_path: Path) -> None:
    config = sparse_config(dataset)
    for attention, kind in (("sparse", SparseInterestExtractor), ("full", FullAttentionExtractor)):
        flags = ["--model.attention", attention, "--model.extractor.pattern.window", "7"]
        save_config(config, tmp_path)
        parser = command_line.parser("test", None)
        _, changed = command_line.parse(parser, ["--config", str(tmp_path / "config.yaml"), *flags], lambda _: None)
        assert changed.model.extractor.pattern.window == 7
        save_config(changed, tmp_path)
        assert load_config(tmp_path / "config.yaml") == changed
        assert isinstance(extractor_of(changed), kind)
    (tmp_path / "config.yaml").write_text("model: {extractor: {pattern: {blok: 8}}}")
    with pytest.raises(ValueError, match=r"model\.extractor\.pattern\.blok is not a field; did you mean .*block"):
        load_config(tmp_path / "config.yaml")


def test_thresholds_of_blocks_come_from_the_training_split(dataset: str) -> None:
    for segmentation, names in (("timegap", ["gap_seconds"]), ("coherence", ["cosine", "modality"])):
        config = sparse_config(dataset, segmentation=segmentation)
        extractor = extractor_of(config)
        assert isinstance(extractor, SparseInterestExtractor)
        for name in names:
            assert getattr(extractor.config.borders, name) is not None
        assert ("timestamp" in loader_of(config).columns) or segmentation == "coherence"


def test_data_set_without_what_borders_need_is_refused_by_name(dataset: str) -> None:
    data = assembly.open_dataset(small_config(dataset))
    timeless = replace(data.manifest, time=replace(data.manifest.time, absolute=False))
    timegap, coherence = (sparse_config(dataset, segmentation=s).model for s in ("timegap", "coherence"))
    with pytest.raises(ValueError, match=r"segmentation='timegap': data set .* has no absolute times"):
        extractors.check_data(timegap, timeless, ["title"])
    with pytest.raises(ValueError, match=r"segmentation='coherence': data set .* has no content"):
        extractors.check_data(coherence, data.manifest, [])
    extractors.check_data(replace(timegap, attention="full"), timeless, [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention": "linear"}, "model.attention='linear': choose one of"),
        (
            {"attention": "sparse", "extractor": SparseAttentionConfig(positions="learned")},
            "model.extractor.positions='learned'",
        ),
    ],
)
def test_attention_that_cannot_be_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrieverConfig(**values)


@pytest.mark.parametrize("segmentation", ["fixed", "coherence"])
def test_one_rank_equals_two_ranks_with_sparse_attention(dataset: str, tmp_path: Path, segmentation: str) -> None:
    config = sparse_config(dataset, segmentation=segmentation)
    config = replace(config, trainer=replace(config.trainer, max_steps=12))
    for world in (1, 2):
        run_ranks(train_in, world, config, tmp_path / str(world))
    one, two = (metrics_of(tmp_path / str(world), "train") for world in (1, 2))
    assert [a["loss"] for a in one] == pytest.approx([a["loss"] for a in two], rel=1e-4)
    assert one[-1]["loss"] < one[0]["loss"]
