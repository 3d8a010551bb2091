"""The readers of re-identification sets: against the real file lists where they are, and small trees of every form."""

import json
import os
import time
import warnings
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import datasets
import h5py
import numpy as np
import pytest
import scipy.io
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from csa_zoo.data import check_reid, detect_reid, load_reid, render_pedestrians, train_labels
from csa_zoo.data.reid import (
    DUKE_NOTICE,
    PUBLISHED,
    name_list_sha256,
    parse_cuhk03_name,
    parse_market_name,
    parse_msmt17_name,
)

FOLDERS = {'train': 'bounding_box_train', 'query': 'query', 'gallery': 'bounding_box_test'}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv('CSA_ZOO_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


def make_tree(root: Path, names: Iterable[str]) -> Path:
    """Files of these names, all of them links to one tiny image."""
    root.mkdir(parents=True, exist_ok=True)
    buffer = BytesIO()
    Image.new('RGB', (4, 8), (200, 30, 60)).save(buffer, 'JPEG')
    source = root / '.tiny'
    source.write_bytes(buffer.getvalue())
    made = set()
    for name in names:
        path = os.path.join(root, name)
        folder = os.path.dirname(path)
        if folder not in made:
            os.makedirs(folder, exist_ok=True)
            made.add(folder)
        os.link(source, path)
    return root


def columns(data: datasets.DatasetDict, split: str) -> list[tuple[str, int, int]]:
    """(base name, person, camera) of each row."""
    rows = data[split]
    names = [os.path.basename(path) for path in rows['path'][:]]
    return list(zip(names, rows['person_id'][:], rows['camera_id'][:], strict=True))


def real_names(data_dir: Path, name: str) -> list[str]:
    folder = data_dir / 'reid'
    if not folder.is_dir():
        pytest.skip(f'no file lists of re-identification sets in {folder}')
    return [
        line.split(',')[1]
        for part in ('train', 'query', 'test')
        for line in (folder / f'{name}_{part}.csv').read_text().split()
    ]


def load_in_silence(*args, **options) -> datasets.DatasetDict:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return load_reid(*args, **options)


def load_part(*args, **options) -> datasets.DatasetDict:
    """Of an excerpt of a published set, which is said to be incomplete."""
    with pytest.warns(UserWarning, match='is not the published set'):
        return load_reid(*args, **options)


def test_market1501_from_the_real_lists(data_dir, tmp_path):
    root = make_tree(tmp_path / 'run1_c2' / 'Market-1501-v15.09.15', real_names(data_dir, 'market1501'))
    (root / 'query' / 'Thumbs.db').write_bytes(b'stray')
    started = time.perf_counter()
    data = load_in_silence('market1501', root)
    assert time.perf_counter() - started < 4  # measured: 0.4 s; the bound is for busy machines
    assert {split: len(rows) for split, rows in data.items()} == {'train': 12936, 'query': 3368, 'gallery': 19732}
    gallery = np.array(data['gallery']['person_id'][:])
    assert (gallery == -1).sum() == 3819 and (gallery == 0).sum() == 2798 and (gallery > 0).sum() == 13115
    assert len(set(gallery)) == 752 and set(data['query']['person_id'][:]) == set(gallery) - {-1, 0}
    cameras = np.bincount(data['train']['camera_id'][:], minlength=7)
    assert tuple(cameras[1:]) == (2017, 1709, 2707, 920, 2338, 3245)
    double = [row for split in data for row in columns(data, split) if row[0].endswith('.jpg.jpg')]
    assert len(double) == 24 and sum(person == 1488 for _, person, _ in double) == 19
    for split, rows in data.items():
        assert rows['path'][:] == sorted(rows['path'][:])
        assert name_list_sha256(rows['path'][:]) == PUBLISHED['market1501'][split].sha256

    labels = train_labels(data['train'])
    classes = sorted(set(data['train']['person_id'][:]))
    assert len(classes) == 751 and [classes[label] for label in labels] == data['train']['person_id'][:]
    report = check_reid(None, root)
    assert report.ok and report.name == 'market1501' and not report.warnings
    assert '12,936' in str(report) and 'all counts are as published' in str(report)


def test_incomplete_market1501_is_reported(data_dir, tmp_path):
    names = real_names(data_dir, 'market1501')
    lost = [name for name in names if name.startswith('query/1488')]
    assert len(lost) == 6
    root = make_tree(tmp_path / 'market', set(names) - set(lost))
    with pytest.warns(UserWarning, match='query has 3,362 images, not 3,368'):
        load_reid('market1501', root)
    report = check_reid('market1501', root)
    assert not report.ok
    wrong = {(row.split, row.quantity): (row.expected, row.found) for row in report.rows if row.wrong}
    assert wrong['query', 'images'] == (3368, 3362) and wrong['query', 'identities'] == (750, 749)
    assert all(split == 'query' for split, _ in wrong) and sum('camera' in quantity for _, quantity in wrong) == 6

    # Renamed, but as many: a warning, since scores do not change.
    for name in lost:
        os.link(root / '.tiny', root / name.replace('.jpg.jpg', '.jpg'))
    report = check_reid('market1501', root)
    assert report.ok and any('names in query' in text for text in report.warnings)


def test_dukemtmcreid_from_the_real_lists(data_dir, tmp_path):
    root = make_tree(tmp_path / 'data' / 'DukeMTMC-reID', real_names(data_dir, 'dukeMTMC'))
    with pytest.warns(UserWarning, match='withdrawn') as caught:
        data = load_reid('dukemtmcreid', tmp_path / 'data')
    assert [str(warning.message) for warning in caught] == [DUKE_NOTICE]
    for split, published in PUBLISHED['dukemtmcreid'].items():
        rows = data[split]
        assert (len(rows), len(set(rows['person_id'][:]))) == (published.images, published.identities)
        assert tuple(np.bincount(rows['camera_id'][:], minlength=9)[1:]) == published.cameras
        assert name_list_sha256(rows['path'][:]) == published.sha256
    report = check_reid(None, tmp_path / 'data')
    assert report.ok and report.name == 'dukemtmcreid' and 'withdrawn' in str(report)
    with pytest.raises(FileNotFoundError, match='no Market-1501'):
        load_reid('market1501', root)


@pytest.mark.parametrize('boxes', ['detected', 'labeled'])
def test_cuhk03np_from_the_real_split(data_dir, tmp_path, boxes):
    split_file = data_dir / 'reid' / f'cuhk03_new_protocol_config_{boxes}.mat'
    if not split_file.is_file():
        pytest.skip(f'no {split_file}')
    content = scipy.io.loadmat(split_file)
    names = [name.item() for name in content['filelist'].ravel()]
    labels, cameras = content['labels'].ravel(), content['camId'].ravel()
    index = {split: content[f'{split}_idx'].ravel().astype(int) for split in FOLDERS}

    ready = make_tree(
        tmp_path / 'cuhk03-np' / boxes,
        (f'{FOLDERS[split]}/{labels[i - 1]:04}_c{cameras[i - 1]}_{i}.png' for split in FOLDERS for i in index[split]),
    )
    folders = load_in_silence('cuhk03np', ready.parent, boxes=boxes)
    assert check_reid('cuhk03np', ready, boxes=boxes).ok

    # torchreid's extraction, moved since: its absolute paths lead nowhere, its training ids are renumbered.
    extracted = tmp_path / 'cuhk03'
    make_tree(extracted / f'images_{boxes}', names)
    moved = {
        split: [[f'C:\\gone\\run1_c2\\images_{boxes}\\{names[i - 1]}', n, 0] for n, i in enumerate(index[split])]
        for split in FOLDERS
    }
    (extracted / f'splits_new_{boxes}.json').write_text(json.dumps([moved]))
    by_json = load_in_silence('cuhk03np', extracted, boxes=boxes)
    assert check_reid(None, extracted, boxes=boxes).ok
    (extracted / f'splits_new_{boxes}.json').unlink()
    (extracted / split_file.name).write_bytes(split_file.read_bytes())
    by_matlab = load_in_silence('cuhk03np', tmp_path / 'cuhk03' / f'images_{boxes}', boxes=boxes)

    for split, published in PUBLISHED[f'cuhk03np {boxes}'].items():
        assert columns(by_json, split) == columns(by_matlab, split)
        assert len(folders[split]) == len(by_json[split]) == published.images
        # The ready-made folders name an image by its number in the list.
        in_folders = {names[int(n.split('_')[2][:-4]) - 1]: (person, cam) for n, person, cam in columns(folders, split)}
        assert in_folders == {name: (person, camera) for name, person, camera in columns(by_json, split)}
    assert boxes in by_json['train'].info.description

    os.remove(extracted / f'images_{boxes}' / names[index['query'][0] - 1])
    with pytest.raises(FileNotFoundError, match=f'1 listed files are not there: .*{names[index["query"][0] - 1]}'):
        load_reid('cuhk03np', extracted, boxes=boxes)


MARKET_EXCERPT = (
    'bounding_box_train/0002_c1s1_000451_03.jpg',
    'bounding_box_train/0002_c2s1_000451_01.jpg',
    'bounding_box_train/1500_c6s3_000451_03.jpg',
    'query/1488_c1s6_000001_00.jpg.jpg',
    'query/0001_c2s1_000301_00.jpg',
    'bounding_box_test/-1_c1s1_000401_03.jpg',
    'bounding_box_test/0000_c3s1_000401_03.JPG',
    'bounding_box_test/0001_c1s1_001051_00.jpg',
    'bounding_box_test/1488_c4s6_000001_00.jpg.jpg',
    'gt_bbox/0001_c1s1_001051_00.jpg',
)
STRAYS = ('bounding_box_test/Thumbs.db', 'query/._0001_c2s1_000301_00.jpg', 'query/.DS_Store', 'readme.txt')


@pytest.mark.parametrize('place', ['.', '..', 'query', 'bounding_box_train'])
def test_market1501_rules(tmp_path, place):
    root = make_tree(tmp_path / 'run1_c2' / '-1_c9' / 'market', (*MARKET_EXCERPT, *STRAYS))
    data = load_part('market1501', root / place)
    assert list(data) == ['train', 'query', 'gallery']
    assert columns(data, 'query') == [
        ('0001_c2s1_000301_00.jpg', 1, 2),
        ('1488_c1s6_000001_00.jpg.jpg', 1488, 1),
    ]
    assert columns(data, 'gallery') == [
        ('-1_c1s1_000401_03.jpg', -1, 1),
        ('0000_c3s1_000401_03.JPG', 0, 3),
        ('0001_c1s1_001051_00.jpg', 1, 1),
        ('1488_c4s6_000001_00.jpg.jpg', 1488, 4),
    ]
    assert train_labels(data['train']).tolist() == [0, 0, 1]
    features = data['train'].features
    assert isinstance(features['image'], datasets.Image) and list(features) == [
        'image',
        'person_id',
        'camera_id',
        'path',
    ]
    assert data['train'][0]['image'].size == (4, 8) and data['train'][0]['path'] == str(root / MARKET_EXCERPT[0])
    with pytest.raises(ValueError, match='-1'):
        train_labels(data['gallery'])


def test_own_folder(tmp_path):
    names = ['query/7_c12_kitchen.png', 'bounding_box_test/7_c3_door.webp', 'bounding_box_test/-1_c3_x.jpg']
    root = make_tree(tmp_path / 'own', names)
    data = load_in_silence('folder', root)
    assert [len(data[split]) for split in FOLDERS] == [0, 1, 2] and data['train'].features == data['query'].features
    assert columns(data, 'query') == [('7_c12_kitchen.png', 7, 12)]
    with pytest.raises(ValueError, match='no training images'):
        train_labels(data['train'])
    assert detect_reid(root) == ['folder'] and check_reid(None, root).ok

    make_tree(root, ['bounding_box_train/7_c1_a.jpg', 'query/8_c3_b.jpg', 'bounding_box_test/8_c3_b.jpg'])
    text = str(check_reid('folder', root))
    assert (
        '1 of 2 queries' in text and '8_c3_b.jpg' in text and '1 persons, 7 for one, are in train and in query' in text
    )

    for name, message in (
        ('bounding_box_train/0000_c1_a.jpg', 'means nobody'),
        ('bounding_box_train/-1_c1_a.jpg', 'means nobody'),
        ('query/-1_c1_a.jpg', 'means nobody'),
        ('query/holiday.jpg', 'no person and camera'),
    ):
        make_tree(root, [name])
        with pytest.raises(ValueError, match=message) as caught:
            load_reid('folder', root)
        assert str(root / name) in str(caught.value)
        assert not check_reid('folder', root).ok and name in str(check_reid('folder', root))
        (root / name).unlink()


def test_own_table(tmp_path):
    root = make_tree(tmp_path / 'own', ['a/b.jpg', 'a/c.jpg', 'd.jpg', 'e.jpg'])
    table = root / 'people.csv'
    rows = ['a/c.jpg,0,3,train,x', f'{root}/a/b.jpg,5,1,train,y', 'd.jpg,7,1,query,', '"a/../e.jpg",-1,2,gallery,z']

    def write(*lines: str) -> Path:
        table.write_text('\n'.join(['path,person_id,camera_id,split,remark', *lines]), encoding='utf-8-sig')
        return table

    data = load_in_silence('csv', write(*rows))
    assert columns(data, 'train') == [('b.jpg', 5, 1), ('c.jpg', 0, 3)]  # 0 is a person like any other here
    assert columns(data, 'gallery') == [('e.jpg', -1, 2)]
    assert data['gallery'][0]['path'] == str(root / 'e.jpg') and data['gallery'][0]['image'].size == (4, 8)
    assert train_labels(data['train']).tolist() == [1, 0]
    assert detect_reid(table) == ['csv'] and check_reid(None, table).ok

    for line, message in (
        ('d.jpg,x,1,query,', r'line 6: .*whole numbers'),
        ('d.jpg,1', 'line 6: split'),
        ('d.jpg,-2,1,query,', 'line 6: person_id is -2'),
        ('d.jpg,-1,1,query,', 'means nobody'),
        ('d.jpg,1,1,test,', "'test'"),
        (',1,1,query,', 'line 6: path is empty'),
    ):
        with pytest.raises(ValueError, match=message):
            load_reid('csv', write(*rows, line))
    with pytest.raises(FileNotFoundError, match=r'1 listed files are not there: .*gone\.jpg'):
        load_reid('csv', write(*rows, 'gone.jpg,1,1,query,'))
    with pytest.raises(FileNotFoundError, match='no images in the split gallery'):
        load_reid('csv', write(*rows[:3]))
    table.write_text('path,person_id\na,1')
    with pytest.raises(ValueError, match='no column camera_id, split'):
        load_reid('csv', table)
    table.write_bytes(b'path,person_id,camera_id,split\n\xff\xfe,1,1,train')
    with pytest.raises(ValueError, match='UTF-8'):
        load_reid('csv', table)


@pytest.mark.parametrize(('train', 'test'), [('train', 'test'), ('mask_train_v2', 'mask_test_v2')])
def test_msmt17(tmp_path, train, test):
    root = tmp_path / 'MSMT17'
    lists = {
        'train': (train, ['0001/0001_004_15_0114noon_0022_1.jpg 1', '0000/0000_000_01_0303morning_0015_0.jpg 0']),
        'val': (train, ['0000/0000_007_06_0302afternoon_0551_1.jpg 0']),
        'query': (test, ['0000/0000_001_14_0303noon_0007_0.jpg 0']),
        'gallery': (test, ['0000/0000_002_12_0303noon_0008_2.jpg 0', '0002/0002_001_03_0303noon_0008_2.jpg 2']),
    }
    for part, (folder, lines) in lists.items():
        make_tree(root, [f'{folder}/{line.split()[0]}' for line in lines])
        (root / f'list_{part}.txt').write_text('\n'.join(lines) + '\n')
    data = load_part('msmt17', root / train)
    assert columns(data, 'train') == [
        ('0000_000_01_0303morning_0015_0.jpg', 0, 1),
        ('0000_007_06_0302afternoon_0551_1.jpg', 0, 6),
        ('0001_004_15_0114noon_0022_1.jpg', 1, 15),
    ]
    assert columns(data, 'query') == [('0000_001_14_0303noon_0007_0.jpg', 0, 14)]
    assert train_labels(data['train']).tolist() == [0, 0, 1]
    assert len(load_part('msmt17', tmp_path, validation=False)['train']) == 2
    report = check_reid(None, root)
    found = {(row.split, row.quantity): row.found for row in report.rows}
    assert found['train', 'identities'] == 2 and ('gallery', 'distractors') not in found and not report.warnings

    (root / test / '0002/0002_001_03_0303noon_0008_2.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='0002_001_03'), pytest.warns(UserWarning):
        load_reid('msmt17', root)
    for line, message in (('0000/0000_000_01_a_b_0.jpg', 'line 1'), ('0000/0000_000_01_a_b_0.jpg 7', 'label 7')):
        (root / 'list_query.txt').write_text(line)
        with pytest.raises(ValueError, match=message):
            load_reid('msmt17', root)


def write_cuhk03(path: Path, people: list[dict[int, np.ndarray]]) -> None:
    """A MATLAB 7.3 file with a cell array {pairs x 1} of cell arrays {persons x 10} of images, as MATLAB lays it out.

    Args:
        path: The file.
        people: For each pair, images (H, W, 3) by (person, image), both from 0.
    """
    with h5py.File(path, 'w') as file:
        cells = file.create_group('#refs#')

        def store(name: str, values: np.ndarray) -> h5py.Reference:
            return cells.create_dataset(name, data=values).ref

        for boxes in ('detected', 'labeled'):
            pairs = np.empty((1, len(people)), h5py.ref_dtype)
            for pair, images in enumerate(people):
                persons = 1 + max(person for person, _ in images)
                references = np.empty((10, persons), h5py.ref_dtype)  # transposed, as all that MATLAB writes
                for person in range(persons):
                    for number in range(10):
                        name = f'{boxes}_{pair}_{person}_{number}'
                        image = images.get((person, number))
                        if image is None:
                            references[number, person] = store(name, np.zeros(2, np.uint64))
                            file[references[number, person]].attrs['MATLAB_empty'] = np.uint8(1)
                        else:
                            references[number, person] = store(name, image.transpose(2, 1, 0))
                pairs[0, pair] = cells.create_dataset(f'{boxes}_{pair}', data=references, dtype=h5py.ref_dtype).ref
            file.create_dataset(boxes, data=pairs, dtype=h5py.ref_dtype)


def write_cuhk03_split(path: Path, names: list[str], labels: list[int], **split: list[int]) -> None:
    filelist = np.empty((len(names), 1), object)
    filelist[:, 0] = names
    views = [int(name.split('_')[2]) for name in names]
    indices = {f'{name}_idx': np.array(index, np.uint16)[:, None] for name, index in split.items()}
    column = {'labels': np.array(labels, np.uint16)[:, None], 'camId': np.array(views, np.uint8)[:, None]}
    scipy.io.savemat(path, {'filelist': filelist, **column, **indices})


def test_raw_cuhk03(tmp_path, cache):
    rng = np.random.default_rng(0)
    shapes = {(0, 0): (9, 4), (0, 5): (8, 5), (1, 0): (7, 3), (1, 1): (6, 6), (1, 9): (5, 7)}
    first = {cell: rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for cell, shape in shapes.items()}
    second = {(0, 4): rng.integers(0, 256, (3, 8, 3), dtype=np.uint8)}
    root = tmp_path / 'cuhk03'
    raw = root / 'cuhk03_release' / 'cuhk-03.mat'
    raw.parent.mkdir(parents=True)
    write_cuhk03(raw, [first, second])
    with pytest.raises(FileNotFoundError, match=r'put cuhk03_new_protocol_config_detected\.mat'):
        load_reid('cuhk03np', root)
    names = ['1_001_1_01.png', '1_001_2_06.png', '1_002_1_01.png', '1_002_1_02.png', '1_002_2_10.png', '2_001_1_05.png']
    split = {'train': [1, 2, 6], 'query': [3], 'gallery': [4, 5]}
    split_file = root / 'cuhk03_new_protocol_config_detected.mat'
    write_cuhk03_split(split_file, names, [1, 1, 2, 2, 2, 3], **split)

    report = check_reid(None, root)
    assert report.name == 'cuhk03np' and 'detected boxes' in str(report) and not list(cache.rglob('*.png'))
    data = load_part('cuhk03np', raw)
    assert columns(data, 'train') == [('1_001_1_01.png', 1, 1), ('1_001_2_06.png', 1, 2), ('2_001_1_05.png', 3, 1)]
    assert columns(data, 'gallery') == [('1_002_1_02.png', 2, 1), ('1_002_2_10.png', 2, 2)]
    pixels = {os.path.basename(row['path']): np.array(row['image']) for rows in data.values() for row in rows}
    expected = [*first.values(), *second.values()]
    for name, image in zip(names, expected, strict=True):
        np.testing.assert_array_equal(pixels[name], image)

    # A killed extraction left a part, under another name; what is complete is not written again.
    files = [Path(path) for rows in data.values() for path in rows['path'][:]]
    assert all(path.is_relative_to(cache) for path in files)
    (files[0].parent / '.partial-1.png').write_bytes(files[0].read_bytes()[:20])
    stamp = files[1].stat().st_mtime_ns
    files[0].unlink()
    again = load_part('cuhk03np', root)
    assert np.array_equal(np.array(again['train'][0]['image']), first[0, 0]) and files[1].stat().st_mtime_ns == stamp

    write_cuhk03_split(split_file, [*names, '1_001_1_02.png'], [1, 1, 2, 2, 2, 3, 1], **{**split, 'train': [1, 7]})
    with pytest.raises(FileNotFoundError, match=r'1 listed files .*1_001_1_02\.png'), pytest.warns(UserWarning):
        load_reid('cuhk03np', root)
    write_cuhk03_split(split_file, names, [1, 1, 2, 2, 2, 3], **{**split, 'query': [7]})
    with pytest.raises(ValueError, match='query_idx names images 7 to 7 of 6'):
        load_reid('cuhk03np', root)
    split_file.write_bytes(split_file.read_bytes()[:150])
    with pytest.raises(ValueError, match='is not a split file'):
        load_reid('cuhk03np', root)
    write_cuhk03_split(split_file, names, [1, 1, 2, 2, 2, 3], **split)
    raw.write_bytes(raw.read_bytes()[:1000])
    with pytest.raises(ValueError, match='cannot be opened as MATLAB'):
        load_reid('cuhk03np', root)


def test_ready_made_cuhk03_boxes(tmp_path):
    names = ['bounding_box_train/0001_c1_1', 'query/0003_c1_22', 'bounding_box_test/0003_c2_27']
    make_tree(tmp_path / 'cuhk03-np' / 'detected', [f'{name}.png' for name in names])
    make_tree(tmp_path / 'cuhk03-np' / 'Labelde', [f'{name}.png' for name in [*names, 'bounding_box_train/0001_c2_6']])
    for root in (tmp_path, tmp_path / 'cuhk03-np', tmp_path / 'cuhk03-np' / 'detected'):
        assert len(load_part('cuhk03np', root)['train']) == 1
    assert len(load_part('cuhk03np', tmp_path, boxes='labeled')['train']) == 2
    with pytest.raises(ValueError, match='holds the labeled boxes'):
        load_reid('cuhk03np', tmp_path / 'cuhk03-np' / 'Labelde')
    with pytest.raises(ValueError, match='labelled'):
        load_reid('cuhk03np', tmp_path, boxes='labelled')
    with pytest.raises(TypeError, match='no option box; it has boxes'):
        load_reid('cuhk03np', tmp_path, box='labeled')

    repack = make_tree(tmp_path / 'other' / 'repack', [f'{name}.jpg' for name in names])
    with pytest.warns(UserWarning) as caught:
        load_reid('cuhk03np', repack)
    texts = ' '.join(str(warning.message) for warning in caught)
    assert 'JPEG' in texts and 'nothing in the name' in texts and 'is not the published set' in texts


def test_rendered_pedestrians(tmp_path, cache):
    options = {'num_identities': 4, 'workers': 1, 'progress': False}
    data = load_in_silence('pedestrians', **options)
    assert Path(data['train'][0]['path']).is_relative_to(cache)
    assert data['train'][0]['image'].size == (64, 128) and -1 in data['gallery']['person_id'][:]

    out = render_pedestrians(tmp_path / 'out', **options)
    again = load_in_silence('pedestrians', out)  # as it is, whatever it was made with
    assert [columns(again, split) for split in data] == [columns(data, split) for split in data]
    assert check_reid(None, out).name == 'pedestrians' and check_reid(None, out).ok
    assert columns(load_part('market1501', out), 'gallery') == columns(data, 'gallery')
    os.remove(again['query'][0]['path'])
    assert not check_reid('pedestrians', out).ok


def test_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"'market'; there are market1501, .*csv"):
        load_reid('market', tmp_path)
    with pytest.raises(ValueError, match='give root'):
        load_reid('market1501')
    with pytest.raises(FileNotFoundError, match='does not exist'):
        load_reid('market1501', tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    for name in ('market1501', 'dukemtmcreid', 'cuhk03np', 'msmt17', 'folder', 'csv'):
        with pytest.raises(FileNotFoundError, match=str(tmp_path / 'empty')):
            load_reid(name, tmp_path / 'empty')
        report = check_reid(name, tmp_path / 'empty')
        assert not report.ok and 'Not usable' in str(report)
    assert (
        'bounding_box_train' in str(check_reid(None, tmp_path / 'empty'))
        and not check_reid(None, tmp_path / 'empty').ok
    )

    make_tree(tmp_path / 'data' / 'market', MARKET_EXCERPT)
    make_tree(tmp_path / 'data' / 'own', ['query/7_c1.jpg', 'bounding_box_test/7_c2.jpg'])
    assert detect_reid(tmp_path / 'data') == ['market1501', 'folder']
    assert 'several sets, market1501, folder' in str(check_reid(None, tmp_path / 'data'))
    assert len(load_in_silence('folder', tmp_path / 'data')['query']) == 1
    make_tree(tmp_path / 'data' / 'market2', MARKET_EXCERPT)
    with pytest.raises(ValueError, match='several copies: market, market2'):
        load_reid('market1501', tmp_path / 'data')
    for name in MARKET_EXCERPT[:3]:
        (tmp_path / 'data' / 'market' / name).unlink()
    with pytest.raises(FileNotFoundError, match='no images in the split train'):
        load_reid('market1501', tmp_path / 'data' / 'market')


tails = st.text(st.characters(blacklist_characters='/\0', blacklist_categories=['Cs']), max_size=20)
folders = st.lists(st.sampled_from(['run1_c2', '-1_c7', '0042_c3s1_000001_00.jpg', '..', 'a b']), max_size=3)


@given(st.integers(-1, 10**6), st.integers(0, 99), tails, folders, st.integers(0, 6))
def test_market_names(person, camera, tail, parents, width):
    name = f'{person if person < 0 else f"{person:0{width}d}"}_c{camera}{"_" if tail[:1].isdigit() else ""}{tail}'
    assert parse_market_name('/'.join([*parents, name])) == (person, camera)


@given(st.text(max_size=30), folders)
def test_names_that_are_none(name, parents):
    """Whatever follows the last slash is read as the format says or refused, whatever the folders are called."""
    path = '/'.join([*parents, name])
    base = name.split('/')[-1]
    head, _, rest = base.partition('_c')
    digits = rest[: len(rest) - len(rest.lstrip('0123456789'))]
    ascii_number = head.isascii() and head.isdigit()
    if (ascii_number or head == '-1') and digits and len(head) <= 18 and len(digits) <= 18:
        assert parse_market_name(path) == (int(head), int(digits))
    else:
        with pytest.raises(ValueError, match='no person and camera'):
            parse_market_name(path)


@given(st.integers(0, 4100), st.integers(0, 999), st.integers(1, 15), folders)
def test_msmt17_names(person, number, camera, parents):
    name = f'{person:04}_{number:03}_{camera:02}_0303morning_0015_0.jpg'
    assert parse_msmt17_name('/'.join([*parents, name])) == (person, camera)


def test_cuhk03_names():
    persons = (843, 440, 77, 58, 49)
    names = [f'{pair}_{n:03}_2_06.png' for pair, count in enumerate(persons, 1) for n in range(1, count + 1)]
    assert [parse_cuhk03_name(f'run1_c2/{name}') for name in names] == [(n, 2) for n in range(1, 1468)]
    for name in (
        '1_844_1_01.png',
        '1_000_1_01.png',
        '6_001_1_01.png',
        '1_001_3_01.png',
        '1_001_1_01',
        '0003_c1_22.png',
    ):
        with pytest.raises(ValueError, match='not the name of a CUHK03 image'):
            parse_cuhk03_name(name)
