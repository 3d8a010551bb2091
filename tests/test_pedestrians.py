"""The rendered pedestrians: Market-1501's rules, bytes that follow from the arguments alone, and how hard they are."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from csa_zoo.data import pedestrians
from csa_zoo.data.pedestrians import default_root, render_pedestrians

FOLDERS = ('bounding_box_train', 'bounding_box_test', 'query')
SMALL = {'num_identities': 24, 'images_per_camera': 3, 'size': (64, 32), 'seed': 5, 'progress': False}

# Lets child processes import the module without the package, which takes seconds to import.
ALONE = {**os.environ, 'PYTHONPATH': str(Path(pedestrians.__file__).parent)}


def files(root: Path) -> dict[str, bytes]:
    return {f'{folder}/{path.name}': path.read_bytes() for folder in FOLDERS for path in (root / folder).iterdir()}


def labels(root: Path, folder: str) -> list[tuple[int, int]]:
    """(person, camera) of every file, by Market-1501's file names."""
    pattern = re.compile(r'(-1|\d{4})_c([1-6])s1_\d{6}_\d\d\.jpg')
    matches = [pattern.fullmatch(path.name) for path in sorted((root / folder).iterdir())]
    return [(int(match[1]), int(match[2])) for match in matches]


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> Path:
    return render_pedestrians(tmp_path_factory.mktemp('pedestrians') / 'small', workers=1, **SMALL)


def test_folder_obeys_the_rules_of_market1501(small):
    train, gallery, query = (Counter(labels(small, folder)) for folder in FOLDERS)
    train_ids, query_ids = ({person for person, _ in subset} for subset in (train, query))
    assert len(train_ids) == len(query_ids) == 12
    assert not train_ids & query_ids
    assert {person for person, _ in gallery} == query_ids | {-1, 0}
    assert set(query.values()) == {1}
    assert set(train.values()) == {3}
    known = {key: count for key, count in gallery.items() if key[0] > 0}
    assert known == dict.fromkeys(query, 2)
    cameras_per_person = Counter(person for person, _ in [*train, *query])
    assert set(cameras_per_person.values()) == {3, 4, 5}
    assert {camera for _, camera in [*train, *query]} == set(range(1, 7))
    assert Counter(person for person, _ in labels(small, 'bounding_box_test') if person <= 0) == {-1: 36, 0: 24}


def test_images_and_manifest(small):
    contents = files(small)
    for name in contents:
        with Image.open(small / name) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ('JPEG', 'RGB', (32, 64))
    assert len(set(contents.values())) == len(contents)
    manifest = json.loads((small / 'pedestrians.json').read_text())
    assert manifest['counts'] == {folder: len(labels(small, folder)) for folder in FOLDERS}
    assert (manifest['num_identities'], manifest['seed'], manifest['size']) == (24, 5, [64, 32])
    assert sorted(path.name for path in small.iterdir()) == sorted([*FOLDERS, 'pedestrians.json'])


def test_bytes_depend_neither_on_workers_nor_on_the_number_of_identities(small, tmp_path):
    # A script without a __main__ guard, its threads busy: where fork may hang and multiprocessing's spawn raises.
    script = tmp_path / 'script.py'
    script.write_text(
        'import threading, time\n'
        'from pedestrians import render_pedestrians\n'
        'threading.Thread(target=time.sleep, args=(0.5,)).start()\n'
        f'render_pedestrians({str(tmp_path / "three")!r}, workers=3, **{SMALL!r})\n'
    )
    subprocess.run([sys.executable, script], check=True, timeout=120, env=ALONE)
    assert files(tmp_path / 'three') == files(small)

    fewer = files(render_pedestrians(tmp_path / 'fewer', workers=1, **{**SMALL, 'num_identities': 8}))
    assert fewer.items() < files(small).items()
    other = files(render_pedestrians(tmp_path / 'other', workers=1, **{**SMALL, 'num_identities': 4, 'seed': 6}))
    assert not set(other.values()) & set(files(small).values())


def test_an_unfinished_folder_is_completed_and_a_complete_one_left_alone(small, tmp_path):
    root = render_pedestrians(tmp_path / 'set', workers=1, **SMALL)
    for name in list(files(root))[::7]:
        (root / name).unlink()
    kept = {name: (root / name).stat().st_mtime_ns for name in files(root)}
    (root / 'pedestrians.json').unlink()
    render_pedestrians(root, **SMALL)
    assert files(root) == files(small)
    assert kept.items() <= {name: (root / name).stat().st_mtime_ns for name in files(root)}.items()

    before = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    assert render_pedestrians(root, **SMALL) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob('*')} == before


