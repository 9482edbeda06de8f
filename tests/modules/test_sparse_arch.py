"""The lookups, unsharded on a CPU."""

from __future__ import annotations

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mufasa_rec.modules.sparse_arch import ContentTableConfig, SparseArch, TableConfig, merge, table_name

TABLES = [TableConfig(name="item", num_embeddings=10), TableConfig(name="item.genre", num_embeddings=4)]
CONTENTS = [
    ContentTableConfig(modality="title", num_embeddings=7, width=6),
    ContentTableConfig(modality="plot", num_embeddings=5, width=8),
    ContentTableConfig(modality="image", num_embeddings=5, width=3),
]
IDS = {
    "item": [3, 9, 3],
    "item.genre": [1, 2, 2, 0],
    "content.title": [6, 0, 1],
    "content.plot": [4, 0, 0],
    "content.image": [1, 1, 2],
}


def make_features(ids: dict[str, list[int]]) -> KeyedJaggedTensor:
    values = torch.tensor([value for one in ids.values() for value in one], dtype=torch.int64)
    lengths = torch.tensor([len(one) for one in ids.values()], dtype=torch.int32)
    return KeyedJaggedTensor(keys=list(ids), values=values, lengths=lengths, stride=1)


def make_arch() -> SparseArch:
    arch = SparseArch(TABLES, 8, CONTENTS, torch.device("cpu"))
    with torch.no_grad():
        for parameter in arch.content.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 8)
    return arch


def test_every_feature_is_looked_up_with_as_many_rows_as_ids() -> None:
    found = merge(make_arch()(make_features(IDS)))
    assert {name: len(rows) for name, rows in found.items()} == {name: len(ids) for name, ids in IDS.items()}
    assert found["item"].shape[1] == found["item.genre"].shape[1] == 8
    assert torch.equal(found["item"][0], found["item"][2])


def test_content_tables_are_padded_to_multiples_of_four_and_half_precise() -> None:
    assert [content.padded_width for content in CONTENTS] == [8, 8, 4]
    arch = make_arch()
    found = merge(arch(make_features(IDS)))
    assert [found[f"content.{c.modality}"].shape[1] for c in CONTENTS] == [8, 8, 4]
    assert all(parameter.dtype == torch.float16 for parameter in arch.content.parameters())
    assert found["content.title"][1].tolist() == [i / 8 for i in range(8)]
    assert arch.widths == {"title": 6, "plot": 8, "image": 3}


def test_content_of_one_width_shares_a_collection() -> None:
    arch = make_arch()
    assert sorted(arch.content) == ["width_4", "width_8"]


def test_tables_of_another_width_lie_in_collections_of_their_own() -> None:
    tables = [
        *TABLES,
        TableConfig(name="user", num_embeddings=5, dim=4),
        TableConfig(name="hour", num_embeddings=2, dim=16),
    ]
    arch = SparseArch(tables, 8, CONTENTS, torch.device("cpu"))
    found = merge(arch(make_features({**IDS, "user": [4, 0], "hour": [1]})))
    assert {name: found[name].shape for name in ("item", "user", "hour")} == {
        "item": (3, 8),
        "user": (2, 4),
        "hour": (1, 16),
    }
    assert sorted(arch.others) == ["dim_16", "dim_4"]
    assert sorted(arch.trained_tables) == ["t_hour", "t_item", "t_item_genre", "t_user"]
    assert found["user"].requires_grad
    assert not list(make_arch().others)


def test_ids_learn_and_content_does_not() -> None:
    arch = make_arch()
    found = merge(arch(make_features(IDS)))
    assert found["item"].requires_grad
    assert not any(found[f"content.{c.modality}"].requires_grad for c in CONTENTS)


def test_batch_without_ids_has_no_rows() -> None:
    found = merge(make_arch()(make_features({name: [] for name in IDS})))
    assert all(len(rows) == 0 for rows in found.values())


def test_initial_weights_are_small_and_content_starts_at_zero() -> None:
    arch = SparseArch(TABLES, 8, CONTENTS, torch.device("cpu"))
    assert all((parameter == 0).all() for parameter in arch.content.parameters())
    assert all(0 < parameter.std() < 1 for parameter in arch.trained.parameters())


def test_tables_on_meta_hold_no_memory() -> None:
    arch = SparseArch(TABLES, 8, CONTENTS, torch.device("meta"))
    assert all(parameter.is_meta for parameter in arch.parameters())


def test_empty_content_store_still_has_a_row() -> None:
    arch = SparseArch(TABLES, 8, [ContentTableConfig(modality="t", num_embeddings=0, width=4)], torch.device("cpu"))
    assert next(arch.content.parameters()).shape == (1, 4)


def test_table_names_hold_no_dots() -> None:
    assert table_name("item.genre") == "t_item_genre"


def test_bad_tables_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="table 'item': num_embeddings=0"):
        TableConfig(name="item", num_embeddings=0)
    with pytest.raises(ValueError, match="table 'user': dim=6; choose a positive multiple of 4"):
        TableConfig(name="user", num_embeddings=3, dim=6)
    with pytest.raises(ValueError, match="modality 'title': width=0"):
        ContentTableConfig(modality="title", num_embeddings=3, width=0)
