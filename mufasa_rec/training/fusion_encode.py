"""Fused vectors of the whole catalog: encoded block by block on all ranks, written as a generation of the store.

A block is a file of its own, and one that is there is not encoded again: an interrupted encoding goes on where it
stopped, on any number of ranks. Memory holds one chunk, whatever the size of the catalog.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mufasa_rec.data import paths
from mufasa_rec.data.content import ContentManifest, ContentStore, generations, write_content
from mufasa_rec.distributed.agreement import on_all_ranks
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.modules.fusion import FusionLayer, ItemContent
from mufasa_rec.training.preemption import StopAgreed

logger = logging.getLogger(__name__)
ENCODER = "mufasa-fusion"
_BLOCK = 1 << 16
_LOG_EVERY_S = 10.0
Contents = Callable[[np.ndarray], ItemContent]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where fused vectors go.

    Attributes:
        dataset: Folder or URL of the data set.
        name: Name of the new modality.
        model: Id of the layer's weights, `model_id`.
        split: Id and hash of the split that the layer was trained on.
        work: Local folder for blocks, which all ranks share.
        chunk: Items of one forward pass.
    """

    dataset: str
    name: str
    model: str
    split: dict[str, str]
    work: Path
    chunk: int = 1024


def model_id(layer: FusionLayer) -> str:
    """What identifies a trained layer: a hash of the names, shapes and values of its weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(layer.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode(layer: FusionLayer, contents: Contents, rows: np.ndarray, chunk: int) -> np.ndarray:
    """Encode items with a layer in evaluation mode.

    Args:
        layer: The layer.
        contents: Gives the contents of rows.
        rows: Item rows, `[n]`.
        chunk: Items of one forward pass.

    Returns:
        Fused vectors, not of unit length, float16 `[n, E]`.
    """
    found = np.empty((len(rows), layer.config.width), np.float16)
    for start in range(0, len(rows), chunk):
        found[start : start + chunk] = layer(contents(rows[start : start + chunk])).z.half().cpu().numpy()
    return found


def _never() -> bool:
    return False


def encode_catalog(
    layer: FusionLayer,
    contents: Contents,
    rows: np.ndarray,
    ids: np.ndarray,
    target: Target,
    exchange: RankExchange,
    *,
    stop: Callable[[], bool] = _never,
) -> ContentManifest:
    """Write fused vectors as a new generation; collective. The same layer's generation is found instead of made again.

    Args:
        layer: The trained layer.
        contents: Gives the contents of item rows.
        rows: Item rows to encode, `[n]`.
        ids: Their raw ids, int64 `[n]`.
        target: Where they go.
        exchange: Reaches the other ranks.
        stop: Says whether this rank was asked to stop; asked before each block.

    Returns:
        The generation's manifest.

    Raises:
        ValueError: When a vector is not finite.
        OSError: When something cannot be written.
        StopAgreed: When a rank was asked to stop; the blocks that are there stay.
    """
    layer.eval()
    folder = block_folder(target, ids)
    there = on_all_ranks(exchange, lambda: _existing(target, ids) if exchange.rank == 0 else None)
    there = exchange.objects(there)[0]
    if there is None:
        encode_blocks(layer, contents, rows, folder, target.chunk, exchange, stop=stop)
        there = on_all_ranks(exchange, lambda: _write(target, ids, folder, layer) if exchange.rank == 0 else None)
        there = exchange.objects(there)[0]
    assert there is not None
    if exchange.rank == 0:
        paths.remove_folder(folder)
    return there


def _existing(target: Target, ids: np.ndarray) -> ContentManifest | None:
    """The newest generation that is this layer's and holds these items."""
    for generation in reversed(generations(target.dataset, target.name)):
        store = ContentStore.open(target.dataset, target.name, generation)
        said = (store.manifest.encoder, store.manifest.encoder_version, store.manifest.split)
        if said == (ENCODER, target.model, target.split) and (store.rows_of(ids) >= 0).all():
            return store.manifest
    return None


def block_folder(target: Target, ids: np.ndarray) -> Path:
    """Where the blocks of a layer and these ids lie until all are there."""
    return target.work / f"fused-{target.model}-{hashlib.sha256(ids.tobytes()).hexdigest()[:8]}"


def encode_blocks(
    layer: FusionLayer,
    contents: Contents,
    rows: np.ndarray,
    folder: Path,
    chunk: int,
    exchange: RankExchange,
    *,
    stop: Callable[[], bool] = _never,
) -> None:
    """Encode the blocks that are not there yet, each rank its share; collective. See `encode_catalog`.

    Raises:
        StopAgreed: When a rank was asked to stop.
    """
    on_all_ranks(exchange, lambda: _own_blocks(layer, contents, rows, folder, chunk, exchange, stop))
    if any(exchange.objects(stop())):
        raise StopAgreed


def _own_blocks(
    layer: FusionLayer,
    contents: Contents,
    rows: np.ndarray,
    folder: Path,
    chunk: int,
    exchange: RankExchange,
    stop: Callable[[], bool],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    begin = told = time.perf_counter()
    done = 0
    for number in range(exchange.rank, -(-len(rows) // _BLOCK), exchange.world_size):
        file = _block_file(folder, number)
        mine = rows[number * _BLOCK : (number + 1) * _BLOCK]
        if file.exists():
            continue
        if stop():
            break
        with paths.atomic_write(file) as path, path.open("wb") as handle:
            np.save(handle, encode(layer, contents, mine, chunk))
        done += len(mine)
        now = time.perf_counter()
        if now - told > _LOG_EVERY_S:
            told = now
            logger.info("encoded %d items of this rank's, %.0f items/s", done, done / (now - begin))
    seconds = max(time.perf_counter() - begin, 1e-9)
    if done:
        logger.info("encoded %d items in %.1f s, %.0f items/s on this rank", done, seconds, done / seconds)


def _block_file(folder: Path, number: int) -> Path:
    return folder / f"block-{number:06d}.npy"


def _write(target: Target, ids: np.ndarray, folder: Path, layer: FusionLayer) -> ContentManifest:
    return write_content(
        target.dataset,
        target.name,
        ids,
        _Blocks(folder, len(ids), layer.config.width),
        encoder=ENCODER,
        encoder_version=target.model,
        normalise=False,  # the layer's reader takes z as it is; its length says something
        split=target.split,
    )


class _Blocks:
    """Blocks one after another, sliced by rows; implements `VectorSource`."""

    def __init__(self, folder: Path, rows: int, width: int) -> None:
        self.shape, self._folder = (rows, width), folder

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        parts = []
        for number in range(start // _BLOCK, -(-stop // _BLOCK)):
            block = np.load(_block_file(self._folder, number), mmap_mode="r", allow_pickle=False)
            parts.append(block[max(start - number * _BLOCK, 0) : stop - number * _BLOCK])
        return np.concatenate(parts) if parts else np.empty((0, self.shape[1]), np.float16)
