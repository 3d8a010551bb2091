"""What a re-identification set on disk holds, against what its authors published and what protocols need."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .reid_listing import DISTRACTOR, JUNK, SPLITS, Listing, Photo
from .reid_published import name_list_sha256
from .reid_sources import SOURCES, detect_reid, find_source, read_listing


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
        if not Path(root).expanduser().exists():
            return ReidReport(None, f'Person re-identification sets in {root}', problems=[f'{root} does not exist'])
        found = detect_reid(root)
        if len(found) != 1:
            return _undetected(root, found)
        name = found[0]
    title = find_source(name).title
    try:
        listing = read_listing(name, root, options)
    except (ValueError, OSError) as error:
        return ReidReport(name, f'{title} in {root}', problems=[str(error)])
    report = ReidReport(
        name, f'{title} in {listing.root} ({listing.form})', compare_counts(listing), notices=listing.notices
    )
    try:
        check_rules(listing)
    except (ValueError, OSError) as error:
        report.problems.append(str(error))
    if listing.missing:
        report.problems.append(missing_text(listing.missing))
    if any(row.wrong for row in report.rows):
        report.problems.append(f'the counts are not the published ones. {find_source(name).layout}')
    report.warnings = [*_name_warnings(listing), *_protocol_warnings(listing)]
    return report


def _undetected(root: str | Path, found: Sequence[str]) -> ReidReport:
    if found:
        problem = f'there are several sets, {", ".join(found)}: name the one to check'
    else:
        layouts = [f'  {name}: {source.layout}' for name, source in SOURCES.items()]
        problem = '\n'.join(['no set was recognised. What can be:', *layouts])
    return ReidReport(None, f'Person re-identification sets in {root}', problems=[problem])


def compare_counts(listing: Listing) -> list[Row]:
    """What each split holds beside what was published; junk, distractors and cameras only where there are any."""
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


def check_rules(listing: Listing) -> None:
    """Refuse what no protocol allows.

    Raises:
        ValueError: If junk or a distractor is in train or query.
        FileNotFoundError: If a split is empty; train may be, unless the set is a published one.
    """
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


def missing_text(missing: Sequence[str]) -> str:
    more = f' and {len(missing) - 5:,} more' if len(missing) > 5 else ''
    return f'{len(missing):,} listed files are not there: {", ".join(missing[:5])}{more}; unpack the archive again'


def _name_warnings(listing: Listing) -> list[str]:
    """Of splits whose files are not called as published: the only sign of other images where all counts agree."""
    return [
        f'the names in {split} are not those of the original archive (another packing, or renamed files)'
        for split, published in listing.published.items()
        if not name_list_sha256(photo.path for photo in listing.splits[split]).startswith(published.sha256)
    ]


def _protocol_warnings(listing: Listing) -> list[str]:
    """Of queries without an answer, and of people known from training."""
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
