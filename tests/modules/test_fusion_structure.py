"""Loss (iii) of the fusion layer: cases by hand, gradients, and that it rises when something is lost."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mufasa_rec.modules.fusion_structure import StructureConfig, guard_loss, reconstruction_loss, structure_loss
from tests.tensors import gradients, leaf

CONFIG = StructureConfig()
EASY = StructureConfig(title_temperature=1.0, temperature=1.0)


def make_titles(num_items: int = 24) -> Tensor:
    """Titles in four bunches: a structure worth keeping."""
    torch.manual_seed(0)
    return torch.randn(4, 6)[torch.arange(num_items) % 4] + 0.4 * torch.randn(num_items, 6)


def test_structure_loss_of_three_items_by_hand() -> None:
    """Two equal titles and one at right angles, against a space where all are alike."""
    titles = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    p = 1 / (1 + math.exp(-1))  # of an item's twin, the third at cosine 0
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    expected = 2 / 3 * (math.log(2) - entropy)  # the third sees both at cosine 0: nothing to lose
    assert structure_loss(titles, torch.ones(3, 4), EASY).item() == pytest.approx(expected)


def test_structure_loss_is_the_divergence_of_each_item() -> None:
    titles, x = make_titles(), torch.randn(24, 3)
    expected = 0.0
    for i in range(24):
        rest = [j for j in range(24) if j != i]
        teacher = (F.cosine_similarity(titles[i], titles[rest]) / 0.2).softmax(0)
        learned = (F.cosine_similarity(x[i], x[rest]) / 0.5).softmax(0)
        expected += (teacher * (teacher / learned).log()).sum().item() / 24
    config = StructureConfig(title_temperature=0.2, temperature=0.5)
    assert structure_loss(titles, x, config).item() == pytest.approx(expected, rel=1e-5)


def test_structure_loss_is_zero_for_the_titles_themselves_turned_and_stretched() -> None:
    titles = make_titles()
    turn = torch.linalg.qr(torch.randn(6, 6))[0]
    assert structure_loss(titles, 7 * titles @ turn, CONFIG).item() == pytest.approx(0.0, abs=1e-5)


def test_structure_loss_rises_when_a_projector_collapses() -> None:
    titles = make_titles()
    line = titles @ torch.randn(6, 1) @ torch.randn(1, 6)
    point = torch.randn(6).expand(24, 6)
    for collapsed in (line, point):
        losses = [structure_loss(titles, torch.lerp(titles, collapsed, share), CONFIG) for share in (0.0, 0.9, 1.0)]
        assert losses[0] < losses[1] < losses[2]


def test_structure_loss_rises_when_the_structure_is_scrambled() -> None:
    titles = make_titles()
    some = torch.arange(24)
    some[:6] = some[:6].roll(1)
    losses = [structure_loss(titles, titles[order], CONFIG) for order in (torch.arange(24), some, torch.randperm(24))]
    assert losses[0] < losses[1] < losses[2]


def decoded(z: Tensor, vectors: Tensor) -> Tensor:
    """The best linear reading of the vectors from z, as a decoder learns it."""
    inputs = torch.cat([z, torch.ones(len(z), 1)], dim=1)
    return inputs @ torch.linalg.lstsq(inputs, vectors).solution


def test_reconstruction_loss_rises_when_z_forgets_a_modality() -> None:
    torch.manual_seed(0)
    titles, image, plot = torch.randn(3, 60, 4)
    present = {name: torch.ones(60, dtype=torch.bool) for name in ("image", "plot")}
    content = {"image": image, "plot": plot}
    losses = []
    for share in (1.0, 0.3, 0.0):  # how much of the plot is left in z, beside a noise as large
        z = torch.cat([titles, image, share * plot + 0.3 * torch.randn(60, 4)], dim=1)
        read = {name: decoded(z, vectors) for name, vectors in content.items()}
        losses.append(reconstruction_loss(read, content, present))
    assert losses[0] < losses[1] < losses[2]
    z = titles  # it kept nothing but the title
    assert reconstruction_loss({n: decoded(z, x) for n, x in content.items()}, content, present) > losses[2]


def test_reconstruction_loss_by_hand() -> None:
    """Image means (2, 0): item 0 is decoded well, item 1 opposite; item 2 has the plot alone, item 3 nothing."""
    nan = float("nan")
    content = {
        "image": torch.tensor([[3.0, 0.0], [1.0, 0.0], [nan, nan], [nan, nan]]),
        "plot": torch.tensor([[0.0], [nan], [4.0], [nan]]),
    }
    present = {
        "image": torch.tensor([True, True, False, False]),
        "plot": torch.tensor([True, False, True, False]),
    }
    read = {"image": leaf(torch.tensor([[5.0, 0.0]] * 4)), "plot": leaf(torch.ones(4, 1))}
    loss = reconstruction_loss(read, content, present)
    loss.backward()
    assert loss.item() == pytest.approx(((0 + 2) / 2 + 2 + 0) / 3)
    image, plot = gradients(read.values())
    assert image.isfinite().all()
    assert (image[2:] == 0).all()
    assert (plot[[1, 3]] == 0).all()


def test_constant_decoder_reads_nothing_although_the_vectors_have_much_in_common() -> None:
    torch.manual_seed(0)
    vectors = 10 + torch.randn(200, 8)
    read = {"image": vectors.mean(0).expand(200, 8)}
    loss = reconstruction_loss(read, {"image": vectors}, {"image": torch.ones(200, dtype=torch.bool)})
    assert loss.item() == pytest.approx(1.0, abs=0.1)


def test_guard_by_hand() -> None:
    config = StructureConfig(guard=1.0)
    x = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])  # variances 8 and 0, covariance 0
    assert guard_loss(x, config).item() == pytest.approx(25 * (1 - 0.01) / 2)
    x = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # variances 2, covariance 2
    assert guard_loss(x, config).item() == pytest.approx((4 + 4) / 2)


def test_guard_rises_when_channels_stop_varying_or_copy_each_other() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 4) * 1.2
    copied = torch.cat([x[:, :2], x[:, :2]], dim=1)
    for worse in (0.1 * x, copied):
        assert guard_loss(worse, CONFIG) > guard_loss(x, CONFIG) + 0.5


def test_gradients_are_those_of_the_functions() -> None:
    torch.manual_seed(0)
    titles, x = make_titles(6).double(), leaf(torch.randn(6, 4, dtype=torch.float64))
    has = {"image": torch.tensor([True, True, False, True, True, False])}
    vectors = {"image": torch.randn(6, 4, dtype=torch.float64)}
    assert torch.autograd.gradcheck(lambda a: structure_loss(titles, a, CONFIG), (x,))
    assert torch.autograd.gradcheck(lambda a: guard_loss(0.3 * a, CONFIG), (x,))
    assert torch.autograd.gradcheck(lambda a: reconstruction_loss({"image": a}, vectors, has), (x,))


@pytest.mark.parametrize("num_items", [0, 1, 2])
def test_too_few_items_are_a_zero_that_keeps_the_graph(num_items: int) -> None:
    x = leaf(torch.randn(num_items, 4))
    nobody = {"image": torch.zeros(num_items, dtype=torch.bool)}
    loss = structure_loss(make_titles(4)[:num_items], x, CONFIG) + reconstruction_loss(
        {"image": x}, {"image": x}, nobody
    )
    if num_items < 2:
        loss = loss + guard_loss(x, CONFIG)
    loss.backward()
    assert loss.item() == 0.0
    assert (gradients([x])[0] == 0).all()


def test_wrong_configurations_are_refused_by_name() -> None:
    for field, value in (("temperature", 0.0), ("title_temperature", -1.0), ("guard", -0.5), ("reconstruction", -1.0)):
        with pytest.raises(ValueError, match=rf"structure\.{field}={value}"):
            StructureConfig(**{field: value})