@pytest.mark.skipif(sys.platform == 'win32', reason='sends SIGKILL')
def test_a_killed_rendering_is_completed_by_the_next_call(small, tmp_path):
    root = tmp_path / 'set'
    code = f'import pedestrians; pedestrians.render_pedestrians({str(root)!r}, workers=2, **{SMALL!r})'
    with subprocess.Popen([sys.executable, '-c', code], env=ALONE) as process:
        while not list(root.glob('*/*.jpg')):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (root / 'pedestrians.json').exists()
    assert 0 < len(files(root)) < len(files(small))
    assert files(render_pedestrians(root, **SMALL)) == files(small)


def test_another_rendering_or_strange_files_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match='num_identities is 24 there and 30 here; seed is 5 there and 7 here'):
        render_pedestrians(small, **{**SMALL, 'seed': 7, 'num_identities': 30})

    root = render_pedestrians(tmp_path / 'set', workers=1, **{**SMALL, 'num_identities': 4})
    (root / 'pedestrians.json').unlink()
    with pytest.raises(ValueError, match=r'is not what seed 5, size \(32, 32\) .* Render into another folder'):
        render_pedestrians(root, **{**SMALL, 'num_identities': 4, 'size': (32, 32)})
    with pytest.raises(ValueError, match='files not of this rendering'):
        render_pedestrians(root, **{**SMALL, 'num_identities': 4, 'seed': 7})
    (root / 'query' / '0715_c1s1_000001_01.jpg').touch()
    with pytest.raises(ValueError, match=r'1 files not of this rendering, such as query/0715_c1s1_000001_01\.jpg'):
        render_pedestrians(root, **{**SMALL, 'num_identities': 4})


def test_a_worker_that_fails_is_reported(tmp_path, monkeypatch):
    broken = tmp_path / 'python'
    broken.write_text('#!/bin/sh\necho no such luck >&2\nexit 3\n')
    broken.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(broken))
    with pytest.raises(RuntimeError, match=r'ended with 3:\nno such luck'):
        render_pedestrians(tmp_path / 'set', workers=2, **SMALL)
    assert not (tmp_path / 'set' / 'pedestrians.json').exists()


@pytest.mark.parametrize(
    'argument',
    [
        {'num_identities': 3},
        {'num_cameras': 2},
        {'num_cameras': 10},
        {'images_per_camera': 1},
        {'size': (128, 8)},
        {'size': (128,)},
        {'seed': -1},
    ],
)
def test_arguments_out_of_range_are_named(argument, tmp_path):
    with pytest.raises(ValueError, match=next(iter(argument))):
        render_pedestrians(tmp_path / 'set', **argument)
    assert not (tmp_path / 'set').exists()


def test_without_a_root_the_cache_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv('CSA_ZOO_CACHE', str(tmp_path))
    parameters = {'num_identities': 4, 'num_cameras': 3, 'images_per_camera': 2, 'size': (32, 16)}
    root = render_pedestrians(**parameters, workers=1, progress=False)
    assert root == default_root(**parameters)
    assert tmp_path in root.parents
    assert root != default_root(**{**parameters, 'seed': 1})


def stripe_histograms(root: Path, folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Roots of HSV histograms in six stripes, colours first standardised in each image's middle; ids; cameras."""
    rows, kept = [], []
    for path, label in zip(sorted((root / folder).iterdir()), labels(root, folder), strict=True):
        if label[0] == -1:
            continue
        pixels = np.asarray(Image.open(path), np.float32)[:, 4:-4]
        mean, deviation = pixels.mean((0, 1)), pixels.std((0, 1))
        pixels = ((pixels - mean) / deviation * 50 + 128).clip(0, 255).astype(np.uint8)
        hsv = np.asarray(Image.fromarray(pixels).convert('HSV')) // (32, 64, 64)
        codes = hsv @ (16, 4, 1)
        rows.append(np.concatenate([np.bincount(stripe.ravel(), minlength=128) for stripe in np.array_split(codes, 6)]))
        kept.append(label)
    histograms = np.asarray(rows, np.float64)
    people, cameras = np.asarray(kept).T
    return np.sqrt(histograms / histograms.sum(1, keepdims=True)), people, cameras


def test_colours_tell_people_apart_better_than_chance_and_far_from_perfectly(tmp_path):
    """Light and camera must leave something to recognise, and not so much that a network has nothing to add."""
    root = render_pedestrians(tmp_path, num_identities=90, images_per_camera=2, size=(64, 32), progress=False)
    query, people, cameras = stripe_histograms(root, 'query')
    gallery, gallery_people, gallery_cameras = stripe_histograms(root, 'bounding_box_test')
    same_person = people[:, None] == gallery_people
    valid = ~(same_person & (cameras[:, None] == gallery_cameras))
    nearest = np.where(valid, query @ gallery.T, -1).argmax(1)
    rank1 = same_person[np.arange(len(query)), nearest].mean()
    chance = ((same_person & valid).sum(1) / valid.sum(1)).mean()
    assert 5 * chance < rank1 < 0.6, f'rank-1 of colour histograms is {rank1:.3f}, of chance {chance:.3f}'
