"""Re-identification sets from videos: who is followed, what is cut out, and what colours alone make of it."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from csa_zoo.cli import main
from csa_zoo.data import load_reid, tracks
from csa_zoo.data.tracks import Track, crop_people, hog_detector, link_boxes, select_tracks
from csa_zoo.evaluation.colours import colour_histograms

WIDTH, HEIGHT, FRAMES = 20, 50, 200
COLOURS = {
    'red': (200, 40, 40),
    'green': (40, 190, 60),
    'blue': (50, 60, 210),
    'yellow': (220, 210, 40),
    'magenta': (210, 50, 200),
    'cyan': (40, 200, 210),
}
# Who is where: first frame, last frame, row, first column, columns per frame; 20 frames are a second.
SCENE = [
    ('red', 0, 199, 10, 0, 1.4),  # stays in sight all the time, behind a post in the middle of the way
    ('green', 0, 79, 70, 280, -3.0),
    ('green', 110, 199, 70, 0, 2.0),  # comes back
    ('blue', 0, 199, 10, 295, 0.0),  # stands still
    ('yellow', 130, 170, 130, 0, 3.0),  # too short
    ('magenta', 0, 120, 180, 0, 2.0),  # meets cyan at frame 70
    ('cyan', 0, 120, 180, 280, -2.0),
]


def scene(frame: int) -> np.ndarray:
    """(240, 320, 3) uint8: grey ground, and the rectangles that are people."""
    picture = np.full((240, 320, 3), 128, np.uint8)
    for name, first, last, row, column, speed in SCENE:
        left = round(column + speed * (frame - first))
        if first <= frame <= last and left < 320:
            picture[row : row + HEIGHT, max(0, left) : max(0, left + WIDTH)] = COLOURS[name]
    picture[:65, 150:158] = 128
    return picture


def is_colour(picture: np.ndarray, name: str) -> np.ndarray:
    return np.abs(picture.astype(int) - COLOURS[name]).max(-1) < 40


def detect_colours(picture: np.ndarray) -> np.ndarray:
    """A box around all of each colour, as any detector would give it: without a name."""
    boxes = []
    place = np.argwhere(np.ptp(picture, axis=2) > 60)
    coloured = picture[tuple(place.T)]
    for name in COLOURS:
        found = place[is_colour(coloured, name)]
        if len(found) > 200:
            boxes.append([*found.min(0)[::-1], *found.max(0)[::-1] + 1])
    return np.array(boxes)


@pytest.fixture(scope='module')
def video(tmp_path_factory) -> Path:
    cv2 = pytest.importorskip('cv2')
    path = tmp_path_factory.mktemp('video') / 'scene.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 20, (320, 240))
    for frame in range(FRAMES):
        writer.write(scene(frame)[..., ::-1])
    writer.release()
    return path


def people_of(folder: Path) -> dict[int, str]:
    """The colour of each person id, all of whose images must show it."""
    people: dict[int, str] = {}
    for path in sorted(folder.glob('*/*.jpg')):
        picture = np.asarray(Image.open(path))
        shares = {name: is_colour(picture, name).mean() for name in COLOURS}
        name = max(shares, key=shares.get)
        # A frame too early or too late would show more ground than this.
        assert shares[name] > 0.9 or name == 'red', f'{path.name} is only {shares[name]:.0%} {name}'
        assert people.setdefault(int(path.name[:4]), name) == name, f'{path.name} is {name}'
    return people


def test_people_who_walk_alone_are_cropped_early_and_late(video, tmp_path):
    root = crop_people(video, tmp_path / 'set', detect=detect_colours)
    assert Counter(people_of(root).values()) == {'red': 1, 'green': 2, 'magenta': 1, 'cyan': 1}
    data = load_reid('folder', root)
    assert len(data['train']) == 0
    assert set(data['query']['camera_id']) == {1} and set(data['gallery']['camera_id']) == {2}
    for split in ('query', 'gallery'):
        assert set(Counter(data[split]['person_id']).values()) == {4}
    frames: dict[int, tuple[list[int], list[int]]] = {person: ([], []) for person in people_of(root)}
    for which, split in enumerate(('query', 'gallery')):
        for row in data[split].remove_columns('image'):
            frames[row['person_id']][which].append(int(Path(row['path']).name.split('_')[2]))
    for query, gallery in frames.values():
        assert min(gallery) - max(query) >= 20, 'a second between query and gallery'
        assert all(frame % 2 == 0 for frame in query + gallery), 'of 20 frames a second every other is looked at'


def test_who_came_back_is_searched_in_the_other_track(video, tmp_path):
    people = people_of(crop_people(video, tmp_path / 'first', detect=detect_colours))
    green = [person for person, name in people.items() if name == 'green']
    root = crop_people(video, tmp_path / 'second', [green], images_per_track=2, detect=detect_colours)
    assert people_of(root) == {person: name for person, name in people.items() if person != green[1]}
    data = load_reid('folder', root)
    assert Counter(zip(data['query']['person_id'], data['query']['camera_id'], strict=True)) == {
        (green[0], 1): 2,
        (green[0], 2): 2,
    }
    assert Counter(data['gallery']['camera_id']) == {1: 8, 2: 2}

    magenta, cyan = (next(p for p, name in people.items() if name == colour) for colour in ('magenta', 'cyan'))
    with pytest.raises(ValueError, match='in one frame'):
        crop_people(video, tmp_path / 'third', [[magenta, cyan]], detect=detect_colours)
    with pytest.raises(ValueError, match='same: 9 is not one of the tracks 1 to 5'):
        crop_people(video, tmp_path / 'third', [[1, 9]], detect=detect_colours)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['first', 'second']


def test_what_cannot_be_cropped_is_said(video, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.avi'):
        crop_people(tmp_path / 'none.avi', tmp_path / 'set', detect=detect_colours)
    (tmp_path / 'text.avi').write_text('no video')
    with pytest.raises(ValueError, match=r'text\.avi is not a video'):
        crop_people(tmp_path / 'text.avi', tmp_path / 'set', detect=detect_colours)
    with pytest.raises(ValueError, match='0 detections in 100 frames'):
        crop_people(video, tmp_path / 'set', detect=lambda picture: np.empty((0, 4)))
    with pytest.raises(ValueError, match='left < right'):
        crop_people(video, tmp_path / 'set', detect=lambda picture: [[10, 10, 5, 30]])
    with pytest.raises(FileExistsError, match='not an empty folder'):
        crop_people(video, tmp_path, detect=detect_colours)
    assert not (tmp_path / 'set').exists()


def test_a_missing_person_detector_is_named(monkeypatch):
    cv2 = pytest.importorskip('cv2')
    monkeypatch.delattr(cv2, 'HOGDescriptor', raising=False)
    with pytest.raises(ModuleNotFoundError, match='opencv-contrib-python-headless'):
        hog_detector()


def test_people_of_a_real_video_are_found():
    cv2 = pytest.importorskip('cv2')
    path = Path(os.environ.get('CSA_ZOO_DATA', '.')) / 'vtest.avi'
    if not path.is_file() or not hasattr(cv2, 'HOGDescriptor'):
        pytest.skip('needs vtest.avi of opencv-doc in CSA_ZOO_DATA, and OpenCV with its contrib modules')
    _, frame = cv2.VideoCapture(str(path)).read()
    found = hog_detector()(frame[..., ::-1].copy())
    for person in ((267, 260), (517, 195), (665, 280)):
        assert any((box[:2] < person).all() and (person < box[2:]).all() for box in found), person
    assert len(found) <= 6


@given(
    seed=st.integers(0, 2**32 - 1),
    speeds=st.lists(st.floats(-6, 6), min_size=1, max_size=5),
    longest_gap=st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_walkers_are_followed_through_gaps(seed, speeds, longest_gap):
    """Each in a lane of one's own, with detections missing and in any order: a track for each, at the right place."""
    rng = np.random.default_rng(seed)
    detections: list[list[np.ndarray]] = [[] for _ in range(60)]
    for lane, speed in enumerate(speeds):
        missing = 0
        for frame in range(60):
            missing = missing + 1 if 8 < frame < 59 and missing < longest_gap and rng.random() < 0.4 else 0
            if not missing:
                left, top = 500 + speed * frame, 200 * lane
                detections[frame].append(np.array([left, top, left + 40, top + 100]) + rng.uniform(-1, 1, 4))
    shuffled = [rng.permutation(np.reshape(boxes, (-1, 4))) for boxes in detections]
    found = link_boxes(shuffled, longest_gap)
    assert sorted(round(track.boxes[0, 1] / 200) for track in found) == list(range(len(speeds)))
    for track in found:
        speed = speeds[round(track.boxes[0, 1] / 200)]
        assert (track.start, track.end) == (0, 60)
        np.testing.assert_allclose(track.boxes[:, 0], 500 + speed * np.arange(60), atol=1.01)
    assert sum(track.seen.sum() for track in found) == sum(map(len, detections))


