"""The fusion layer: its equations item by item, and what may and may not move a fused vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mufasa_rec.modules.fusion import Fused, FusionConfig, FusionLayer, ItemContent
from tests.tensors import assert_close, gradients, leaf

WIDTHS = {"title": 5, "image": 3, "plot": 4}
NUM_ITEMS, NUM_GENRES = 6, 4
LENGTHS = torch.tensor([2, 0, 1, 3, 1, 1])
PRESENT = {
    "title": torch.tensor([True, True, False, True, False, True]),
    "image": torch.tensor([True, False, True, True, False, False]),
    "plot": torch.tensor([True, False, False, True, False, True]),
}


def make_items(names: Mapping[str, int] = WIDTHS) -> ItemContent:
    torch.manual_seed(1)
    content = {name: torch.randn(NUM_ITEMS, width) for name, width in WIDTHS.items()}
    genres = torch.tensor([3, 1, 0, 0, 1, 2, 2, 3])
    return ItemContent(
        content={name: content[name] for name in names},
        present={name: PRESENT[name] for name in names},
        genres=genres,
        genre_lengths=LENGTHS,
    )


def make_layer(config: FusionConfig | None = None, widths: Mapping[str, int] = WIDTHS) -> FusionLayer:
    torch.manual_seed(0)
    layer = FusionLayer(config or FusionConfig(width=8, num_heads=2), widths, NUM_GENRES)
    with torch.no_grad():  # as after some training: the small tables would hide a mistake
        for table in (layer.types, layer.no_title, layer.genres):
            assert table is not None
            table.normal_()
    return layer.eval()


def with_content(items: ItemContent, **content: Tensor) -> ItemContent:
    return replace(items, content={**items.content, **content})


def slow(layer: FusionLayer, items: ItemContent, i: int) -> Tensor:
    """The docstring's equations for one item, its set `U` built one by one."""
    present = [name for name in layer.widths if items.present[name][i]]
    h = {}
    for name in present:
        vector = items.content[name][i]
        linear = layer.projections[name]
        assert isinstance(linear, torch.nn.Linear)
        h[name] = F.linear(vector / vector.norm() * len(vector) ** 0.5, linear.weight, linear.bias)
    a = h.get("title", layer.no_title)
    assert layer.genres is not None
    mine = items.genres.split(items.genre_lengths.tolist())[i]
    genre = layer.genres[mine].mean(0) if len(mine) else torch.zeros_like(a)
    types = dict(zip(layer.widths, layer.types))
    u = [a + types["title"], *(h[name] + types[name] + genre for name in present if name != "title")]
    tokens, attention = torch.stack(u), layer.attention
    key, value = attention.key_value(tokens).chunk(2, dim=-1)
    query, read = attention.query(a), []
    for q, k, v in zip(*(x.chunk(layer.config.num_heads, dim=-1) for x in (query, key, value))):
        read.append((k @ q / len(q) ** 0.5).softmax(0) @ v)
    f = layer.attention_norm(a + attention.out(torch.cat(read)))
    return layer.output_norm(f + layer.feed_forward(f))


def test_layer_is_its_equations_item_by_item() -> None:
    layer, items = make_layer(), make_items()
    expected = torch.stack([slow(layer, items, i) for i in range(NUM_ITEMS)])
    assert_close([layer(items).z], [expected], 1e-6)


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("training", [False, True])
def test_missing_modality_has_no_influence_even_as_nan(name: str, training: bool) -> None:
    """Neither on outputs nor on gradients, nor in evaluation without gradients."""
    layer, items = make_layer().train(training), make_items()
    missing = ~PRESENT[name][:, None]
    results, without = [], []
    for fill in (0.0, 1e6, float("nan")):
        mine = with_content(items, **{name: items.content[name].masked_fill(missing, fill)})
        torch.manual_seed(3)
        layer.zero_grad()
        fused = layer(mine)
        (fused.z.sin().sum() + sum(h.cos().sum() for h in fused.projected.values())).backward()
        results.append([fused.z, *fused.projected.values(), *gradients(layer.parameters())])
        with torch.no_grad():
            torch.manual_seed(3)
            without.append(layer(mine).z)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
    assert all(torch.equal(x, without[0]) for x in without)
    assert_close(without[:1], results[0][:1], 1e-6)


