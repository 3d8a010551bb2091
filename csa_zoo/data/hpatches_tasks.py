"""What HPatches' three tasks compare: splits, pairs of patches to verify, queries and distractors to retrieve.

The lists of the benchmark (Balntas et al., CVPR 2017) are in the folder `tasks` of its repository. Its largest, the
verification pairs, are often missing; they are then drawn again as the benchmark drew them. For sequences of one's own
there is a draw by the same rules.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from .patches import cache_entry

# Fields with verification pairs, and their part of the benchmark's file names.
PAIRS = {'positives': 'pos', 'inter': 'neg_inter', 'intra': 'neg_intra'}
LEAST_CONTRAST = 10  # standard deviation in grey levels of the patches that retrieval uses

Patches = Mapping[str, Tensor | np.ndarray]


@dataclass(frozen=True)
class HPatchesTasks:
    """What is compared. A sequence is given as its number in `sequences`, from 0; an image as 0 (reference) to 5.

    Attributes:
        sequences: Names of the sequences that are evaluated.
        positives: (P, 6) pairs of patches of one point: sequence, image, index, sequence, image, index.
        inter: (P, 6) pairs of different points, as a rule of different sequences.
        intra: (P, 6) pairs of different points of one sequence.
        queries: (Q, 2) patches of the reference image: sequence, index.
        distractors: (R, 2), likewise.

    Raises:
        ValueError: If a field has another shape, or a number is out of its range.
    """

    sequences: tuple[str, ...]
    positives: np.ndarray
    inter: np.ndarray
    intra: np.ndarray
    queries: np.ndarray
    distractors: np.ndarray

    def __post_init__(self) -> None:
        for name, width in {**dict.fromkeys(PAIRS, 6), 'queries': 2, 'distractors': 2}.items():
            rows = getattr(self, name)
            if rows.ndim != 2 or rows.shape[1] != width or not len(rows):
                raise ValueError(f'{name} must be of shape (rows, {width}) and not empty, not {rows.shape}')
            if rows.min() < 0 or rows[:, :: max(2, width // 2)].max() >= len(self.sequences):
                raise ValueError(f'{name} has a negative number or a sequence beyond {len(self.sequences) - 1}')
            if width == 6 and rows[:, 1::3].max() > 5:
                raise ValueError(f'{name} has image {rows[:, 1::3].max()}, but images are 0 to 5')

    def check(self, descriptors: Patches) -> None:
        """See whether patches or descriptors are there for all that is compared.

        Raises:
            ValueError: If a sequence is missing, or has fewer patches than an index says.
        """
        missing = [name for name in self.sequences if name not in descriptors]
        if missing:
            raise ValueError(f'{len(missing)} of {len(self.sequences)} sequences are missing: {", ".join(missing[:5])}')
        counts = np.array([descriptors[name].shape[1] for name in self.sequences])
        for name in (*PAIRS, 'queries', 'distractors'):
            rows = getattr(self, name)
            step = 3 if name in PAIRS else 2
            sequence, index = rows[:, ::step].ravel(), rows[:, step - 1 :: step].ravel()
            beyond = index >= counts[sequence]
            if beyond.any():
                number = sequence[beyond.argmax()]
                raise ValueError(
                    f'{name} names patch {index[beyond.argmax()]} of {self.sequences[number]}, which has '
                    f'{counts[number]}: the lists belong to other patches'
                )


def load_hpatches_splits(folder: str | Path) -> dict[str, dict[str, list[str]]]:
    """The benchmark's splits from `splits.json`, in the folder or in its `splits`.

    Returns:
        Names of sequences under 'train' and 'test' for each split: a, b, c, full, illum, view. The last three have no
        training sequences.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its content is not of this form.
    """
    folder = Path(folder).expanduser()
    for path in (folder / 'splits.json', folder / 'splits' / 'splits.json'):
        if path.is_file():
            break
    else:
        raise FileNotFoundError(
            f"no splits.json in {folder}: name the folder 'tasks' of the HPatches benchmark's repository"
        )
    try:
        content = json.loads(path.read_text())
        splits = {
            name: {part: list(split.get(part, ())) for part in ('train', 'test')} for name, split in content.items()
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f'{path} is not of the form {{split: {{"train": [...], "test": [...]}}}} ({error})') from error
    return splits


def load_hpatches_tasks(folder: str | Path, split: str, patches: Patches, progress: bool = True) -> HPatchesTasks:
    """The benchmark's lists for a split.

    Args:
        folder: The benchmark's `tasks`, with `splits.json`, `retr_queries_split-<split>.csv` and
            `retr_distractors_split-<split>.csv`, and perhaps `verif_{pos,neg_inter,neg_intra}_split-<split>.csv`.
            Without these three, the pairs are drawn again as the benchmark drew them, from the seed 42 and the number
            of patches in each sequence; that takes a minute, once (see `csa_zoo.data.patches.cache_folder`).
        split: A name in `splits.json`; papers on descriptors that are trained elsewhere use 'full'.
        patches: Patches, or descriptors, of shape (16, N, ...) by sequence.
        progress: Show a progress bar while drawing, on a terminal.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If there is no such split, or a file or a sequence does not fit the others.
    """
    folder = Path(folder).expanduser()
    splits = load_hpatches_splits(folder)
    if split not in splits:
        raise ValueError(f'{folder} has the splits {", ".join(splits)}, not {split!r}')
    names = splits[split]['test']
    missing = [name for name in names if name not in patches]
    if missing:
        raise ValueError(f'{len(missing)} sequences of the split {split} are missing: {", ".join(missing[:5])}')
    retrieval = [_read_list(folder / f'retr_{kind}_split-{split}.csv', names) for kind in ('queries', 'distractors')]
    paths = [folder / f'verif_{kind}_split-{split}.csv' for kind in PAIRS.values()]
    if any(path.is_file() for path in paths):
        pairs = [_read_list(path, names) for path in paths]
    else:
        pairs = _official_pairs(split, [patches[name].shape[1] for name in names], progress)
    tasks = HPatchesTasks(tuple(names), *pairs, *retrieval)
    tasks.check(patches)
    return tasks


def draw_hpatches_tasks(
    patches: Patches, pairs: int = 1_000_000, queries: int = 10_000, distractors: int = 20_000, seed: int = 0
) -> HPatchesTasks:
    """Lists for sequences of one's own, by the benchmark's rules; other descriptors compare on the same draw only.

    Unlike the benchmark's, pairs use all six images, and an `inter` pair is always of two sequences.

    Args:
        patches: (16, N, S, S) uint8 by sequence; at least two sequences of two points each.
        pairs: In each of the three lists of pairs.
        queries: At most so many, and at most a third of the reference patches that have contrast.
        distractors: At most so many, of the others.
        seed: Seed of the draw.

    Raises:
        ValueError: If there are too few sequences, points, or reference patches with contrast.
    """
    names, counts = tuple(patches), np.array([stack.shape[1] for stack in patches.values()])
    if len(names) < 2 or counts.min() < 2:
        raise ValueError(
            f'tasks need two sequences of two points at least, not {dict(zip(names, counts, strict=True))}'
        )
    rng = np.random.default_rng(seed)
    sequence = rng.integers(len(names), size=pairs)
    other = (sequence + rng.integers(1, len(names), size=pairs)) % len(names)
    point = rng.integers(counts[sequence])
    neighbour = (point + rng.integers(1, counts[sequence])) % counts[sequence]
    image = rng.integers(6, size=pairs)
    second = (image + rng.integers(1, 6, size=pairs)) % 6
    positives, inter, intra = _pair_lists(sequence, point, neighbour, image, second, other, rng.integers(counts[other]))

    contrast = [np.asarray(stack[0], np.float32).std((1, 2)) for stack in patches.values()]
    usable = [np.flatnonzero(std > LEAST_CONTRAST) for std in contrast]
    reference = np.stack([np.repeat(np.arange(len(names)), [len(u) for u in usable]), np.concatenate(usable)], 1)
    if len(np.unique(reference[:, 0])) < 2 or len(reference) < 3:
        raise ValueError(
            f'{len(reference)} reference patches have a standard deviation above {LEAST_CONTRAST} grey levels: '
            'retrieval needs three, of two sequences'
        )
    reference = rng.permutation(reference).astype(np.int32)
    first = min(queries, len(reference) // 3)
    return HPatchesTasks(names, positives, inter, intra, reference[:first], reference[first : first + distractors])


def _read_list(path: Path, names: Sequence[str]) -> np.ndarray:
    """Rows of a list, int32, with numbers for the names of sequences."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: it is in the benchmark's repository, folder 'tasks'")
    with path.open() as lines:
        header = lines.readline().strip().split(',')
    if header not in (['s', 'idx'], ['s1', 't1', 'idx1', 's2', 't2', 'idx2']):
        raise ValueError(
            f'{path} begins with {",".join(header)!r}, but a list of HPatches with s,idx or s1,t1,idx1,...'
        )
    dtype = [(column, 'S64' if column.startswith('s') else np.int32) for column in header]
    try:
        table = np.loadtxt(path, dtype, delimiter=',', skiprows=1, ndmin=1)
    except ValueError as error:
        raise ValueError(f'{path} is no list of {",".join(header)} ({error})') from error
    if not len(table):
        raise ValueError(f'{path} has no row: it is cut short')
    ascending = np.array(sorted(names), 'S64')
    number = np.array([names.index(name) for name in sorted(names)], np.int32)
    rows = np.empty((len(table), len(header)), np.int32)
    for index, column in enumerate(header):
        values = table[column]
        if column.startswith('s'):
            place = np.searchsorted(ascending, values).clip(max=len(names) - 1)
            strange = ascending[place] != values
            if strange.any():
                name = values[strange.argmax()].decode(errors='replace')
                raise ValueError(f'{path}, row {strange.argmax() + 1}: {name} is no sequence of the split')
            values = number[place]
        rows[:, index] = values
    return rows


