"""A small set of real people for re-identification, cropped from a video of one camera that does not move.

People are found in every frame by OpenCV's HOG detector, boxes are linked over time by their overlap, and each person
is cropped early and late in the track. What comes out has the layout of Market-1501 but tells far less: one camera, few
people, and the same clothes in the same light a few seconds later. It is a check that a model works on photographs of
people, not a benchmark. Who leaves the picture and comes back has two tracks; only somebody who looks can say so.

Sources: Dalal & Triggs, "Histograms of oriented gradients for human detection" (CVPR 2005), for the detector; Bochinski
et al., "High-speed tracking-by-detection without using image information" (AVSS 2017), for tracking by overlap alone.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment
from tqdm.auto import tqdm

from .keypoints import opencv

FRAMES_PER_SECOND = 10  # more would be looked at in vain: people do not walk faster
SHORTEST_TRACK = 3.0  # seconds
LONGEST_GAP = 1.0  # seconds without a detection
MOST_OVERLAP = 0.3  # of a person's box with anybody else's
LEAST_SCORE = 0.3  # of the detector, beyond the decision boundary of its support vector machine

# The detector sees people of 96 pixels and more, which are a ninth of this height.
DETECTION_HEIGHT = 864

TEST_FOLDERS = 'query', 'bounding_box_test'

Detector = Callable[[np.ndarray], np.ndarray]


class Track(NamedTuple):
    """One person over successive frames.

    Attributes:
        start: Index of the first frame.
        boxes: (T, 4) left, top, right, bottom in pixels, one for each frame; interpolated where nothing was detected.
        seen: (T,) bool, whether the box was detected.
    """

    start: int
    boxes: np.ndarray
    seen: np.ndarray

    @property
    def end(self) -> int:
        """Index of the frame after the last."""
        return self.start + len(self.boxes)

    def part(self, first: int, last: int) -> 'Track':
        """The frames from the first to the last, the latter excluded, counted from the start of the track."""
        return Track(self.start + first, self.boxes[first:last], self.seen[first:last])


def crop_people(
    video: str | Path,
    folder: str | Path,
    same: Sequence[Sequence[int]] = (),
    images_per_track: int = 4,
    detect: Detector | None = None,
    progress: bool = True,
) -> Path:
    """Write the people of a video as a folder that `load_reid('folder', ...)` reads.

    A person is kept if the track, between meetings with others, lasts three seconds and moves on by a body's width:
    what stands still is as often a lamp post. Queries are from the first third of a track, the gallery from its last,
    so that no gallery image follows its query at once. Training images there are none.

    Each track is a person of its own, its thirds passing for cameras 1 and 2, unless `same` says who came back. That is
    the better set: queries are then those who did, each track is another camera, so that they must be found in another
    one, and people with a single track are in the gallery only.

    Args:
        video: Any file that OpenCV can read, of a camera that does not move. Ten frames a second are looked at.
        folder: Where to write bounding_box_train (empty), query and bounding_box_test; must not exist or be empty.
        same: Groups of tracks that show one person, by their numbers: the person ids in the folder that is written
            without this argument.
        images_per_track: Most crops from either third of a track, evenly spaced in time.
        detect: Turns a frame, (H, W, 3) uint8 in RGB, into (N, 4) boxes of people, left, top, right, bottom in pixels;
            None for OpenCV's HOG detector, which finds people taller than a ninth of the frame.
        progress: Show progress bars where the standard error is a terminal.

    Returns:
        The folder. File names are Market-1501's, with the number of the video's frame.

    Raises:
        FileNotFoundError: If there is no such video.
        FileExistsError: If the folder is not empty.
        ValueError: If the video cannot be read or shows nobody long enough, if `same` names a track that there is not,
            names it twice or joins two that are in one frame, if `images_per_track` is below 1, or if `detect` gives no
            boxes.
        ModuleNotFoundError: If OpenCV, or its person detector, is not installed.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f'{folder} is not an empty folder: name another one')
    if images_per_track < 1:
        raise ValueError(f'images_per_track must be at least 1, not {images_per_track}')
    detect = detect or hog_detector()
    film = Film(video)
    detections = [_within(frame, detect(frame)) for frame in film.frames('finding people', progress)]
    tracks = link_boxes(detections, round(LONGEST_GAP * film.rate))
    tracks = select_tracks(tracks, math.ceil(SHORTEST_TRACK * film.rate), MOST_OVERLAP)
    if not tracks:
        raise ValueError(
            f'{video}: {sum(map(len, detections)):,} detections in {len(detections):,} frames, but nobody who walks '
            f'alone for {SHORTEST_TRACK:g} seconds; take a video in which people are taller and further apart'
        )
    crops = list(_crops(_people(tracks, same), images_per_track))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.partial-', dir=folder.parent) as unfinished:
        whole = Path(unfinished) / folder.name
        _write_crops(whole, crops, film, progress)
        if folder.exists():
            folder.rmdir()
        os.replace(whole, folder)
    return folder


