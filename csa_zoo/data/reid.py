"""Person re-identification sets on disk: Market-1501, DukeMTMC-reID, CUHK03-NP, MSMT17, rendered ones and one's own.

Nothing is downloaded. Ids and cameras are read from base names (or from the lists that come with a set), never from a
whole path, where a parent folder such as `run1_c2` would pass for a label. Images are listed in the order of their base
names, so that two machines train on the same sequence.

Sources: Market-1501, Zheng et al. (ICCV 2015); DukeMTMC-reID, Ristani et al. (ECCV-W 2016) and Zheng et al. (ICCV
2017); CUHK03, Li et al. (CVPR 2014) in the 767/700 protocol of Zhong et al. (CVPR 2017); MSMT17, Wei et al. (CVPR
2018). The published counts are those of the original archives; the name lists' hashes were computed from them.
"""

import csv
import hashlib
import inspect
import json
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import datasets
import h5py
import numpy as np
import scipy.io
from PIL import Image
from tqdm.auto import tqdm

from .patches import cache_folder
from .pedestrians import MANIFEST, render_pedestrians

logger = logging.getLogger(__name__)

Boxes = Literal['detected', 'labeled']

SPLITS = ('train', 'query', 'gallery')
FOLDERS = {'train': 'bounding_box_train', 'query': 'query', 'gallery': 'bounding_box_test'}
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')
JUNK, DISTRACTOR = -1, 0

CUHK03_PERSONS_PER_PAIR = (843, 440, 77, 58, 49)
CUHK03_IMAGES_PER_VIEW = 5


class Photo(NamedTuple):
    """One image of a set."""

    path: str
    person_id: int
    camera_id: int


class Published(NamedTuple):
    """What a split holds according to its authors.

    Attributes:
        images: Files.
        identities: Different persons; junk and distractors are none. None, here and below, where unknown.
        junk: Images labelled -1.
        distractors: Images labelled 0, where that means "nobody in the query".
        cameras: Images of camera 1, 2, ...; empty where unknown.
        sha256: Of the sorted base names joined by newlines, or how it begins; empty where unknown.
    """

    images: int
    identities: int | None
    junk: int | None = 0
    distractors: int | None = 0
    cameras: tuple[int, ...] = ()
    sha256: str = ''


PUBLISHED: dict[str, dict[str, Published]] = {
    'market1501': {
        'train': Published(
            12936,
            751,
            cameras=(2017, 1709, 2707, 920, 2338, 3245),
            sha256='6665d2f686d98426d2253ab9acc5c60a3abd81ce7207726c72b49ab40178d4d6',
        ),
        'query': Published(
            3368,
            750,
            cameras=(668, 530, 717, 248, 622, 583),
            sha256='6981ba13f71377071831b5f258dbe603ced4fd90e4cfed179918ca3842e4f470',
        ),
        'gallery': Published(
            19732,
            750,
            junk=3819,
            distractors=2798,
            cameras=(3156, 2944, 3803, 1671, 3814, 4344),
            sha256='234d677d2896ea6522b9d9a7a12d4e21767fffed21a731d305e2b065e7a38568',
        ),
    },
    'dukemtmcreid': {
        'train': Published(
            16522,
            702,
            cameras=(2809, 3009, 1088, 1395, 1685, 3700, 1330, 1506),
            sha256='c89c6d312a1d91c89eca2f79bbf7c2a2c1d010704d20dafe04516e97c3f71a49',
        ),
        'query': Published(
            2228,
            702,
            cameras=(413, 383, 190, 155, 216, 369, 239, 263),
            sha256='481693f88c7ddf1feb7575a398641edc8f0b62b18b658ded253014a22bfe3589',
        ),
        'gallery': Published(
            17661,
            1110,
            cameras=(2704, 2798, 828, 1139, 1209, 3308, 1255, 4420),
            sha256='091ba192f88fe0573d4d5d500dc79e8b03010e93dd4d31c8a6af1642f525fa8f',
        ),
    },
    'msmt17': {
        'train': Published(32621, 1041),
        'query': Published(11659, 3060),
        'gallery': Published(82161, 3060),
    },
    'cuhk03np detected': {
        'train': Published(7365, 767),
        'query': Published(1400, 700, cameras=(700, 700)),
        'gallery': Published(5332, 700, cameras=(2617, 2715)),
    },
    'cuhk03np labeled': {
        'train': Published(7368, 767),
        'query': Published(1400, 700, cameras=(700, 700)),
        'gallery': Published(5328, 700, cameras=(2615, 2713)),
    },
}

