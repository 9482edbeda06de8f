"""Candidates beside their users' histories: padded pairs of candidate and event, and their content similarities.

What concerns a user alone (normalised content vectors, padding) is done once per user, however many candidates there
are; only what concerns a pair is repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mufasa_rec.modules.history import Candidates, History
from mufasa_rec.ops import host_reads
from mufasa_rec.ops.jagged import PaddedGroup, lengths_of, plan_groups, positions, sequence_ids


@dataclass(frozen=True)
class PairGroup:
    """Candidates of users with histories of similar length, padded together; `b` users, `c` candidates, `n` places.

    Attributes:
        events: Event at each place of each user, `[b, n]` int64; a place behind the end repeats the last event.
        valid: Whether a place of a user holds an event, `[b, n]` bool.
        candidates: Which candidates, `[c]` int64.
        row: User of each candidate among the group's, `[c]` int64.
        slot: Place of each candidate among those of its user, `[c]` int64.
        num_slots: Most candidates of one user.
        empty: Which candidates' users have no event at all, `[c]` bool; what is read for them must be replaced. None
            where no such user is in the group.
    """

    events: Tensor
    valid: Tensor
    candidates: Tensor
    row: Tensor
    slot: Tensor
    num_slots: int
    empty: Tensor | None = None

    @property
    def pair_valid(self) -> Tensor:
        """Whether a place of a candidate's user holds an event, `[c, n]`."""
        return self.valid[self.row]

    @property
    def pair_events(self) -> Tensor:
        """Event of each pair, `[c, n]`."""
        return self.events[self.row]


@dataclass(frozen=True)
class Similarities:
    """Content similarities of the pairs of a group.

    Attributes:
        r: `(cosine + 1) / 2` by modality, `[c, M, n]`; 1/2 where `has` is false.
        has: Whether the place holds an event, and event and candidate both have the modality, `[c, M, n]` bool.
        valid: Whether the place holds an event, `[c, n]` bool.
    """

    r: Tensor
    has: Tensor
    valid: Tensor


def plan_pairs(
    history: History, candidates: Candidates, *, max_events: int | None = None, tight: bool | None = None
) -> list[PairGroup]:
    """Pair every candidate with its user's newest events.

    Args:
        history: The users' events.
        candidates: Candidates of the same users.
        max_events: Newest events of a user that are paired; None for all.
        tight: Whether groups are padded to their own longest history only, which reads the offsets on the host; None
            does so on a CPU.

    Returns:
        Groups; candidates of users without events are in none of the tight ones. Otherwise one group holds all users,
        and one without events has a valid place that repeats another's event.

    Raises:
        ValueError: When there are not as many users on both sides, or not `tight` without `History.max_length`.

    Example:
        >>> users, items = torch.tensor([0, 3, 3]), torch.tensor([0, 2, 3])
        >>> history = History(embedded=torch.zeros(3, 4), offsets=users, start_position=torch.zeros(2).long())
        >>> (group,) = plan_pairs(history, Candidates(embedded=torch.zeros(3, 4), offsets=items), max_events=2)
        >>> group.events.tolist(), group.candidates.tolist(), group.slot.tolist()
        ([[1, 2]], [0, 1], [0, 1])
    """
    if candidates.offsets.shape != history.offsets.shape:
        raise ValueError(
            f"Candidates.offsets: {candidates.offsets.numel() - 1} users, but History has "
            f"{history.offsets.numel() - 1}; give every user an entry, empty where there are no candidates."
        )
    num_candidates = len(candidates.embedded)
    if not num_candidates or not len(history.embedded):
        return []
    tight = host_reads.free(history.offsets) if tight is None else tight
    groups = _tight_groups(history, max_events) if tight else [_one_group(history, max_events)]
    owner = sequence_ids(candidates.offsets, num_candidates)
    slot = positions(candidates.offsets, num_candidates)
    if not tight:
        with host_reads.argued("the most candidates of a user is a shape that only the batch knows; once a batch"):
            num_slots = int(lengths_of(candidates.offsets).max())
        everyone = torch.arange(num_candidates, device=owner.device)
        empty = (lengths_of(history.offsets) == 0)[owner]
        return [PairGroup(g.gather, g.valid, everyone, owner, slot, num_slots, empty) for g in groups]
    found = []
    for group in groups:
        place = torch.full((history.offsets.numel() - 1,), -1, dtype=torch.int64)
        place[group.sequences] = torch.arange(len(group.sequences))
        mine = torch.nonzero(place[owner] >= 0).squeeze(1)
        if len(mine):
            row, slots = place[owner[mine]], slot[mine]
            found.append(PairGroup(group.gather, group.valid, mine, row, slots, int(slots.max()) + 1))
    return found


