"""The fusion objective: composed of its terms, equal on one rank and on two, whole where nothing is to be seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.modules.fusion import FusionConfig, FusionLayer, ItemContent
from mufasa_rec.modules.fusion_batch import Behaviour
from mufasa_rec.modules.fusion_distribution import DistributionConfig
from mufasa_rec.modules.fusion_losses import CollaborativeConfig, SemanticConfig
from mufasa_rec.modules.fusion_objective import FusionLoss, FusionObjective, FusionObjectiveConfig
from mufasa_rec.modules.fusion_structure import StructureConfig
from mufasa_rec.modules.next_item import Exchange
from tests.helpers.ranks import run_ranks
from tests.tensors import assert_close, gradients

WIDTHS = {"title": 6, "image": 3, "plot": 4}
NUM_ITEMS, NUM_GENRES, BEHAVIOUR_WIDTH = 16, 5, 5
# Every loss has much to compare in so small a batch.
CONFIG = FusionObjectiveConfig(
    semantic=SemanticConfig(threshold=0.3),
    structure=StructureConfig(guard=0.1, modality_weight=0.5, reconstruction=2.0),
    distribution=DistributionConfig(min_genre_items=2, num_directions=8),
)
PAIRS = replace(
    CONFIG,
    semantic=SemanticConfig(quantile=0.7),
    collaborative=CollaborativeConfig(kind="pairs", min_events=2),
    distribution=replace(CONFIG.distribution, kind="sliced", per_genre=True),
)
CONFIGS = {"vectors": CONFIG, "pairs": PAIRS}
Batch = tuple[ItemContent, Behaviour]


def make_batch(num_items: int = NUM_ITEMS) -> Batch:
    torch.manual_seed(2)
    content = {name: torch.randn(num_items, width, dtype=torch.float64) for name, width in WIDTHS.items()}
    content["title"] = content["title"][torch.arange(num_items) % 6] + 0.3 * content["title"]
    lengths = torch.randint(0, 3, (num_items,))
    items = ItemContent(
        content=content,
        present={name: torch.rand(num_items) < 0.8 for name in WIDTHS},
        genres=torch.randint(0, NUM_GENRES, (int(lengths.sum()),)),
        genre_lengths=lengths,
    )
    behaviour = Behaviour(
        num_events=torch.randint(0, 20, (num_items,)),
        vectors=torch.randn(num_items, BEHAVIOUR_WIDTH, dtype=torch.float64),
        pairs=torch.stack([torch.arange(0, num_items - 1, 2), torch.arange(1, num_items, 2)], dim=1),
    )
    return items, behaviour


def take(batch: Batch, begin: int, end: int) -> Batch:
    """One rank's items; a pair must lie within them."""
    items, behaviour = batch
    assert behaviour.vectors is not None
    assert behaviour.pairs is not None
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), items.genre_lengths.cumsum(0)])
    inside = ((behaviour.pairs >= begin) & (behaviour.pairs < end)).all(1)
    mine = ItemContent(
        content={name: x[begin:end] for name, x in items.content.items()},
        present={name: x[begin:end] for name, x in items.present.items()},
        genres=items.genres[offsets[begin] : offsets[end]],
        genre_lengths=items.genre_lengths[begin:end],
    )
    own = Behaviour(
        num_events=behaviour.num_events[begin:end],
        vectors=behaviour.vectors[begin:end],
        pairs=behaviour.pairs[inside] - begin,
    )
    return mine, own


def make_models(
    config: FusionObjectiveConfig, exchange: Exchange | None = None, widths: dict[str, int] = WIDTHS
) -> tuple[FusionLayer, FusionObjective]:
    torch.manual_seed(0)
    layer = FusionLayer(FusionConfig(width=8, num_heads=2, modality_dropout=0.0), widths, NUM_GENRES).double()
    objective = FusionObjective(config, layer, collaborative_width=BEHAVIOUR_WIDTH, exchange=exchange).double()
    return layer, objective


def step(layer: FusionLayer, objective: FusionObjective, batch: Batch) -> tuple[FusionLoss, list[Tensor]]:
    """The loss and the gradient of every parameter."""
    layer.zero_grad()
    objective.zero_grad()
    loss = objective(layer(batch[0]), *batch)
    loss.total.backward()
    return loss, gradients([*layer.parameters(), *objective.parameters()])


def numbers(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: x.item() for name, x in terms.items()}


