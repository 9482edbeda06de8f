"""Content vectors of several modalities, projected to the model's width, a missing one without any influence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ModalityProjections(nn.ModuleDict):
    """One linear projection per modality, summed over those that a row has.

    Args:
        widths: Width `P` of each modality's vectors, at least one.
        width: Model width `E`.

    Raises:
        ValueError: Without modalities.

    Example:
        >>> content = ModalityProjections({"title": 3, "image": 2}, 4)
        >>> vectors = {"title": torch.ones(2, 3), "image": torch.full((2, 2), float("nan"))}
        >>> present = {"title": torch.tensor([True, True]), "image": torch.tensor([False, False])}
        >>> total, count = content(vectors, present)
        >>> total.shape, count.tolist(), bool(total.isfinite().all())
        (torch.Size([2, 4]), [1, 1], True)
    """

    def __init__(self, widths: Mapping[str, int], width: int) -> None:
        super().__init__()
        if not widths:
            raise ValueError("modalities: none; leave the projections out where there is no content.")
        self.widths = dict(widths)
        self._keys: dict[str, str] = {}
        for name, vector_width in widths.items():
            key = name.replace(".", "_")  # parameter names take no dots, nor the names of a module's own attributes
            while hasattr(self, key):
                key += "_"
            self._keys[name] = key
            self.add_module(key, nn.Linear(vector_width, width))

    def forward(self, content: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum the projected modalities.

        Args:
            content: Vectors by modality, each `[n, P]`; a missing one is never read, so it may be NaN.
            present: Which rows have the modality, `[n]` bool.

        Returns:
            Sum over the present modalities, `[n, E]`, and their number, `[n]` int64.

        Raises:
            ValueError: When a modality that the model was built with is missing or of another width.
        """
        parts = []
        for name, key in self._keys.items():
            self._check(name, content, present)
            projection, missing = self[key], ~present[name][:, None]
            vectors = content[name].masked_fill(missing, 0.0).to(next(projection.parameters()).dtype)
            parts.append(projection(vectors).masked_fill(missing, 0.0))
        count = torch.stack([present[name] for name in self._keys]).sum(0)
        return sum(parts[1:], parts[0]), count

    def _check(self, name: str, content: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
        for field, given in (("content", content), ("present", present)):
            if name not in given:
                raise ValueError(f"{field}[{name!r}]: missing; the model was built with {list(self.widths)}.")
        if content[name].shape[1] != self.widths[name]:
            raise ValueError(
                f"content[{name!r}]: width {content[name].shape[1]}, but the model was built for {self.widths[name]}; "
                "use the content generation that it was trained on."
            )
