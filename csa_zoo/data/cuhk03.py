"""CUHK03-NP in all its forms: ready-made folders, the original .mat file, and images extracted from it by torchreid.

Sources: CUHK03, Li et al. (CVPR 2014), in the 767/700 protocol of Zhong et al. (CVPR 2017).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import h5py
import numpy as np
import scipy.io
from PIL import Image
from tqdm.auto import tqdm

from .patches import cache_folder
from .reid_layouts import FOLDERS, name_style, read_market_layout, subfolders
from .reid_listing import SPLITS, Listing, Photo, by_base_name, missing_files
from .reid_published import CUHK03_NAMES, PUBLISHED, Published

Boxes = Literal['detected', 'labeled']

CUHK03_PERSONS_PER_PAIR = (843, 440, 77, 58, 49)
CUHK03_IMAGES_PER_VIEW = 5

# Folders of the set; given as root, the set is around them.
_INSIDE = {*FOLDERS.values(), 'cuhk03_release', 'images_detected', 'images_labeled'}


def parse_cuhk03_name(path: str) -> tuple[int, int]:
    """Person and camera of a raw CUHK03 name `pair_person_view_image`: `2_003_1_02.png`.

    Args:
        path: File name or path; only what follows the last slash counts.

    Returns:
        The person, counted from 1 over all camera pairs (2_003 is 843 + 3), and the view, 1 or 2.

    Raises:
        ValueError: If the name is not like this, or there is no such person.
    """
    match = re.match(r'([1-5])_([0-9]{3})_([12])_([0-9]{2})\.', os.path.basename(path))
    if not match or not 1 <= int(match[2]) <= CUHK03_PERSONS_PER_PAIR[int(match[1]) - 1]:
        raise ValueError(f'{path}: not the name of a CUHK03 image, pair_person_view_image as in 2_003_1_02.png')
    return sum(CUHK03_PERSONS_PER_PAIR[: int(match[1]) - 1]) + int(match[2]), int(match[3])


def read_cuhk03np(root: Path, boxes: Boxes = 'detected', progress: bool = True) -> Listing | None:
    """The list of the images; None if the set is neither in root nor within two folders below.

    Args:
        root: The folder of the set, one around it, one of those inside it, or the .mat file.
        boxes: Whether people were cut out by a detector or by hand.
        progress: Whether a bar shows the extraction from the .mat file.

    Raises:
        FileNotFoundError: If only the other boxes are there, or a part of the set is not.
        ValueError: If root holds the other boxes or several copies, or a file is not of its format.
    """
    if boxes not in get_args(Boxes):
        raise ValueError(f"boxes must be 'detected' or 'labeled', not {boxes!r}")
    root = root.parent if root.is_file() else root
    root = root.parent if root.name in _INSIDE else root
    if name_style(root) == 'cuhk03np' and _boxes_of(root) not in (boxes, None):
        raise ValueError(f'{root} holds the {_boxes_of(root)} boxes, but {boxes} ones are asked for: pass boxes=')
    ready = _find_ready(root, boxes)
    if ready:
        return _list_ready(ready, boxes)
    if _is_raw(root):
        return _list_raw(root, boxes, progress)
    others = [folder for other in get_args(Boxes) if (folder := _find_ready(root, other))]
    if others:
        raise FileNotFoundError(f'{root} has no {boxes} boxes; the others are in {others[0]}: pass boxes=')
    return None


def is_cuhk03np(root: Path) -> bool:
    return _is_raw(root) or any(_find_ready(root, boxes) for boxes in get_args(Boxes))


def _places(root: Path) -> Iterator[Path]:
    """Root and the folders up to two levels below."""
    below = subfolders(root)
    yield root
    yield from below
    for folder in below:
        yield from subfolders(folder)


def _first(root: Path, name: str) -> Path | None:
    return next((path for folder in _places(root) if (path := folder / name).exists()), None)


def _boxes_of(folder: Path) -> Boxes | None:
    """By its name, with the misspellings (`Labelde`) that are about."""
    name = folder.name.lower()
    return 'labeled' if 'label' in name else 'detected' if 'detect' in name else None


def _find_ready(root: Path, boxes: Boxes) -> Path | None:
    found = [folder for folder in _places(root) if name_style(folder) == 'cuhk03np']
    named = [folder for folder in found if _boxes_of(folder) == boxes]
    candidates = named or [folder for folder in found if _boxes_of(folder) is None]
    if len(candidates) > 1:
        raise ValueError(f'several copies of the {boxes} boxes, {", ".join(map(str, candidates))}: give one as root')
    return candidates[0] if candidates else None


def _list_ready(folder: Path, boxes: Boxes) -> Listing:
    splits = read_market_layout(folder)
    notices = []
    if _boxes_of(folder) is None:
        notices.append(f"nothing in the name {folder} tells which CUHK03-NP boxes it holds; taken for '{boxes}'")
    if any(not photo.path.lower().endswith('.png') for photos in splits.values() for photo in photos):
        notices.append(
            f'{folder} is a repack of CUHK03-NP as JPEG: its pixels differ from the original PNG files, and so will '
            'the scores, a little'
        )
    published = _published('ready', boxes)
    return Listing(folder, f'{boxes} boxes, ready-made folders', splits, published, notices=notices)


def _published(form: str, boxes: Boxes) -> dict[str, Published]:
    hashes = zip(SPLITS, CUHK03_NAMES[form, boxes], strict=True)
    return {split: PUBLISHED[f'cuhk03np {boxes}'][split]._replace(sha256=sha256) for split, sha256 in hashes}


def _is_raw(root: Path) -> bool:
    return any(_first(root, name) for name in ('cuhk-03.mat', 'images_detected', 'images_labeled'))


def _list_raw(root: Path, boxes: Boxes, progress: bool) -> Listing:
    """The original .mat file or its images, extracted by torchreid, with one of the two split files."""
    splits = {split: by_base_name(photos) for split, photos in _read_split(root, boxes).items()}
    names = [photo.path for split in SPLITS for photo in splits[split]]
    published = _published('raw', boxes)

    def listing(place: Path, form: str, folder: Path, **rest: Any) -> Listing:
        placed = {
            split: [photo._replace(path=os.path.join(folder, photo.path)) for photo in photos]
            for split, photos in splits.items()
        }
        return Listing(place, f'{boxes} boxes, {form}', placed, published, **rest)

    raw = _first(root, 'cuhk-03.mat')
    images = _first(root, f'images_{boxes}')
    missing = missing_files(os.path.join(images, name) for name in names) if images else []
    if images and (not missing or not raw):
        return listing(images, 'extracted images', images, missing=missing)
    if not raw:
        raise FileNotFoundError(f'{root} has no {boxes} images of CUHK03: neither images_{boxes} nor cuhk-03.mat')
    target = _extraction_folder(raw, boxes)
    form = f'extracted from {raw.name} to {target}'
    if not missing_files(os.path.join(target, name) for name in names):
        return listing(raw, form, target)
    with _open_raw(raw) as file:
        cells = _cells(file, raw, boxes)
        missing = [f'{raw}: {name}' for name in names if name not in cells]
    return listing(raw, form, target, missing=missing, prepare=lambda: _extract(raw, boxes, names, target, progress))


def _read_split(root: Path, boxes: Boxes) -> dict[str, list[Photo]]:
    """The photos' paths are base names."""
    matlab = _first(root, f'cuhk03_new_protocol_config_{boxes}.mat')
    if matlab:
        return _read_matlab_split(matlab)
    torchreid = _first(root, f'splits_new_{boxes}.json')
    if torchreid:
        return _read_torchreid_split(torchreid)
    raise FileNotFoundError(
        f'{root} has CUHK03 images but no split of the new protocol: put cuhk03_new_protocol_config_{boxes}.mat '
        '(76 kB, from github.com/zhunzhong07/person-re-ranking, evaluation/data/CUHK03) there'
    )


