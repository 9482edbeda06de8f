"""Fused vectors into the content store: of the whole catalog after training, of new items with a trained run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch

from mufasa_rec.data import paths
from mufasa_rec.data.coding import Vocabulary
from mufasa_rec.data.content import ContentManifest, ContentStore, append_content, coverage
from mufasa_rec.data.schema import ContentRef, DatasetManifest
from mufasa_rec.data.vectors import ID_NAMES, as_int64
from mufasa_rec.distributed.agreement import on_all_ranks
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.models.fuser import Fuser
from mufasa_rec.modules.fusion import FusionLayer, ItemContent
from mufasa_rec.training.checkpoint import check_intact, find_checkpoint, load_tensors
from mufasa_rec.training.checkpoint_manifest import Manifest
from mufasa_rec.training.checkpoint_tensors import CheckpointTensors
from mufasa_rec.training.fusion_encode import ENCODER, Target, encode_catalog, model_id
from mufasa_rec.training.fusion_items import FusionItems
from torchx_apps.assembly import OpenDataset
from torchx_apps.fuse_assembly import split_facts
from torchx_apps.fuse_config import FuseConfig

pc: Any = pyarrow.compute  # made at import: a type checker cannot see its functions
logger = logging.getLogger(__name__)


def encode_all(
    config: FuseConfig,
    folder: Path,
    items: FusionItems,
    module: Fuser,
    data: OpenDataset,
    exchange: RankExchange,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """Encode the catalog with the best weights of a run and pin the generation in `dataset.json`; collective.

    Items without any content are left out, which is how the store says "missing".

    Returns:
        Modality, generation, checksum, model id and number of items.

    Raises:
        StopAgreed: When `stop` said so on some rank; the same command goes on where it stopped.
    """
    best = exchange.objects(_best(config, folder) if exchange.rank == 0 else None)[0]
    check_intact(best, exchange)
    load_tensors(best, {"model": module.state_dict()})
    rows = items.has_content()
    target = Target(
        dataset=data.folder,
        name=config.output,
        model=model_id(module.layer),
        split=split_facts(data.split),
        work=folder,
        chunk=config.chunk,
    )
    ids = np.ascontiguousarray(np.asarray(data.catalog.items.ids)[rows])
    manifest = encode_catalog(module.layer, items.content, rows, ids, target, exchange, stop=stop)
    on_all_ranks(exchange, lambda: _pin(data, manifest) if exchange.rank == 0 else None)
    if exchange.rank == 0:
        missing = len(data.catalog) - len(rows)
        logger.info(
            "content modality %s, generation %s: %d items, width %d, model %s; %d items have no content at all",
            manifest.name, manifest.generation, manifest.rows, manifest.width, target.model, missing,
        )  # fmt: skip
    facts = {"modality": manifest.name, "generation": manifest.generation, "checksum": manifest.checksum}
    return {**facts, "model": target.model, "items": len(rows)}


def _best(config: FuseConfig, folder: Path) -> str:
    return find_checkpoint(config.checkpoint.location(str(folder)), "best")


def _pin(data: OpenDataset, manifest: ContentManifest) -> None:
    """Have `dataset.json` name a generation's present state."""
    now = DatasetManifest.load(data.folder)
    store = ContentStore.open(data.folder, manifest.name, manifest.generation)
    shares = coverage(store, np.asarray(data.catalog.items.ids), data.catalog.counts)
    ref = _ref(manifest, shares)
    if now.content.get(manifest.name) != ref:
        replace(now, content={**now.content, manifest.name: ref}).save(data.folder)


def _ref(manifest: ContentManifest, shares: dict[str, float]) -> ContentRef:
    return ContentRef(
        generation=manifest.generation,
        width=manifest.width,
        dtype="float16",
        rows=manifest.rows,
        checksum=manifest.checksum,
        coverage=shares,
    )


def encode_new(config: FuseConfig, folder: Path, file: str, exchange: RankExchange) -> None:
    """Encode the items of a file with a trained run and append them to its generation; collective, rank 0 works.

    Args:
        config: Configuration of the run.
        folder: Run folder.
        file: Parquet: an id column, a list column for each modality (null where an item lacks it), and the genre.
        exchange: Reaches the other ranks.

    Raises:
        ValueError: When the run has not encoded its catalog, the file does not fit it, or an item is there already.
    """
    best = exchange.objects(on_all_ranks(exchange, lambda: _best(config, folder) if exchange.rank == 0 else None))[0]
    trained = check_intact(best, exchange)
    on_all_ranks(exchange, lambda: _append(config, folder, file, best, trained) if exchange.rank == 0 else None)