# The same images have other names in the raw set (pair_person_view_image) and in the ready-made folders.
CUHK03_NAMES = {
    ('raw', 'detected'): ('2ae21c93220859752eda694c', '733c2e4458d53dc55d8cbc17', '01e9153b3dc4159e69b3208b'),
    ('raw', 'labeled'): ('9588692c6efb3ccc5e2b35ec', '1df2968a18eb631acc9adc9e', 'fce5a751cf5f436001d5b96b'),
    ('ready', 'detected'): ('9669258a77070b400ea00e17', 'd3e5f69ba0b835998fd35f3b', 'fc1aa2382fc9d412bd29b5af'),
    ('ready', 'labeled'): ('17dc73c733b84e642c35a684', '2127961e2607499d9f27dde9', '05eac6451295bc99b877b145'),
}

DUKE_NOTICE = (
    'DukeMTMC-reID was withdrawn by Duke University in 2019: the people in it had not consented. It is supported for '
    'those who must compare with published numbers and is never downloaded; MSMT17 is the usual replacement.'
)


@dataclass
class Listing:
    """All that is known of a set before an image is opened.

    Attributes:
        root: The folder (or CSV) where it was found.
        form: Which variant it is, in words.
        splits: The images of train, query and gallery.
        published: What each split should hold; empty where nobody has published it.
        zero_is_distractor: Whether id 0 means "nobody in the query", or is a person like any other.
        ids_are_global: Whether equal ids in train and test mean the same person.
        missing: Files that the set's lists name but that are not on disk.
        notices: What the user must be told.
        prepare: Makes the files that are not there yet, where that can be done.
    """

    root: Path
    form: str
    splits: dict[str, list[Photo]]
    published: dict[str, Published] = field(default_factory=dict)
    zero_is_distractor: bool = True
    ids_are_global: bool = True
    missing: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    prepare: Callable[[], None] | None = None


@dataclass(frozen=True)
class Source:
    """A kind of set: what it is called, how it lies on disk, how it is recognised and listed."""

    title: str
    layout: str
    is_in: Callable[[Path], bool]
    read: Callable[..., Listing]


def load_reid(name: str, root: str | Path | None = None, **options: Any) -> datasets.DatasetDict:
    """Load a person re-identification set.

    Args:
        name: `market1501`, `dukemtmcreid`, `cuhk03np`, `msmt17`, `pedestrians` (rendered), or, for one's own images,
            `folder` (Market-1501's layout and names) or `csv` (a table with the header path,person_id,camera_id,split).
        root: Where it is; the folder itself, the one above it or one of those inside it. The file for `csv`. None, for
            `pedestrians` only, renders into the cache.
        **options: `cuhk03np`: `boxes='detected'` (as in most papers) or `'labeled'`, `progress=True`. `msmt17`:
            `validation=True`, whether list_val.txt belongs to the training split, as in the published counts.
            `pedestrians`: those of `render_pedestrians`.

    Returns:
        The splits train, query and gallery with the columns image (`datasets.Image`, decoded when accessed), person_id,
        camera_id (as in the file name) and path. Junk stays in the gallery with person_id -1, distractors with 0;
        metrics leave the former out of every ranking. Only of `folder` and `csv` may train be empty.

    Raises:
        FileNotFoundError: If the set, or a file that its lists name, is not there.
        ValueError: If a name, a label or a list is not of the set's format.
        TypeError: If the set has no such option.

    Warns:
        UserWarning: If the set was withdrawn, repacked, or does not hold what its authors published.
    """
    source = _source(name)
    if name == 'pedestrians':
        root, options = _rendered(root, options), {}
    listing = _read(name, root, options)
    _check_rules(listing)
    for notice in listing.notices:
        warnings.warn(notice, stacklevel=2)
    wrong = [
        f'{row.split} has {row.found:,} {row.quantity}, not {row.expected:,}' for row in _rows(listing) if row.wrong
    ]
    if wrong:
        more = f' and {len(wrong) - 3} more differences' if len(wrong) > 3 else ''
        warnings.warn(
            f'{source.title} in {listing.root} is not the published set: {"; ".join(wrong[:3])}{more}. Scores on it do '
            f'not compare with published ones; check_reid("{name}", ...) tells all.',
            stacklevel=2,
        )
    if listing.missing:
        raise FileNotFoundError(f'{source.title} in {listing.root}: {_missing_text(listing.missing)}')
    if listing.prepare:
        listing.prepare()
    about = f'{source.title}, {listing.form}, in {listing.root}'
    logger.info('%s', about)
    return datasets.DatasetDict({split: _dataset(listing.splits[split], about) for split in SPLITS})


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f'no re-identification set is called {name!r}; there are {", ".join(SOURCES)}')
    return SOURCES[name]


def _read(name: str, root: str | Path | None, options: dict[str, Any]) -> Listing:
    source = _source(name)
    if root is None:
        raise ValueError(f'{source.title} is not downloaded: give root, the folder where it is. {source.layout}')
    root = Path(root).expanduser().resolve()
    if not root.exists():
        raise FileNotFoundError(f'{root} does not exist. {source.title}: {source.layout}')
    known = list(inspect.signature(source.read).parameters)[1:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f'{name} has no option {", ".join(unknown)}; it has {", ".join(known) or "none"}')
    return source.read(root, **options)