def hog_detector() -> Detector:
    """OpenCV's detector of standing people, its boxes trimmed to the width and height of Market-1501's crops.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed, or is version 5 without its contrib modules.
    """
    cv2 = opencv()
    if not hasattr(cv2, 'HOGDescriptor'):
        raise ModuleNotFoundError(
            f'OpenCV {cv2.__version__} has its person detector in the contrib modules only: pip uninstall '
            'opencv-python-headless opencv-python, then pip install opencv-contrib-python-headless'
        )
    hog = cv2.HOGDescriptor()
    hog.setSVMDetector(cv2.HOGDescriptor.getDefaultPeopleDetector())

    def detect(frame: np.ndarray) -> np.ndarray:
        scale = DETECTION_HEIGHT / frame.shape[0]
        resized = cv2.resize(frame[..., ::-1], None, fx=scale, fy=scale)  # BGR, as all of OpenCV
        found, scores = hog.detectMultiScale(resized, winStride=(8, 8), padding=(8, 8), scale=1.05)
        found, scores = np.reshape(found, (-1, 4)), np.ravel(scores)
        # A sixth of the window on the left and right and a tenth above and below are margin.
        corner, size = found[:, :2] / scale, found[:, 2:] / scale
        boxes = np.hstack([corner + size * (1 / 6, 0.1), corner + size * (5 / 6, 0.9)])
        boxes, scores = boxes[scores >= LEAST_SCORE], scores[scores >= LEAST_SCORE]
        return suppress(boxes, scores)

    return detect


