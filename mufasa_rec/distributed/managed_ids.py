"""The rows of a bounded table given to ids as they come, and taken from those that fade: TorchRec's MCH, made whole.

TorchRec's `MCHManagedCollisionModule` has the buffers (ids of the rows in order, their row numbers, counts, last
steps); what is done with them is done here, because its own way

- sizes the history by the first batch, and keeps it out of the state: here it grows with what comes and is saved;
- admits per rank, so that the result depends on the number of ranks and cannot be dealt anew: here the table has a
  fixed number of buckets, each a range of rows with its own ids, and a rank holds whole buckets;
- sends all misses to one row: here to the bucket's fallback rows, by hash;
- filters by count the ids that it knows too: here only new ones.

A bucket's rows are `[managed ..., fallback ...]`. Its ids lie sorted, empty places last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    MCHEvictionPolicy,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor

from mufasa_rec.distributed import id_keys
from mufasa_rec.distributed.id_policy import ManagedIdsConfig

COUNTERS = ("counted", "hits", "lookups", "fallbacks", "admitted", "evicted")


class Seen(NamedTuple):
    """What was seen since the last round, each id once, by ascending key.

    Attributes:
        keys: Keys, `[n]`.
        counts: How often, `[n]`.
        steps: Last step, `[n]`.
    """

    keys: Tensor
    counts: Tensor
    steps: Tensor

    def where(self, mask: Tensor | slice) -> Seen:
        """Those that a mask `[n]`, an index or a slice names."""
        return Seen(self.keys[mask], self.counts[mask], self.steps[mask])


class ManagedIds(MCHManagedCollisionModule):
    """Gives rows of a table, or of a rank's part of it, to ids.

    Args:
        feature: Name of the feature.
        table_rows: Rows of the whole table.
        config: Admission and eviction.
        device: Where it works; ``meta`` for one that only describes.
        part: First row and number of rows of this rank's part; None for the whole table.

    Attributes:
        counters: What `COUNTERS` names, summed on the device since the owner set them to zero, int64.
        pending: Keys of the ids of each step since the last round.
    """

    def __init__(
        self,
        feature: str,
        table_rows: int,
        config: ManagedIdsConfig,
        device: torch.device,
        part: tuple[int, int] | None = None,
    ) -> None:
        first, rows = part or (0, table_rows)
        self.bucket_rows = table_rows // config.buckets
        super().__init__(
            zch_size=rows,
            device=device,
            eviction_policy=policy_of(config),
            eviction_interval=config.interval,
            input_hash_size=0,  # TorchRec's word for all 64 bits
            name=feature,
            output_global_offset=first,
            output_segments=[bucket * self.bucket_rows for bucket in range(config.buckets + 1)],
            buckets=config.buckets,
        )
        self.feature, self.table_rows, self.config = feature, table_rows, config
        self.managed_rows = self.bucket_rows - config.fallback_rows(self.bucket_rows)
        self.first_bucket, self.num_buckets = first // self.bucket_rows, rows // self.bucket_rows
        if device.type != "meta":
            self.empty = id_keys.last_keys(self.first_bucket, self.num_buckets, config.buckets, device)
            self._mch_sorted_raw_ids.copy_(self.empty.repeat_interleave(self.bucket_rows))
            self.counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        self.pending: list[Tensor] = []

    def rebuild_with_output_id_range(
        self, output_id_range: tuple[int, int], output_segments: list[int], device: torch.device | None = None
    ) -> ManagedIds:
        """This rank's part of it.

        Raises:
            ValueError: When the range is not one of whole buckets.
        """
        first, end = output_id_range
        if first % self.bucket_rows or end % self.bucket_rows:
            self.config.refuse_world(len(output_segments) - 1, self.feature)
            raise ValueError(
                f"ids.{self.feature}: rows {first} to {end} of a rank are no whole buckets of {self.bucket_rows} rows; "
                "leave the table out of saved plans."
            )
        return ManagedIds(self.feature, self.table_rows, self.config, device or self.device, (first, end - first))

    def preprocess(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Raw ids to what is sent between ranks."""
        return {
            name: with_values(one, id_keys.to_send(one.values(), self.config.buckets)) for name, one in features.items()
        }

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Remember what was seen in a training step; at an interval's end, admit and evict."""
        if not self.training:
            return features
        self._current_iter = self.step + 1
        self._current_iter_tensor += 1
        seen = [one.values()[: num_counted(one)] for one in features.values()]
        self.pending.append(id_keys.received(torch.cat(seen), self.config.buckets))
        if self._current_iter % self._eviction_interval == 0:
            self._round()
        return features

    @property
    def step(self) -> int:
        """Training steps so far."""
        if self._current_iter == -1:  # unknown since it was made or loaded
            self._current_iter = int(self._current_iter_tensor.item())
        return self._current_iter

    def loaded(self, pending: list[Tensor]) -> None:
        """Say that the buffers were read from a checkpoint, with what had been seen since the round before."""
        self._current_iter = -1
        self.pending = pending

    def remap(
        self,
        features: dict[str, JaggedTensor],
        mutate_miss_lengths: bool = True,
        write_weights: Tensor | None = None,
    ) -> dict[str, JaggedTensor]:
        """What was sent between ranks to rows of the table."""
        return {name: self._remapped(one) for name, one in features.items()}

    def _remapped(self, feature: JaggedTensor) -> JaggedTensor:
        keys = id_keys.received(feature.values(), self.config.buckets)
        place = self._places(keys)
        hit = self._mch_sorted_raw_ids[place] == keys
        bucket = place.div(self.bucket_rows, rounding_mode="floor")
        spread = (keys & ((1 << 32) - 1)) % (self.bucket_rows - self.managed_rows)
        fallback = self._output_global_offset + bucket * self.bucket_rows + self.managed_rows + spread
        rows = torch.where(hit, self._mch_remapped_ids_mapping[place], fallback)
        if self.training:
            counted, lookups = num_counted(feature), len(keys)
            hits = torch.stack([hit[:counted].sum(), hit[counted:].sum()])
            self.counters[1] += hits[0]
            self.counters[3] += lookups - hits.sum()
            self.counters[0] += counted
            self.counters[2] += lookups
        return with_values(feature, rows)

    def _places(self, keys: Tensor) -> Tensor:
        """First place of the ids' table that is not below each key, `[n]`.

        On a CPU in the keys' own order: a large table is read about twice as fast when near keys follow each other.
        """
        if keys.is_cuda:
            return torch.searchsorted(self._mch_sorted_raw_ids, keys)
        ascending, order = torch.sort(keys)
        return torch.empty_like(order).scatter_(0, order, torch.searchsorted(self._mch_sorted_raw_ids, ascending))

    @torch.no_grad()
    def _round(self) -> None:
        """Admit and evict by what was seen since the last round."""
        seen = self._seen()
        self.pending = []
        place = torch.searchsorted(self._mch_sorted_raw_ids, seen.keys)
        known = self._mch_sorted_raw_ids[place] == seen.keys
        counts, steps = (self._mch_metadata.get(name) for name in ("counts", "last_access_iter"))
        if counts is not None:
            counts[place[known]] += seen.counts[known]
        if steps is not None:
            steps[place[known]] = seen.steps[known]
        new = seen.where(~known & (seen.counts >= self.config.min_count))
        bucket = id_keys.bucket_of(new.keys, self.config.buckets) - self.first_bucket
        borders = torch.searchsorted(bucket, torch.arange(self.num_buckets + 1, device=bucket.device)).tolist()
        given = [
            self._replace(number, new.where(slice(first, end)))
            for number, (first, end) in enumerate(zip(borders, borders[1:]))
            if end > first
        ]
        if any(len(rows) for rows in given):
            self._evicted_emb_indices, self._evicted = torch.cat(given), True

    def _seen(self) -> Seen:
        """The ids of the steps since the last round, each once."""
        keys, order = torch.sort(torch.cat(self.pending), stable=True)
        last = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
        last[:-1] = keys[1:] != keys[:-1]
        ends = last.nonzero().squeeze(1)
        counts = torch.diff(ends, prepend=ends.new_full((1,), -1))
        # Equal keys are in the order in which they came, so the end of each run is its last step.
        borders = torch.tensor([len(part) for part in self.pending], device=keys.device).cumsum(0)
        steps = torch.searchsorted(borders, order[ends], right=True) + (self._current_iter - len(self.pending) + 1)
        return Seen(keys[ends], counts, steps)

    def _replace(self, bucket: int, new: Seen) -> Tensor:
        """Admit the best new ids of a bucket in place of the worst that are there; one of equal worth stays.

        A bucket at a time, so that ties do not depend on which buckets a rank holds.

        Args:
            bucket: The bucket, counted from this rank's first.
            new: Its new ids.

        Returns:
            Rows that got another id.
        """
        start = bucket * self.bucket_rows
        managed = slice(start, start + self.managed_rows)
        ids, rows = self._mch_sorted_raw_ids[managed], self._mch_remapped_ids_mapping[managed]
        metadata = {name: column[managed] for name, column in self._mch_metadata.items()}
        scores = self._scores({"counts": new.counts, "last_access_iter": new.steps})
        order = torch.argsort(scores, descending=True, stable=True)[: self.managed_rows]
        held = self._scores(metadata).masked_fill_(ids == self.empty[bucket], -torch.inf)
        worst, place = torch.topk(held, len(order), largest=False, sorted=True)
        taken = scores[order] > worst
        place, worst, admitted = place[taken], worst[taken], new.where(order[taken])
        self.counters[4] += len(place)
        self.counters[5] += (worst > -torch.inf).sum()
        given = rows[place]
        ids[place] = admitted.keys
        for name, column in metadata.items():
            column[place] = admitted.counts if name == "counts" else admitted.steps
        if len(place):
            ids[:], order = torch.sort(ids)
            for column in (rows, *metadata.values()):
                column[:] = column[order]
        return given

    def _scores(self, metadata: dict[str, Tensor]) -> Tensor:
        """How much each id deserves a row, float64."""
        if self.config.eviction == "lfu":
            return metadata["counts"].double()
        if self.config.eviction == "lru":
            return metadata["last_access_iter"].double()
        distance = (self._current_iter - metadata["last_access_iter"] + 1).double()
        return metadata["counts"] / (distance if self.config.decay == 1 else distance**self.config.decay)

    def open_slots(self) -> Tensor:
        """Managed rows that no id has."""
        free = (self._mch_sorted_raw_ids.view(self.num_buckets, -1) == self.empty[:, None]).sum()
        return free - self.num_buckets * (self.bucket_rows - self.managed_rows)

    def validate_state(self) -> None:
        """Nothing to do: the buckets are the same on any number of ranks, and each is sorted."""


def policy_of(config: ManagedIdsConfig) -> MCHEvictionPolicy:
    """TorchRec's eviction policy, which says what is remembered of each id."""
    if config.eviction == "distance_lfu":
        return DistanceLFU_EvictionPolicy(decay_exponent=config.decay)
    return LFU_EvictionPolicy() if config.eviction == "lfu" else LRU_EvictionPolicy()


def num_counted(feature: JaggedTensor) -> int:
    """Ids of the table's first feature, which are counted; TorchRec hands the number of each feature as weights.

    The second feature holds ids that are looked up but were not seen, such as drawn negatives.
    """
    lengths = feature.weights_or_none()
    return len(feature.values()) if lengths is None else int(lengths[0])


def with_values(feature: JaggedTensor, values: Tensor) -> JaggedTensor:
    """The same with other values."""
    return JaggedTensor(
        values=values, lengths=feature.lengths(), offsets=feature.offsets(), weights=feature.weights_or_none()
    )
