"""The re-identification sets there are, by name: recognising one on disk, and listing its images."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cuhk03 import is_cuhk03np, read_cuhk03np
from .reid_layouts import (
    MSMT17_LISTS,
    TABLE_LAYOUT,
    find_market_layout,
    find_msmt17,
    read_dukemtmcreid,
    read_market1501,
    read_msmt17,
    read_own_folders,
    read_own_table,
    read_pedestrians,
)
from .reid_listing import Listing


@dataclass(frozen=True)
class Source:
    """A kind of set.

    Attributes:
        title: What it is called.
        layout: How it must lie on disk, for messages.
        is_in: Whether it is in a folder, or one level above or below.
        read: Lists its images; None if it is not there. The arguments after root are the set's options.
    """

    title: str
    layout: str
    is_in: Callable[[Path], bool]
    read: Callable[..., Listing | None]


_THREE_FOLDERS = 'the folders bounding_box_train, bounding_box_test and query'

SOURCES = {
    'market1501': Source(
        'Market-1501',
        f'Unpack Market-1501-v15.09.15.zip: root must hold {_THREE_FOLDERS} with names like 0002_c1s1_000451_03.jpg.',
        lambda root: find_market_layout(root, 'market1501') is not None,
        read_market1501,
    ),
    'dukemtmcreid': Source(
        'DukeMTMC-reID',
        f'Root must hold {_THREE_FOLDERS} with names like 0001_c2_f0046182.jpg.',
        lambda root: find_market_layout(root, 'dukemtmcreid') is not None,
        read_dukemtmcreid,
    ),
    'cuhk03np': Source(
        'CUHK03-NP',
        f'Root must hold folders detected and labeled, each with {_THREE_FOLDERS} and names like 0003_c1_22.png; or '
        'cuhk03_release/cuhk-03.mat, or images_detected and images_labeled as torchreid extracts them, beside '
        "cuhk03_new_protocol_config_detected.mat and ..._labeled.mat (or torchreid's splits_new_detected.json).",
        is_cuhk03np,
        read_cuhk03np,
    ),
    'msmt17': Source(
        'MSMT17',
        f'Unpack MSMT17_V1 (or V2): root must hold {", ".join(MSMT17_LISTS)} and the folders train and test (V2: '
        'mask_train_v2 and mask_test_v2).',
        lambda root: find_msmt17(root) is not None,
        read_msmt17,
    ),
    'pedestrians': Source(
        'Rendered pedestrians',
        'They are made by load_reid("pedestrians") or `csa-zoo render-pedestrians OUT`.',
        lambda root: find_market_layout(root, 'pedestrians') is not None,
        read_pedestrians,
    ),
    'folder': Source(
        'Own images in folders',
        f'Root must hold {_THREE_FOLDERS}; names begin with person and camera, like 0002_c1_anything.jpg. -1_c1_... is '
        'junk and 0000_c1_... a distractor, in bounding_box_test only. bounding_box_train may be left out to evaluate.',
        lambda root: find_market_layout(root, 'folder') is not None,
        read_own_folders,
    ),
    'csv': Source(
        'Own images in a table',
        TABLE_LAYOUT,
        lambda root: root.is_file() and root.suffix.lower() == '.csv',
        read_own_table,
    ),
}


def find_source(name: str) -> Source:
    """The set of a name; a ValueError lists the names if there is none."""
    if name not in SOURCES:
        raise ValueError(f'no re-identification set is called {name!r}; there are {", ".join(SOURCES)}')
    return SOURCES[name]


def detect_reid(root: str | Path) -> list[str]:
    """Names (for `load_reid`) of the sets that lie in a folder, or one level above or below, by their layout.

    Args:
        root: A folder, or a CSV file.
    """
    root = Path(root).expanduser().resolve()
    return [name for name, source in SOURCES.items() if source.is_in(root)]


def read_listing(name: str, root: str | Path | None, options: dict[str, Any]) -> Listing:
    """List the images of a set; raises as `load_reid` does."""
    source = find_source(name)
    if root is None:
        raise ValueError(f'{source.title} is not downloaded: give root, the folder where it is. {source.layout}')
    root = Path(root).expanduser().resolve()
    if not root.exists():
        raise FileNotFoundError(f'{root} does not exist. {source.title}: {source.layout}')
    known = list(inspect.signature(source.read).parameters)[1:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f'{name} has no option {", ".join(unknown)}; it has {", ".join(known) or "none"}')
    listing = source.read(root, **options)
    if listing is None:
        raise FileNotFoundError(f'no {source.title} in {root}, nor one folder above or below. {source.layout}')
    return listing
