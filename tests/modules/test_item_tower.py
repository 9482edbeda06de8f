"""Item vectors: which of an item's parts may and may not change them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mufasa_rec.modules.item_tower import Items, ItemTower
from tests.tensors import gradients, leaf

WIDTH, NUM_ITEMS = 8, 6
MODALITIES = {"title": 5, "image": 3}
COUNTS = torch.tensor([2, 0, 1, 3, 0, 1])
PRESENT = {
    "title": torch.tensor([True, True, False, False, True, False]),
    "image": torch.tensor([True, False, True, False, False, False]),
}


class Parts(NamedTuple):
    ids: Tensor
    looked_up: dict[str, Tensor]


def make_parts() -> Parts:
    torch.manual_seed(1)
    looked_up = {f"content.{name}": torch.randn(NUM_ITEMS, width) for name, width in MODALITIES.items()}
    looked_up["item.genre"] = torch.randn(int(COUNTS.sum()), WIDTH)
    looked_up["item.brand"] = torch.randn(NUM_ITEMS, WIDTH)
    return Parts(torch.randn(NUM_ITEMS, WIDTH), looked_up)


def make_tower(
    modalities: dict[str, int] = MODALITIES, *, categoricals: bool = True, use_id: bool = True, id_dropout: float = 0.1
) -> ItemTower:
    torch.manual_seed(0)
    names = {"genre": True, "brand": False} if categoricals else {}
    return ItemTower(modalities, names, WIDTH, use_id=use_id, id_dropout=id_dropout)


def embed(tower: ItemTower, parts: Parts) -> Items:
    return tower(parts.ids, parts.looked_up, PRESENT, {"genre": COUNTS})


def test_vectors_are_unit_and_items_know_whether_they_have_content() -> None:
    items = embed(make_tower(), make_parts())
    assert torch.allclose(items.vectors.norm(dim=1), torch.ones(NUM_ITEMS))
    assert items.has_content.tolist() == [True, True, True, False, True, False]
    assert (items.content[~items.has_content] == 0).all()


def test_embedding_is_the_id_plus_categoricals_a_multi_valued_one_by_its_mean() -> None:
    parts = make_parts()
    genre = parts.looked_up["item.genre"].split(COUNTS.tolist())
    mean = torch.stack([values.mean(0) if len(values) else torch.zeros(WIDTH) for values in genre])
    assert torch.allclose(embed(make_tower(), parts).embedded, parts.ids + parts.looked_up["item.brand"] + mean)


def test_id_is_dropped_in_training_only_where_content_exists() -> None:
    tower, parts = make_tower(id_dropout=0.999999), make_parts()
    other = parts._replace(ids=parts.ids + 1.0)
    same = torch.isclose(embed(tower, parts).vectors, embed(tower, other).vectors).all(1)
    assert same.tolist() == [True, True, True, False, True, False]
    tower.eval()
    assert not torch.isclose(embed(tower, parts).vectors, embed(tower, other).vectors).all(1).any()


def test_history_keeps_an_id_that_the_item_vector_dropped() -> None:
    tower, parts = make_tower(id_dropout=0.999999), make_parts()
    assert torch.equal(embed(tower, parts).embedded, embed(tower.eval(), parts).embedded)


def test_share_of_dropped_ids_is_the_one_asked_for() -> None:
    tower = make_tower(id_dropout=0.3)
    keep = tower._keep(torch.zeros(20_000, WIDTH), torch.ones(20_000, dtype=torch.bool))
    assert keep.mean().item() == pytest.approx(0.7, abs=0.02)


def test_without_ids_nothing_depends_on_them_but_the_table_stays_in_the_graph() -> None:
    tower, parts = make_tower(use_id=False), make_parts()
    ids = leaf(parts.ids)
    items = embed(tower, parts._replace(ids=ids))
    (items.vectors.sum() + items.embedded.sum()).backward()
    assert (gradients([ids])[0] == 0).all()
    poisoned = embed(tower, parts._replace(ids=torch.full_like(parts.ids, float("nan"))))
    assert torch.equal(poisoned.vectors, items.vectors)
    assert torch.equal(poisoned.embedded, items.embedded)


def test_missing_modality_has_no_influence_even_as_nan() -> None:
    tower, parts = make_tower(id_dropout=0.0), make_parts()
    before = embed(tower, parts)
    for name, has in PRESENT.items():
        parts.looked_up[f"content.{name}"][~has] = float("nan")
    after = embed(tower, parts)
    after.vectors.sum().backward()
    assert torch.equal(before.vectors, after.vectors)
    assert torch.equal(before.content, after.content)
    assert all(torch.isfinite(g).all() for g in gradients(tower.parameters()))


def test_modalities_of_an_item_are_averaged() -> None:
    """An item with two equal modalities has the content of an item with one of them."""
    tower = ItemTower({"a": 4, "b": 4}, {}, WIDTH)
    assert tower.content is not None
    tower.content.projections["b"].load_state_dict(tower.content.projections["a"].state_dict())
    vectors = torch.randn(1, 4).expand(2, -1)
    present = {"a": torch.tensor([True, True]), "b": torch.tensor([True, False])}
    z, _ = tower.content({"a": vectors, "b": vectors}, present)
    assert torch.allclose(z[0], z[1], atol=1e-6)


def test_cold_item_has_a_vector_from_content_and_the_shared_row() -> None:
    """Row 0 starts at zero: an item that nobody chose has the direction of its content, not of noise."""
    tower, parts = make_tower(categoricals=False).eval(), make_parts()
    cold = embed(tower, parts._replace(ids=torch.zeros_like(parts.ids)))
    assert tower.head is not None
    expected = torch.nn.functional.normalize(tower.head(cold.content), dim=1)
    assert torch.allclose(cold.vectors, expected, atol=1e-6)


def test_zero_row_of_a_model_of_ids_alone_has_a_bounded_gradient() -> None:
    ids = leaf(torch.cat([torch.zeros(1, WIDTH), torch.randn(1, WIDTH)]))
    items = make_tower({}, categoricals=False)(ids, {}, {}, {})
    (items.vectors * torch.randn(2, WIDTH)).sum().backward()
    assert items.vectors[0].tolist() == [0.0] * WIDTH
    assert items.vectors[1].norm().item() == pytest.approx(1.0)
    assert 0 < gradients([ids])[0][0].abs().max() < 1000


def test_tower_of_ids_alone_has_no_content() -> None:
    items = make_tower({}, categoricals=False)(torch.randn(3, WIDTH), {}, {}, {})
    assert not items.has_content.any()
    assert (items.content == 0).all()


def test_every_parameter_has_a_gradient_without_items() -> None:
    tower = make_tower()
    looked_up = {name: x[:0] for name, x in make_parts().looked_up.items()}
    items = tower(torch.zeros(0, WIDTH), looked_up, {n: x[:0] for n, x in PRESENT.items()}, {"genre": COUNTS[:0]})
    items.vectors.sum().backward()
    assert all((g == 0).all() for g in gradients(tower.parameters()))


def test_missing_features_are_refused_by_name() -> None:
    parts = make_parts()
    for name in parts.looked_up:
        fewer = {key: x for key, x in parts.looked_up.items() if key != name}
        with pytest.raises(ValueError, match=name):
            embed(make_tower(), parts._replace(looked_up=fewer))
    with pytest.raises(ValueError, match=r"model\.use_id=False needs content"):
        make_tower({}, use_id=False)
