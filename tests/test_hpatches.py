"""HPatches: readers on made files, task lists against the benchmark's, metrics against loops over single rows."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from csa_zoo.data.hpatches import (
    PATCH_TYPES,
    as_patch_set,
    find_hpatches_sequences,
    load_hpatches,
    load_hpatches_csv,
    save_hpatches_csv,
)
from csa_zoo.data.hpatches_tasks import (
    HPatchesTasks,
    draw_hpatches_tasks,
    draw_official_pairs,
    load_hpatches_splits,
    load_hpatches_tasks,
)
from csa_zoo.evaluation.hpatches import POOLS, hpatches_metrics

COUNTS = {'i_one': 100, 'i_two': 75, 'v_three': 85}
SPLITS = {'x': {'name': 'x', 'test': list(COUNTS)}, 'y': {'test': ['i_two'], 'train': ['i_one']}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('CSA_ZOO_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture(scope='module')
def patches() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 256, (16, count, 8, 8), dtype=np.uint8) for name, count in COUNTS.items()}


@pytest.fixture(scope='module')
def tasks(patches) -> HPatchesTasks:
    return draw_hpatches_tasks(patches, pairs=203, queries=30, seed=1)


def random_descriptors(integer: bool) -> dict[str, np.ndarray]:
    """Descriptors that are neither perfect nor chance; integers have many equal distances."""
    rng = np.random.default_rng(3)
    result = {}
    for name, count in COUNTS.items():
        noise = np.repeat([0, 0.5, 0.9, 1.4], [1, 5, 5, 5])[:, None, None]
        x = rng.standard_normal((1, count, 6)) + noise * rng.standard_normal((16, count, 6))
        result[name] = np.rint(x) if integer else x
    return result


class TestReader:
    @pytest.fixture
    def release(self, tmp_path):
        rng = np.random.default_rng(0)
        root = tmp_path / 'hpatches-release'
        strips = {name: rng.integers(0, 256, (16, n, 65, 65), dtype=np.uint8) for name, n in (('v_b', 5), ('i_a', 3))}
        for name, stack in strips.items():
            (root / name).mkdir(parents=True)
            for patch_type, strip in zip(PATCH_TYPES, stack, strict=True):
                Image.fromarray(strip.reshape(-1, 65)).save(root / name / f'{patch_type}.png')
        return root, strips

    def test_order_and_values(self, release):
        root, strips = release
        loaded = load_hpatches(root, size=65)
        assert list(loaded) == ['i_a', 'v_b']
        for name, stack in strips.items():
            assert np.array_equal(loaded[name], stack)
        assert PATCH_TYPES[:3] + PATCH_TYPES[-1:] == ('ref', 'e1', 'e2', 't5')
        assert PATCH_TYPES[6] == 'h1'

    @pytest.mark.parametrize('size', [32, 64])
    def test_resize_is_opencvs(self, release, size):
        cv2 = pytest.importorskip('cv2')
        root, strips = release
        for name, stack in load_hpatches(root, size).items():
            for ours, patch in zip(stack.flatten(0, 1), strips[name].reshape(-1, 65, 65), strict=True):
                assert np.array_equal(ours, cv2.resize(patch, (size, size), interpolation=cv2.INTER_LINEAR))

    def test_decoded_once(self, release, cache):
        root, _ = release
        before = load_hpatches(root)
        (entry,) = cache.iterdir()
        stamp = (entry / 'patches.npy').stat().st_mtime_ns
        assert all(torch.equal(before[name], stack) for name, stack in load_hpatches(root).items())
        assert (entry / 'patches.npy').stat().st_mtime_ns == stamp
        Image.fromarray(np.zeros((195, 65), np.uint8)).save(root / 'i_a' / 't5.png')
        assert load_hpatches(root)['i_a'][15].max() == 0

    def test_patch_set(self, release):
        loaded = load_hpatches(release[0])
        data = as_patch_set(loaded)
        assert data.num_points == 8
        assert torch.bincount(data.point_ids).tolist() == [16] * 8
        seventh = data.patches[data.point_ids == 6]  # the fourth point of the second sequence
        assert torch.equal(seventh, loaded['v_b'][:, 3])

    @pytest.mark.parametrize(
        ('shape', 'message'),
        [
            ((196, 65), r'i_a/h2\.png is 65x196 pixels.*multiple of 65'),
            ((195, 64), r'i_a/h2\.png is 64x195 pixels'),
            ((130, 65), r"strips of .*i_a hold different numbers of patches.*'h2\.png': 2"),
        ],
    )
    def test_wrong_strips(self, release, shape, message):
        root, _ = release
        Image.fromarray(np.zeros(shape, np.uint8)).save(root / 'i_a' / 'h2.png')
        with pytest.raises(ValueError, match=message):
            load_hpatches(root)

    def test_damaged_missing_and_misnamed(self, release, tmp_path, cache):
        root, _ = release
        strip = root / 'v_b' / 'e4.png'
        good = strip.read_bytes()
        start = good.index(b'IDAT') + 4
        (size,) = struct.unpack('>I', good[start - 8 : start - 4])
        for bad in (good[: len(good) // 2], good[: start + size // 2] + bytes(size // 2) + good[start + size :]):
            strip.write_bytes(bad)
            with pytest.raises(ValueError, match=r'v_b/e4\.png cannot be decoded'):
                load_hpatches(root)
        strip.write_text('no image')
        with pytest.raises(ValueError, match=r'v_b/e4\.png is no image'):
            load_hpatches(root)
        strip.unlink()
        with pytest.raises(FileNotFoundError, match=r'v_b lacks e4\.png'):
            load_hpatches(root)
        (root / 'v_b').rename(root / 'b')
        with pytest.raises(ValueError, match=r'release/b: the name of a sequence must begin with i_'):
            load_hpatches(root)
        with pytest.raises(FileNotFoundError, match=r'no \*/ref\.png in'):
            load_hpatches(tmp_path)
        with pytest.raises(ValueError, match='size must be 32, 64 or 65, not 48'):
            load_hpatches(root, 48)
        assert not list(cache.glob('*/patches.npy'))


class TestCSV:
    @pytest.mark.parametrize('kind', [np.asarray, torch.from_numpy])
    def test_round_trip_is_exact(self, tmp_path, kind):
        descriptors = {name: x.astype(np.float32) for name, x in random_descriptors(integer=False).items()}
        save_hpatches_csv({name: kind(x) for name, x in descriptors.items()}, tmp_path / 'mine')
        loaded = load_hpatches_csv(tmp_path / 'mine')
        assert list(loaded) == list(COUNTS)
        assert all(np.array_equal(loaded[name], x) for name, x in descriptors.items())
        row = (tmp_path / 'mine' / 'i_two' / 'h3.csv').read_text().splitlines()[7]
        assert np.array_equal(np.float32(row.split(',')), descriptors['i_two'][8, 7])

    def test_other_layouts(self, tmp_path):
        folder = tmp_path / 'v_x'
        folder.mkdir()
        for patch_type in PATCH_TYPES:
            (folder / f'{patch_type}.csv').write_text('   3.00000; 128.00000\n   0.00000; 255.00000\n')
        assert load_hpatches_csv(tmp_path)['v_x'][4].tolist() == [[3, 128], [0, 255]]
        bits = load_hpatches_csv(tmp_path, packed_bits=True)['v_x'][4]
        assert bits.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1, *[0] * 7], [*[0] * 8, *[1] * 8]]
        (folder / 't1.csv').write_text('3;1\n')
        with pytest.raises(ValueError, match=r't1\.csv has 1 rows of 2 numbers, but ref\.csv beside it 2 of 2'):
            load_hpatches_csv(tmp_path)
        (folder / 't1.csv').write_text('3 1\n4 5\n')
        with pytest.raises(ValueError, match=r't1\.csv is no table'):
            load_hpatches_csv(tmp_path)
        (folder / 't1.csv').write_text('3\n4\n')
        with pytest.raises(ValueError, match=r't1\.csv has 1 numbers in a row'):
            load_hpatches_csv(tmp_path)
        (folder / 't1.csv').write_text('3.5;1\n4;1\n')
        with pytest.raises(ValueError, match='v_x holds numbers that are no bytes'):
            load_hpatches_csv(tmp_path, packed_bits=True)
        (folder / 't1.csv').unlink()
        with pytest.raises(FileNotFoundError, match=r'v_x lacks t1\.csv'):
            load_hpatches_csv(tmp_path)
        with pytest.raises(ValueError, match=r'\(16, N, D\), not \(15, 4, 8\)'):
            save_hpatches_csv({'i_a': np.zeros((15, 4, 8))}, tmp_path)


# An empty file is refused by its name; numpy warns as well.
@pytest.mark.filterwarnings('ignore:loadtxt')
class TestSequences:
    @pytest.fixture
    def release(self, tmp_path):
        for name in ('v_b', 'i_a'):
            (tmp_path / name).mkdir()
            for number in range(1, 7):
                Image.new('RGB', (8, 6)).save(tmp_path / name / f'{number}.ppm')
            for number in range(2, 7):
                (tmp_path / name / f'H_1_{number}').write_text(f'1 0 {number} \n0 1.5e0 -2\n0 0 1\n')
        return tmp_path

    def test_read(self, release):
        first, second = find_hpatches_sequences(release)
        assert (first.name, second.name) == ('i_a', 'v_b')
        assert first.images[5] == release / 'i_a' / '6.ppm'
        assert second.homographies[4].tolist() == [[1, 0, 6], [0, 1.5, -2], [0, 0, 1]]

    @pytest.mark.parametrize('content', ['1 0 0\n0 1 0\n', '1 0 0\n0 1 0\n0 0 x\n', '1 0 0\n0 0 0\n0 0 1\n', ''])
    def test_invalid(self, release, content):
        (release / 'v_b' / 'H_1_4').write_text(content)
        with pytest.raises(ValueError, match=r'v_b/H_1_4 is no'):
            find_hpatches_sequences(release)
        (release / 'v_b' / 'H_1_4').unlink()
        with pytest.raises(FileNotFoundError, match='v_b lacks H_1_4'):
            find_hpatches_sequences(release)


def write_tasks(folder: Path, splits: dict, tasks: HPatchesTasks, pairs: bool = True) -> None:
    """The benchmark's files for a split named x."""
    folder.mkdir()
    (folder / 'splits').mkdir()
    (folder / 'splits' / 'splits.json').write_text(json.dumps(splits))
    lists = {'retr_queries': tasks.queries, 'retr_distractors': tasks.distractors}
    if pairs:
        lists |= {'verif_pos': tasks.positives, 'verif_neg_inter': tasks.inter, 'verif_neg_intra': tasks.intra}
    for name, rows in lists.items():
        header = 's,idx' if len(rows[0]) == 2 else 's1,t1,idx1,s2,t2,idx2'
        names = [','.join(tasks.sequences[v] if i % 3 == 0 else str(v) for i, v in enumerate(r)) for r in rows]
        (folder / f'{name}_split-x.csv').write_text('\n'.join([header, *names]) + '\n')