def _within(frame: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The boxes, cut at the frame's edges; those beyond them are left out."""
    boxes = np.asarray(boxes, np.float64)
    if boxes.size == 0:
        return np.empty((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all() or (boxes[:, :2] >= boxes[:, 2:]).any():
        raise ValueError(f'the detector must give (N, 4) boxes, left < right and top < bottom, not {boxes.tolist()}')
    boxes = boxes.clip(0, np.tile(frame.shape[1::-1], 2))
    return boxes[(boxes[:, :2] < boxes[:, 2:]).all(1)]


def suppress(boxes: np.ndarray, scores: np.ndarray, most_cover: float = 0.6) -> np.ndarray:
    """Boxes without those of which a better one covers too much, best first.

    Args:
        boxes: (N, 4) left, top, right, bottom.
        scores: (N,) the higher, the better.
        most_cover: Share of either box that may be common to both.
    """
    boxes = boxes[np.argsort(-scores, kind='stable')]
    kept: list[int] = []
    for i, box in enumerate(boxes):
        if (_common(boxes[kept], box) <= most_cover * np.minimum(_area(boxes[kept]), _area(box))).all():
            kept.append(i)
    return boxes[kept]


def link_boxes(detections: Sequence[np.ndarray], longest_gap: int = 10, least_iou: float = 0.3) -> list[Track]:
    """Tracks of boxes that overlap from frame to frame, in the order of their starts.

    In each frame detections are assigned to tracks so that the sum of overlaps is largest. A track that finds nothing
    goes on at its last speed, and ends when it has found nothing for too long.

    Args:
        detections: (N, 4) boxes of each frame, left, top, right, bottom.
        longest_gap: Most successive frames without a detection.
        least_iou: Intersection over union at which a detection may continue a track.
    """
    ended: list[_Path] = []
    going: list[_Path] = []
    for frame, boxes in enumerate(detections):
        ended += [path for path in going if frame - path.frames[-1] > longest_gap + 1]
        going = [path for path in going if frame - path.frames[-1] <= longest_gap + 1]
        expected = np.array([path.expect(frame) for path in going]).reshape(-1, 4)
        common = _common(expected[:, None], boxes)
        overlap = common / (_area(expected)[:, None] + _area(boxes) - common)
        overlap[overlap < least_iou] = 0
        row, column = linear_sum_assignment(overlap, maximize=True)
        pairs = {j: i for i, j in zip(row, column, strict=True) if overlap[i, j] > 0}
        for j, box in enumerate(boxes):
            path = going[pairs[j]] if j in pairs else _Path([], [])
            path.frames.append(frame)
            path.boxes.append(box)
            if j not in pairs:
                going.append(path)
    return sorted((path.track() for path in ended + going), key=lambda track: (track.start, *track.boxes[0]))


class _Path(NamedTuple):
    """Detections that were linked so far."""

    frames: list[int]
    boxes: list[np.ndarray]

    def expect(self, frame: int) -> np.ndarray:
        """The box in a later frame, at the mean speed over the last detections."""
        earlier = max(0, len(self.frames) - 6)
        elapsed = max(1, self.frames[-1] - self.frames[earlier])
        speed = (_centre(self.boxes[-1]) - _centre(self.boxes[earlier])) / elapsed
        return self.boxes[-1] + np.tile(speed, 2) * (frame - self.frames[-1])

    def track(self) -> Track:
        frames = np.arange(self.frames[0], self.frames[-1] + 1)
        boxes = np.stack([np.interp(frames, self.frames, side) for side in np.transpose(self.boxes)], 1)
        return Track(self.frames[0], boxes, np.isin(frames, self.frames))


def select_tracks(tracks: Sequence[Track], shortest: int, most_overlap: float = MOST_OVERLAP) -> list[Track]:
    """Of each track the longest part without anybody else in its box, if that is long, often seen, and moves on.

    After two people have met, either track may have taken the other's detections; the part before or after is pure.

    Args:
        tracks: All tracks of a video, also those that are too short: they get in the way of others.
        shortest: Frames that the part must have. It must be seen in half of them, and in its first and last third.
        most_overlap: Share of a box that another track's may cover.
    """
    parts = (_longest_run(track, _cover(track, tracks) <= most_overlap) for track in tracks)
    return [part for part in parts if len(part.boxes) >= shortest and _is_often_seen(part) and _moves_on(part)]


def _cover(track: Track, tracks: Sequence[Track]) -> np.ndarray:
    """(T,) largest share of the track's box that another one covers, in each of its frames."""
    cover = np.zeros(len(track.boxes))
    for other in tracks:
        first = max(track.start, other.start)
        last = min(track.end, other.end)
        if other is not track and first < last:
            own, its = (t.boxes[first - t.start : last - t.start] for t in (track, other))
            now = slice(first - track.start, last - track.start)
            cover[now] = np.maximum(cover[now], _common(own, its) / _area(own))
    return cover


def _longest_run(track: Track, good: np.ndarray) -> Track:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], good, [False]]).astype(np.int8))).reshape(-1, 2)
    first, last = max(edges.tolist(), key=lambda edge: edge[1] - edge[0], default=(0, 0))
    return track.part(first, last)


def _is_often_seen(track: Track) -> bool:
    return bool(track.seen.mean() >= 0.5 and all(map(len, _early_and_late(track))))


def _early_and_late(track: Track) -> tuple[np.ndarray, np.ndarray]:
    """Indices at which the person is seen in the first third of the track, and in the last."""
    third = len(track.boxes) // 3
    seen = np.flatnonzero(track.seen)
    return seen[seen < third], seen[seen >= len(track.boxes) - third]


def _moves_on(track: Track) -> bool:
    centre = _centre(track.boxes)
    width = np.median(track.boxes[:, 2] - track.boxes[:, 0])
    return bool(np.linalg.norm(centre - centre[0], axis=1).max() >= width)


