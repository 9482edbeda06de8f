"""DMAE as one extractor: equal to its definition in outputs and gradients, and what must not change its results."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mufasa_rec.modules import content_interest, similarity_interest, target_attention
from mufasa_rec.modules.candidate_pairs import plan_pairs
from mufasa_rec.modules.content_interest import EarlyFusionExtractor, SimTierExtractor
from mufasa_rec.modules.history import Candidates, History, InterestExtractor
from mufasa_rec.modules.similarity_encoding import SimilarityEncoding
from mufasa_rec.modules.similarity_interest import (
    RestoringExtractor,
    SimilarityInterestConfig,
    SimilarityInterestExtractor,
)
from mufasa_rec.modules.target_attention import TargetAttentionExtractor
from tests.helpers.naive_similarity import naive_similarity_interest
from tests.histories import CONTENT, WIDTH, make_candidates, make_history, take_candidates, take_users
from tests.tensors import assert_close, gradients, leaf, offsets_of

LENGTHS, CANDIDATES = [3, 0, 9, 1, 5, 0], [2, 1, 3, 1, 0, 0]
THREE = {**CONTENT, "audio": 4}


def make_extractor(modalities: dict[str, int] | None = None, **values: Any) -> SimilarityInterestExtractor:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 8, "num_buckets": 5, "num_bins": 4, "num_time_buckets": 12, **values}
    config = SimilarityInterestConfig(**sizes)
    extractor = SimilarityInterestExtractor(config, CONTENT if modalities is None else modalities, WIDTH)
    if isinstance(extractor.encoding, SimilarityEncoding):
        nn.init.normal_(extractor.encoding.scale, 1.0, 0.3)  # ones at first, which would hide mistakes
        nn.init.normal_(extractor.encoding.shift, 0.0, 0.2)
    return extractor


def make_rivals() -> dict[str, InterestExtractor]:
    config = SimilarityInterestConfig(width=8, num_time_buckets=12)
    return {
        "dmae": make_extractor(),
        "dmae, top by similarity": make_extractor(selection="top", max_events=4),
        "dmae without mieu": make_extractor(use_mieu=False),
        "dmae without mifu": make_extractor(use_mifu=False),
        "early fusion": EarlyFusionExtractor(config, CONTENT, WIDTH),
        "simtier": SimTierExtractor(CONTENT, width=4, num_bins=20),
        "din": TargetAttentionExtractor(WIDTH),
    }


every_extractor = pytest.mark.parametrize("name", list(make_rivals()))


def with_audio(rows: History | Candidates) -> dict[str, Any]:
    count = len(rows.embedded)
    content = {**rows.content, "audio": torch.randn(count, 4)}
    return {"content": content, "present": {**rows.present, "audio": torch.rand(count) < 0.5}}


def make_inputs(modalities: dict[str, int] = CONTENT) -> tuple[History, Candidates]:
    torch.manual_seed(1)
    history, candidates = make_history(LENGTHS), make_candidates(CANDIDATES)
    if "audio" in modalities:
        history, candidates = replace(history, **with_audio(history)), replace(candidates, **with_audio(candidates))
    return history, candidates


def in_float64(rows: Any) -> Any:
    content = {name: leaf(x, torch.float64) for name, x in rows.content.items()}
    return replace(rows, embedded=leaf(rows.embedded, torch.float64), content=content)


CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "two modalities": (CONTENT, {}),
    "one modality": ({"title": 6}, {}),
    "three modalities": (THREE, {}),
    "joint histogram": (THREE, {"joint": ("audio", "title")}),
    "newest events": (CONTENT, {"max_events": 4}),
    "top events": (CONTENT, {"max_events": 4, "selection": "top"}),
    "no times": (CONTENT, {"num_time_buckets": 0, "num_heads": 1}),
    "without mieu": (CONTENT, {"use_mieu": False}),
    "without mieu, top events": (CONTENT, {"use_mieu": False, "max_events": 3, "selection": "top"}),
    "without mifu": (CONTENT, {"use_mifu": False}),
    "without midu": (CONTENT, {"use_midu": False}),
}


@pytest.mark.parametrize(("modalities", "values"), CASES.values(), ids=list(CASES))
def test_outputs_and_gradients_are_those_of_the_definition(modalities: dict[str, int], values: dict[str, Any]) -> None:
    history, candidates = make_inputs(modalities)
    results = []
    for naive in (False, True):
        extractor = make_extractor(modalities, **values).double()
        events, items = in_float64(history), in_float64(candidates)
        found = naive_similarity_interest(extractor, events, items) if naive else extractor.restored(events, items)
        direction = torch.randn(found.vectors.shape, generator=torch.Generator().manual_seed(2)).double()
        ((found.vectors * direction).sum() + 3 * found.loss_sum).backward()
        inputs = [*events.content.values(), *items.content.values(), items.embedded]
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in [*extractor.parameters(), *inputs]]
        results.append((int(found.num_histograms), [found.vectors, found.loss_sum, *grads]))
    assert results[0][0] == results[1][0]
    assert_close(results[0][1], results[1][1], 1e-10)
    assert results[1][0] > 0 or values.get("use_midu") is False


class Restoring(nn.Module):
    """An extractor whose forward gives the loss too."""

    def __init__(self, model: SimilarityInterestExtractor) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: History, candidates: Candidates) -> tuple[Tensor, Tensor]:
        found = self.model.restored(history, candidates)
        return found.vectors, found.loss_sum


def test_gradients_are_those_of_finite_differences() -> None:
    model = Restoring(make_extractor(width=2, num_heads=1).double())
    history, candidates = in_float64(make_history([3, 2])), in_float64(make_candidates([1, 2]))
    names = ["model.encoding.scale", "model.encoding.shift", "model.encoding.buckets", "model.fusion.query.weight"]

    def run(events: Tensor, items: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        past = replace(history, content={**history.content, "title": events})
        asked = replace(candidates, content={**candidates.content, "title": items})
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (past, asked))

    inputs = [history.content["title"], candidates.content["title"], *(model.get_parameter(name) for name in names)]
    assert torch.autograd.gradcheck(run, [leaf(x) for x in inputs], eps=1e-7, atol=1e-5)


@every_extractor
def test_shapes_are_those_of_the_contract(name: str) -> None:
    extractor, (history, candidates) = make_rivals()[name], make_inputs()
    assert extractor(history, candidates).shape == (sum(CANDIDATES), extractor.output_dim)
    places = []
    for count in (1, 4):  # histories are padded once, whatever the candidates
        extractor(make_history(LENGTHS), make_candidates([count] * len(LENGTHS)))
        places.append(extractor.num_places)
    assert places[0] == places[1] >= sum(LENGTHS)
    with pytest.raises(ValueError, match="candidates=None"):
        extractor(history)
    with pytest.raises(NotImplementedError, match="call forward"):
        extractor.encode(history)


@every_extractor
def test_order_of_users_and_candidates_does_not_matter(name: str) -> None:
    extractor, (history, candidates) = make_rivals()[name].eval(), make_inputs()
    before = extractor(history, candidates)
    users = [2, 0, 5, 3, 1, 4]
    rows = [5, 3, 4, 1, 0, 6, 2]  # candidates of users 2, 0, 3, 1, turned around inside
    after = extractor(take_users(history, users), take_candidates(candidates, rows, [3, 2, 0, 1, 1, 0]))
    torch.testing.assert_close(after, before[rows], atol=1e-5, rtol=1e-5)


@every_extractor
def test_candidate_alone_gets_what_it_gets_among_others(name: str) -> None:
    extractor, (history, candidates) = make_rivals()[name].eval(), make_inputs()
    together = extractor(history, candidates)
    owners = [0, 0, 1, 2, 2, 2, 3]
    alone = extractor(take_users(history, owners), take_candidates(candidates, range(7), [1] * 7))
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


@every_extractor
def test_missing_modality_has_no_influence_whatever_its_numbers(name: str) -> None:
    extractor, inputs, results = make_rivals()[name], make_inputs(), []
    for fill in (0.0, 7.0, float("nan")):
        changed = []
        for rows in inputs:
            content = {m: x.masked_fill(~rows.present[m][:, None], fill) for m, x in rows.content.items()}
            changed.append(replace(rows, content=content))
        extractor.zero_grad()
        out = extractor(*changed)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in extractor.parameters() if p.grad is not None)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        assert all(torch.isfinite(x).all() for x in other)


@every_extractor
def test_one_group_as_on_an_accelerator_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor, (history, candidates) = make_rivals()[name], make_inputs()
    history = replace(history, max_length=12)
    results = []
    for tight in (True, False):
        for module in (similarity_interest, content_interest, target_attention):
            monkeypatch.setattr(module, "plan_pairs", functools.partial(plan_pairs, tight=tight))
        extractor.zero_grad()
        if isinstance(extractor, RestoringExtractor):
            found = [*extractor.restored(history, candidates)]
        else:
            found = [extractor(history, candidates)]
        (found[0].square().sum() + sum(found[1:])).backward()
        results.append([*found, *gradients(extractor.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_one_group_needs_an_upper_bound_of_the_lengths() -> None:
    with pytest.raises(ValueError, match=r"History\.max_length=None"):
        plan_pairs(*make_inputs(), tight=False)


def test_user_without_history_gets_the_learned_vector() -> None:
    extractor, (history, candidates) = make_extractor(), make_inputs()
    assert torch.equal(extractor(history, candidates)[2], extractor.empty)


@pytest.mark.parametrize("lengths", [[0, 0], [3, 2]], ids=["no events", "events"])
@pytest.mark.parametrize("asked", [[0, 0], [2, 1]], ids=["no candidates", "candidates"])
def test_every_parameter_has_a_gradient_in_training(lengths: list[int], asked: list[int]) -> None:
    for name, extractor in make_rivals().items():
        history, candidates = make_history(lengths), make_candidates(asked)
        if isinstance(extractor, (SimilarityInterestExtractor, EarlyFusionExtractor)):
            found = extractor.restored(history, candidates)
            loss = found.vectors.sum() + found.loss_sum
        else:
            loss = extractor(history, candidates).sum()
        loss.backward()
        assert all(torch.isfinite(g).all() for g in gradients(extractor.parameters())), name


def test_decoder_is_in_no_graph_but_that_of_training() -> None:
    extractor, (history, candidates) = make_extractor(), make_inputs()
    assert extractor.decoder is not None
    extractor(history, candidates).sum().backward()
    assert all(p.grad is None for p in extractor.decoder.parameters())
    before = extractor(history, candidates)
    extractor.drop_decoder()
    assert not [name for name, _ in extractor.named_parameters() if "decoder" in name]
    assert torch.equal(extractor(history, candidates), before)
    assert int(extractor.restored(history, candidates).num_histograms) == 0


def test_only_the_newest_events_are_read() -> None:
    extractor, (history, candidates) = make_extractor(max_events=4), make_inputs()
    before = extractor(history, candidates)
    old = (torch.arange(9) < 5).repeat(1)
    content = {m: x.clone() for m, x in history.content.items()}
    for x in content.values():
        x[3:12][old] = -x[3:12][old]  # of the third user, who has nine events
    assert torch.equal(extractor(replace(history, content=content), candidates), before)


def test_events_of_the_highest_similarity_are_read_in_the_order_of_time() -> None:
    torch.manual_seed(3)
    kept = make_extractor({"title": 2}, max_events=2, selection="top", num_time_buckets=0).eval()
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [-1.0, 0.0]])
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
    history = History(
        embedded=torch.zeros(4, WIDTH),
        offsets=torch.tensor([0, 4]),
        start_position=zero,
        content={"title": vectors},
        present={"title": ones},
    )
    item = Candidates(
        embedded=torch.randn(1, WIDTH),
        offsets=torch.tensor([0, 1]),
        content={"title": vectors[:1]},
        present={"title": ones[:1]},
    )
    both = replace(history, embedded=torch.zeros(2, WIDTH), offsets=torch.tensor([0, 2]),
                   content={"title": vectors[[0, 2]]}, present={"title": ones[:2]})  # fmt: skip
    torch.testing.assert_close(kept(history, item), kept(both, item))


def test_bad_input_is_refused_by_name() -> None:
    extractor, (history, candidates) = make_extractor(), make_inputs()
    with pytest.raises(ValueError, match=r"Candidates\.content\['image'\]: missing"):
        extractor(history, replace(candidates, content={"title": candidates.content["title"]}))
    with pytest.raises(ValueError, match=r"History\.content\['image'\]: width 2, but the model was built for 3"):
        content = {**history.content, "image": history.content["image"][:, :2]}
        extractor(replace(history, content=content), candidates)
    with pytest.raises(ValueError, match=r"Candidates\.request_time_ms=None: required"):
        extractor(history, replace(candidates, request_time_ms=None))
    with pytest.raises(ValueError, match=r"Candidates\.offsets: 1 users, but History has 6"):
        extractor(history, replace(candidates, offsets=offsets_of([7])))
    with pytest.raises(ValueError, match=r"Candidates\.embedded: width 3, expected 8"):
        extractor(history, replace(candidates, embedded=candidates.embedded[:, :3]))
    with pytest.raises(ValueError, match="modalities: none"):
        make_extractor({})
    with pytest.raises(ValueError, match="joint: 'sound' is no modality"):
        make_extractor(joint=("sound", "title"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_heads": 3}, "num_heads=3: must divide width=32"),
        ({"num_buckets": 0}, "num_buckets=0: choose 1 or more"),
        ({"max_events": 0}, "max_events=0: choose 1 or more"),
        ({"selection": "oldest"}, "selection='oldest': choose one of"),
        ({"joint": ("title",)}, "joint=.*name two modalities"),
        ({"dropout": 1.0}, "dropout=1.0: choose at least 0 and below 1"),
    ],
)
def test_configuration_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimilarityInterestConfig(**values)


def test_early_fusion_sees_one_cosine_of_all_modalities() -> None:
    """Present ones are averaged by the lengths of what is there; opposite modalities cancel."""
    config = SimilarityInterestConfig(width=8, num_time_buckets=0, use_midu=False)
    extractor, (history, candidates) = EarlyFusionExtractor(config, CONTENT, WIDTH), make_inputs()
    events, items = extractor._joined(history, candidates)
    ones = {name: torch.ones_like(has) for name, has in history.present.items()}
    everything = extractor._joined(replace(history, present=ones), candidates)[0]
    whole = everything.content["together"]
    torch.testing.assert_close(whole.norm(dim=1), torch.full((len(whole),), 2.0**0.5))
    lacks = ~history.present["image"]
    assert (events.content["together"][lacks][:, CONTENT["title"] :] == 0).all()
    assert torch.equal(items.present["together"], candidates.present["title"] | candidates.present["image"])


def test_simtier_counts_events_per_bin() -> None:
    extractor = SimTierExtractor({"title": 2}, width=3, num_bins=2)
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    history = History(
        embedded=torch.zeros(4, 1),
        offsets=torch.tensor([0, 4]),
        start_position=torch.zeros(1, dtype=torch.int64),
        content={"title": vectors},
        present={"title": torch.tensor([True, True, True, False])},
    )
    item = Candidates(
        embedded=torch.zeros(1, 1),
        offsets=torch.tensor([0, 1]),
        content={"title": vectors[:1]},
        present={"title": torch.ones(1, dtype=torch.bool)},
    )
    counts = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(extractor(history, item)[0], counts.log1p() @ extractor.tiers[0])
