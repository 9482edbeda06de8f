"""The retriever on small batches, unsharded: its forward, and what may not change its results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mufasa_rec.data.batch import Batch
from mufasa_rec.models.retriever import FUSED, Retriever, RetrieverArch, RetrieverConfig
from mufasa_rec.modules.event_embedding import EventEmbedding, EventEmbeddingConfig
from mufasa_rec.modules.full_attention import FullAttentionConfig, FullAttentionExtractor
from mufasa_rec.modules.history import History
from mufasa_rec.modules.item_tower import Items, ItemTower
from mufasa_rec.modules.next_item import NextItemConfig, NextItemObjective
from mufasa_rec.modules.sparse_arch import ContentTableConfig, SparseArch, TableConfig
from tests.tensors import gradients, offsets_of

WIDTH, NUM_ITEMS, CONTENT_WIDTH = 8, 9, 6


def make_retriever(*, full: bool = True, content: bool = True, use_id: bool = True) -> Retriever:
    torch.manual_seed(0)
    contents = [ContentTableConfig(modality="title", num_embeddings=NUM_ITEMS, width=CONTENT_WIDTH)] if content else []
    tables = [
        TableConfig(name="item", num_embeddings=NUM_ITEMS),
        TableConfig(name="item.genre", num_embeddings=4),
        TableConfig(name="event.device", num_embeddings=3),
    ]
    sparse = SparseArch(tables, WIDTH, contents, torch.device("cpu"))
    with torch.no_grad():
        for parameter in sparse.content.parameters():
            parameter.copy_(torch.randn_like(parameter))  # the padding too: it must have no influence
    modalities = {"title": CONTENT_WIDTH} if content else {}
    tower = ItemTower(modalities, {"genre": True}, WIDTH, use_id=use_id, id_dropout=0.0)
    embedding = EventEmbedding(EventEmbeddingConfig(width=WIDTH, content={FUSED: WIDTH} if content else {}))
    extractor = FullAttentionExtractor(FullAttentionConfig(dropout=0.0), embedding, max_history=16)
    objective = NextItemObjective(NextItemConfig(), full=full)
    dense = RetrieverArch(tower, extractor, objective, max_history=16, event_categoricals=("device",))
    return Retriever(sparse, dense)


def make_batch(lengths: list[int]) -> Batch:
    torch.manual_seed(1)
    events = sum(lengths)
    genres = torch.tensor([1, 2, 0] * 3)
    ids = {
        "item": torch.arange(NUM_ITEMS),
        "item.genre": torch.randint(0, 4, (int(genres.sum()),)),
        "content.title": torch.arange(NUM_ITEMS),
        "event.device": torch.randint(0, 3, (events,)),
    }
    weight = torch.rand(events) * (torch.rand(events) < 0.7)
    return Batch(
        features=KeyedJaggedTensor(
            keys=list(ids),
            values=torch.cat(list(ids.values())),
            lengths=torch.tensor([len(x) for x in ids.values()], dtype=torch.int32),
            stride=1,
        ),
        item_row=torch.arange(NUM_ITEMS) * 3,
        event_item=torch.randint(0, NUM_ITEMS, (events,)),
        next_item=torch.randint(0, NUM_ITEMS, (events,)),
        target_weight=weight,
        offsets=offsets_of(lengths),
        start_position=torch.zeros(len(lengths), dtype=torch.int64),
        candidate_item=torch.arange(NUM_ITEMS),
        candidate_bias=torch.zeros(NUM_ITEMS),
        user=torch.arange(len(lengths)),
        target_row=torch.zeros(len(lengths), dtype=torch.int64),
        seen_row=torch.zeros(0, dtype=torch.int64),
        seen_offsets=torch.zeros(len(lengths) + 1, dtype=torch.int64),
        present={"title": torch.arange(NUM_ITEMS) % 3 != 0},
        category_lengths={"genre": genres},
        num_targets=int((weight > 0).sum()),
        num_rows=len(lengths),
    )


def history_of(model: Retriever, batch: Batch) -> tuple[Items, History]:
    """The items and the history that the retriever makes of a batch, step by step."""
    values = {name: x.values() for found in model.sparse(batch.features) for name, x in found.items()}
    if "content.title" in values:
        values["content.title"] = values["content.title"][:, :CONTENT_WIDTH].float()
    items = model.dense.tower(values["item"], values, batch.present, batch.category_lengths)
    return items, model.dense._history(items, values, batch)


def table_of(model: Retriever, name: str) -> Tensor:
    return model.sparse.trained.get_parameter(f"0.embeddings.{name}.weight")


@pytest.mark.parametrize("full", [False, True])
def test_loss_compares_each_state_with_the_event_after_it(full: bool) -> None:
    model, batch = make_retriever(full=full), make_batch([5, 0, 9])
    loss, output = model(batch)
    items, history = history_of(model, batch)
    states = model.dense.extractor.encode(history)
    scores = F.normalize(states, dim=1) @ items.vectors.T / model.dense.objective.temperature
    losses = F.cross_entropy(scores, batch.next_item, reduction="none") * batch.target_weight
    assert loss.item() == pytest.approx(losses.sum().item() / batch.num_targets, rel=1e-5)
    assert output.loss_sum.item() == pytest.approx(losses.sum().item(), rel=1e-5)
    assert output.num_places >= 14


def test_evaluation_gives_unit_vectors_of_users_and_items() -> None:
    model, batch = make_retriever().eval(), make_batch([5, 0, 9])
    loss, output = model(batch)
    items, history = history_of(model, batch)
    assert loss.item() == 0.0
    assert torch.allclose(output.user_vectors, F.normalize(model.dense.extractor(history), dim=1))
    assert torch.equal(output.item_vectors, items.vectors)
    assert torch.allclose(output.user_vectors.norm(dim=1), torch.ones(3))


def test_item_vectors_do_not_depend_on_the_histories_beside_them() -> None:
    """That is how the catalog is embedded: a batch of candidates and one user without events."""
    model = make_retriever().eval()
    alone, beside = make_batch([0]), make_batch([5, 9])
    ids = {name: beside.features[name] for name in ("item", "item.genre", "content.title")}
    keys = [*ids, "event.device"]
    lengths = torch.tensor([*(len(x.values()) for x in ids.values()), 0], dtype=torch.int32)
    values = torch.cat([x.values() for x in ids.values()])
    alone = replace(alone, features=KeyedJaggedTensor(keys=keys, values=values, lengths=lengths, stride=1))
    assert torch.allclose(model(alone)[1].item_vectors, model(beside)[1].item_vectors, atol=1e-6)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("lengths", [[5, 0, 9], [0, 0]], ids=["events", "no events"])
def test_every_parameter_has_a_gradient_on_every_rank(lengths: list[int], full: bool) -> None:
    model = make_retriever(full=full)
    loss, _ = model(make_batch(lengths))
    loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model.dense.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients(model.sparse.trained.parameters()))
    assert not any(parameter.grad is not None for parameter in model.sparse.content.parameters())


def test_padding_of_a_content_table_has_no_influence() -> None:
    results = []
    for fill in (0.0, float("nan")):
        model = make_retriever().eval()
        with torch.no_grad():
            for parameter in model.sparse.content.parameters():
                parameter[:, CONTENT_WIDTH:] = fill
        results.append(model(make_batch([5, 9]))[1])
    assert torch.equal(results[0].user_vectors, results[1].user_vectors)
    assert torch.equal(results[0].item_vectors, results[1].item_vectors)


def test_pure_content_model_does_not_read_ids() -> None:
    batch, results = make_batch([5, 9]), []
    for shift in (0.0, 1.0):
        model = make_retriever(use_id=False).eval()
        with torch.no_grad():
            table_of(model, "t_item").add_(shift)
        results.append(model(batch)[1])
    assert torch.equal(results[0].user_vectors, results[1].user_vectors)
    assert torch.equal(results[0].item_vectors, results[1].item_vectors)


def test_event_categoricals_reach_users_and_not_items() -> None:
    batch, results = make_batch([5, 9]), []
    for shift in (0.0, 1.0):
        model = make_retriever().eval()
        with torch.no_grad():
            table_of(model, "t_event_device")[:, 0] += shift
        results.append(model(batch)[1])
    assert not torch.allclose(results[0].user_vectors, results[1].user_vectors)
    assert torch.equal(results[0].item_vectors, results[1].item_vectors)


def test_model_without_content_runs() -> None:
    model = make_retriever(content=False)
    loss, _ = model(make_batch([5, 0, 9]))
    loss.backward()
    assert torch.isfinite(loss)


def test_targets_of_weight_zero_are_not_asked() -> None:
    model, batch = make_retriever(), make_batch([5, 9])
    unasked = batch.target_weight == 0
    changed = replace(batch, next_item=torch.where(unasked, (batch.next_item + 1) % NUM_ITEMS, batch.next_item))
    assert unasked.any()
    assert torch.equal(model(batch)[0], model(changed)[0])


@pytest.mark.parametrize(
    "values", [{"width": 6}, {"width": 0}, {"id_dropout": 1.0}, {"init_std": -0.1}, {"num_gap_buckets": -1}]
)
def test_bad_config_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"model\.{next(iter(values))}="):
        RetrieverConfig(**values)