class Film:
    """A video, looked at about ten times a second.

    Attributes:
        path: The file.
        step: Every how manieth frame is looked at.
        rate: Frames looked at in a second.
    """

    def __init__(self, path: str | Path):
        """Open the file.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If OpenCV cannot read it, or it does not tell its frame rate.
        """
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(f'{self.path} is not a file')
        rate = opencv().VideoCapture(str(self.path)).get(opencv().CAP_PROP_FPS)
        if not 0 < rate < math.inf:
            raise ValueError(f'{self.path} is not a video that OpenCV can read: convert it, for instance to MP4')
        self.step = max(1, round(rate / FRAMES_PER_SECOND))
        self.rate = rate / self.step

    def frames(self, description: str, progress: bool) -> Iterator[np.ndarray]:
        """The frames looked at, (H, W, 3) uint8 in RGB.

        Raises:
            ValueError: If there is none.
        """
        cv2 = opencv()
        capture = cv2.VideoCapture(str(self.path))
        total = max(0, math.ceil(capture.get(cv2.CAP_PROP_FRAME_COUNT) / self.step)) or None
        with tqdm(total=total, desc=description, unit='frame', disable=None if progress else True) as bar:
            count = 0
            while capture.grab():
                if count % self.step == 0:
                    whole, frame = capture.retrieve()
                    if not whole:
                        break
                    yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                    bar.update()
                count += 1
        if count == 0:
            raise ValueError(f'{self.path}: not a single frame can be decoded; convert it, for instance to MP4')


def _people(tracks: Sequence[Track], same: Sequence[Sequence[int]]) -> dict[int, list[Track]]:
    """The tracks of each person, who goes by the lowest number of these, counted from 1."""
    people = {number: [track] for number, track in enumerate(tracks, 1)}
    for group in same:
        for number in group:
            if number not in people or len(people[number]) > 1 or len(set(group)) < len(group):
                raise ValueError(f'same: {number} is not one of the tracks 1 to {len(tracks)}, or is named twice')
        person, *others = sorted(group)
        people[person] += [people.pop(number)[0] for number in others]
        for earlier, later in pairwise(sorted(people[person], key=lambda track: track.start)):
            if later.start < earlier.end:
                raise ValueError(f'same: two of the tracks {group} are in one frame, so that they are two people')
    return people


class _Crop(NamedTuple):
    folder: str
    person: int
    camera: int
    index: int  # of the frame among those looked at
    box: np.ndarray


def _crops(people: dict[int, list[Track]], count: int) -> Iterator[_Crop]:
    """Up to `count` detected boxes from the first third of each track, and as many from the last."""
    somebody_returns = any(len(tracks) > 1 for tracks in people.values())
    for person, tracks in people.items():
        for number, track in enumerate(tracks, 1):
            cameras = (number, number) if somebody_returns else (1, 2)
            for folder, camera, seen in zip(TEST_FOLDERS, cameras, _early_and_late(track), strict=True):
                if folder == 'query' and somebody_returns and len(tracks) == 1:
                    continue
                for index in seen[np.unique(np.linspace(0, len(seen) - 1, count).round().astype(int))]:
                    yield _Crop(folder, person, camera, track.start + int(index), track.boxes[index])


def _write_crops(root: Path, crops: Sequence[_Crop], film: Film, progress: bool) -> None:
    for name in ('bounding_box_train', *TEST_FOLDERS):
        (root / name).mkdir(parents=True)
    by_frame: dict[int, list[_Crop]] = {}
    for crop in crops:
        by_frame.setdefault(crop.index, []).append(crop)
    for index, frame in enumerate(film.frames('cutting them out', progress)):
        image = Image.fromarray(frame)
        for crop in by_frame.get(index, ()):
            left, top, right, bottom = *np.floor(crop.box[:2]), *np.ceil(crop.box[2:])
            name = f'{crop.person:04d}_c{crop.camera}s1_{index * film.step:06d}_00.jpg'
            image.crop((left, top, right, bottom)).save(root / crop.folder / name, quality=95)


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)


def _common(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Area of the intersection, of boxes (..., 4) that are broadcast against each other."""
    corner = np.maximum(first[..., :2], second[..., :2])
    return np.prod(np.clip(np.minimum(first[..., 2:], second[..., 2:]) - corner, 0, None), axis=-1)


def _centre(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., :2] + boxes[..., 2:]) / 2
