"""What a re-identification set holds, before an image of it is opened: the list of its images, with their labels.

Images are listed in the order of their base names, so that two machines train on the same sequence.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .reid_published import Published

SPLITS = ('train', 'query', 'gallery')
# Person ids that mean nobody: of bad boxes, and, where a set says so, of people whom no query asks for.
JUNK, DISTRACTOR = -1, 0


class Photo(NamedTuple):
    """One image of a set."""

    path: str
    person_id: int
    camera_id: int


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


def by_base_name(photos: Iterable[Photo]) -> list[Photo]:
    """Sorted by base name, whichever folders they are in."""
    return sorted(photos, key=lambda photo: (os.path.basename(photo.path), photo.path))


def missing_files(paths: Iterable[str]) -> list[str]:
    """Those that do not exist, with one directory listing per folder instead of one system call per file."""
    paths = list(paths)
    names = {
        folder: set(os.listdir(folder)) if os.path.isdir(folder) else set()
        for folder in set(map(os.path.dirname, paths))
    }
    return [path for path in paths if os.path.basename(path) not in names[os.path.dirname(path)]]
