"""Figures: ranked lists of a re-identification model, matches, attention maps of any CSA model (paper, Figure 5)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import nn

from .attention import CompressedSelfAttention
from .evaluation.retrieval import RankedLists
from .features import ImageMatches

RIGHT, WRONG = '#2a9d4a', '#d1495b'
FAINT = '#8a8a8a'


def draw_ranked_lists(
    query_images: np.ndarray, gallery_images: np.ndarray, lists: RankedLists, queries: Sequence[int]
) -> Figure:
    """A row per query: the query, then its nearest gallery images, framed green if they show the same person.

    Args:
        query_images: (Q, H, W, 3) uint8.
        gallery_images: (G, H, W, 3) uint8.
        lists: From `ranked_lists`.
        queries: Which queries to draw.
    """
    k = lists.index.shape[1]
    height, width = query_images.shape[1:3]
    scale = 0.62 / width
    figure = Figure(figsize=(scale * width * (k + 1.3), scale * height * len(queries) + 0.3), layout='constrained')
    axes = figure.subplots(len(queries), k + 1, squeeze=False)
    for row, query in zip(axes, queries, strict=True):
        row[0].imshow(query_images[query])
        for axis, index, is_match in zip(row[1:], lists.index[query], lists.is_match[query], strict=True):
            if index >= 0:
                axis.imshow(gallery_images[index])
                axis.spines[:].set(color=RIGHT if is_match else WRONG, linewidth=2.5)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_title('query', fontsize=8)
    for rank, axis in enumerate(axes[0, 1:], 1):
        axis.set_title(str(rank), fontsize=8)
    return figure


def draw_matches(image0: np.ndarray, image1: np.ndarray, matches: Mapping[str, ImageMatches]) -> Figure:
    """A row per descriptor: two images side by side and lines between their matches, inliers green, others faint.

    Args:
        image0: (H, W) or (H, W, 3) uint8.
        image1: The same of the second image; another size will do.
        matches: From `csa_zoo.features.match_features`, by the name of the descriptor.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not matches:
        raise ValueError('no matches to draw')
    left = image0.shape[1]
    height, width = max(image0.shape[0], image1.shape[0]), left + image1.shape[1]
    figure = Figure(figsize=(10, (10 * height / width + 0.3) * len(matches)), layout='constrained')
    axes = figure.subplots(len(matches), 1, squeeze=False)[:, 0]
    for axis, (name, (points0, points1, is_inlier)) in zip(axes, matches.items(), strict=True):
        # a pixel's centre is an integer in keypoints and in imshow
        axis.imshow(image0, cmap='gray', vmin=0, vmax=255)
        axis.imshow(
            image1, cmap='gray', vmin=0, vmax=255, extent=(left - 0.5, width - 0.5, image1.shape[0] - 0.5, -0.5)
        )
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axis.set_axis_off()
        lines = np.stack([points0, points1 + np.array([left, 0])], 1)
        axis.add_collection(LineCollection(lines[~is_inlier], colors=FAINT, linewidths=0.4, alpha=0.25))
        axis.add_collection(LineCollection(lines[is_inlier], colors=RIGHT, linewidths=0.6, alpha=0.7))
        axis.set_title(f'{name}: {is_inlier.sum():,} inliers of {len(is_inlier):,} matches', fontsize=9)
    return figure


@torch.inference_mode()
def draw_attention(model: nn.Module, image: torch.Tensor, picture: np.ndarray, num_maps: int = 4) -> Figure:
    """A row per CSA module: base attention maps, and full attention maps of a few positions, over the image.

    The base maps shown are the ones that the image's positions weigh most. A full map is put together from the base
    maps for its position only, equation [4].

    Args:
        model: A model with CSA; its mode is restored.
        image: Its input, (1, C, H, W).
        picture: The same image to draw, (H, W, 3) or (H, W) uint8.
        num_maps: Base maps, and positions, to show for each module.

    Raises:
        ValueError: If the model has no CSA.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, CompressedSelfAttention)}
    if not modules:
        raise ValueError(f'{type(model).__name__} has no CompressedSelfAttention to draw')
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, module in modules.items()
    ]
    training = model.training
    try:
        model.eval()(image)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()

    height, width = picture.shape[:2]
    columns = 1 + 2 * num_maps
    figure = Figure(
        figsize=(0.8 * columns, 0.8 * height / width * len(modules) + 0.3 * len(modules)), layout='constrained'
    )
    axes = figure.subplots(len(modules), columns, squeeze=False)
    for row, (name, module) in zip(axes, modules.items(), strict=True):
        base, weights = (maps[0].flatten(0, 1) for maps in module.attention_maps(inputs[name]))  # (G·D, h, w)
        row[0].imshow(picture, cmap='gray')
        row[0].set_title(name, fontsize=7)
        for axis, index in zip(row[1:], weights.mean((1, 2)).topk(num_maps).indices.tolist(), strict=False):
            _overlay(axis, picture, base[index])
            axis.set_title(f'base {index}', fontsize=7)
        size = base.shape[1:]
        for axis, fraction in zip(row[1 + num_maps :], np.linspace(0.15, 0.85, num_maps), strict=True):
            y, x = int(fraction * size[0]), size[1] // 2
            maps = module.num_maps  # of the first group
            _overlay(axis, picture, (weights[:maps, y, x, None, None] * base[:maps]).sum(0))
            axis.plot((x + 0.5) * width / size[1], (y + 0.5) * height / size[0], '+', color='white', markersize=7)
            axis.set_title('position', fontsize=7)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure


def _overlay(axis, picture: np.ndarray, attention: torch.Tensor) -> None:
    """A map on a dimmed picture, scaled to its own maximum."""
    size = picture.shape[:2]
    map_ = F.interpolate(attention[None, None].float(), size=size, mode='bilinear')[0, 0].numpy()
    axis.imshow(picture, cmap='gray', alpha=0.45)
    axis.imshow(map_ / map_.max(), cmap='inferno', alpha=0.6, vmin=0, vmax=1)
