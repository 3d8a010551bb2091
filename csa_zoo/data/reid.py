"""Person re-identification sets on disk: Market-1501, DukeMTMC-reID, CUHK03-NP, MSMT17, rendered ones and one's own.

Nothing is downloaded. What the sets hold according to their authors is in `reid_published`, how they lie on disk in
`reid_layouts` and `cuhk03`, their names in `reid_sources`.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from .cuhk03 import CUHK03_IMAGES_PER_VIEW, CUHK03_PERSONS_PER_PAIR, Boxes, parse_cuhk03_name
from .pedestrians import render_pedestrians
from .reid_layouts import DUKE_NOTICE, FOLDERS, IMAGE_SUFFIXES, is_rendered, parse_market_name, parse_msmt17_name
from .reid_listing import DISTRACTOR, JUNK, SPLITS, Listing, Photo
from .reid_published import CUHK03_NAMES, PUBLISHED, Published, name_list_sha256
from .reid_report import ReidReport, Row, check_reid, check_rules, compare_counts, missing_text
from .reid_sources import SOURCES, Source, detect_reid, find_source, read_listing

__all__ = [
    'CUHK03_IMAGES_PER_VIEW',
    'CUHK03_NAMES',
    'CUHK03_PERSONS_PER_PAIR',
    'DISTRACTOR',
    'DUKE_NOTICE',
    'FOLDERS',
    'IMAGE_SUFFIXES',
    'JUNK',
    'PUBLISHED',
    'SOURCES',
    'SPLITS',
    'Boxes',
    'Listing',
    'Photo',
    'Published',
    'ReidReport',
    'Row',
    'Source',
    'check_reid',
    'detect_reid',
    'load_reid',
    'name_list_sha256',
    'parse_cuhk03_name',
    'parse_market_name',
    'parse_msmt17_name',
]


logger = logging.getLogger(__name__)


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
    source = find_source(name)
    if name == 'pedestrians':
        root, options = _rendered(root, options), {}
    listing = read_listing(name, root, options)
    check_rules(listing)
    for notice in listing.notices:
        warnings.warn(notice, stacklevel=2)
    wrong = [
        f'{row.split} has {row.found:,} {row.quantity}, not {row.expected:,}'
        for row in compare_counts(listing)
        if row.wrong
    ]
    if wrong:
        more = f' and {len(wrong) - 3} more differences' if len(wrong) > 3 else ''
        warnings.warn(
            f'{source.title} in {listing.root} is not the published set: {"; ".join(wrong[:3])}{more}. Scores on it do '
            f'not compare with published ones; check_reid("{name}", ...) tells all.',
            stacklevel=2,
        )
    if listing.missing:
        raise FileNotFoundError(f'{source.title} in {listing.root}: {missing_text(listing.missing)}')
    if listing.prepare:
        listing.prepare()
    about = f'{source.title}, {listing.form}, in {listing.root}'
    logger.info('%s', about)
    return datasets.DatasetDict({split: _dataset(listing.splits[split], about) for split in SPLITS})


def _rendered(root: str | Path | None, options: dict[str, Any]) -> str | Path:
    """A rendering that is complete is taken as it is; nobody has to know the arguments it was made with."""
    if root is not None and not options and is_rendered(Path(root).expanduser()):
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
