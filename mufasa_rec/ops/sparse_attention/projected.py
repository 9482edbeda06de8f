"""What a layer hands to sparse attention for each event or candidate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

WINDOW, SELECTED, BLOCK = 0, 1, 2  # the order of the branches wherever they are numbered


@dataclass(frozen=True, kw_only=True)
class Projected:
    """Queries, keys, values and gates of rows (events or candidates), all of one dtype.

    Attributes:
        q: Queries of the window and selected branches, with positions applied, `[L, H, D]`.
        q_block: Queries of the block branch, without rotary positions, `[L, H, D]`.
        k_window: Keys of the window branch, with positions applied, `[L, G, D]`; `G` divides `H`, and query head `h`
            reads key head `h // (H / G)`.
        v_window: Values of the window branch, `[L, G, D]`.
        k_selected: Keys of the selected branch. The very tensor `k_window` where keys are shared.
        v_selected: Values of the selected branch. The very tensor `v_window` where values are shared.
        gates: Weight of each head's window, selected and block branch, in this order, `[L, H, 3]`; sigmoids already.
    """

    q: Tensor
    q_block: Tensor
    k_window: Tensor
    v_window: Tensor
    k_selected: Tensor
    v_selected: Tensor
    gates: Tensor

    @property
    def shared(self) -> bool:
        """Whether the window and the selected branch read the same keys and values."""
        return self.k_selected is self.k_window and self.v_selected is self.v_window

    @property
    def groups(self) -> int:
        """Key/value heads `G`."""
        return self.k_window.shape[1]

    def map(self, **changes: Tensor) -> Projected:
        """A copy with some tensors replaced."""
        return Projected(**{**self.tensors(), **changes})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in a fixed order."""
        return {name: getattr(self, name) for name in FIELDS}


FIELDS = tuple(Projected.__dataclass_fields__)
