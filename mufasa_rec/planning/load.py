"""What a training step asks of one rank, as far as it follows from the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """What a step asks of one rank.

    Attributes:
        ids: Ids that are looked up, by feature.
        dense_parameters: Numbers in the data-parallel weights.
        dense_flops: Floating-point operations of the layers of the data-parallel part, forward and backward.
        attention_flops: Those of attention.
        objective_flops: Those of the scores of a retriever's candidates.
        batches_ahead: Batches that the loader makes ahead.
        activation_bytes: Most memory that a step takes beside weights, gradients and optimizer state.
    """

    ids: Mapping[str, int] = field(default_factory=dict)
    dense_parameters: int = 0
    dense_flops: float = 0.0
    attention_flops: float = 0.0
    objective_flops: float = 0.0
    batches_ahead: int = 0
    activation_bytes: int = 0

    @property
    def dense_bytes(self) -> int:
        """Data-parallel weights, their gradients and AdamW's two moments, all fp32."""
        return 4 * 4 * self.dense_parameters