def test_a_track_ends_when_nothing_is_found_for_too_long():
    box = np.array([[0.0, 0, 40, 100]])
    nothing = np.empty((0, 4))
    found = link_boxes([box] * 5 + [nothing] * 4 + [box] * 5, longest_gap=3)
    assert [(track.start, track.end) for track in found] == [(0, 5), (9, 14)]
    found = link_boxes([box] * 5 + [nothing] * 3 + [box] * 5, longest_gap=3)
    assert [(track.start, track.end, track.seen.sum()) for track in found] == [(0, 13, 10)]


def walk(start: int, left: np.ndarray, top: float = 0.0) -> Track:
    boxes = np.stack([left, np.full(len(left), top), left + 40, np.full(len(left), top + 100)], 1)
    return Track(start, boxes, np.ones(len(left), bool))


def test_of_two_who_meet_the_longer_parts_without_the_other_remain():
    one, other = walk(0, np.arange(0.0, 500, 5)), walk(10, np.arange(450.0, 0, -5))
    parts = select_tracks([one, other], shortest=20, most_overlap=0.3)
    # In frames 48 to 52 they have at least half of their boxes in common, in 47 and 53 a quarter.
    assert [(part.start, part.end) for part in parts] == [(0, 48), (53, 100)]
    assert select_tracks([one], shortest=101) == []
    assert select_tracks([walk(0, np.linspace(0, 39, 50))], shortest=20) == []