def _read_matlab_split(path: Path) -> dict[str, list[Photo]]:
    try:
        content = scipy.io.loadmat(path)
        names = [str(name.item()) for name in content['filelist'].ravel()]
        labels, cameras = (content[key].ravel().astype(int).tolist() for key in ('labels', 'camId'))
        photos = [Photo(*columns) for columns in zip(names, labels, cameras, strict=True)]
        indices = {split: content[f'{split}_idx'].ravel().astype(int) - 1 for split in SPLITS}
    except Exception as error:  # scipy's readers raise whatever the damaged bytes lead to
        raise ValueError(f'{path} is not a split file of CUHK03-NP ({error!r}): fetch it again') from error
    for split, index in indices.items():
        if len(index) and not 0 <= index.min() <= index.max() < len(photos):
            raise ValueError(
                f'{path}: {split}_idx names images {index.min() + 1} to {index.max() + 1} of {len(photos)}'
            )
    return {split: [photos[i] for i in index] for split, index in indices.items()}


def _read_torchreid_split(path: Path) -> dict[str, list[Photo]]:
    """Base names only: the file's paths are absolute on the machine that made it, its training ids renumbered."""
    try:
        content = json.loads(path.read_text())
        content = content[0] if isinstance(content, list) else content
        names = {split: [re.split(r'[\\/]', entry[0])[-1] for entry in content[split]] for split in SPLITS}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f'{path} is not a split file written by torchreid ({error!r}): make it again') from error
    return {split: [Photo(name, *parse_cuhk03_name(name)) for name in names[split]] for split in SPLITS}