def _official_pairs(split: str, counts: Sequence[int], progress: bool) -> np.ndarray:
    """Positive, inter and intra pairs of the benchmark, (3, 1000000, 6) int32."""

    def build(entry: Path) -> None:
        np.save(entry / 'pairs.npy', draw_official_pairs(counts, progress=progress))

    entry = cache_entry(f'hpatches-pairs-{split}', ['hpatches-pairs', 1, list(map(int, counts))], build)
    return np.load(entry / 'pairs.npy', allow_pickle=False)


def draw_official_pairs(counts: Sequence[int], pairs: int = 1_000_000, progress: bool = False) -> np.ndarray:
    """Verification pairs from the random numbers that the benchmark's generator takes, in its order.

    It never uses the fifth image of a sequence, and an inter pair may by chance be of one sequence.

    Args:
        counts: Patches in each sequence of the split, in the order of `splits.json`.
        pairs: In each list.
        progress: Show a progress bar, on a terminal.

    Returns:
        (3, pairs, 6) int32: positives, inter, intra.
    """
    random, counts = np.random.RandomState(42), np.asarray(counts)

    def draw_two(sizes: np.ndarray, description: str) -> np.ndarray:
        sizes = tqdm(sizes.tolist(), description, disable=None if progress else True)
        return np.array([random.permutation(size)[:2] for size in sizes])

    sequence = random.choice(len(counts), pairs)
    point, neighbour = draw_two(counts[sequence], 'drawing points').T
    image, second = draw_two(np.full(pairs, 5), 'drawing images').T
    other = random.choice(len(counts), pairs)
    stranger = np.array([random.randint(count) for count in counts[other].tolist()])
    return np.stack(_pair_lists(sequence, point, neighbour, image, second, other, stranger))


def _pair_lists(
    sequence: np.ndarray,
    point: np.ndarray,
    neighbour: np.ndarray,
    image: np.ndarray,
    second: np.ndarray,
    other: np.ndarray,
    stranger: np.ndarray,
) -> list[np.ndarray]:
    """Positive, inter and intra pairs of the same first patches."""
    seconds = ((sequence, second, point), (other, second, stranger), (sequence, second, neighbour))
    return [np.stack([sequence, image, point, *columns], 1).astype(np.int32) for columns in seconds]