def _rendered(root: str | Path | None, options: dict[str, Any]) -> str | Path:
    """A rendering that is complete is taken as it is; nobody has to know the arguments it was made with."""
    if root is not None and not options and _is_rendered(Path(root).expanduser()):
        return root
    return render_pedestrians(root, **options)


def _dataset(photos: Sequence[Photo], about: str) -> datasets.Dataset:
    paths, person_ids, camera_ids = zip(*photos, strict=True) if photos else ((), (), ())
    features = datasets.Features(
        {
            'image': datasets.Value('string'),
            'person_id': datasets.Value('int64'),
            'camera_id': datasets.Value('int64'),
            'path': datasets.Value('string'),
        }
    )
    columns = {'image': paths, 'person_id': person_ids, 'camera_id': camera_ids, 'path': paths}
    info = datasets.DatasetInfo(description=about, features=features)
    dataset = datasets.Dataset.from_dict(columns, features=features, info=info)
    # Cast as a whole: encoding path after path would take longer than all the rest.
    return dataset.cast_column('image', datasets.Image())


def _check_rules(listing: Listing) -> None:
    reserved = (JUNK, DISTRACTOR) if listing.zero_is_distractor else (JUNK,)
    for split in ('train', 'query'):
        for photo in listing.splits[split]:
            if photo.person_id in reserved:
                raise ValueError(
                    f'{photo.path} is in {split}, but its id {photo.person_id} means nobody '
                    '(-1: junk, 0: distractor): number persons from 1, or move it to the gallery'
                )
    for split, photos in listing.splits.items():
        if not photos and (split != 'train' or listing.published):
            raise FileNotFoundError(f'no images in the split {split} of {listing.root} ({listing.form})')


def parse_market_name(path: str) -> tuple[int, int]:
    """Person and camera of an image named as in Market-1501, DukeMTMC-reID or CUHK03-NP: `0002_c1s1_000451_03.jpg`.

    Args:
        path: File name or path; only what follows the last slash counts.

    Returns:
        The person id (-1 for junk) and the camera as written.

    Raises:
        ValueError: If the name does not begin like this.
    """
    match = re.match(r'(-1|[0-9]{1,18})_c([0-9]{1,18})', os.path.basename(path))
    if not match:
        raise ValueError(
            f'{path}: no person and camera in this name; rename it like 0002_c1s1_000451_03.jpg or remove it'
        )
    return int(match[1]), int(match[2])


def parse_msmt17_name(path: str) -> tuple[int, int]:
    """Person and camera (third field, 1 to 15) of an MSMT17 name: `0000_000_01_0303morning_0015_0.jpg`.

    Args:
        path: File name or path; only what follows the last slash counts.

    Raises:
        ValueError: If the name does not begin like this.
    """
    match = re.match(r'([0-9]+)_[0-9]+_([0-9]+)_', os.path.basename(path))
    if not match:
        raise ValueError(f'{path}: no person and camera in this name; MSMT17 has 0000_000_01_0303morning_0015_0.jpg')
    return int(match[1]), int(match[2])


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


def _by_base_name(photos: Iterable[Photo]) -> list[Photo]:
    return sorted(photos, key=lambda photo: (os.path.basename(photo.path), photo.path))


def _image_names(folder: Path) -> list[str]:
    """Sorted; without strays such as Thumbs.db and the `._` files of macOS."""
    if not folder.is_dir():
        return []
    return sorted(
        name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith('.')
    )


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith('.') and entry.is_dir())


def _find(root: Path, holds: Callable[[Path], bool], inside: Iterable[str]) -> Path | None:
    """The folder that `holds` a set: root, one below it, or the one above it if root is called like one of `inside`."""
    if holds(root):
        return root
    below = [folder for folder in _subfolders(root) if holds(folder)]
    if len(below) > 1:
        raise ValueError(f'{root} holds several copies: {", ".join(f.name for f in below)}; give one of them as root')
    if below:
        return below[0]
    return root.parent if root.name in inside and holds(root.parent) else None


def _not_found(name: str, root: Path) -> FileNotFoundError:
    source = SOURCES[name]
    return FileNotFoundError(f'no {source.title} in {root}, nor one folder above or below. {source.layout}')


def _absent(paths: Iterable[str]) -> list[str]:
    """Those that do not exist, with one directory listing per folder instead of one system call per file."""
    paths = list(paths)
    names = {
        folder: set(os.listdir(folder)) if os.path.isdir(folder) else set()
        for folder in set(map(os.path.dirname, paths))
    }
    return [path for path in paths if os.path.basename(path) not in names[os.path.dirname(path)]]


