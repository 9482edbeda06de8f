"""A trained fusion layer as one safetensors file: its weights, and all that is needed to use them elsewhere."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mufasa_rec.data import paths
from mufasa_rec.modules.fusion import FusionConfig, FusionLayer

LAYER_FILE = "layer.safetensors"
_KEY = "fusion_layer"


@dataclass(frozen=True, eq=False)
class TrainedLayer:
    """A trained layer.

    Attributes:
        config: The layer.
        widths: Width of each modality's vectors.
        num_genres: Its genre ids.
        genre: Item categorical that is its genre; None without genres.
        dataset: What identifies the data that it was trained on: `split`, `content.<modality>`, and others.
        weights: Its weights by name.
    """

    config: FusionConfig
    widths: dict[str, int]
    num_genres: int
    genre: str | None
    dataset: dict[str, str]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, layer: FusionLayer, genre: str | None, dataset: dict[str, str]) -> TrainedLayer:
        """A layer as it stands."""
        weights = {name: value.detach().cpu().contiguous() for name, value in layer.state_dict().items()}
        return cls(layer.config, layer.widths, layer.num_genres, genre, dataset, weights)

    def build(self) -> FusionLayer:
        """Make the layer with these weights."""
        layer = FusionLayer(self.config, self.widths, self.num_genres)
        layer.load_state_dict(self.weights)
        return layer

    def save(self, file: paths.Location) -> None:
        """Write the file."""
        about = {name: getattr(self, name) for name in ("widths", "num_genres", "genre", "dataset")}
        text = json.dumps({"format_version": 1, "config": asdict(self.config), **about})
        with paths.atomic_write(file) as path:
            save_file(self.weights, path, metadata={_KEY: text})

    @classmethod
    def load(cls, file: paths.Location) -> TrainedLayer:
        """Read what `save` wrote.

        Raises:
            ValueError: When the file is missing, or no such file.
        """
        if not paths.exists(file):
            raise ValueError(f"{os.fspath(file)}: missing; `fuse` writes it at the end of a run.")
        try:
            with safe_open(paths.local_copy(file), framework="pt") as handle:
                about = json.loads((handle.metadata() or {})[_KEY])
                weights = {name: handle.get_tensor(name) for name in list(handle.keys())}
            config = FusionConfig(**about["config"])
            return cls(config, about["widths"], about["num_genres"], about["genre"], about["dataset"], weights)
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(
                f"{os.fspath(file)}: holds no fusion layer ({error}); give the run folder of `fuse`."
            ) from error
