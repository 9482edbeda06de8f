"""Where `torchx run` finds our components: in the working folder, or else in the installed package.

TorchX looks for a component file in the working folder and then beside its own package. By the entry point
`torchx.file` it asks here instead of there, so that `components/train.py:train` and `components.train:train` work
from any folder, however the package was installed. A file in the working folder is always taken first.
"""

from importlib import resources
from pathlib import Path

import torchx

PACKAGE = "components"


def get_file_contents(conf_file: str) -> str | None:
    """The text of a component file that the working folder does not have; None when there is none.

    Args:
        conf_file: What was given before the colon.
    """
    package, _, name = conf_file.removesuffix(".py").replace("/", ".").partition(".")
    if package == PACKAGE and name.isidentifier():
        file = resources.files(PACKAGE).joinpath(f"{name}.py")
        if file.is_file():
            return file.read_text()
    beside_torchx = Path(torchx.__file__).parent.parent / conf_file
    return beside_torchx.read_text() if beside_torchx.is_file() else None
