"""What is optimised: the HardNet and RAL losses of descriptors, the part losses of PCB and deep supervision.

HardNet: Mishchuk et al., NIPS 2017. RAL: Xu et al., ACCV 2018. Deep supervision: equation [8] of the CSA paper.
Batch-hard triplets: Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .models import PCB


class _HardestInBatchLoss(nn.Module):
    """Mining that the two descriptor losses share: each pair against its hardest negative in the batch.

    In several processes the negatives come from all of them. Other processes' descriptors enter without gradient and
    the loss is scaled by the number of processes, which after the averaging of gradients between processes is exactly
    the gradient of the whole batch in one process.
    """

    def forward(self, anchors: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        """Loss of corresponding descriptors.

        Args:
            anchors: Unit-length descriptors (B, D).
            positives: Row i corresponds to row i of `anchors`, and to no other.

        Returns:
            The mean loss, a float32 scalar. In several processes, this process's value is the loss of the whole batch
            times the number of processes (see the class): divide it by that number to report it.

        Raises:
            ValueError: If the two have different shapes or there are fewer than two pairs.
        """
        if anchors.shape != positives.shape or anchors.ndim != 2:
            raise ValueError(
                f'need two (B, D) tensors of one shape, got {tuple(anchors.shape)}, {tuple(positives.shape)}'
            )
        with torch.autocast(anchors.device.type, enabled=False):
            anchors, positives = _whole_batch(anchors.float()), _whole_batch(positives.float())
            if len(anchors) < 2:
                raise ValueError('a batch of one pair has no negatives')
            loss = self._loss(*self._mine(self._distances(anchors, positives))).mean()
        return loss * _world_size()

    def _mine(self, distances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances of the pairs and of their hardest negatives, both (B,), from all distances (B, B)."""
        excluded = torch.eye(len(distances), dtype=torch.bool, device=distances.device)
        # another patch at nearly the same descriptor is taken for the same point and not for a negative
        excluded = excluded | (distances.detach() < self._duplicate)
        masked = distances + 10.0 * excluded
        return distances.diagonal(), torch.minimum(masked.amin(0), masked.amin(1))


