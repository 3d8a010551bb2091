"""The losses against the golden values of the released codes, naive loops, and themselves in two processes."""

import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import debug_launcher
from hypothesis import given, settings
from hypothesis import strategies as st

import csa_zoo  # noqa: F401
from csa_zoo.losses import HardNetLoss, PartLoss, RALLoss

ANCHORS = F.normalize(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0]]))
POSITIVES = F.normalize(torch.tensor([[0.8, 0.6, 0, 0], [0, 1, 1, 0], [0.6, 0.8, 0.1, 0]]))


@pytest.mark.parametrize(('loss', 'expected'), [(HardNetLoss(), 1.097688), (RALLoss(), 1.138514)])
def test_golden_values(loss, expected):
    assert loss(ANCHORS, POSITIVES).item() == pytest.approx(expected, abs=1e-6)


def naive(anchors, positives, squared):
    """Both losses as loops over pairs, in float64."""
    total, count = 0.0, len(anchors)

    def distance(i, j):
        square = sum((a - p) ** 2 for a, p in zip(anchors[i].tolist(), positives[j].tolist(), strict=True))
        return square if squared else math.sqrt(square + 1e-6)

    duplicate = 0.008**2 if squared else 0.008
    for i in range(count):
        rivals = [distance(i, j) for j in range(count) if j != i] + [distance(j, i) for j in range(count) if j != i]
        rivals = [d for d in rivals if d >= duplicate] or [min(rivals) + 10]
        gap = distance(i, i) - min(rivals)
        total += 1 + math.tanh(gap) if squared else max(0.0, 1 + gap)
    return total / count


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10_000), st.booleans())
def test_against_loops(batch, seed, squared):
    generator = torch.Generator().manual_seed(seed)
    anchors, positives = F.normalize(torch.randn(2, batch, 8, generator=generator), dim=2)
    if batch > 4:
        positives[1] = anchors[0]  # a duplicate that must not be mined
    loss = RALLoss() if squared else HardNetLoss()
    assert loss(anchors, positives).item() == pytest.approx(naive(anchors, positives, squared), abs=2e-5)


def test_duplicates_are_no_negatives():
    anchors = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    twice = torch.cat([anchors, anchors[:1]])
    assert HardNetLoss()(twice, twice).item() < 1 + 0.01  # mined, the duplicate would give a margin of exactly 1
    assert HardNetLoss(margin=0.0)(twice, twice).item() == 0


@pytest.mark.parametrize('loss', [HardNetLoss(), RALLoss()])
def test_gradient_is_finite_at_identical_descriptors_and_float32_under_autocast(loss):
    anchors = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), dim=1).requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        value = loss(anchors, anchors.detach())
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(anchors.grad).all()
    torch.testing.assert_close(value, loss(anchors, anchors.detach()))


def test_bad_batches():
    with pytest.raises(ValueError, match='one shape'):
        HardNetLoss()(torch.zeros(3, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match='no negatives'):
        RALLoss()(torch.ones(1, 4), torch.ones(1, 4))


def _net_and_batch():
    torch.manual_seed(0)
    net = torch.nn.Linear(12, 8)
    return net, torch.randn(2, 8, 12)


def _descriptors(net, batch):
    return F.normalize(net(batch), dim=-1)


def _two_processes(loss_class):
    torch.set_num_threads(1)  # a forked process has none of its parent's threads, and would wait for them
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    net, batch = _net_and_batch()
    whole = loss_class()
    rank, world = dist.get_rank(), dist.get_world_size()
    wrapped = DistributedDataParallel(net)
    mine = batch[:, rank * 4 : (rank + 1) * 4]
    value = whole(*_descriptors(wrapped, mine.reshape(8, 12)).reshape(2, 4, 8))
    value.backward()

    reference, batch = _net_and_batch()
    anchors, positives = _descriptors(reference, batch)
    distances = whole._distances(anchors, positives)
    expected = whole._loss(*whole._mine(distances)).mean()
    expected.backward()
    torch.testing.assert_close(value / world, expected)
    torch.testing.assert_close(net.weight.grad, reference.weight.grad)
    torch.testing.assert_close(net.bias.grad, reference.bias.grad)


@pytest.mark.parametrize('loss_class', [HardNetLoss, RALLoss])
def test_two_processes_equal_one_with_the_whole_batch(loss_class):
    debug_launcher(_two_processes, (loss_class,), num_processes=2)


def test_part_loss_is_the_sum_of_parts_and_weighted_branches():
    torch.manual_seed(0)
    model = timm.create_model('resnet18_pcb_csa', num_classes=5, drop_rate=0.0).eval()
    objective = PartLoss(model, aux_stages=(0, 2), aux_weight=0.5).eval()
    images, labels = torch.randn(3, 3, 96, 32), torch.tensor([0, 4, 2])
    values = objective(images, labels)

    features = model.forward_features(images)
    parts = model.forward_parts(features)
    part_loss = sum(F.cross_entropy(parts[:, part], labels) for part in range(6))
    stem = model.maxpool(model.act1(model.bn1(model.conv1(images))))
    first = model.layer1(stem)
    third = model.layer3(model.layer2(first))
    aux_loss = sum(
        F.cross_entropy(branch(level.mean((2, 3))), labels)
        for branch, level in zip(objective.aux, (first, third), strict=True)
    )
    torch.testing.assert_close(values['part_loss'], part_loss.detach())
    torch.testing.assert_close(values['aux_loss'], aux_loss.detach())
    torch.testing.assert_close(values['loss'], part_loss + 0.5 * aux_loss)

    values['loss'].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert not any(key.startswith('aux') for key in model.state_dict())


def test_part_loss_needs_classes_and_stages_of_the_model():
    with pytest.raises(ValueError, match='num_classes'):
        PartLoss(timm.create_model('resnet18_pcb'))
    model = timm.create_model('resnet18_pcb_csa', num_classes=5)
    for stages in ((-1,), (4,)):
        with pytest.raises(
            ValueError, match=re.escape(f'{list(stages)}, but the stages of the model are [0, 1, 2, 3]')
        ):
            PartLoss(model, stages)
    values = PartLoss(model, (2, 0, 0))(torch.randn(2, 3, 96, 32), torch.tensor([0, 1]))
    assert 2 * math.log(5) == pytest.approx(values['aux_loss'].item(), abs=0.1)  # two branches that know nothing yet
