"""What all tests share: `gpu` tests are skipped without a GPU, and one small data set is prepared per session."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.datasets import prepare_small

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared data set of 120 users and 90 items with every kind of column and two modalities; read only."""
    return prepare_small(tmp_path_factory.mktemp("small"))