def on_ranks(env: DistributedEnv, borders: list[list[int]]) -> list[Any]:
    """Losses and gradients of each configuration and split on this rank."""
    results = []
    for config in CONFIGS.values():
        for border in borders:
            batch = take(make_batch(), border[env.rank], border[env.rank + 1])
            loss, grads = step(*make_models(config, RankExchange()), batch)
            results.append((loss.total.detach(), loss.terms, grads))
    return results


def test_two_ranks_equal_one_with_all_items() -> None:
    """Losses and gradients, averaged over the ranks as DDP does it; also where a rank has one item, or none."""
    borders = [[0, 10, NUM_ITEMS], [0, 2, NUM_ITEMS], [0, 0, NUM_ITEMS]]
    ranks = run_ranks(on_ranks, 2, borders)
    expected = [step(*make_models(config), make_batch()) for config in CONFIGS.values() for _ in borders]
    for (loss, grads), *found in zip(expected, *ranks, strict=True):
        for total, terms, _ in found:
            assert total.item() == pytest.approx(loss.total.item(), rel=1e-10)
            assert numbers(terms) == pytest.approx(numbers(loss.terms))
        mean = [torch.stack(parts).mean(0) for parts in zip(*(grads for _, _, grads in found), strict=True)]
        for mine, truth in zip(mean, grads, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", CONFIGS)
def test_total_is_the_weighted_sum_of_the_terms_and_each_reaches_the_layer(kind: str) -> None:
    config = replace(CONFIGS[kind], semantic_weight=0.7, structure_weight=0.3)
    loss, _ = step(*make_models(config), make_batch())
    terms = numbers(loss.terms)
    weights = {"semantic": 0.7, "collaborative": 1.0, "structure": 0.3, "distribution": 0.1}
    assert loss.total.item() == pytest.approx(sum(w * terms[name] for name, w in weights.items()))
    parts = {"fused": 1.0, "image": 0.5, "plot": 0.5}
    inside = sum(w * (terms[f"structure/{part}"] + 0.1 * terms[f"guard/{part}"]) for part, w in parts.items())
    assert terms["structure"] == pytest.approx(inside + 2 * terms["reconstruction"])
    assert terms["positives"] > 0.1


@pytest.mark.parametrize("name", ["semantic", "collaborative", "structure", "distribution"])
def test_each_loss_can_be_off_and_be_the_only_one(name: str) -> None:
    weight: dict[str, Any] = {f"{name}_weight": 0.0}
    off = replace(CONFIG, **weight)
    loss, _ = step(*make_models(off), make_batch())
    assert name not in loss.terms
    nothing: dict[str, Any] = {
        f"{other}_weight": 0.0 for other in ("semantic", "collaborative", "structure", "distribution")
    }
    only = replace(CONFIG, **(nothing | {f"{name}_weight": 2.0}))
    layer, objective = make_models(only)
    loss, grads = step(layer, objective, make_batch())
    assert loss.total.item() == pytest.approx(2 * loss.terms[name].item())
    assert sum(g.abs().sum() for g in grads) > 0
    assert {n for n, _ in objective.named_parameters()} == {
        "collaborative": {"projection.weight"},
        "structure": {"decoder.weight", "decoder.bias"},
    }.get(name, set())


def emptied(batch: Batch, what: str) -> Batch:
    items, behaviour = batch
    nobody = torch.zeros(NUM_ITEMS, dtype=torch.bool)
    if what == "titles":
        return replace(items, present={**items.present, "title": nobody}), behaviour
    if what == "other modalities":
        return replace(items, present={**items.present, "image": nobody, "plot": nobody}), behaviour
    if what == "behaviour":
        return items, replace(behaviour, num_events=torch.zeros(NUM_ITEMS, dtype=torch.int64))
    if what == "genres":
        return replace(items, genres=items.genres[:0], genre_lengths=torch.zeros_like(items.genre_lengths)), behaviour
    if what == "genres but one":
        ones = torch.ones_like(items.genre_lengths)
        return replace(items, genres=torch.zeros_like(ones), genre_lengths=ones), behaviour
    if what == "everything":
        for name in ("titles", "other modalities", "behaviour", "genres"):
            batch = emptied(batch, name)
        return batch
    return take(batch, 0, int(what.split()[-1]))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "what",
    ["titles", "other modalities", "behaviour", "genres", "genres but one", "everything", "items but 1", "items but 0"],
)
def test_batch_without_something_has_a_finite_loss_with_every_parameter_in_its_graph(kind: str, what: str) -> None:
    loss, grads = step(*make_models(CONFIGS[kind]), emptied(make_batch(), what))
    assert loss.total.isfinite()
    assert all(g.isfinite().all() for g in grads)
    gone = {
        "titles": ["semantic", "structure", "positives"],
        "other modalities": ["reconstruction", "structure/plot"],
        "behaviour": ["collaborative"],
        "genres": ["positives"],
        "genres but one": ["positives"],
    }
    for name in gone.get(what, []):
        assert loss.terms[name].item() == 0.0


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_missing_has_no_influence_even_as_nan(kind: str) -> None:
    items, behaviour = make_batch()
    assert behaviour.vectors is not None
    untrusted = (behaviour.num_events < CONFIG.collaborative.min_events)[:, None]
    assert untrusted.any()
    results = []
    for fill in (0.0, float("nan")):
        content = {name: x.masked_fill(~items.present[name][:, None], fill) for name, x in items.content.items()}
        mine = replace(behaviour, vectors=behaviour.vectors.masked_fill(untrusted, fill))
        loss, grads = step(*make_models(CONFIGS[kind]), (replace(items, content=content), mine))
        results.append([loss.total, *grads])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert all(x.isfinite().all() for x in results[1])