def test_colour_histograms_compare_stripes_and_nothing_within():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 30, 8, 3), dtype=np.uint8)
    histograms = colour_histograms(images)
    np.testing.assert_allclose(np.linalg.norm(histograms, axis=1), 1, rtol=1e-6)
    stripes = images.reshape(3, 6, 40, 3)
    shuffled = stripes[:, :, rng.permutation(40)].reshape(images.shape)
    np.testing.assert_array_equal(histograms, colour_histograms(shuffled))
    # Two of six stripes of another colour: the others' share of the overlap is left.
    plain = np.full((2, 60, 10, 3), (200, 30, 30), np.uint8)
    plain[1, :20] = 30, 30, 200
    first, second = colour_histograms(plain)
    assert first @ second == pytest.approx(4 / 6)
    # Half of the pixels in common in every stripe: Hellinger's affinity is the root of a half.
    plain = np.full((2, 60, 10, 3), (200, 30, 30), np.uint8)
    plain[1, :, 5:] = 30, 30, 200
    first, second = colour_histograms(plain)
    assert first @ second == pytest.approx(0.5**0.5)
    with pytest.raises(ValueError, match='uint8'):
        colour_histograms(images / 255)


def test_command_line_from_video_to_score(video, tmp_path, capsys, monkeypatch):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(tracks, 'hog_detector', lambda: detect_colours)
    monkeypatch.setenv('CSA_ZOO_CACHE', str(tmp_path / 'cache'))
    root, table = tmp_path / 'set', tmp_path / 'queries.parquet'
    assert main(['data', 'crop-people', str(video), str(root)]) == 0
    assert '--same' in capsys.readouterr().out
    green = ','.join(str(person) for person, name in people_of(root).items() if name == 'green')
    assert main(['data', 'crop-people', str(video), str(tmp_path / 'again'), '--same', green]) == 0
    data = ['--data', 'folder', '--root', str(tmp_path / 'again')]
    assert main(['evaluate', 'colour-histograms', *data, '--camera-pairs', '--per-query', str(table)]) == 0
    printed = capsys.readouterr().out.splitlines()
    scores = {line.split()[0]: line.split()[1] for line in printed if '%' in line and not line.startswith('of')}
    assert scores['rank1'] == scores['mAP'] == scores['TPR@0.001'] == '100.00'
    assert scores['EER'] == '0.00'
    pairs = [line.split() for line in printed if line.split()[0].isdigit() and line.endswith('%')]
    assert [pair[:4] for pair in pairs] == [['1', '2', '4', '100.00'], ['2', '1', '4', '100.00']]
    rows = datasets.Dataset.from_parquet(str(table), cache_dir=str(tmp_path / 'cache'))
    assert rows['first_rank'][:] == [1] * 8 and all(Path(path).is_file() for path in rows['path'])
    with pytest.raises(SystemExit):
        main(['data', 'crop-people', str(tmp_path / 'none.avi'), str(tmp_path / 'third')])
    assert 'none.avi is not a file' in capsys.readouterr().err
