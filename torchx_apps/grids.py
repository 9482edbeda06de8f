"""Named grids of the ablation runner: variants as the flags in which they differ from a preset.

The others are compared with the first one, unless the command names another.
"""

from __future__ import annotations

_PATTERN = "--model.extractor.pattern"
_SPARSE = ("--model.attention", "sparse")

Variants = dict[str, tuple[str, ...]]

# What `mufasa_rec.ops.sparse_attention.pattern.ablate` does, as flags; `timegap` needs absolute times.
ATTENTION: Variants = {
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

GRIDS: dict[str, Variants] = {"attention": ATTENTION}