def fields(tasks: HPatchesTasks) -> list[np.ndarray]:
    return [tasks.positives, tasks.inter, tasks.intra, tasks.queries, tasks.distractors]


@pytest.mark.filterwarnings('ignore:loadtxt')
class TestTasks:
    def test_official_files(self, tmp_path, patches, tasks):
        write_tasks(tmp_path / 'tasks', SPLITS, tasks)
        assert load_hpatches_splits(tmp_path / 'tasks')['y'] == {'train': ['i_one'], 'test': ['i_two']}
        loaded = load_hpatches_tasks(tmp_path / 'tasks', 'x', patches)
        assert loaded.sequences == tuple(COUNTS)
        for ours, theirs in zip(fields(loaded), fields(tasks), strict=True):
            assert np.array_equal(ours, theirs)

    def test_missing_and_misfit(self, tmp_path, patches, tasks):
        folder = tmp_path / 'tasks'
        with pytest.raises(FileNotFoundError, match=r'no splits\.json in .*benchmark'):
            load_hpatches_tasks(folder, 'x', patches)
        write_tasks(folder, SPLITS, tasks)
        with pytest.raises(ValueError, match="has the splits x, y, not 'full'"):
            load_hpatches_tasks(folder, 'full', patches)
        with pytest.raises(FileNotFoundError, match=r'no retr_queries_split-y\.csv'):
            load_hpatches_tasks(folder, 'y', patches)
        with pytest.raises(ValueError, match='1 sequences of the split x are missing: v_three'):
            load_hpatches_tasks(folder, 'x', {name: patches[name] for name in ('i_one', 'i_two')})
        short = {**patches, 'i_one': patches['i_one'][:, :9]}
        with pytest.raises(ValueError, match=r'names patch \d+ of i_one, which has 9'):
            load_hpatches_tasks(folder, 'x', short)
        path = folder / 'retr_queries_split-x.csv'
        for content, message in (
            ('s,idx\ni_one,3\ni_uno,4\n', r'row 2: i_uno is no sequence'),
            ('s,idx\ni_one,three\n', r'is no list of s,idx'),
            ('i_one,3\n', r"begins with 'i_one,3'"),
            ('s,idx\n', r'queries_split-x\.csv has no row'),
        ):
            path.write_text(content)
            with pytest.raises(ValueError, match=message):
                load_hpatches_tasks(folder, 'x', patches)
        (folder / 'verif_pos_split-x.csv').unlink()
        path.write_text('s,idx\ni_one,3\n')
        with pytest.raises(FileNotFoundError, match=r'no verif_pos_split-x\.csv'):
            load_hpatches_tasks(folder, 'x', patches)

    def test_drawn_again_like_the_benchmark(self):
        """Its generator, a row at a time, from numpy's global random numbers."""
        counts, rows = [7, 300, 41], 400
        np.random.seed(42)
        s = np.random.choice(3, rows)
        idx = np.array([np.random.choice(np.arange(counts[k]), 2, replace=False) for k in s])
        t = np.array([np.random.choice(np.arange(5), 2, replace=False) for _ in s])
        other = np.random.choice(3, rows)
        far = np.array([np.random.randint(counts[k]) for k in other])
        positives, inter, intra = draw_official_pairs(counts, rows)
        assert np.array_equal(positives, np.stack([s, t[:, 0], idx[:, 0], s, t[:, 1], idx[:, 0]], 1))
        assert np.array_equal(intra, np.stack([s, t[:, 0], idx[:, 0], s, t[:, 1], idx[:, 1]], 1))
        assert np.array_equal(inter, np.stack([s, t[:, 0], idx[:, 0], other, t[:, 1], far], 1))

    def test_own_draw(self, patches):
        flat = {**patches, 'v_three': patches['v_three'] // 16}
        tasks = draw_hpatches_tasks(flat, pairs=3000)
        first, second = tasks.positives[:, :3], tasks.positives[:, 3:]
        assert np.array_equal(first[:, ::2], second[:, ::2])
        assert (first[:, 1] != second[:, 1]).all()
        assert set(first[:, 1]) == set(second[:, 1]) == set(range(6))
        assert (tasks.intra[:, 0] == tasks.intra[:, 3]).all()
        assert (tasks.intra[:, 2] != tasks.intra[:, 5]).all()
        assert (tasks.inter[:, 0] != tasks.inter[:, 3]).all()
        used = np.concatenate([tasks.queries, tasks.distractors])
        assert len(np.unique(used, axis=0)) == len(used) == 175
        assert len(tasks.queries) == 58
        assert set(used[:, 0]) == {0, 1}  # the third has no contrast
        for ours, again in zip(fields(tasks), fields(draw_hpatches_tasks(flat, pairs=3000)), strict=True):
            assert np.array_equal(ours, again)
        with pytest.raises(ValueError, match='two sequences of two points'):
            draw_hpatches_tasks({'i_one': patches['i_one']})

    @pytest.mark.parametrize(
        ('change', 'message'),
        [
            ({'positives': np.zeros((3, 5), int)}, r'positives must be of shape \(rows, 6\)'),
            ({'queries': np.array([[3, 0]])}, 'queries has a negative number or a sequence beyond 2'),
            ({'inter': np.array([[0, 6, 0, 1, 0, 0]])}, 'inter has image 6'),
        ],
    )
    def test_invalid(self, tasks, change, message):
        with pytest.raises(ValueError, match=message):
            HPatchesTasks(**{**vars(tasks), **change})

    @pytest.mark.parametrize(('split', 'fewest', 'mean', 'most'), [('full', 19781, 19826, 19908), ('a', 0, 0, 20000)])
    def test_real_lists(self, data_dir, tmp_path, split, fewest, mean, most):
        folder = data_dir / 'hpatches'
        if not folder.is_dir():
            pytest.skip('CSA_ZOO_DATA has no hpatches/')
        names = load_hpatches_splits(folder)[split]['test']
        assert (len(names), sum(name.startswith('i_') for name in names)) == {'full': (116, 57), 'a': (40, 20)}[split]
        stand_in = {name: np.broadcast_to(np.uint8(0), (16, 9999, 1, 1)) for name in names}
        for path in folder.iterdir():
            (tmp_path / path.name).symlink_to(path)
        for kind in ('pos', 'neg_inter', 'neg_intra'):
            (tmp_path / f'verif_{kind}_split-{split}.csv').write_text(
                f's1,t1,idx1,s2,t2,idx2\n{names[0]},0,1,{names[1]},2,3'
            )
        tasks = load_hpatches_tasks(tmp_path, split, stand_in)
        used = np.concatenate([tasks.queries, tasks.distractors])
        assert len(np.unique(used, axis=0)) == len(used) == 30_000
        assert len(tasks.queries) == 10_000
        own = np.bincount(tasks.distractors[:, 0], minlength=len(names))
        negatives = 20_000 - own[tasks.queries[:, 0]]
        assert fewest <= negatives.min()
        assert negatives.max() <= most
        if split == 'full':
            assert (negatives.min(), round(negatives.mean()), negatives.max()) == (fewest, mean, most)
        else:  # the example in the benchmark's documentation of its verification pairs
            drawn = draw_official_pairs([2000] * 40, 4)[0, :, 0]
            assert [names[i] for i in drawn] == ['v_birdwoman', 'v_strand', 'i_salon', 'i_zion']


def precision_recall(distances, labels, positives=None, negatives_first=True):
    """Areas by trapezoid and by step, item by item."""
    order = sorted(range(len(labels)), key=lambda i: (distances[i], labels[i] if negatives_first else 0, i))
    total = positives or sum(labels)
    true = false = 0
    recall, precision = [0.0], [1.0]
    step = 0.0
    for i in order:
        true, false = true + bool(labels[i]), false + (not labels[i])
        recall.append(true / total)
        precision.append(max(true, 1e-10) / (true + false))
        step += precision[-1] / total if labels[i] else 0
    return sum((recall[i + 1] - recall[i]) * (precision[i + 1] + precision[i]) / 2 for i in range(len(order))), step


def by_rows(descriptors, tasks, official):
    """The benchmark's evaluation, one row after another; integers of distances squared stay exact."""

    def patch(sequence, image, index, noise):
        return descriptors[tasks.sequences[sequence]][5 * noise + image if image else 0][index]

    def distance(a, b):
        return float(((a - b) ** 2).sum())

    result, by_kind = {}, {'i': [], 'v': []}
    values = {key: [] for key in ('v', 'v_step', 'auc', 'm', 'm_step', 'success', 'r_matlab', 'r', 'r_step')}
    pools = {size: [] for size in POOLS}
    for noise, level in enumerate(('easy', 'hard', 'tough')):
        per_level = {'v': [], 'm': [], 'r': []}
        far = {
            kind: [distance(patch(*row[:3], noise), patch(*row[3:], noise)) for row in getattr(tasks, kind).tolist()]
            for kind in ('positives', 'inter', 'intra')
        }
        fifth = far['positives'][: len(far['positives']) // 5]
        for kind in ('inter', 'intra'):
            distances, labels = far[kind] + fifth, [0] * len(far[kind]) + [1] * len(fifth)
            area, step = precision_recall(distances, labels)
            result[f'verification_{level}_{kind}'] = area
            per_level['v'].append(area)
            values['v_step'].append(step)
            values['auc'].append(np.mean([p < n for p in far['positives'] for n in far[kind]]))
        for name in tasks.sequences:
            x = descriptors[name]
            for image in range(1, 6):
                y = x[5 * noise + image]
                nearest, correct = [], []
                for i in range(len(y)):
                    row = [distance(x[0, i], other) for other in y]
                    index = row.index(min(row))
                    alone = row.count(min(row)) == 1
                    nearest.append(min(row))
                    correct.append(int(index == i and (official or alone)))
                area, step = precision_recall(nearest, correct, len(y), not official)
                by_kind[name[0]].append((noise, area, step))
                per_level['m'].append(area)
                values['m_step'].append(step)
                values['success'].append(np.mean(correct))
        for sequence, index in tasks.queries.tolist():
            query = patch(sequence, 0, index, noise)
            ranked = [distance(query, patch(sequence, image, index, noise)) for image in range(1, 6)]
            ranked += [distance(query, patch(s, 0, i, noise)) for s, i in tasks.distractors.tolist() if s != sequence]
            labels = [1] * 5 + [0] * (len(ranked) - 5)
            per_pool = []
            for size in POOLS:
                area, step = precision_recall(ranked[:size], labels[:size], negatives_first=not official)
                pools[size].append(area)
                per_pool.append(area)
                values['r_step'].append(step)
            per_level['r'].append(np.mean(per_pool))
            values['r_matlab'].append(precision_recall(ranked, labels, negatives_first=not official)[1])
        for key, name in (('v', 'verification'), ('m', 'matching'), ('r', 'retrieval')):
            result[f'{name}_{level}'] = np.mean(per_level[key])
            values[key] += per_level[key]
    for key, name in (
        ('v', 'verification'),
        ('v_step', 'verification_step'),
        ('auc', 'verification_auc'),
        ('m', 'matching'),
        ('m_step', 'matching_step'),
        ('success', 'matching_success'),
        ('r', 'retrieval'),
        ('r_step', 'retrieval_step'),
        ('r_matlab', 'retrieval_matlab'),
    ):
        result[name] = np.mean(values[key])
    # Sequences of different sizes weigh alike; within a noise level and a kind all have five image pairs.
    six = [[a for n, *a in by_kind[kind] if n == noise] for kind in 'iv' for noise in range(3)]
    result['matching_figure'], result['matching_matlab'] = np.mean([np.mean(cell, 0) for cell in six], 0)
    return result | {f'retrieval@{size}': np.mean(areas) for size, areas in pools.items()}


class TestMetrics:
    @pytest.mark.parametrize('official', [False, True])
    @pytest.mark.parametrize('integer', [False, True])
    def test_equals_the_benchmark_by_rows(self, tasks, integer, official):
        descriptors = random_descriptors(integer)
        expected = by_rows(descriptors, tasks, official)
        metrics = hpatches_metrics(descriptors, tasks, official_ties=official)
        assert set(metrics) == set(expected)
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, abs=1e-9), name
        assert 0.03 < metrics['matching'] < 0.9
        assert metrics['retrieval'] > metrics['retrieval@20000'] + 0.001
        single = hpatches_metrics({n: torch.from_numpy(x).float() for n, x in descriptors.items()}, tasks, official)
        assert single == pytest.approx(expected, abs=1e-6)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
    def test_on_the_gpu(self, tasks):
        descriptors = random_descriptors(integer=True)
        on_gpu = {name: torch.from_numpy(x).half().cuda() for name, x in descriptors.items()}
        assert hpatches_metrics(on_gpu, tasks) == pytest.approx(hpatches_metrics(descriptors, tasks), abs=1e-9)

    @pytest.mark.parametrize('length', [0, 1])
    @pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16])
    def test_constant_descriptors_are_chance(self, tasks, dtype, length):
        vector = torch.nn.functional.normalize(torch.rand(128, generator=torch.Generator().manual_seed(0)), dim=0)
        constant = {name: (length * vector).to(dtype).expand(16, count, 128) for name, count in COUNTS.items()}
        metrics = hpatches_metrics(constant, tasks)
        assert metrics['matching'] == metrics['matching_success'] == metrics['verification_auc'] == 0
        # All positives after all negatives: 95 distractors in the first pool.
        assert metrics['retrieval@100'] == pytest.approx(0.0252, abs=2e-3)
        assert metrics['retrieval'] < 0.03
        assert metrics['verification_step'] < 0.2
        official = hpatches_metrics(constant, tasks, official_ties=True)
        assert official['retrieval'] == 1
        assert official['matching_success'] == pytest.approx(np.mean([1 / n for n in COUNTS.values()]))

    def test_perfect_descriptors(self, tasks):
        rng = np.random.default_rng(0)
        perfect = {name: np.tile(rng.standard_normal((1, count, 32)), (16, 1, 1)) for name, count in COUNTS.items()}
        assert set(hpatches_metrics(perfect, tasks).values()) == {1.0}

    @pytest.mark.parametrize('official', [False, True])
    @pytest.mark.parametrize(('place', 'length'), [(0, 1000), (1000, 1), (1000, 1000)])
    def test_float32_survives_a_long_descriptor_and_a_common_offset(self, tasks, place, length, official):
        rng = np.random.default_rng(0)
        perfect = {name: np.tile(rng.standard_normal((1, count, 32)), (16, 1, 1)) for name, count in COUNTS.items()}
        for name, index in ((tasks.sequences[s], index) for s, index in (tasks.queries[0], tasks.distractors[0])):
            perfect[name][:, index] *= length
        descriptors = {name: (x + place).astype(np.float32) for name, x in perfect.items()}
        assert set(hpatches_metrics(descriptors, tasks, official).values()) == {1.0}

    def test_extra_sequences_and_read_only_arrays(self, tasks):
        descriptors = random_descriptors(integer=False)
        expected = hpatches_metrics(descriptors, tasks)
        for x in descriptors.values():
            x.setflags(write=False)
        assert hpatches_metrics({'v_more': np.zeros((16, 1, 6)), **descriptors}, tasks) == expected

    def test_invalid(self, tasks):
        good = random_descriptors(integer=False)
        broken = good['i_two'].copy()
        broken[3, 7, 2] = np.nan
        shape = r'of i_two must be of shape \(16, N, D\)'
        for bad, message in (
            (broken, r'1 of 1200 descriptors of i_two are NaN or infinite, the first of them \[3, 7\]'),
            (good['i_two'][:15], shape),
            (good['i_two'][..., :0], shape),
            (good['i_two'][..., :5], 'descriptors of i_two have 5 dimensions on cpu, but those of i_one 6'),
            (good['i_two'][:, :9], r'names patch \d+ of i_two, which has 9'),
        ):
            with pytest.raises(ValueError, match=message):
                hpatches_metrics({**good, 'i_two': bad}, tasks)
        with pytest.raises(ValueError, match='1 of 3 sequences are missing: v_three'):
            hpatches_metrics({name: good[name] for name in ('i_one', 'i_two')}, tasks)
        lonely = HPatchesTasks(**{**vars(tasks), 'queries': np.array([[0, 1]]), 'distractors': np.array([[0, 2]])})
        with pytest.raises(ValueError, match='all distractors are of i_one'):
            hpatches_metrics(good, lonely)
        few = HPatchesTasks(**{**vars(tasks), 'positives': tasks.positives[:4]})
        with pytest.raises(ValueError, match='4 positive pairs'):
            hpatches_metrics(good, few)
