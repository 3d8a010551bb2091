"""How re-identification sets lie on disk, other than CUHK03-NP: where a set is, and the list of its images.

Market-1501, DukeMTMC-reID, rendered pedestrians and own images come in Market-1501's layout, a folder per split whose
file names tell person and camera; MSMT17 and one's own table (CSV) name their images in lists. Labels are read from
base names (or from the lists), never from a whole path, where a parent folder such as `run1_c2` would pass for one.
A `read_...` of a set takes what the user gave as root; it returns None if the set is neither there nor one folder above
or below.

Sources: Market-1501, Zheng et al. (ICCV 2015); DukeMTMC-reID, Ristani et al. (ECCV-W 2016) and Zheng et al. (ICCV
2017); MSMT17, Wei et al. (CVPR 2018).
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .pedestrians import MANIFEST
from .reid_listing import JUNK, SPLITS, Listing, Photo, by_base_name, missing_files
from .reid_published import PUBLISHED, Published

FOLDERS = {'train': 'bounding_box_train', 'query': 'query', 'gallery': 'bounding_box_test'}
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')
_NAME_STYLES = {
    'market1501': re.compile(r'(-1|[0-9]+)_c[0-9]+s[0-9]+_'),
    'dukemtmcreid': re.compile(r'[0-9]+_c[0-9]+_f[0-9]+'),
    'cuhk03np': re.compile(r'[0-9]+_c[12]_[0-9]+\.'),
}

MSMT17_LISTS = tuple(f'list_{part}.txt' for part in ('train', 'val', 'query', 'gallery'))
# The second version has blurred faces, the same lists and other names of folders.
_MSMT17_FOLDERS = {'train': ('train', 'mask_train_v2'), 'test': ('test', 'mask_test_v2')}

TABLE_LAYOUT = (
    'Root is a CSV file with the header path,person_id,camera_id,split; paths are relative to the file, split is '
    'train, query or gallery, ids are whole numbers, -1 is junk.'
)

DUKE_NOTICE = (
    'DukeMTMC-reID was withdrawn by Duke University in 2019: the people in it had not consented. It is supported for '
    'those who must compare with published numbers and is never downloaded; MSMT17 is the usual replacement.'
)


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


def find_near(root: Path, holds: Callable[[Path], bool], inside: Iterable[str]) -> Path | None:
    """The folder that `holds` a set: root, one below it, or the one above it if root is called like one of `inside`."""
    if holds(root):
        return root
    below = [folder for folder in subfolders(root) if holds(folder)]
    if len(below) > 1:
        raise ValueError(f'{root} holds several copies: {", ".join(f.name for f in below)}; give one of them as root')
    if below:
        return below[0]
    return root.parent if root.name in inside and holds(root.parent) else None


def subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith('.') and entry.is_dir())


def find_market_layout(root: Path, *styles: str) -> Path | None:
    """The folder of Market-1501's layout whose names are of the first of these styles that is there."""
    found = (
        find_near(root, lambda folder, style=style: name_style(folder) == style, FOLDERS.values()) for style in styles
    )
    return next((folder for folder in found if folder), None)


def name_style(folder: Path) -> str | None:
    """Which set the names in a folder of Market-1501's layout belong to; None for another layout."""
    if not all((folder / FOLDERS[split]).is_dir() for split in ('query', 'gallery')):
        return None
    if is_rendered(folder):
        return 'pedestrians'
    first = next(
        (names[0] for split in ('query', 'gallery', 'train') if (names := _image_names(folder / FOLDERS[split]))), ''
    )
    return next((style for style, pattern in _NAME_STYLES.items() if pattern.match(first)), 'folder')


def is_rendered(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_market_layout(folder: Path) -> dict[str, list[Photo]]:
    return {
        split: [
            Photo(path, *parse_market_name(path))
            for path in (os.path.join(folder, name, image) for image in _image_names(folder / name))
        ]
        for split, name in FOLDERS.items()
    }


def _image_names(folder: Path) -> list[str]:
    """Sorted; without strays such as Thumbs.db and the `._` files of macOS."""
    if not folder.is_dir():
        return []
    return sorted(
        name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith('.')
    )


def read_market1501(root: Path) -> Listing | None:
    """Rendered pedestrians, whose names are of the same style, pass for an incomplete Market-1501."""
    folder = find_market_layout(root, 'market1501', 'pedestrians')
    if folder is None:
        return None
    return Listing(folder, 'original folders', read_market_layout(folder), PUBLISHED['market1501'])


def read_dukemtmcreid(root: Path) -> Listing | None:
    folder = find_market_layout(root, 'dukemtmcreid')
    if folder is None:
        return None
    return Listing(
        folder, 'original folders', read_market_layout(folder), PUBLISHED['dukemtmcreid'], notices=[DUKE_NOTICE]
    )


def read_own_folders(root: Path) -> Listing | None:
    """Any names will do; those of a public set are taken if there are no others."""
    folder = find_market_layout(root, 'folder', 'market1501', 'dukemtmcreid', 'cuhk03np', 'pedestrians')
    if folder is None:
        return None
    return Listing(folder, 'own images', read_market_layout(folder))


def read_pedestrians(root: Path) -> Listing | None:
    folder = find_market_layout(root, 'pedestrians')
    if folder is None:
        return None
    splits = read_market_layout(folder)
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


def find_msmt17(root: Path) -> Path | None:
    return find_near(root, _is_msmt17, [name for names in _MSMT17_FOLDERS.values() for name in names])


def _is_msmt17(folder: Path) -> bool:
    return all((folder / name).is_file() for name in MSMT17_LISTS)


def read_msmt17(root: Path, validation: bool = True) -> Listing | None:
    folder = find_msmt17(root)
    if folder is None:
        return None
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
    splits = {split: by_base_name(photos) for split, photos in splits.items()}
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
        missing=missing_files(photo.path for photos in splits.values() for photo in photos),
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


def read_own_table(root: Path) -> Listing:
    """Further columns are ignored, and 0 is a person like any other."""
    if not root.is_file():
        raise FileNotFoundError(f'{root} is not a file. {TABLE_LAYOUT}')
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
        split, photo = _table_row(row, where, root.parent)
        splits[split].append(photo)
    splits = {split: by_base_name(photos) for split, photos in splits.items()}
    missing = missing_files(photo.path for photos in splits.values() for photo in photos)
    return Listing(root, 'own images', splits, zero_is_distractor=False, missing=missing)


def _table_row(row: dict[str, str], where: str, folder: Path) -> tuple[str, Photo]:
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
