"""A model on a person re-identification set: embeddings of the splits, and the single-query results."""

from collections.abc import Mapping
from typing import NamedTuple

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from ..data.images import normalize
from .colours import colour_histograms
from .embedding import embed
from .retrieval import QueryResults, RankedLists, check_labels, ranked_lists, reid_per_query


class PeopleEvaluation(NamedTuple):
    """Query and gallery embeddings of one model, with what the retrieval functions need beside them.

    Attributes:
        query: (Q, D) float32, unit length.
        gallery: (G, D) float32, unit length.
        labels: Person ids of query and gallery, then camera ids of query and gallery.
    """

    query: torch.Tensor
    gallery: torch.Tensor
    labels: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def of(cls, query: torch.Tensor, gallery: torch.Tensor, data: datasets.DatasetDict) -> 'PeopleEvaluation':
        """With the labels of a set from `load_reid`."""
        return cls(query, gallery, people_labels(data))

    def results(self) -> QueryResults:
        """What each query found; its `metrics()` are CMC, mAP and mINP."""
        return reid_per_query(self.query, self.gallery, *self.labels)

    def ranked_lists(self, k: int = 10) -> RankedLists:
        """The k gallery images nearest to each query, without junk."""
        return ranked_lists(self.query, self.gallery, *self.labels, k=k)


def people_labels(data: datasets.DatasetDict) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Person ids of query and gallery, then camera ids of query and gallery: the order that retrieval functions take.

    Args:
        data: From `load_reid`.

    Raises:
        ValueError: If nothing can be measured with these labels, such as of one camera.
    """
    labels = tuple(
        np.asarray(data[split][column][:]) for column in ('person_id', 'camera_id') for split in ('query', 'gallery')
    )
    check_labels(*labels)
    return labels


def embed_people(
    model: nn.Module,
    data: datasets.DatasetDict,
    images: Mapping[str, np.ndarray],
    accelerator: Accelerator,
    batch_size: int = 256,
) -> PeopleEvaluation:
    """Embed query and gallery with a timm model; embeddings are brought to unit length, so that cosines rank.

    Args:
        model: Any timm model, on the accelerator's device.
        data: From `load_reid`.
        images: From `cache_splits(data, ...)`, at the model's input size.
        accelerator: Of this process.
        batch_size: Images in one forward pass.
    """
    config = model.pretrained_cfg

    def preprocess(batch: torch.Tensor) -> torch.Tensor:
        return normalize(batch.permute(0, 3, 1, 2), config['mean'], config['std'])

    query, gallery = (
        F.normalize(embed(model, images[split], preprocess, accelerator, batch_size, f'embedding {split}'))
        for split in ('query', 'gallery')
    )
    return PeopleEvaluation.of(query, gallery, data)


def describe_colours(data: datasets.DatasetDict, images: Mapping[str, np.ndarray]) -> PeopleEvaluation:
    """The same from `colour_histograms`: what a model has to beat.

    Args:
        data: From `load_reid`.
        images: From `cache_splits(data, ...)`, at any size.
    """
    query, gallery = (torch.from_numpy(colour_histograms(images[split])) for split in ('query', 'gallery'))
    return PeopleEvaluation.of(query, gallery, data)