def _extraction_folder(raw: Path, boxes: Boxes) -> Path:
    stat = raw.stat()
    digest = hashlib.sha256(json.dumps([str(raw), stat.st_size, stat.st_mtime_ns]).encode()).hexdigest()[:16]
    return cache_folder() / f'cuhk03-{digest}' / f'images_{boxes}'


def _open_raw(path: Path) -> h5py.File:
    try:
        return h5py.File(path, 'r')
    except OSError as error:
        raise ValueError(f'{path} cannot be opened as MATLAB 7.3 file ({error}): unpack the archive again') from error


def _cells(file: h5py.File, path: Path, boxes: Boxes) -> dict[str, h5py.Dataset]:
    """The images of a cell array, pairs x (persons x 10), by the names that the protocol gives them.

    MATLAB writes the transpose of everything, and an empty cell as a vector of its dimensions.
    """
    cells = {}
    try:
        for pair, persons in enumerate(np.ravel(file[boxes][()]), 1):
            for person, references in enumerate(file[persons][()].T, 1):
                for image, reference in enumerate(references, 1):
                    view = 1 if image <= CUHK03_IMAGES_PER_VIEW else 2
                    if reference and (cell := file[reference]).ndim == 3:
                        cells[f'{pair}_{person:03d}_{view}_{image:02d}.png'] = cell
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise ValueError(f'{path} does not hold the cell array {boxes!r} of CUHK03 ({error!r})') from error
    return cells


def _extract(raw: Path, boxes: Boxes, names: Sequence[str], target: Path, progress: bool) -> None:
    """Write the images as PNG; each appears when it is whole, so that a killed run is taken up where it ended."""
    target.mkdir(parents=True, exist_ok=True)
    unfinished = target / f'.partial-{os.getpid()}.png'
    todo = sorted(set(names) - set(os.listdir(target)))
    with _open_raw(raw) as file:
        cells = _cells(file, raw, boxes)
        for name in tqdm(todo, desc=f'extracting {raw.name}', unit='img', disable=None if progress else True):
            try:
                pixels = np.ascontiguousarray(cells[name][()].T)
                Image.fromarray(pixels).save(unfinished, compress_level=1)
            except (OSError, TypeError, ValueError) as error:
                raise ValueError(f'{raw}: image {name} cannot be extracted to {target} ({error})') from error
            os.replace(unfinished, target / name)
