"""What the training split says about items: collaborative vectors, and pairs of items that were chosen together.

Vectors are a truncated SVD of the items' shifted PPMI, by `torch.svd_lowrank` (Halko et al., 2009): no dependency
beside torch, and as good as item2vec, whose implicit matrix it is (Levy and Goldberg, 2014). Everything learned from
events carries the id and hash of its split, and is refused where another split is used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mufasa_rec.data import paths
from mufasa_rec.data.cooccurrence import Cooccurrence
from mufasa_rec.data.row_ids import match
from mufasa_rec.data.vectors import read_vectors

_POWER_ITERATIONS = 4
_OVERSAMPLING = 8


@dataclass(frozen=True, kw_only=True)
class BehaviourConfig:
    """What is learned from the training events.

    Attributes:
        source: `cooccurrence`, or what somebody learned: a vector file by item id, or the folder of a retriever's run
            or export, whose id table is taken.
        split: Split that a vector file was learned on, as `<id>@<hash>`, where the file does not say so itself.
        window: Most events between two items that count as chosen together.
        width: Width of the vectors of `cooccurrence`.
        shift: Number of negatives that PPMI stands for.
        neighbours: Most items that are paired with an item, the closest by PPMI.
    """

    source: str = "cooccurrence"
    split: str | None = None
    window: int = 5
    width: int = 64
    shift: float = 1.0
    neighbours: int = 20

    def __post_init__(self) -> None:
        for name in ("window", "width", "neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"behaviour.{name}={getattr(self, name)}: choose 1 or more.")
        if not self.shift > 0:
            raise ValueError(f"behaviour.shift={self.shift}: choose more than 0; 1 keeps all positive information.")
        if not self.source:
            raise ValueError("behaviour.source: empty; give 'cooccurrence', a vector file, or a run folder.")


@dataclass(frozen=True, eq=False)
class CollaborativeVectors:
    """Frozen vectors of items that training events speak of.

    Attributes:
        ids: Raw item ids, int64 `[n]`, each once.
        vectors: Their vectors, float32 `[n, Q]`.
        num_events: Training events of each, int64 `[n]`.
        split: Split that they were learned on, `<id>@<hash>`.
    """

    ids: np.ndarray
    vectors: np.ndarray
    num_events: np.ndarray
    split: str

    def of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors `[k, Q]`, zero where there is none, and training events `[k]`, 0 there, of raw ids `[k]`."""
        place = match(ids, self.ids)
        has = place >= 0
        vectors = np.zeros((len(ids), self.vectors.shape[1]), np.float32)
        vectors[has] = self.vectors[place[has]]
        events = np.zeros(len(ids), np.int64)
        events[has] = self.num_events[place[has]]
        return vectors, events

    def save(self, file: paths.Location) -> None:
        """Write a safetensors file, which `load` and every reader of vector files read."""
        tensors = {"id": self.ids, "vector": self.vectors, "num_events": self.num_events}
        with paths.atomic_write(file) as path:
            whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
            save_file(whole, path, metadata={"format_version": "1", "split": self.split})

    @classmethod
    def load(cls, file: paths.Location) -> CollaborativeVectors:
        """Read what `save` wrote.

        Raises:
            ValueError: When it is not such a file.
        """
        try:
            with safe_open(paths.local_copy(file), framework="numpy") as handle:
                id_, vector, events = (handle.get_tensor(name) for name in ("id", "vector", "num_events"))
                return cls(id_, vector, events, (handle.metadata() or {})["split"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{file}: holds no collaborative vectors ({error}); remove it, it is made anew."
            ) from error


def factorise(
    pairs: Cooccurrence, ids: np.ndarray, num_events: np.ndarray, split: str, config: BehaviourConfig, seed: int = 0
) -> CollaborativeVectors:
    """Learn vectors by a truncated SVD of shifted PPMI.

    Args:
        pairs: Co-occurrence of the training split.
        ids: Raw ids of the catalog, int64 `[items]`.
        num_events: Training events of each, `[items]`.
        split: The split, `<id>@<hash>`.
        config: Width and shift.
        seed: Seed of the random projection.

    Returns:
        Vectors `U sqrt(S)` of the items that have a positive pair; at most as wide as there are such items.

    Raises:
        ValueError: When no two items were chosen together more often than by chance.
    """
    value = pairs.ppmi(config.shift)
    kept = value > 0
    used = np.unique(np.r_[pairs.left[kept], pairs.right[kept]])
    if len(used) < 2:
        raise ValueError(
            f"behaviour.shift={config.shift}: no two items of split {split} were chosen together more often than by "
            "chance; choose a smaller shift or a wider behaviour.window, or set objective.collaborative_weight=0."
        )
    low, high = np.searchsorted(used, pairs.left[kept]), np.searchsorted(used, pairs.right[kept])
    places = torch.from_numpy(np.stack([np.r_[low, high], np.r_[high, low]]))
    entries = torch.from_numpy(np.tile(value[kept], 2))
    matrix = torch.sparse_coo_tensor(places, entries, (len(used), len(used)), check_invariants=True).coalesce()
    width = min(config.width, len(used))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = torch.svd_lowrank(matrix, q=min(width + _OVERSAMPLING, len(used)), niter=_POWER_ITERATIONS)
    vectors = (found[0][:, :width] * found[1][:width].sqrt()).float().numpy()
    return CollaborativeVectors(ids[used].copy(), vectors, num_events[used].astype(np.int64), split)


def closest(pairs: Cooccurrence, config: BehaviourConfig) -> np.ndarray:
    """Mine co-behaviour pairs: for each item those closest by PPMI.

    Args:
        pairs: Co-occurrence of the training split.
        config: Shift, and how many of each item.

    Returns:
        Codes `smaller row * items + larger row`, ascending, int64 `[pairs]`.
    """
    value = pairs.ppmi(config.shift)
    kept = value > 0
    code = (pairs.left * pairs.num_items + pairs.right)[kept]
    owner = np.r_[pairs.left[kept], pairs.right[kept]]
    order = np.lexsort((np.tile(code, 2), -np.tile(value[kept], 2), owner))
    sizes = np.bincount(owner, minlength=pairs.num_items)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.unique(np.tile(code, 2)[order[rank < config.neighbours]])


def read_given(
    file: paths.Location, stated: str | None, split: str, ids: np.ndarray, num_events: np.ndarray
) -> CollaborativeVectors:
    """Read a user's vector file, by item id.

    Args:
        file: Any format of `read_vectors`; a safetensors file may say its split in its metadata.
        stated: The split that the user says it was learned on; None to take the file's word.
        split: The split that is used here.
        ids: Raw ids of the catalog, `[items]`; vectors of others are left out.
        num_events: Training events of each, `[items]`.

    Raises:
        ValueError: When the split is unknown or another one, or none of the ids is an item.
    """
    said = stated or _said_split(file)
    if said is None:
        raise ValueError(
            f"behaviour.split: unknown for {os.fspath(file)}; give the split that it was learned on (this run uses "
            f"{split}). Vectors that have seen validation or test events would make every result worthless."
        )
    refuse_other_split(file, said, split)
    given, source = read_vectors(str(file))
    place = match(ids, given)
    has = place >= 0
    if not has.any():
        raise ValueError(f"behaviour.source={os.fspath(file)}: none of its {len(given)} ids is an item; give raw ids.")
    vectors = np.asarray(source[0 : len(given)], dtype=np.float32)[place[has]]
    if not np.isfinite(vectors).all():
        raise ValueError(
            f"behaviour.source={os.fspath(file)}: holds values that are not finite; leave those items out."
        )
    return CollaborativeVectors(ids[has].copy(), vectors, num_events[has].astype(np.int64), split)


def refuse_other_split(source: paths.Location, said: str, split: str) -> None:
    """Refuse what was learned on another split.

    Raises:
        ValueError: Names both.
    """
    if said != split:
        raise ValueError(
            f"behaviour.source={os.fspath(source)}: learned on split {said}, but this run uses {split}; learn it on "
            "this split, or use that one."
        )


def _said_split(file: paths.Location) -> str | None:
    """The split that a safetensors file names."""
    if not str(file).endswith(".safetensors"):
        return None
    try:
        with safe_open(paths.local_copy(file), framework="numpy") as handle:
            return (handle.metadata() or {}).get("split")
    except SafetensorError as error:
        raise ValueError(
            f"behaviour.source={os.fspath(file)}: no safetensors file ({error}); write it again."
        ) from error