def _tight_groups(history: History, max_events: int | None) -> list[PaddedGroup]:
    """Users with events, by length, each with its newest ones."""
    offsets = history.offsets
    kept = _kept(offsets, max_events)
    kept_offsets = F.pad(kept.cumsum(0), (1, 0))
    dropped = (offsets[1:] - kept_offsets[1:])[:, None]  # events that no one reads, up to each user's end
    plan = plan_groups(kept_offsets, int(kept_offsets[-1]))
    return [PaddedGroup(g.sequences, g.gather + dropped[g.sequences], g.valid) for g in plan.groups]


def _one_group(history: History, max_events: int | None) -> PaddedGroup:
    """All users, without reading a length on the host."""
    if history.max_length is None:
        raise ValueError("History.max_length=None: an accelerator needs an upper bound of the lengths; pass it.")
    offsets = history.offsets
    width = history.max_length if max_events is None else min(history.max_length, max_events)
    kept = _kept(offsets, width)[:, None]
    step = torch.arange(width, device=offsets.device)[None]
    gather = offsets[1:, None] - kept + torch.minimum(step, (kept - 1).clamp(min=0))
    everyone = torch.arange(len(kept), device=offsets.device)
    return PaddedGroup(everyone, gather.clamp(max=len(history.embedded) - 1), step < kept.clamp(min=1))


def _kept(offsets: Tensor, max_events: int | None) -> Tensor:
    lengths = lengths_of(offsets)
    return lengths if max_events is None else lengths.clamp(max=max_events)


class ContentReader:
    """Normalised content of a batch, read by groups of pairs.

    Args:
        history: The users' events.
        candidates: Candidates of the same users.
        modalities: Width of each modality's vectors.

    Raises:
        ValueError: When a modality is missing or of another width.
    """

    def __init__(self, history: History, candidates: Candidates, modalities: Mapping[str, int]) -> None:
        check_content("History", history, modalities)
        check_content("Candidates", candidates, modalities)
        self.modalities = tuple(modalities)
        self.events = {name: unit(history.content[name], history.present[name]) for name in modalities}
        self.targets = {name: unit(candidates.content[name], candidates.present[name]) for name in modalities}
        self.event_has = torch.stack([history.present[name] for name in modalities], dim=1)
        self.target_has = torch.stack([candidates.present[name] for name in modalities], dim=1)

    def similarities(self, group: PairGroup) -> Similarities:
        """Compare each candidate of a group with its user's events, in fp32 also under autocast."""
        with torch.autocast(group.events.device.type, enabled=False):
            cosine = torch.stack([self._cosines(name, group) for name in self.modalities], dim=1)
        valid = group.pair_valid
        has = self.event_has[group.events][group.row] & self.target_has[group.candidates][:, None]  # [c, n, M]
        has = has.transpose(1, 2) & valid[:, None]
        return Similarities(((cosine + 1.0) / 2.0).masked_fill(~has, 0.5), has, valid)

    def _cosines(self, name: str, group: PairGroup) -> Tensor:
        """Cosines `[c, n]`: one matrix product per user."""
        users, places = group.events.shape
        events = self.events[name].index_select(0, group.events.reshape(-1)).view(users, places, -1)
        mine = self.targets[name].index_select(0, group.candidates)
        targets = mine.new_zeros(users, group.num_slots, mine.shape[1]).index_put((group.row, group.slot), mine)
        return torch.bmm(targets, events.transpose(1, 2))[group.row, group.slot]


def unit(vectors: Tensor, present: Tensor) -> Tensor:
    """Vectors `[n, P]` at length 1 in fp32 at least; zero where a row lacks them, whatever stands there.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [float("nan"), 1.0]]), torch.tensor([True, False])).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return F.normalize(vectors.masked_fill(~present[:, None], 0.0), dim=1, eps=1e-6)


def check_content(owner: str, rows: History | Candidates, modalities: Mapping[str, int]) -> None:
    """Refuse rows without the modalities that a model was built with.

    Raises:
        ValueError: Names the modality, and both widths when they differ.
    """
    for name, width in modalities.items():
        if name not in rows.content:
            raise ValueError(f"{owner}.content[{name!r}]: missing; the model was built with {list(modalities)}.")
        if rows.content[name].shape[1] != width:
            raise ValueError(
                f"{owner}.content[{name!r}]: width {rows.content[name].shape[1]}, but the model was built for {width}; "
                "use the content generation that it was trained on."
            )