def test_layer_of_titles_alone_is_trained() -> None:
    items, behaviour = make_batch()
    titles = replace(items, content={"title": items.content["title"]}, present={"title": items.present["title"]})
    loss, _ = step(*make_models(CONFIG, widths={"title": 6}), (titles, behaviour))
    assert loss.total.isfinite()
    assert "reconstruction" not in loss.terms


@pytest.mark.parametrize("kind", CONFIGS)
def test_steps_lower_every_term(kind: str) -> None:
    layer, objective = make_models(CONFIGS[kind])
    batch, optimizer = make_batch(), torch.optim.Adam([*layer.parameters(), *objective.parameters()], lr=0.01)
    before, _ = step(layer, objective, batch)
    for _ in range(40):
        step(layer, objective, batch)
        optimizer.step()
    after, _ = step(layer, objective, batch)
    assert after.total < 0.7 * before.total
    for name in ("semantic", "collaborative", "structure", "reconstruction"):
        assert after.terms[name] < before.terms[name], name


def test_directions_are_new_in_each_training_step_and_the_same_in_evaluation() -> None:
    layer, objective = make_models(PAIRS)
    batch = make_batch()

    def twice() -> list[float]:
        return [objective(layer(batch[0]), *batch).terms["distribution"].item() for _ in range(2)]

    first, second = twice()
    assert first != second
    objective.load_state_dict({**objective.state_dict(), "draws": torch.tensor(1)})
    assert twice()[0] == second  # a resumed run goes on where it was
    objective.eval()
    assert twice() == [first, first]
    assert objective.state_dict()["draws"].item() == 3


def test_order_within_a_pair_says_nothing() -> None:
    items, behaviour = make_batch()
    assert behaviour.pairs is not None
    found = [
        step(*make_models(PAIRS), (items, replace(behaviour, pairs=pairs)))[0].total
        for pairs in (behaviour.pairs, behaviour.pairs.flip(1))
    ]
    assert torch.equal(*found)


def test_losses_under_bf16_autocast_are_in_single_precision() -> None:
    layer, objective = (module.float() for module in make_models(CONFIG))
    items, behaviour = make_batch()
    items = replace(items, content={name: x.float() for name, x in items.content.items()})
    expected = objective(layer(items), items, behaviour)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(layer(items), items, behaviour)
    assert loss.total.dtype == torch.float32
    assert_close([loss.total], [expected.total], 5e-2)
    assert loss.terms["positives"] == expected.terms["positives"]


def test_missing_behaviour_and_wrong_weights_are_refused_by_name() -> None:
    items, behaviour = make_batch()
    layer, objective = make_models(CONFIG)
    with pytest.raises(ValueError, match=r"behaviour\.vectors=None: collaborative\.kind='vectors'"):
        objective(layer(items), items)
    with pytest.raises(ValueError, match=r"behaviour\.vectors: shape \(16, 4\), expected \(16, 5\)"):
        assert behaviour.vectors is not None
        objective(layer(items), items, replace(behaviour, vectors=behaviour.vectors[:, :4]))
    with pytest.raises(ValueError, match=r"collaborative_width=None"):
        FusionObjective(CONFIG, layer)
    with pytest.raises(ValueError, match=r"fusion\.objective\.structure_weight=-1"):
        FusionObjectiveConfig(structure_weight=-1)
