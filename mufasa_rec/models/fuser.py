"""The fusion layer with its losses, as a training program steps it."""

from __future__ import annotations

from torch import Tensor, nn

from mufasa_rec.modules.fusion import FusionLayer, ItemContent
from mufasa_rec.modules.fusion_batch import Behaviour
from mufasa_rec.modules.fusion_objective import FusionObjective


class Fuser(nn.Module):
    """A fusion layer and its objective.

    Args:
        layer: The layer.
        objective: Its losses, over the items of all ranks.
    """

    def __init__(self, layer: FusionLayer, objective: FusionObjective) -> None:
        super().__init__()
        self.layer, self.objective = layer, objective

    def forward(self, items: ItemContent, behaviour: Behaviour) -> tuple[Tensor, dict[str, Tensor]]:
        """Fuse and judge a batch; collective.

        Args:
            items: This rank's items.
            behaviour: What the training split says of them.

        Returns:
            The loss of all ranks' items, and its terms.
        """
        loss = self.objective(self.layer(items), items, behaviour)
        return loss.total, loss.terms
