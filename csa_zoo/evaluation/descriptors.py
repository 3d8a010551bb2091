"""How good a patch descriptor is on a folder of patches or photographs, whatever kind of folder it is.

A descriptor is any function of patches, so that a model and SIFT are measured on the very same ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..data.hpatches import load_hpatches
from ..data.hpatches_tasks import HPatchesTasks, draw_hpatches_tasks, load_hpatches_tasks
from ..data.patches import PatchSet, verification_pairs
from ..data.photographs import bundled_photographs
from ..data.phototour import load_phototour, load_reference_images
from ..data.sequences import cut_sequences
from .embedding import embed
from .hpatches import hpatches_metrics
from .patches import fpr_at_recall, phototour_ratio_map

Describe = Callable[[Tensor], Tensor]
"""(N, S, S) uint8 to (N, D) floating point."""

BUNDLED = 'scikit-image'
"""Stands for the test photographs that come with scikit-image."""

TASKS = ('verification', 'matching', 'retrieval')


def descriptor_metrics(describe: Describe, source: str | Path, pairs: int = 100_000) -> dict[str, float]:
    """Measure a descriptor on one source.

    * PhotoTour's layout (it has an `info.txt`): `fpr95`, on the set's own pairs or, without any, on `pairs` drawn
      ones; with an `interest.txt` also `ratio_map`, the mean average precision of PhotoTour revisited.
    * HPatches' patches (`*/ref.png`): `verification`, `matching` and `retrieval` on all sequences, with the benchmark's
      lists if they are in a folder `tasks` inside or beside, else with drawn ones.
    * Photographs, or `scikit-image`: the same three on sequences that are cut from them.

    Args:
        describe: The descriptor.
        source: Folder, or `scikit-image`.
        pairs: Number of pairs to draw where they have to be.

    Returns:
        All in [0, 1].

    Raises:
        FileNotFoundError: If there is nothing of these kinds.
        ValueError: If a file is damaged, or the descriptor is NaN or infinite.
    """
    folder = Path(source)
    if (folder / 'info.txt').is_file():
        return _phototour(describe, folder, pairs)
    if any(folder.glob('*/ref.png')):
        patches = load_hpatches(folder)
        lists = folder / 'tasks' if (folder / 'tasks').is_dir() else folder.parent / 'tasks'
        if lists.is_dir():
            return _sequences(describe, patches, load_hpatches_tasks(lists, 'full', patches))
    else:
        patches = cut_sequences(bundled_photographs()['test'] if source == BUNDLED else folder)
    return _sequences(describe, patches, draw_hpatches_tasks(patches, pairs))


def by_name(sources: Sequence[str]) -> dict[str, str]:
    """Sources by the names that their results go by.

    Raises:
        FileNotFoundError: If one is not there.
        ValueError: If two have one name, of which one's results would be lost.
    """
    named = {Path(source).name: source for source in sources}
    if len(named) < len(sources):
        raise ValueError(f'results go by the names of folders, and two of {", ".join(sources)} have one: rename it')
    for source in sources:
        if source != BUNDLED and not Path(source).exists():
            raise FileNotFoundError(f'{source} does not exist: give a folder, or {BUNDLED} for its photographs')
    return named


def describe_with(model: nn.Module, accelerator: Accelerator, description: str = 'describing') -> Describe:
    """A descriptor model, on the accelerator's device, as a function of patches of its input size."""
    return lambda patches: embed(model, patches, scale_patches, accelerator, 1024, description)


def scale_patches(patches: Tensor) -> Tensor:
    """(B, S, S) uint8 to (B, 1, S, S) in [0, 1]."""
    return patches.unsqueeze(1).float() / 255


def _phototour(describe: Describe, folder: Path, pairs: int) -> dict[str, float]:
    patches = load_phototour(folder)
    descriptors = describe(patches.patches)
    metrics = {'fpr95': verification_fpr95(descriptors, with_pairs(patches, pairs))}
    if (folder / 'interest.txt').is_file():
        metrics['ratio_map'] = phototour_ratio_map(descriptors, patches.point_ids, load_reference_images(folder))
    return metrics


def _sequences(describe: Describe, patches: dict[str, Tensor], tasks: HPatchesTasks) -> dict[str, float]:
    counts = [len(stack.flatten(0, 1)) for stack in patches.values()]
    rows = describe(torch.cat([stack.flatten(0, 1) for stack in patches.values()])).split(counts)
    descriptors = {name: block.unflatten(0, (16, -1)) for name, block in zip(patches, rows, strict=True)}
    metrics = hpatches_metrics(descriptors, tasks)
    return {name: value for name, value in metrics.items() if name.split('_')[0] in TASKS and name.count('_') < 2}


def with_pairs(patches: PatchSet, count: int) -> PatchSet:
    """The set with its own verification pairs, or drawn ones if it has none."""
    return patches if patches.pairs else replace(patches, pairs=verification_pairs(patches, count))


def verification_fpr95(descriptors: Tensor, patches: PatchSet) -> float:
    """False positive rate at 95 % recall of the set's pairs, by Euclidean distance; in [0, 1]."""
    first, second, is_match = patches.pairs
    return fpr_at_recall((descriptors[first] - descriptors[second]).norm(dim=1), is_match)
