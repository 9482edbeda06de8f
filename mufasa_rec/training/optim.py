"""One optimizer for the pipeline: AdamW on the data-parallel weights, and the learning rate of the tables."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mufasa_rec.distributed.table_config import TableOptimizerConfig


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights are updated.

    Attributes:
        learning_rate: Peak learning rate of AdamW on everything but the tables.
        weight_decay: AdamW's decay, on matrices only.
        warmup_steps: Steps of linear warm-up, of the tables too.
        final_share: Share of the peak learning rate at the end of the cosine; 1 keeps it constant.
        fusion_share: Share of the learning rate that a fusion layer inside the retriever is tuned with.
        max_grad_norm: Bound of the norm of the data-parallel gradient (the tables are updated inside the backward).
        tables: The tables' fused optimizer.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    final_share: float = 0.05
    fusion_share: float = 0.1
    max_grad_norm: float = 1.0
    tables: TableOptimizerConfig = field(default_factory=TableOptimizerConfig)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "fusion_share", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)}: choose above 0.")
        if not 0.0 <= self.final_share <= 1.0:
            raise ValueError(f"optimizer.final_share={self.final_share}: choose 0 to 1.")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps={self.warmup_steps}: choose 0 or more.")


class TrainOptimizer:
    """What the pipeline calls as its optimizer: clips, schedules and steps.

    Args:
        dense: The data-parallel parameters by name.
        fused: The fused optimizer of the sharded tables (a TorchRec KeyedOptimizer), with the peak learning rate of
            each; its step only hands FBGEMM the learning rates.
        config: How weights are updated.
        total_steps: Steps of the whole run, over which the cosine falls.
        slow: Names of the parameters that learn at `config.fusion_share` of the learning rate.
    """

    def __init__(
        self,
        dense: dict[str, nn.Parameter],
        fused: Any,
        config: OptimizerConfig,
        total_steps: int,
        *,
        slow: Collection[str] = (),
    ) -> None:
        self.config, self.fused, self.total_steps = config, fused, max(total_steps, 1)
        self.parameters = dense
        groups = _groups({name: p for name, p in dense.items() if name not in slow}, config.weight_decay, 1.0)
        if slow:
            groups += _groups({name: dense[name] for name in slow}, config.weight_decay, config.fusion_share)
        self.dense = torch.optim.AdamW(groups, lr=config.learning_rate, foreach=True)
        self.table_rates = [group["lr"] for group in fused.param_groups]  # peaks; a frozen table's is 0
        self.num_steps = 0
        self.grad_norm: Tensor = torch.zeros(())
        self._set_learning_rates()

    @property
    def learning_rate(self) -> float:
        """Learning rate of AdamW in the coming step."""
        return self.config.learning_rate * self.share(self.num_steps)

    def share(self, step: int) -> float:
        """Share of the peak learning rate at `step`: linear warm-up, then a cosine down to `final_share`."""
        config = self.config
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        progress = (step - config.warmup_steps) / max(self.total_steps - config.warmup_steps, 1)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        return config.final_share + (1.0 - config.final_share) * cosine

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the last step."""
        self.dense.zero_grad(set_to_none=set_to_none)
        self.fused.zero_grad()

    def step(self, *_: Any) -> None:
        """Clip, update, and set the learning rates of the next step."""
        self.grad_norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.max_grad_norm)
        self.dense.step()
        self.num_steps += 1
        self._set_learning_rates()

    def tensors(self) -> dict[str, Any]:
        """The state of both optimizers by parameter name, as tensors that a checkpoint is written from or read into.

        AdamW makes its state in its first step; it is made here when that has not been.
        """
        dense = {name: self._dense_state(parameter) for name, parameter in self.parameters.items()}
        fused = self.fused.state_dict()["state"]
        # A rank without a shard of a table has an empty entry for it, which a checkpoint cannot hold.
        return {"dense": dense, "fused": {name: dict(state) for name, state in fused.items() if state}}

    def _dense_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.dense.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return dict(state)

    def resume(self, num_steps: int) -> None:
        """Stand where the run stood after `num_steps` steps; the tensors are read by the checkpoint."""
        self.num_steps = num_steps
        self.fused.set_optimizer_step(num_steps)  # Adam's bias correction counts steps
        self._set_learning_rates()

    def _set_learning_rates(self) -> None:
        share = self.share(self.num_steps)
        for group in self.dense.param_groups:
            group["lr"] = self.config.learning_rate * share * group["share"]
        for group, peak in zip(self.fused.param_groups, self.table_rates):
            group["lr"] = peak * share
        self.fused.step()  # FBGEMM takes the learning rate here; the update itself happens in the backward


def _groups(parameters: Mapping[str, nn.Parameter], decay: float, share: float) -> list[dict[str, Any]]:
    """Matrices, which decay, and the rest, which does not; `share` is that of the learning rate."""
    decayed = [p for p in parameters.values() if p.ndim >= 2]
    kept = [p for p in parameters.values() if p.ndim < 2]
    return [
        {"params": decayed, "weight_decay": decay, "share": share},
        {"params": kept, "weight_decay": 0.0, "share": share},
    ]