class HardNetLoss(_HardestInBatchLoss):
    """Triplet margin loss with the hardest negative in the batch, over rows and columns of the distance matrix.

    Distances are Euclidean; negatives closer than 0.008 are left out as duplicates.
    """

    _duplicate = 0.008

    def __init__(self, margin: float = 1.0):
        """Create the loss with a margin between positive and negative distance."""
        super().__init__()
        self.margin = margin

    def _distances(self, anchors: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        squares = anchors.square().sum(1)[:, None] + positives.square().sum(1) - 2 * anchors @ positives.T
        # the constants of the released code; the first keeps the root's derivative finite
        return (squares.clamp_min(0) + 1e-6).sqrt() + 1e-8

    def _loss(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        return F.relu(self.margin + positive - negative)


class RALLoss(_HardestInBatchLoss):
    """Robust angular loss 1 + tanh(d⁺ − d⁻) on squared distances, with HardNet's mining; in (0, 2).

    Its gradient fades for pairs that are very wrong, which are often labelled wrongly, as for those that are easy.
    """

    _duplicate = 0.008**2

    def _distances(self, anchors: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        return 2 * (1 - anchors @ positives.T) + 1e-8

    def _loss(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        return 1 + torch.tanh(positive - negative)


class TripletLoss(nn.Module):
    """Batch-hard triplet loss: each descriptor's farthest positive against its nearest negative in the batch.

    In several processes positives and negatives come from all of them, with the exact gradient of the whole batch.
    """

    def __init__(self, margin: float = 0.3):
        """Create the loss with a margin between positive and negative distance."""
        super().__init__()
        self.margin = margin

    def forward(self, descriptors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of a batch with several descriptors of each identity.

        Args:
            descriptors: (B, D), of unit length, which the margin is meant for.
            labels: Identity of each (B,). One that is the only one of its identity is its own positive, at a distance
                of 0.001 (the root of what keeps the derivative finite).

        Returns:
            The mean loss, a float32 scalar; in several processes times their number.

        Raises:
            ValueError: If there is not one label for each descriptor.
        """
        if labels.shape != descriptors.shape[:1]:
            raise ValueError(f'{tuple(descriptors.shape)} descriptors need a label each, not {tuple(labels.shape)}')
        with torch.autocast(descriptors.device.type, enabled=False):
            descriptors, labels = _whole_batch(descriptors.float()), _whole_batch(labels)
            squares = descriptors.square().sum(1)
            distances = squares[:, None] + squares - 2 * descriptors @ descriptors.T
            distances = (distances.clamp_min(0) + 1e-6).sqrt()  # a finite derivative, also on the diagonal
            same = labels[:, None] == labels
            positive = distances.masked_fill(~same, 0).amax(1)
            negative = distances.masked_fill(same, torch.inf).amin(1)
            return F.relu(self.margin + positive - negative).mean() * _world_size()


class PartLoss(nn.Module):
    """PCB with what it is trained by: the sum of the parts' cross-entropies, plus deep supervision [8].

    A triplet loss on the descriptor may be added.

    This module owns the model and the auxiliary branches (global average pooling, linear to 256, linear classifier, one
    after each stage of `aux_stages`), so that it is what data parallelism wraps, and the model alone is what is
    evaluated and published.
    """

    def __init__(
        self,
        model: PCB,
        aux_stages: Sequence[int] = (),
        aux_weight: float = 1.0,
        label_smoothing: float = 0.0,
        triplet_weight: float = 0.0,
    ):
        """Create the branches.

        Args:
            model: The model, with `num_classes` identities.
            aux_stages: Stages that get an auxiliary branch, from 0; usually those that attention follows.
            aux_weight: λ, the weight of the auxiliary losses.
            label_smoothing: Of every cross-entropy, in [0, 1).
            triplet_weight: Of the triplet loss; 0 for none.

        Raises:
            ValueError: If the model has no classes, or no such stages.
        """
        super().__init__()
        if not model.num_classes:
            raise ValueError('the model has no classes to train: create it with num_classes')
        stages = range(len(model.feature_info) - 1)  # in feature_info the stem comes first
        if not set(aux_stages) <= set(stages):
            raise ValueError(f'aux_stages are {list(aux_stages)}, but the stages of the model are {list(stages)}')
        self.model = model
        self.aux_weight = aux_weight
        self.label_smoothing = label_smoothing
        self.triplet_weight = triplet_weight
        self.triplet = TripletLoss()
        self.levels = sorted({stage + 1 for stage in aux_stages})  # intermediates come in this order
        self.aux = nn.ModuleList(
            _auxiliary_branch(model.feature_info[level]['num_chs'], model.num_classes) for level in self.levels
        )

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss of a batch.

        Args:
            images: (B, 3, H, W), normalised.
            labels: Class of each image (B,), from 0.

        Returns:
            `loss` to back-propagate and, detached, `part_loss` and `aux_loss` that it is made of, and `accuracy`: the
            fraction of images whose mean part logits are highest at their own class. All scalars. `triplet_loss` is
            there if it has a weight.
        """
        features, levels = (
            self.model.forward_intermediates(images, indices=self.levels)
            if self.levels
            else (
                self.model.forward_features(images),
                [],
            )
        )
        logits = self.model.forward_parts(features)
        part_loss = sum(self._cross_entropy(part, labels) for part in logits.unbind(1))
        aux_loss = sum(
            (
                self._cross_entropy(branch(level.mean((2, 3))), labels)
                for branch, level in zip(self.aux, levels, strict=True)
            ),
            start=part_loss.new_zeros(()),
        )
        values = {
            'loss': part_loss + self.aux_weight * aux_loss,
            'part_loss': part_loss.detach(),
            'aux_loss': aux_loss.detach(),
            'accuracy': (logits.detach().mean(1).argmax(1) == labels).float().mean(),
        }
        if self.triplet_weight:
            triplet_loss = self.triplet(self.model.forward_descriptor(features), labels)
            values['loss'] = values['loss'] + self.triplet_weight * triplet_loss
            values['triplet_loss'] = triplet_loss.detach() / _world_size()
        return values

    def _cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)


def _auxiliary_branch(channels: int, num_classes: int) -> nn.Sequential:
    branch = nn.Sequential(nn.Linear(channels, 256, bias=False), nn.Linear(256, num_classes))
    nn.init.kaiming_normal_(branch[0].weight, mode='fan_out')
    nn.init.normal_(branch[1].weight, std=0.001)
    nn.init.zeros_(branch[1].bias)
    return branch


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _whole_batch(descriptors: torch.Tensor) -> torch.Tensor:
    """The descriptors of all processes in rank order, of which only this process's carry a gradient."""
    if _world_size() == 1:
        return descriptors
    gathered = [torch.empty_like(descriptors) for _ in range(_world_size())]
    dist.all_gather(gathered, descriptors.detach().contiguous())
    gathered[dist.get_rank()] = descriptors
    return torch.cat(gathered)
