"""Named grids of the ablation runner: variants as the flags in which they differ from a preset.

The others are compared with the first one, unless the command names another.
"""

from __future__ import annotations

from dataclasses import dataclass

_PATTERN = "--model.extractor.pattern"
_SPARSE = ("--model.attention", "sparse")
# Stands for the modalities of a data set that were not learned from events.
RAW = "{raw}"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is different about a variant.

    Attributes:
        train: Flags of `train`.
        fuse: Flags of `fuse`, which runs first then; None for a variant that does without.
    """

    train: tuple[str, ...] = ()
    fuse: tuple[str, ...] | None = None


Variants = dict[str, Variant]


@dataclass(frozen=True, kw_only=True)
class NamedGrid:
    """A grid.

    Attributes:
        variants: Its variants.
        preset: Preset of `train`, unless the command names another.
    """

    variants: Variants
    preset: str = "short"


# What `mufasa_rec.ops.sparse_attention.pattern.ablate` does, as flags; `timegap` needs absolute times.
_ATTENTION = {
    "sal": _SPARSE,
    "full": ("--model.attention", "full"),
    "window_only": (*_SPARSE, f"{_PATTERN}.selected-branch", "False", f"{_PATTERN}.block-branch", "False"),
    "window_first_block": (
        *_SPARSE,
        *(f"{_PATTERN}.block-branch", "False", f"{_PATTERN}.own-block", "False"),
        *(f"{_PATTERN}.num-selected", "1"),
    ),
    "no_selected": (*_SPARSE, f"{_PATTERN}.selected-branch", "False"),
    "no_block": (*_SPARSE, f"{_PATTERN}.block-branch", "False"),
    "no_mixer": (*_SPARSE, f"{_PATTERN}.block-mixer", "False"),
    "exact_choice": (*_SPARSE, f"{_PATTERN}.selection-stride", "1"),
    "shared_kv": (*_SPARSE, "--model.extractor.shared-kv", "True"),
    "timegap": (*_SPARSE, f"{_PATTERN}.segmentation", "timegap"),
    "coherence": (*_SPARSE, f"{_PATTERN}.segmentation", "coherence"),
}

_NO_ID = ("--model.use-id", "False")
_FUSED = ("--data.modalities", "fused")
_RAW = ("--data.modalities", RAW)
_LOSSES = ("semantic", "collaborative", "structure", "distribution")

# Each loss of the fusion layer off, by what the fused vectors alone retrieve.
FUSION: Variants = {
    "all": Variant(train=(*_NO_ID, *_FUSED), fuse=()),
    **{f"no_{name}": Variant(train=(*_NO_ID, *_FUSED), fuse=(f"--objective.{name}-weight", "0")) for name in _LOSSES},
    "no_reconstruction": Variant(train=(*_NO_ID, *_FUSED), fuse=("--objective.structure.reconstruction", "0")),
}

# Content alone. A linear projection per modality, summed, is one of their concatenation: that is what `raw` is.
CONTENT: Variants = {
    "fused": Variant(train=(*_NO_ID, *_FUSED), fuse=()),
    "raw": Variant(train=(*_NO_ID, *_RAW)),
    "title": Variant(train=(*_NO_ID, "--data.modalities", "title")),
}

# With ids: what content adds where events say little.
RARE: Variants = {
    "fused": Variant(train=_FUSED, fuse=()),
    "ids": Variant(train=("--model.use-content", "False")),
    "raw": Variant(train=_RAW),
}

# DMAE, its rivals, and DMAE without each unit; what `mufasa_rec.models.ranker_config.comparator` does, as flags.
_INTEREST = "--ranker.content-interest"
RANKING: Variants = {
    "dmae": Variant(),
    "din": Variant(train=(_INTEREST, "none")),
    "simtier": Variant(train=(_INTEREST, "simtier")),
    "early_fusion": Variant(train=(_INTEREST, "early_fusion")),
    **{
        f"dmae_without_{unit}": Variant(train=(f"--ranker.dmae.use-{unit}", "False"))
        for unit in ("mieu", "mifu", "midu")
    },
}

GRIDS: dict[str, NamedGrid] = {
    "attention": NamedGrid(variants={name: Variant(train=flags) for name, flags in _ATTENTION.items()}),
    "fusion": NamedGrid(variants=FUSION, preset="brief"),
    "content": NamedGrid(variants=CONTENT, preset="brief"),
    "rare": NamedGrid(variants=RARE, preset="brief"),
    "ranking": NamedGrid(variants=RANKING, preset="ranking"),
}
