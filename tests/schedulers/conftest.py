"""What the tests of launching share: the package installed once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.installed import install


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this tree's package is installed, apart from the one that runs the tests."""
    return install(tmp_path_factory.mktemp("installed"))