def test_missing_modality_gives_its_parameters_no_gradient() -> None:
    layer, items = make_layer(), make_items()
    absent = replace(items, present={**items.present, "plot": torch.zeros(NUM_ITEMS, dtype=torch.bool)})
    layer(absent).z.sin().sum().backward()
    assert all((g == 0).all() for g in gradients(layer.projections["plot"].parameters()))
    by_type = dict(zip(layer.widths, gradients([layer.types])[0]))
    assert (by_type["plot"] == 0).all()
    assert (by_type["image"] != 0).any()


@pytest.mark.parametrize("name", WIDTHS)
def test_shuffling_a_modality_between_items_moves_those_who_have_it_and_nobody_else(name: str) -> None:
    layer, items = make_layer(), make_items()
    shuffled = with_content(items, **{name: items.content[name].roll(1, 0)})
    moved = (layer(items).z - layer(shuffled).z).abs().amax(1) > 1e-3
    assert moved.tolist() == PRESENT[name].tolist()


def test_item_with_title_alone_and_item_with_everything_both_work() -> None:
    items = make_items()
    z = make_layer()(items).z
    assert z.isfinite().all()
    assert z.std(dim=1).min() > 0.5
    alone = make_layer(widths={"title": 5})
    assert alone(make_items({"title": 5})).z.shape == (NUM_ITEMS, 8)
    only = replace(items, present={**items.present, **{n: torch.zeros(6, dtype=torch.bool) for n in ("image", "plot")}})
    assert torch.allclose(make_layer()(only).z[1], z[1], atol=1e-6)  # item 1 has nothing but its title


def test_item_without_title_reads_from_a_learned_anchor() -> None:
    layer, items = make_layer(), make_items()
    z = layer(items).z
    z[~PRESENT["title"]].sin().sum().backward()
    assert (gradients([layer.no_title])[0] != 0).any()
    assert (gradients(layer.projections["title"].parameters())[0] == 0).all()
    assert not torch.allclose(z[2], z[4])  # one has an image, the other nothing at all


def test_genres_are_a_set_and_speak_through_the_other_modalities() -> None:
    layer, items = make_layer(), make_items()
    z = layer(items).z
    reordered = replace(items, genres=torch.tensor([1, 3, 0, 2, 1, 0, 2, 3]))
    assert torch.allclose(layer(reordered).z, z, atol=1e-6)
    other = replace(items, genres=(items.genres + 1) % NUM_GENRES)
    moved = (layer(other).z - z).abs().amax(1) > 1e-4
    has = (LENGTHS > 0) & (PRESENT["image"] | PRESENT["plot"])
    assert moved.tolist() == has.tolist()


def test_hidden_modality_is_a_missing_one_and_the_projections_do_not_see_it() -> None:
    config = FusionConfig(width=8, num_heads=2, modality_dropout=0.999999)
    layer, items = make_layer(config).train(), make_items()
    nothing = torch.zeros(NUM_ITEMS, dtype=torch.bool)
    fused = layer(items)
    alone = layer.eval()(replace(items, present={**items.present, "image": nothing, "plot": nothing}))
    assert torch.allclose(fused.z, alone.z, atol=1e-6)
    assert torch.equal(fused.projected["plot"], layer(items).projected["plot"])
    assert not torch.allclose(layer(items).z, alone.z)


def test_share_of_hidden_modalities_is_the_one_asked_for() -> None:
    layer = make_layer(FusionConfig(width=8, num_heads=2, modality_dropout=0.3, anchor_dropout=0.1)).train()
    present = torch.ones(20_000, 3, dtype=torch.bool)
    present[:, 2] = False
    seen = layer._seen(present).float().mean(0)
    assert seen[0].item() == pytest.approx(0.9, abs=0.02)
    assert seen[1].item() == pytest.approx(0.7, abs=0.02)
    assert seen[2].item() == 0.0
    assert layer.eval()._seen(present) is present


