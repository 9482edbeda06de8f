"""The programs that components launch: each runs as `python -m torchx_apps.<name>` and has `main(argv)`.

The versions of torch, fbgemm-gpu and torchrec are checked here because this file runs before any app imports torchrec.
"""

from mufasa_rec.versions import check_versions

check_versions()