def _missing_text(missing: Sequence[str]) -> str:
    more = f' and {len(missing) - 5:,} more' if len(missing) > 5 else ''
    return f'{len(missing):,} listed files are not there: {", ".join(missing[:5])}{more}; unpack the archive again'


_NAME_STYLES = {
    'market1501': re.compile(r'(-1|[0-9]+)_c[0-9]+s[0-9]+_'),
    'dukemtmcreid': re.compile(r'[0-9]+_c[0-9]+_f[0-9]+'),
    'cuhk03np': re.compile(r'[0-9]+_c[12]_[0-9]+\.'),
}


def _style(folder: Path) -> str | None:
    """Which set the names in a folder of Market-1501's layout belong to; None for another layout."""
    if not all((folder / FOLDERS[split]).is_dir() for split in ('query', 'gallery')):
        return None
    if _is_rendered(folder):
        return 'pedestrians'
    first = next(
        (names[0] for split in ('query', 'gallery', 'train') if (names := _image_names(folder / FOLDERS[split]))), ''
    )
    return next((style for style, pattern in _NAME_STYLES.items() if pattern.match(first)), 'folder')


def _is_rendered(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _find_folders(root: Path, *styles: str) -> Path | None:
    """The folder of Market-1501's layout whose names are of the first of these styles that is there."""
    found = (_find(root, lambda folder, style=style: _style(folder) == style, FOLDERS.values()) for style in styles)
    return next((folder for folder in found if folder), None)


def _read_folders(folder: Path) -> dict[str, list[Photo]]:
    return {
        split: [
            Photo(path, *parse_market_name(path))
            for path in (os.path.join(folder, name, image) for image in _image_names(folder / name))
        ]
        for split, name in FOLDERS.items()
    }


def _read_market1501(root: Path) -> Listing:
    folder = _find_folders(root, 'market1501', 'pedestrians')
    if folder is None:
        raise _not_found('market1501', root)
    return Listing(folder, 'original folders', _read_folders(folder), PUBLISHED['market1501'])


def _read_dukemtmcreid(root: Path) -> Listing:
    folder = _find_folders(root, 'dukemtmcreid')
    if folder is None:
        raise _not_found('dukemtmcreid', root)
    return Listing(folder, 'original folders', _read_folders(folder), PUBLISHED['dukemtmcreid'], notices=[DUKE_NOTICE])


def _read_folder(root: Path) -> Listing:
    folder = _find_folders(root, 'folder', 'market1501', 'dukemtmcreid', 'cuhk03np', 'pedestrians')
    if folder is None:
        raise _not_found('folder', root)
    return Listing(folder, 'own images', _read_folders(folder))


def _read_pedestrians(root: Path) -> Listing:
    folder = _find_folders(root, 'pedestrians')
    if folder is None:
        raise _not_found('pedestrians', root)
    splits = _read_folders(folder)
    manifest = folder / MANIFEST
    try:
        counts = json.loads(manifest.read_text())['counts']
        published = {
            split: Published(int(counts[name]), identities=None, junk=None, distractors=None)
            for split, name in FOLDERS.items()
        }
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'{manifest} is not a manifest of rendered pedestrians ({error!r}): render them again'
        ) from error
    return Listing(folder, 'rendered', splits, published)


def _read_csv(root: Path) -> Listing:
    if not root.is_file():
        raise FileNotFoundError(f'{root} is not a file. {SOURCES["csv"].layout}')
    splits: dict[str, list[Photo]] = {split: [] for split in SPLITS}
    try:
        with root.open(newline='', encoding='utf-8-sig') as file:
            table = csv.DictReader(file)
            absent = {'path', 'person_id', 'camera_id', 'split'} - set(table.fieldnames or ())
            rows = [(f'{root}, line {table.line_num}', row) for row in table]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f'{root} is not a CSV file in UTF-8 ({error}): save it again as one') from error
    if absent:
        raise ValueError(f'{root} has no column {", ".join(sorted(absent))}: its first line must name the columns')
    for where, row in rows:
        split, photo = _csv_row(row, where, root.parent)
        splits[split].append(photo)
    splits = {split: _by_base_name(photos) for split, photos in splits.items()}
    missing = _absent(photo.path for photos in splits.values() for photo in photos)
    return Listing(root, 'own images', splits, zero_is_distractor=False, missing=missing)


def _csv_row(row: dict[str, str], where: str, folder: Path) -> tuple[str, Photo]:
    if row['split'] not in SPLITS:
        raise ValueError(f'{where}: split is {row["split"]!r}, but must be one of {", ".join(SPLITS)}')
    if not row['path']:
        raise ValueError(f'{where}: path is empty')
    try:
        person_id, camera_id = int(row['person_id']), int(row['camera_id'])
    except (TypeError, ValueError) as error:
        raise ValueError(f'{where}: person_id and camera_id must be whole numbers ({error})') from error
    if person_id < JUNK:
        raise ValueError(f'{where}: person_id is {person_id}, but must be at least 0, or -1 for junk in the gallery')
    return row['split'], Photo(os.path.normpath(os.path.join(folder, row['path'])), person_id, camera_id)