def test_length_of_a_content_vector_says_nothing_unless_asked() -> None:
    items = make_items()
    longer = with_content(items, plot=items.content["plot"] * 40)
    layer = make_layer()
    assert torch.allclose(layer(items).z, layer(longer).z, atol=1e-5)
    plain = make_layer(FusionConfig(width=8, num_heads=2, unit_inputs=False))
    assert not torch.allclose(plain(items).z, plain(longer).z, atol=1e-2)


def test_order_of_the_modalities_and_their_names_do_not_matter() -> None:
    backwards = dict(reversed(WIDTHS.items()))
    layer = make_layer()
    other = make_layer(widths=backwards)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(make_items()).z, other(make_items(backwards)).z)
    odd = FusionLayer(FusionConfig(width=8), {"title": 5, "image.v2": 3, "keys": 3}, 0)
    ones, vectors = torch.ones(2, dtype=torch.bool), torch.randn(2, 3)
    items = ItemContent(
        content={"title": torch.randn(2, 5), "image.v2": vectors, "keys": vectors},
        present={"title": ones, "image.v2": ones, "keys": ones},
        genres=torch.zeros(0, dtype=torch.int64),
        genre_lengths=torch.zeros(2, dtype=torch.int64),
    )
    assert list(odd(items).projected) == ["title", "image.v2", "keys"]


@pytest.mark.parametrize("widths", [WIDTHS, {"title": 5}])
def test_every_parameter_has_a_gradient_without_items(widths: dict[str, int]) -> None:
    items = make_items(widths)
    nobody = ItemContent(
        content={name: x[:0] for name, x in items.content.items()},
        present={name: x[:0] for name, x in items.present.items()},
        genres=items.genres[:0],
        genre_lengths=LENGTHS[:0],
    )
    layer = make_layer(widths=widths).train()
    layer(nobody).z.sum().backward()
    assert all((g == 0).all() for g in gradients(layer.parameters()))


def test_gradient_is_that_of_the_function() -> None:
    layer, items = make_layer().double(), make_items()
    title, plot = (leaf(items.content[name], torch.float64) for name in ("title", "plot"))

    def fuse(title: Tensor, plot: Tensor) -> Tensor:
        fused: Fused = layer(with_content(items, title=title, plot=plot))
        return fused.z

    assert torch.autograd.gradcheck(fuse, (title, plot))


def test_half_precision_content_is_read() -> None:
    items = make_items()
    half = replace(items, content={name: x.half() for name, x in items.content.items()})
    assert_close([make_layer()(half).z], [make_layer()(items).z], 5e-3)


def test_wrong_configurations_and_items_are_refused_by_name() -> None:
    wrong: dict[str, Any] = {"width": 0, "num_heads": 3, "dropout": 1.0, "modality_dropout": -0.1, "hidden": 0}
    for field, value in wrong.items():
        with pytest.raises(ValueError, match=rf"fusion\.{field}={value}"):
            FusionConfig(**{field: value})
    with pytest.raises(ValueError, match=r"fusion\.anchor='title': not among the modalities \['image'\]"):
        FusionLayer(FusionConfig(), {"image": 3}, 0)
    items = make_items()
    with pytest.raises(ValueError, match=r"genres: id 9"):
        make_layer()(replace(items, genres=items.genres + 6))
    with pytest.raises(ValueError, match=r"genre_lengths: 8 in sum, but genres holds 7"):
        make_layer()(replace(items, genres=items.genres[:-1]))
    with pytest.raises(ValueError, match=r"present\['plot'\]: missing"):
        replace(items, present={"title": PRESENT["title"], "image": PRESENT["image"]})
    with pytest.raises(ValueError, match=r"content\['plot'\]: missing"):
        make_layer()(make_items({"title": 5, "image": 3}))
    with pytest.raises(ValueError, match=r"content\['image'\]: width 5, but the model was built for 3"):
        make_layer()(with_content(items, image=items.content["title"]))
