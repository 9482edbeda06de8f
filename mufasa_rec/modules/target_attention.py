"""Interest of ids: a user's events weighed for each candidate, as Deep Interest Network does (DIN, arXiv 1706.06978).

    w_j = MLP[event ; candidate ; event * candidate]      not normalised: many matching events are more interest
    interest = sum_j w_j event_j / sqrt(number of events)

The root, which keeps long histories within bounds, is ours. The event's share of the first layer is computed once per
event and the candidate's once per candidate; only their product is work for each pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mufasa_rec.modules.candidate_pairs import plan_pairs
from mufasa_rec.modules.history import Candidates, History, InterestExtractor


class TargetAttentionExtractor(InterestExtractor):
    """The extractor; it reads embeddings alone.

    Args:
        width: Width `E` of events and candidates.
        hidden: Hidden width of the weighing.
        max_events: Newest events of a user that are read; None for all.

    Example:
        >>> extractor = TargetAttentionExtractor(4)
        >>> users, zero = torch.tensor([0, 5, 5]), torch.zeros(2, dtype=torch.int64)
        >>> history = History(embedded=torch.randn(5, 4), offsets=users, start_position=zero)
        >>> extractor(history, Candidates(embedded=torch.randn(3, 4), offsets=torch.tensor([0, 2, 3]))).shape
        torch.Size([3, 4])
    """

    def __init__(self, width: int, *, hidden: int = 32, max_events: int | None = None) -> None:
        super().__init__()
        self.output_dim, self.max_events = width, max_events
        self.of_event = nn.Linear(width, hidden)
        self.of_target = nn.Linear(width, hidden, bias=False)
        self.of_product = nn.Parameter(torch.randn(width, hidden) * width**-0.5)
        self.weigh = nn.Linear(hidden, 1)
        self.empty = nn.Parameter(torch.randn(width) * width**-0.5)

    def encode(self, history: History) -> Tensor:
        """Refuse: events are weighed for a candidate.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("encode: events are weighed for a candidate; call forward(history, candidates).")

    def forward(self, history: History, candidates: Candidates | None = None) -> Tensor:
        """Return one vector per candidate, `[C, E]`; those of users without history get a learned vector.

        Raises:
            ValueError: Without candidates.
        """
        if candidates is None:
            raise ValueError("candidates=None: events are weighed for candidates; pass the items to be scored.")
        target = candidates.embedded.to(self.empty.dtype)
        events = history.embedded.to(self.empty.dtype)
        of_event, of_target = self.of_event(events), self.of_target(target)
        result = self.empty + of_event[:0].sum() + of_target[:0].sum() + self.of_product[:0].sum()
        result = (result + self.weigh(of_event[:0]).sum()).expand(len(target), -1)
        self.num_places = 0
        for group in plan_pairs(history, candidates, max_events=self.max_events):
            read = events[group.events]  # [b, n, E]
            # (event * candidate) W = event (diag(candidate) W): a product per user, whatever the candidates
            weights = target[group.candidates][:, :, None] * self.of_product
            product = read[group.row] @ weights
            hidden = F.silu(of_event[group.events][group.row] + of_target[group.candidates][:, None] + product)
            valid = group.pair_valid
            self.num_places += group.events.numel()
            weight = self.weigh(hidden).squeeze(-1).masked_fill(~valid, 0.0)
            interest = (weight[:, None] @ read[group.row]).squeeze(1) / valid.sum(1, keepdim=True) ** 0.5
            if group.empty is not None:
                interest = torch.where(group.empty[:, None], self.empty, interest)
            result = result.index_copy(0, group.candidates, interest.to(result.dtype))
        return result