_MSMT17_LISTS = tuple(f'list_{part}.txt' for part in ('train', 'val', 'query', 'gallery'))
# The second version has blurred faces, the same lists and other names of folders.
_MSMT17_FOLDERS = {'train': ('train', 'mask_train_v2'), 'test': ('test', 'mask_test_v2')}


def _is_msmt17(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _MSMT17_LISTS)


def _find_msmt17(root: Path) -> Path | None:
    return _find(root, _is_msmt17, [name for names in _MSMT17_FOLDERS.values() for name in names])


def _read_msmt17(root: Path, validation: bool = True) -> Listing:
    folder = _find_msmt17(root)
    if folder is None:
        raise _not_found('msmt17', root)
    train, test = (
        next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])
        for names in _MSMT17_FOLDERS.values()
    )
    lists = {part: _read_msmt17_list(folder / f'list_{part}.txt', train) for part in ('train', 'val')}
    lists |= {part: _read_msmt17_list(folder / f'list_{part}.txt', test) for part in ('query', 'gallery')}
    splits = {
        'train': lists['train'] + (lists['val'] if validation else []),
        'query': lists['query'],
        'gallery': lists['gallery'],
    }
    splits = {split: _by_base_name(photos) for split, photos in splits.items()}
    published = dict(PUBLISHED['msmt17'])
    if not validation:
        del published['train']
    return Listing(
        folder,
        f'training images {"with" if validation else "without"} list_val.txt',
        splits,
        published,
        zero_is_distractor=False,
        ids_are_global=False,
        missing=_absent(photo.path for photos in splits.values() for photo in photos),
    )


def _read_msmt17_list(path: Path, folder: Path) -> list[Photo]:
    """Lines `0000/0000_000_01_0303morning_0015_0.jpg 0`."""
    photos = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        name, _, label = line.rpartition(' ')
        if not line.strip():
            continue
        if not name or not label.isdecimal():
            raise ValueError(f'{path}, line {number} is {line!r}, but must be a path, a space and a person id')
        person_id, camera_id = parse_msmt17_name(name)
        if person_id != int(label):
            raise ValueError(f'{path}, line {number}: the name says person {person_id}, the label {label}')
        photos.append(Photo(os.path.join(folder, name), person_id, camera_id))
    return photos


_CUHK03_INSIDE = {*FOLDERS.values(), 'cuhk03_release', 'images_detected', 'images_labeled'}


def _read_cuhk03np(root: Path, boxes: Boxes = 'detected', progress: bool = True) -> Listing:
    if boxes not in get_args(Boxes):
        raise ValueError(f"boxes must be 'detected' or 'labeled', not {boxes!r}")
    root = root.parent if root.is_file() else root
    root = root.parent if root.name in _CUHK03_INSIDE else root
    if _style(root) == 'cuhk03np' and _boxes_of(root) not in (boxes, None):
        raise ValueError(f'{root} holds the {_boxes_of(root)} boxes, but {boxes} ones are asked for: pass boxes=')
    ready = _find_ready_cuhk03(root, boxes)
    if ready:
        return _list_ready_cuhk03(ready, boxes)
    if _is_raw_cuhk03(root):
        return _list_raw_cuhk03(root, boxes, progress)
    error = _not_found('cuhk03np', root)
    others = [folder for other in get_args(Boxes) if (folder := _find_ready_cuhk03(root, other))]
    if others:
        raise FileNotFoundError(f'{root} has no {boxes} boxes; the others are in {others[0]}: pass boxes=')
    raise error


def _places(root: Path) -> Iterator[Path]:
    """Root and the folders up to two levels below."""
    below = _subfolders(root)
    yield root
    yield from below
    for folder in below:
        yield from _subfolders(folder)


def _first(root: Path, name: str) -> Path | None:
    return next((path for folder in _places(root) if (path := folder / name).exists()), None)


def _boxes_of(folder: Path) -> Boxes | None:
    """By its name, with the misspellings (`Labelde`) that are about."""
    name = folder.name.lower()
    return 'labeled' if 'label' in name else 'detected' if 'detect' in name else None


def _find_ready_cuhk03(root: Path, boxes: Boxes) -> Path | None:
    found = [folder for folder in _places(root) if _style(folder) == 'cuhk03np']
    named = [folder for folder in found if _boxes_of(folder) == boxes]
    candidates = named or [folder for folder in found if _boxes_of(folder) is None]
    if len(candidates) > 1:
        raise ValueError(f'several copies of the {boxes} boxes, {", ".join(map(str, candidates))}: give one as root')
    return candidates[0] if candidates else None


