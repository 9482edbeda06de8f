"""The rows of a bounded table found by probing: TorchRec's multi-probe hash (MPZCH), for GPUs.

An id's row is the first of `max_probe` places from its hash on that holds it or is free; where all are taken, the one
that was seen longest ago is given to it. TorchRec's `HashZchManagedCollisionModule` has the buffers (the id of each row
and when it was last seen) and FBGEMM the kernel; what is different here:

- "last seen" is a training step and not an hour of the clock, so that a run does not depend on when it runs;
- a table has a fixed number of buckets that a rank holds whole, and ids are sent as those of `managed_ids` are;
- ids that are only looked up (drawn negatives) take no row and keep none.

FBGEMM's kernel claims places by atomics: which of two new ids gets a place that both want is not the same in every run.
On a CPU it only looks up, so a table that was trained on GPUs can be evaluated there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec.modules.hash_mc_modules import HashZchManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from mufasa_rec.distributed import id_keys
from mufasa_rec.distributed.id_policy import ManagedIdsConfig
from mufasa_rec.distributed.managed_ids import COUNTERS, num_counted, with_values

_EMPTY = -1  # FBGEMM's word for a row that no id has
_LEAST_RECENT = 1  # FBGEMM's number of the policy that takes the row that was seen longest ago


class MultiProbeIds(HashZchManagedCollisionModule):
    """Gives rows of a table, or of a rank's part of it, to ids by multi-probe hashing.

    Args:
        feature: Name of the feature.
        table_rows: Rows of the whole table.
        config: Admission and eviction; its method is ``multi_probe``.
        device: Where it works; ``meta`` for one that only describes.
        part: First row and number of rows of this rank's part; None for the whole table.

    Attributes:
        counters: What `COUNTERS` names, summed on the device since the owner set them to zero, int64.
        pending: Always empty: ids are admitted as they come.
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
        self.first_bucket, self.num_buckets = first // self.bucket_rows, rows // self.bucket_rows
        super().__init__(
            zch_size=rows,
            device=device,
            total_num_buckets=config.buckets,
            max_probe=min(config.max_probe, self.bucket_rows),
            input_hash_size=0,  # TorchRec's word for all 64 bits
            output_segments=[bucket * self.bucket_rows for bucket in range(config.buckets + 1)],
            name=feature,
            start_bucket=self.first_bucket,
            end_bucket=self.first_bucket + self.num_buckets,
        )
        self.feature, self.table_rows, self.config, self.first_row = feature, table_rows, config, first
        self._make_state(rows, device)
        self.pending: list[Tensor] = []
        self._taken: list[Tensor] = []

    def _make_state(self, rows: int, device: torch.device) -> None:
        """Last steps of the rows, the run's step, and the counters."""
        self.register_buffer(self.METADATA_BUFFER, torch.full((rows, 1), _EMPTY, dtype=torch.int32, device=device))
        self.register_buffer("_current_iter_tensor", torch.zeros(1, dtype=torch.int64, device=device))
        self._current_iter = -1
        if device.type != "meta":
            self.counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)

    @property
    def step(self) -> int:
        """Training steps so far."""
        if self._current_iter == -1:  # unknown since it was made or loaded
            self._current_iter = int(self._current_iter_tensor.item())
        return self._current_iter

    def loaded(self, pending: list[Tensor]) -> None:
        """Say that the buffers were read from a checkpoint; nothing is ever pending."""
        self._current_iter = -1

    def rebuild_with_output_id_range(
        self,
        output_id_range: tuple[int, int],
        output_segments: list[int] | None = None,
        device: torch.device | None = None,
    ) -> MultiProbeIds:
        """This rank's part of it.

        Raises:
            ValueError: When the range is not one of whole buckets.
        """
        first, end = output_id_range
        if first % self.bucket_rows or end % self.bucket_rows:
            raise ValueError(
                f"ids.{self.feature}: rows {first} to {end} of a rank are no whole buckets of {self.bucket_rows} rows; "
                "take a number of ranks that divides ids...managed.buckets, and leave the table out of saved plans."
            )
        return MultiProbeIds(self.feature, self.table_rows, self.config, device or self.device, (first, end - first))

    def preprocess(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Raw ids to what is sent between ranks."""
        buckets = self.config.buckets
        return {name: with_values(one, id_keys.to_send(one.values(), buckets)) for name, one in features.items()}

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Count a training step."""
        if self.training:
            self._current_iter = self.step + 1
            self._current_iter_tensor += 1
        return features

    def remap(
        self,
        features: dict[str, JaggedTensor],
        mutate_miss_lengths: bool = True,
        write_weights: Tensor | None = None,
    ) -> dict[str, JaggedTensor]:
        """What was sent between ranks to rows of the table; in training, ids that count are given rows."""
        return {name: self._remapped(one) for name, one in features.items()}

    @torch.no_grad()
    def _remapped(self, feature: JaggedTensor) -> JaggedTensor:
        keys = id_keys.received(feature.values(), self.config.buckets)
        rows = self._rows(keys)
        if self.training:
            known, counted = self._held(rows, keys), num_counted(feature)
            rows[:counted] = self._claimed(keys[:counted])
            if counted < len(keys):  # a row may have been taken from an id that is only looked up
                rows[counted:] = self._rows(keys[counted:])
            self._count(known, keys[:counted], self._held(rows[:counted], keys[:counted]))
        return with_values(feature, rows + self.first_row)

    def _rows(self, keys: Tensor) -> Tensor:
        """Rows of keys `[n]` in this rank's part, without a change: their own, or the one that their hash says."""
        return self._kernel(keys)[0]

    def _claimed(self, keys: Tensor) -> Tensor:
        """Rows of keys `[n]` that are seen in this step, which may take rows not seen for `interval` steps."""
        seen = torch.full((len(keys),), self.step, dtype=torch.int32, device=keys.device)
        rows, taken = self._kernel(keys, seen, max(self.step - self.config.interval + 1, 0))
        self._taken.append(taken[taken != _EMPTY])
        return rows

    def _kernel(self, keys: Tensor, seen: Tensor | None = None, threshold: int = -1) -> tuple[Tensor, Tensor]:
        """FBGEMM's multi-probe hash; it writes only where `seen` is given."""
        bucket = id_keys.bucket_of(keys, self.config.buckets) - self.first_bucket
        return torch.ops.fbgemm.zero_collision_hash(
            input=keys,
            identities=self._hash_zch_identities,
            max_probe=self._max_probe,
            circular_probe=True,
            exp_hours=-1,
            readonly=seen is None,
            local_sizes=torch.full_like(keys, self.bucket_rows),
            offsets=bucket * self.bucket_rows,
            metadata=None if seen is None else self._hash_zch_metadata,
            output_on_uvm=False,
            disable_fallback=False,
            _modulo_identity_DPRECATED=False,
            input_metadata=seen,
            eviction_threshold=threshold,
            eviction_policy=_LEAST_RECENT,
            opt_in_prob=-1,
            num_reserved_slots=-1,
            opt_in_rands=None,
        )

    def _held(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Which keys `[n]` have the row that was found for them as their own."""
        return self._hash_zch_identities.data[rows, 0] == keys

    def _count(self, known: Tensor, counted: Tensor, held: Tensor) -> None:
        """Add a step to the counters.

        Args:
            known: Which lookups found their own row before this step.
            counted: Keys that count, the first of the lookups.
            held: Which of those have a row of their own now.
        """
        first = len(counted)
        # Each new id once: equal keys lie together, and those that are not new are made equal to a key that is none.
        new, _ = torch.where(held & ~known[:first], counted, _EMPTY).sort()
        self.counters[0] += first
        self.counters[1] += known[:first].sum()
        self.counters[2] += len(known)
        self.counters[3] += (~known).sum()
        if first:
            distinct = (new[1:] != new[:-1]).sum() + 1
            self.counters[4] += distinct - (new == _EMPTY).any().long()
            self.counters[5] += len(self._taken[-1])

    def evict(self) -> Tensor | None:
        """Rows of the whole table that were taken from an id in this step, each once; None where there are none."""
        taken, self._taken = self._taken, []
        if not sum(len(one) for one in taken):
            return None
        return torch.unique(torch.cat(taken)) + self.first_row

    def open_slots(self) -> Tensor:
        """Rows that no id has."""
        return (self._hash_zch_identities.data == _EMPTY).sum()

    def validate_state(self) -> None:
        """Nothing to do: the buckets are the same on any number of ranks."""