def _append(config: FuseConfig, folder: Path, file: str, best: str, trained: Manifest) -> None:
    summary = folder / "summary.json"
    if not summary.exists():
        raise ValueError(f"--run {folder}: has not encoded its catalog yet; run it to its end first.")
    fused = json.loads(summary.read_text())["fused"]
    layer = _load_layer(config, best, trained)
    genre = trained.about["layer"]["genre"]
    codes = {} if genre is None else _codes(config, genre)
    ids, vectors = [], []
    for chunk_ids, content in _read(file, layer, genre, codes, config.chunk):
        with torch.no_grad():
            z = layer(content).z.half().numpy()
        has = torch.stack(list(content.present.values())).any(0).numpy()
        ids.append(chunk_ids[has])
        vectors.append(z[has])
    manifest = append_content(
        config.dataset,
        fused["modality"],
        np.concatenate(ids),
        np.concatenate(vectors),
        encoder=ENCODER,
        encoder_version=model_id(layer),
        generation=fused["generation"],
    )
    now = DatasetManifest.load(config.dataset)
    pinned = now.content.get(manifest.name)
    if pinned is not None and pinned.generation == manifest.generation:
        ref = _ref(manifest, pinned.coverage)
        replace(now, content={**now.content, manifest.name: ref}).save(config.dataset)
    logger.info("%d new items appended to %s/%s", sum(map(len, ids)), manifest.name, manifest.generation)


def _load_layer(config: FuseConfig, best: str, trained: Manifest) -> FusionLayer:
    """The trained layer, in evaluation mode."""
    about = trained.about["layer"]
    layer = FusionLayer(config.layer, about["widths"], about["num_genres"])
    saved = CheckpointTensors(best)
    layer.load_state_dict({name: saved.tensor(f"model.layer.{name}") for name in layer.state_dict()})
    return layer.eval()


def _codes(config: FuseConfig, genre: str) -> dict[Any, int]:
    values = Vocabulary.load(config.dataset, genre).values
    return {value: place + 1 for place, value in enumerate(values)}


def _read(
    file: str, layer: FusionLayer, genre: str | None, codes: dict[Any, int], chunk: int
) -> Iterator[tuple[np.ndarray, ItemContent]]:
    """Ids and contents of a file of new items, chunk by chunk."""
    parquet = pq.ParquetFile(paths.local_copy(file))
    names = parquet.schema_arrow.names
    id_name = next((name for name in ID_NAMES if name in names), None)
    wanted = [*layer.widths, *([genre] if genre else [])]
    missing = [name for name in wanted if name not in names]
    if id_name is None or missing:
        raise ValueError(
            f"--items {file}: lacks {', '.join(missing) or 'an id column'}; it needs one of {', '.join(ID_NAMES)}, and "
            f"{', '.join(wanted)} (null where an item lacks one)."
        )
    for batch in parquet.iter_batches(chunk, columns=[id_name, *wanted]):
        ids = as_int64(np.asarray(batch.column(id_name).to_pylist()), file)
        content, present = {}, {}
        for name, width in layer.widths.items():
            vectors, has = _matrix(batch.column(name), width, f"--items {file}: {name}")
            content[name], present[name] = torch.from_numpy(vectors), torch.from_numpy(has)
        found = _genres(batch.column(genre).to_pylist() if genre else [None] * len(ids), codes)
        lengths = torch.tensor([len(one) for one in found], dtype=torch.int64)
        genres = torch.tensor([code for one in found for code in one], dtype=torch.int64)
        yield ids, ItemContent(content=content, present=present, genres=genres, genre_lengths=lengths)


def _matrix(column: pa.Array, width: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors `[n, P]` of a list column, zeros where null, and where it is not, `[n]`."""
    has = ~column.is_null().to_numpy(zero_copy_only=False)
    lists = column.drop_null()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    lengths = np.unique(pc.list_value_length(lists).to_numpy(zero_copy_only=False)) if len(lists) else [width]
    if list(lengths) != [width] or not np.isfinite(values).all():
        raise ValueError(f"{where}: lists of {list(lengths)} values; give {width} finite ones, or null.")
    vectors = np.zeros((len(column), width), np.float32)
    vectors[has] = values.reshape(-1, width)
    return vectors, has


def _genres(values: list[Any], codes: dict[Any, int]) -> list[list[int]]:
    """Codes of each item's genres; those that the layer has not seen are left out."""
    lists = [value if isinstance(value, list) else [value] for value in values]
    return [sorted({codes[one] for one in given if one in codes}) for given in lists]