def _list_ready_cuhk03(folder: Path, boxes: Boxes) -> Listing:
    splits = _read_folders(folder)
    notices = []
    if _boxes_of(folder) is None:
        notices.append(f"nothing in the name {folder} tells which CUHK03-NP boxes it holds; taken for '{boxes}'")
    if any(not photo.path.lower().endswith('.png') for photos in splits.values() for photo in photos):
        notices.append(
            f'{folder} is a repack of CUHK03-NP as JPEG: its pixels differ from the original PNG files, and so will '
            'the scores, a little'
        )
    published = _cuhk03_published('ready', boxes)
    return Listing(folder, f'{boxes} boxes, ready-made folders', splits, published, notices=notices)


def _cuhk03_published(form: str, boxes: Boxes) -> dict[str, Published]:
    hashes = zip(SPLITS, CUHK03_NAMES[form, boxes], strict=True)
    return {split: PUBLISHED[f'cuhk03np {boxes}'][split]._replace(sha256=sha256) for split, sha256 in hashes}


def _is_raw_cuhk03(root: Path) -> bool:
    return any(_first(root, name) for name in ('cuhk-03.mat', 'images_detected', 'images_labeled'))


def _list_raw_cuhk03(root: Path, boxes: Boxes, progress: bool) -> Listing:
    """The original .mat file or its images, extracted by torchreid, with one of the two split files."""
    matlab = _first(root, f'cuhk03_new_protocol_config_{boxes}.mat')
    torchreid = _first(root, f'splits_new_{boxes}.json')
    if matlab:
        splits = _read_cuhk03_matlab(matlab)
    elif torchreid:
        splits = _read_cuhk03_json(torchreid)
    else:
        raise FileNotFoundError(
            f'{root} has CUHK03 images but no split of the new protocol: put cuhk03_new_protocol_config_{boxes}.mat '
            '(76 kB, from github.com/zhunzhong07/person-re-ranking, evaluation/data/CUHK03) there'
        )
    splits = {split: _by_base_name(photos) for split, photos in splits.items()}
    names = [photo.path for split in SPLITS for photo in splits[split]]
    published = _cuhk03_published('raw', boxes)

    def listing(place: Path, form: str, folder: Path, **rest: Any) -> Listing:
        placed = {
            split: [photo._replace(path=os.path.join(folder, photo.path)) for photo in photos]
            for split, photos in splits.items()
        }
        return Listing(place, f'{boxes} boxes, {form}', placed, published, **rest)

    raw = _first(root, 'cuhk-03.mat')
    images = _first(root, f'images_{boxes}')
    missing = _absent(os.path.join(images, name) for name in names) if images else []
    if images and (not missing or not raw):
        return listing(images, 'extracted images', images, missing=missing)
    if not raw:
        raise FileNotFoundError(f'{root} has no {boxes} images of CUHK03: neither images_{boxes} nor cuhk-03.mat')
    target = _extraction_folder(raw, boxes)
    form = f'extracted from {raw.name} to {target}'
    if not _absent(os.path.join(target, name) for name in names):
        return listing(raw, form, target)
    with _open_cuhk03(raw) as file:
        cells = _cuhk03_cells(file, raw, boxes)
        missing = [f'{raw}: {name}' for name in names if name not in cells]
    return listing(
        raw, form, target, missing=missing, prepare=lambda: _extract_cuhk03(raw, boxes, names, target, progress)
    )


def _read_cuhk03_matlab(path: Path) -> dict[str, list[Photo]]:
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


def _read_cuhk03_json(path: Path) -> dict[str, list[Photo]]:
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


def _open_cuhk03(path: Path) -> h5py.File:
    try:
        return h5py.File(path, 'r')
    except OSError as error:
        raise ValueError(f'{path} cannot be opened as MATLAB 7.3 file ({error}): unpack the archive again') from error


def _cuhk03_cells(file: h5py.File, path: Path, boxes: Boxes) -> dict[str, h5py.Dataset]:
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


def _extract_cuhk03(raw: Path, boxes: Boxes, names: Sequence[str], target: Path, progress: bool) -> None:
    """Write the images as PNG; each appears when it is whole, so that a killed run is taken up where it ended."""
    target.mkdir(parents=True, exist_ok=True)
    unfinished = target / f'.partial-{os.getpid()}.png'
    todo = sorted(set(names) - set(os.listdir(target)))
    with _open_cuhk03(raw) as file:
        cells = _cuhk03_cells(file, raw, boxes)
        for name in tqdm(todo, desc=f'extracting {raw.name}', unit='img', disable=None if progress else True):
            try:
                pixels = np.ascontiguousarray(cells[name][()].T)
                Image.fromarray(pixels).save(unfinished, compress_level=1)
            except (OSError, TypeError, ValueError) as error:
                raise ValueError(f'{raw}: image {name} cannot be extracted to {target} ({error})') from error
            os.replace(unfinished, target / name)


