"""Cells of a grid that fuse first: each fusion is made once, in a view of the data set, so that the data set stays.

A view is a folder of links to what `prepare` wrote, with a `dataset.json` and a list of modalities of its own: `fuse`
writes its vectors there, and variants do not see one another's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mufasa_rec.data import paths
from mufasa_rec.data.content import ContentManifest
from mufasa_rec.data.content_manifest import generation_folder
from mufasa_rec.data.schema import DATASET_FILE, DatasetManifest
from torchx_apps.fuse_config import FuseConfig, preset
from torchx_apps.local_job import Job, run_job

# What makes no other vectors: where things lie, the seed (which names the fusion itself), how a run is watched.
_NO_PART = {"dataset", "checkpoint", "threads", "seed", "chunk", "report"}
_DONE = "summary.json"


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """A fusion that variants of a grid want.

    Attributes:
        flags: Command line of `fuse`, without data set, run and seed.
        config: Its configuration.
    """

    flags: tuple[str, ...]
    config: FuseConfig

    @classmethod
    def parse(cls, flags: tuple[str, ...], name: str) -> Fusion:
        """Read flags of `fuse` upon a preset.

        Raises:
            ValueError: For an unknown preset or a value that is refused.
            SystemExit: For an unknown flag; says which.
        """
        config = tyro.cli(
            FuseConfig, args=flags, default=preset(name), prog="fuse", config=(tyro.conf.FlagConversionOff,)
        )
        return cls(flags=("--preset", name, *flags), config=config)

    def key(self, split: str) -> str:
        """Short hash of all that makes the vectors, the seed aside."""
        fields = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in _NO_PART}
        text = json.dumps({"split": split, **fields}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def raw_modalities(dataset: paths.Location, manifest: DatasetManifest) -> list[str]:
    """Modalities of a data set that were not learned from events."""
    found = []
    for name, ref in sorted(manifest.content.items()):
        if ContentManifest.load(generation_folder(str(dataset), name, ref.generation)).split is None:
            found.append(name)
    return found


def fused(fusion: Fusion, dataset: str, split: str, seed: int, output: Path, processes: int) -> tuple[Path, float]:
    """Fuse in a view of the data set, or find that it was done; a fusion that was interrupted goes on.

    Args:
        fusion: What is wanted.
        dataset: The data set, a local folder.
        split: Hash of the split.
        seed: Seed of the run.
        output: Folder of the grid.
        processes: Processes of the job.

    Returns:
        The view, and the seconds that were spent now.

    Raises:
        ValueError: When the data set is no local folder.
    """
    stem = f"{fusion.key(split)}-seed{seed}"
    view, run = output / "datasets" / stem, output / "fusions" / stem
    if (run / _DONE).exists():
        return view, 0.0
    make_view(dataset, view)
    job = Job(
        name=f"fuse {stem}",
        component="fuse",
        program_args=[*fusion.flags, "--seed", str(seed), "--dataset", str(view), "--run", str(run)],
        processes=processes,
    )
    return view, run_job(job, output / "logs" / job.name.replace(" ", "_"))


def make_view(dataset: str, view: Path) -> None:
    """Make a view of a data set, unless it is there.

    Raises:
        ValueError: When the data set is no local folder.
    """
    if paths.is_remote(dataset):
        raise ValueError(f"data.dataset={dataset!r}: a view is made of links; copy the data set to a local folder.")
    if (view / DATASET_FILE).exists():
        return
    source = Path(dataset).resolve()
    (view / "content").mkdir(parents=True, exist_ok=True)
    links = {view / path.name: path for path in source.iterdir() if path.name not in ("content", DATASET_FILE)}
    links |= {view / "content" / path.name: path for path in (source / "content").iterdir()}
    raw = raw_modalities(dataset, DatasetManifest.load(dataset))
    for link, target in links.items():
        learned = link.parent.name == "content" and target.name not in raw
        if not learned and not link.is_symlink():
            os.symlink(target, link, target_is_directory=target.is_dir())
    with paths.atomic_write(view / DATASET_FILE) as path:  # last: from here on it is a view
        shutil.copyfile(source / DATASET_FILE, path)
        document: dict[str, Any] = json.loads(path.read_text())
        document["content"] = {name: ref for name, ref in document["content"].items() if name in raw}
        path.write_text(json.dumps(document, indent=2) + "\n")
