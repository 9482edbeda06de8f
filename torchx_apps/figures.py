"""Draw the figures of the documentation, from the code that they are about.

    python -m torchx_apps.figures [--output docs/figures]

They are committed beside the pages that show them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mufasa_rec.evaluation.mask_figure import draw_mask


def main(argv: Sequence[str] | None = None) -> None:
    """Write all figures into a folder."""
    parser = argparse.ArgumentParser(
        prog="figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), metavar="FOLDER")
    folder = parser.parse_args(argv).output
    draw_mask(folder / "attention_mask.png")
    print(f"written: {folder / 'attention_mask.png'}")


if __name__ == "__main__":
    main()