class Row(NamedTuple):
    """One number of a report: what was published (None where nothing was) and what is there."""

    split: str
    quantity: str
    expected: int | None
    found: int

    @property
    def wrong(self) -> bool:
        return self.expected is not None and self.expected != self.found


@dataclass
class ReidReport:
    """What `check_reid` found; `str(report)` is the text to show.

    Attributes:
        name: The set's name for `load_reid`; None if none was recognised.
        title: In words, with where and in which form it was found.
        rows: Counts by split.
        problems: What makes the set unusable, with the remedy.
        warnings: What may change scores.
        notices: What a user of the set has to know.
    """

    name: str | None
    title: str
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the set can be used and all counts are the published ones."""
        return not self.problems and not any(row.wrong for row in self.rows)

    def __str__(self) -> str:
        lines = [self.title]
        # Cameras are many, so only those that differ are shown.
        shown = [row for row in self.rows if row.wrong or not row.quantity.startswith('images of camera')]
        if shown:
            lines += ['', f'{"split":<9}{"quantity":<20}{"expected":>10}{"found":>10}']
        for row in shown:
            expected = '-' if row.expected is None else f'{row.expected:,}'
            verdict = '' if row.expected is None else '  WRONG' if row.wrong else '  ok'
            lines.append(f'{row.split:<9}{row.quantity:<20}{expected:>10}{row.found:>10,}{verdict}')
        lines.append('')
        for kind in ('problems', 'warnings', 'notices'):
            lines += [f'{kind[:-1]}: {text}' for text in getattr(self, kind)]
        lines.append(self._verdict())
        return '\n'.join(lines)

    def _verdict(self) -> str:
        if not self.ok:
            return 'Not complete: see above.' if self.rows else 'Not usable: see above.'
        if any(row.expected is not None for row in self.rows):
            return 'Complete: all counts are as published.'
        return 'Usable; there are no published counts to compare with.'


def detect_reid(root: str | Path) -> list[str]:
    """Names (for `load_reid`) of the sets that lie in a folder, or one level above or below, by their layout.

    Args:
        root: A folder, or a CSV file.
    """
    root = Path(root).expanduser().resolve()
    return [name for name, source in SOURCES.items() if source.is_in(root)]


def check_reid(name: str | None, root: str | Path, **options: Any) -> ReidReport:
    """Compare a set on disk with what its authors published. Opens no image, downloads and writes nothing.

    Args:
        name: As for `load_reid`; None to recognise the set by its layout.
        root: As for `load_reid`.
        **options: As for `load_reid`; none for `pedestrians`.

    Returns:
        A report. A set that is missing or broken is a problem in it, not an exception.

    Raises:
        ValueError: If there is no set of this name.
        TypeError: If the set has no such option.
    """
    if name is None:
        found = detect_reid(root)
        if len(found) != 1:
            return _undetected(root, found)
        name = found[0]
    title = _source(name).title
    try:
        listing = _read(name, root, options)
    except (ValueError, OSError) as error:
        return ReidReport(name, f'{title} in {root}', problems=[str(error)])
    report = ReidReport(name, f'{title} in {listing.root} ({listing.form})', _rows(listing), notices=listing.notices)
    try:
        _check_rules(listing)
    except (ValueError, OSError) as error:
        report.problems.append(str(error))
    if listing.missing:
        report.problems.append(_missing_text(listing.missing))
    if any(row.wrong for row in report.rows):
        report.problems.append(f'the counts are not the published ones. {_source(name).layout}')
    report.warnings = [*_hash_warnings(listing), *_protocol_warnings(listing)]
    return report


def _undetected(root: str | Path, found: Sequence[str]) -> ReidReport:
    if found:
        problem = f'there are several sets, {", ".join(found)}: name the one to check'
    else:
        layouts = [f'  {name}: {source.layout}' for name, source in SOURCES.items()]
        problem = '\n'.join(['no set was recognised. What can be:', *layouts])
    return ReidReport(None, f'Person re-identification sets in {root}', problems=[problem])


def _rows(listing: Listing) -> list[Row]:
    rows = []
    for split in SPLITS:
        photos, published = listing.splits[split], listing.published.get(split)
        found = _found(photos, listing.zero_is_distractor)
        for quantity in ('images', 'identities', 'junk', 'distractors'):
            expected = getattr(published, quantity) if published else None
            if found[quantity] or expected or quantity in ('images', 'identities'):
                rows.append(Row(split, quantity, expected, found[quantity]))
        if published and published.cameras:
            per_camera = Counter(photo.camera_id for photo in photos)
            expected = dict(enumerate(published.cameras, 1))
            rows += [
                Row(split, f'images of camera {camera}', expected.get(camera, 0), per_camera[camera])
                for camera in sorted({*expected, *per_camera})
            ]
    return rows


def _found(photos: Sequence[Photo], zero_is_distractor: bool) -> dict[str, int]:
    per_id = Counter(photo.person_id for photo in photos)
    nobody = {JUNK, DISTRACTOR} if zero_is_distractor else {JUNK}
    distractors = per_id[DISTRACTOR] if zero_is_distractor else 0
    identities = len(per_id.keys() - nobody)
    return {'images': len(photos), 'identities': identities, 'junk': per_id[JUNK], 'distractors': distractors}


def name_list_sha256(paths: Iterable[str]) -> str:
    """Hash of a list of images that depends on their base names only: joined by newlines in sorted order."""
    return hashlib.sha256('\n'.join(sorted(map(os.path.basename, paths))).encode()).hexdigest()


def _hash_warnings(listing: Listing) -> list[str]:
    return [
        f'the names in {split} are not those of the original archive (another packing, or renamed files)'
        for split, published in listing.published.items()
        if not name_list_sha256(photo.path for photo in listing.splits[split]).startswith(published.sha256)
    ]


def _protocol_warnings(listing: Listing) -> list[str]:
    texts = []
    train, query, gallery = (listing.splits[split] for split in SPLITS)
    cameras: dict[int, set[int]] = {}
    for photo in gallery:
        cameras.setdefault(photo.person_id, set()).add(photo.camera_id)
    lonely = [photo for photo in query if not cameras.get(photo.person_id, set()) - {photo.camera_id}]
    if lonely:
        texts.append(
            f'{len(lonely):,} of {len(query):,} queries, {lonely[0].path} for one, have no image of the same person by '
            'another camera in the gallery: they cannot be evaluated'
        )
    both = {photo.person_id for photo in train} & {photo.person_id for photo in query}
    if both and listing.ids_are_global:
        texts.append(f'{len(both):,} persons, {min(both)} for one, are in train and in query: scores will be too good')
    return texts


_THREE_FOLDERS = 'the folders bounding_box_train, bounding_box_test and query'

SOURCES = {
    'market1501': Source(
        'Market-1501',
        f'Unpack Market-1501-v15.09.15.zip: root must hold {_THREE_FOLDERS} with names like 0002_c1s1_000451_03.jpg.',
        lambda root: _find_folders(root, 'market1501') is not None,
        _read_market1501,
    ),
    'dukemtmcreid': Source(
        'DukeMTMC-reID',
        f'Root must hold {_THREE_FOLDERS} with names like 0001_c2_f0046182.jpg.',
        lambda root: _find_folders(root, 'dukemtmcreid') is not None,
        _read_dukemtmcreid,
    ),
    'cuhk03np': Source(
        'CUHK03-NP',
        f'Root must hold folders detected and labeled, each with {_THREE_FOLDERS} and names like 0003_c1_22.png; or '
        'cuhk03_release/cuhk-03.mat, or images_detected and images_labeled as torchreid extracts them, beside '
        "cuhk03_new_protocol_config_detected.mat and ..._labeled.mat (or torchreid's splits_new_detected.json).",
        lambda root: _is_raw_cuhk03(root) or any(_find_ready_cuhk03(root, boxes) for boxes in get_args(Boxes)),
        _read_cuhk03np,
    ),
    'msmt17': Source(
        'MSMT17',
        f'Unpack MSMT17_V1 (or V2): root must hold {", ".join(_MSMT17_LISTS)} and the folders train and test (V2: '
        'mask_train_v2 and mask_test_v2).',
        lambda root: _find_msmt17(root) is not None,
        _read_msmt17,
    ),
    'pedestrians': Source(
        'Rendered pedestrians',
        'They are made by load_reid("pedestrians") or `csa-zoo render-pedestrians OUT`.',
        lambda root: _find_folders(root, 'pedestrians') is not None,
        _read_pedestrians,
    ),
    'folder': Source(
        'Own images in folders',
        f'Root must hold {_THREE_FOLDERS}; names begin with person and camera, like 0002_c1_anything.jpg. -1_c1_... is '
        'junk and 0000_c1_... a distractor, in bounding_box_test only. bounding_box_train may be left out to evaluate.',
        lambda root: _find_folders(root, 'folder') is not None,
        _read_folder,
    ),
    'csv': Source(
        'Own images in a table',
        'Root is a CSV file with the header path,person_id,camera_id,split; paths are relative to the file, split is '
        'train, query or gallery, ids are whole numbers, -1 is junk.',
        lambda root: root.is_file() and root.suffix.lower() == '.csv',
        _read_csv,
    ),
}
