"""Precomputed vectors by item id: everything a caller of the content store needs, from one place.

The parts: `vectors` reads vector files, `content_writer` writes generations and appends segments, `content_store` maps
and reads them, `content_manifest` and `content_segment` are the two file formats. `docs/content.md` tells the whole.
"""

from mufasa_rec.data.content_manifest import ContentManifest, generations, require_same
from mufasa_rec.data.content_store import ContentStore, coverage, coverage_lines
from mufasa_rec.data.content_writer import append_content, write_content
from mufasa_rec.data.vectors import read_vectors

__all__ = [
    "ContentManifest",
    "ContentStore",
    "append_content",
    "coverage",
    "coverage_lines",
    "generations",
    "read_vectors",
    "require_same",
    "write_content",
]
