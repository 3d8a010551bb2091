"""Patch sets, the PhotoTour reader, pair batches, augmentation and FPR95, against literal twins and made files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from csa_zoo.data.jitter import Jitter, draw_jitter, flip_coins, flip_patches, jitter_patches
from csa_zoo.data.pairs import PairBatches, PairSampler
from csa_zoo.data.patches import PatchPairs, PatchSet, concatenate, verification_pairs
from csa_zoo.data.phototour import load_phototour, load_reference_images
from csa_zoo.evaluation.patches import average_precision, fpr_at_recall, phototour_ratio_map
from csa_zoo.evaluation.sift import sift_descriptors

PHOTOTOUR = Path(os.environ.get('CSA_ZOO_DATA', 'unset')) / 'phototour'
MATCHES = 'm50_6_6_0.txt'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('CSA_ZOO_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture
def phototour(tmp_path):
    """300 patches in two mosaics, the second padded; ids with gaps; match lines of six and of seven columns."""
    root = tmp_path / 'set'
    root.mkdir()
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (300, 64, 64), dtype=np.uint8)
    ids = 10 * (np.arange(300) // 3) + 7
    for number in range(2):
        mosaic = np.zeros((1024, 1024), np.uint8)
        for cell, patch in enumerate(patches[256 * number : 256 * (number + 1)]):
            row, column = divmod(cell, 16)
            mosaic[64 * row : 64 * row + 64, 64 * column : 64 * column + 64] = patch
        Image.fromarray(mosaic).save(root / f'patches{number:04d}.bmp')
    (root / 'info.txt').write_text(''.join(f'{i} 0\n' for i in ids))
    pairs = [(0, 1), (299, 297), (4, 200), (256, 255), (3, 5), (7, 100)]
    lines = [f'{a} {ids[a]} 0 {b} {ids[b]} 0' + (' 0' if n % 2 else '') for n, (a, b) in enumerate(pairs)]
    (root / MATCHES).write_text('\n'.join(lines) + '\n')
    return root, patches, ids, pairs


def points(*counts: int) -> torch.Tensor:
    """Ids of points with the given numbers of patches, not adjacent."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))]


def random_set(*counts: int, size: int = 8) -> PatchSet:
    ids = points(*counts)
    generator = torch.Generator().manual_seed(2)
    return PatchSet(torch.randint(0, 256, (len(ids), size, size), dtype=torch.uint8, generator=generator), ids)


class TestPhotoTour:
    def test_patches_ids_and_pairs(self, phototour):
        root, patches, ids, pairs = phototour
        full, half = load_phototour(root, size=64), load_phototour(root)
        assert np.array_equal(full.patches, patches)
        mean = patches.reshape(300, 32, 2, 32, 2).astype(int).sum((2, 4)) / 4
        assert np.array_equal(half.patches, np.floor(mean + 0.5))
        assert np.array_equal(half.point_ids, ids // 10)
        assert half.num_points == 100
        assert list(zip(half.pairs.index1.tolist(), half.pairs.index2.tolist(), strict=True)) == pairs
        assert half.pairs.is_match.tolist() == [True, True, False, True, True, False]

    def test_half_size_is_opencvs(self, phototour):
        cv2 = pytest.importorskip('cv2')
        root, patches, *_ = phototour
        resized = [cv2.resize(patch, (32, 32), interpolation=cv2.INTER_LINEAR) for patch in patches[:20]]
        assert np.array_equal(load_phototour(root).patches[:20], resized)

    def test_cache_is_reused_and_follows_the_files(self, phototour, cache):
        root, *_ = phototour
        load_phototour(root)
        (entry,) = cache.iterdir()
        stored = np.lib.format.open_memmap(entry / 'patches.npy', mode='r+')
        stored[0] = 99
        stored.flush()
        again = load_phototour(root).patches
        assert (again[0] == 99).all()
        again[0] = 1  # the mapping is private: the file keeps its bytes
        assert (load_phototour(root).patches[0] == 99).all()
        os.utime(root / 'patches0000.bmp', ns=(1, 1))
        assert not (load_phototour(root).patches[0] == 99).all()
        assert len(list(cache.iterdir())) == 2

    def test_choice_of_matches(self, phototour, tmp_path):
        root, *_ = phototour
        lines = (root / MATCHES).read_text().splitlines()
        (root / 'm50_2_2_0.txt').write_text('\n'.join(lines[:2]))
        with pytest.raises(ValueError, match='several match files'):
            load_phototour(root)
        assert len(load_phototour(root, matches='m50_2_2_0.txt').pairs.is_match) == 2
        (tmp_path / 'own.txt').write_text(lines[0])
        assert len(load_phototour(root, matches=tmp_path / 'own.txt').pairs.is_match) == 1
        with pytest.raises(FileNotFoundError, match=r'nope\.txt.*m50_2_2_0'):
            load_phototour(root, matches='nope.txt')
        for file in root.glob('m50*'):
            file.unlink()
        assert load_phototour(root).pairs is None

    @pytest.mark.parametrize(
        ('file', 'content', 'message'),
        [
            (MATCHES, '0 7 0 300 7 0\n', r'm50_6_6_0\.txt, pair 1: patches \[0, 300\].*0 to 299'),
            (MATCHES, '0 7 0 1 7 0\n0 8 0 1 8 0\n', r'pair 2: points \[8, 8\].*\[7, 7\]'),
            (MATCHES, '0 7 0\n', r'm50_6_6_0\.txt is not a table'),
            (MATCHES, '', r'm50_6_6_0\.txt is empty'),
            ('info.txt', '1 0\nx 0\n', r'info\.txt is not a table'),
            ('info.txt', '1 0\n-2 0\n', r'info\.txt, line 2.*-2'),
            ('info.txt', '1 0\n' * 200, r'2 patches\*\.bmp.*200 lines of info\.txt need 1'),
            ('patches0001.bmp', 'BM', r'patches0001\.bmp cannot be decoded'),
        ],
    )
    def test_bad_files_are_named(self, phototour, cache, file, content, message):
        root, *_ = phototour
        (root / file).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_phototour(root)
        assert not list(cache.glob('.building*'))

    def test_bad_mosaics_and_arguments(self, phototour):
        root, *_ = phototour
        good = (root / 'patches0001.bmp').read_bytes()
        (root / 'patches0001.bmp').write_bytes(good[: len(good) // 2])
        with pytest.raises(ValueError, match=r'patches0001\.bmp cannot be decoded'):
            load_phototour(root)
        Image.new('L', (1024, 960)).save(root / 'patches0001.bmp')
        with pytest.raises(ValueError, match=r'patches0001\.bmp is 1024x960'):
            load_phototour(root)
        with pytest.raises(ValueError, match='size must be 32 or 64, not 48'):
            load_phototour(root, size=48)
        (root / 'info.txt').unlink()
        with pytest.raises(FileNotFoundError, match=r'no info\.txt'):
            load_phototour(root)

    def test_reference_images(self, phototour):
        root, *_ = phototour
        with pytest.raises(FileNotFoundError, match=r'no interest\.txt'):
            load_reference_images(root)
        (root / 'interest.txt').write_text(''.join(f'{n // 50} 1.5 {n} 0.1 -3e-2\n' for n in range(300)))
        assert load_reference_images(root).tolist() == [n // 50 for n in range(300)]
        (root / 'interest.txt').write_text('0 1.5\n')
        with pytest.raises(ValueError, match=r'interest\.txt has 1 lines and .*info\.txt 300'):
            load_reference_images(root)

    @pytest.mark.skipif(not PHOTOTOUR.is_dir(), reason='CSA_ZOO_DATA names no folder with phototour/')
    @pytest.mark.parametrize(
        ('scene', 'patches', 'count', 'ncc'),
        [('sceaux', 13503, 3698, 0.347), ('monstree', 13501, 3575, 0.304), ('buddha', 13501, 4245, 0.280)],
    )
    def test_real_scene(self, scene, patches, count, ncc):
        data = load_phototour(PHOTOTOUR / scene)
        assert (len(data), data.num_points) == (patches, count)
        assert data.pairs.is_match.float().mean() == 0.5
        x = data.patches.float().flatten(1)
        x = torch.nn.functional.normalize(x - x.mean(1, keepdim=True))
        distances = 1 - (x[data.pairs.index1] * x[data.pairs.index2]).sum(1)
        assert abs(fpr_at_recall(distances, data.pairs.is_match) - ncc) < 0.002


class TestPatchSet:
    def test_concatenation_keeps_points_and_pairs_apart(self):
        pairs = PatchPairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([True]))
        first, second = random_set(2, 3), random_set(4)
        second = PatchSet(second.patches, second.point_ids, pairs)
        both = concatenate([first, second, second])
        assert both.point_ids.tolist() == first.point_ids.tolist() + [2] * 4 + [3] * 4
        assert both.num_points == 4
        assert both.pairs.index1.tolist() == [5, 9]
        assert both.pairs.index2.tolist() == [6, 10]
        assert torch.equal(both.patches[5:9], second.patches)
        assert concatenate([first, first]).pairs is None
        with pytest.raises(ValueError, match=r'different sizes \[8, 16\]'):
            concatenate([first, random_set(2, size=16)])

    @pytest.mark.parametrize(
        'device',
        ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'))],
    )
    def test_batches_are_made_where_the_set_is(self, device):
        data = random_set(*[3] * 9)
        data = PatchSet(data.patches, data.point_ids, verification_pairs(data, 4)).to(device)
        assert {t.device.type for t in (data.patches, data.point_ids, *data.pairs, *verification_pairs(data, 4))} == {
            device
        }
        batches = PairBatches(data, 4, aug='dihedral', jitter=Jitter())
        first, again = ([torch.stack(pair) for pair in batches.epoch(0)] for _ in range(2))
        assert first[0].shape == (2, 4, 1, 8, 8)
        assert first[0].device.type == device
        assert torch.equal(torch.stack(first), torch.stack(again))

    @pytest.mark.parametrize(
        ('patches', 'ids', 'pairs', 'message'),
        [
            (torch.zeros(2, 8, 8), [0, 0], None, 'uint8'),
            (torch.zeros(2, 8, 9, dtype=torch.uint8), [0, 0], None, r'\(2, 8, 9\)'),
            (torch.zeros(2, 8, 8, dtype=torch.uint8), [0], None, 'one per patch'),
            (torch.zeros(2, 8, 8, dtype=torch.uint8), [0, -1], None, '-1'),
            (torch.zeros(2, 8, 8, dtype=torch.uint8), [0, 0], ([0], [2], [True]), '0 to 1'),
            (torch.zeros(2, 8, 8, dtype=torch.uint8), [0, 0], ([0], [1], [1]), 'bool'),
        ],
    )
    def test_invalid(self, patches, ids, pairs, message):
        with pytest.raises(ValueError, match=message):
            PatchSet(patches, torch.tensor(ids), pairs and PatchPairs(*map(torch.tensor, pairs)))


class TestPairSampler:
    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_invariants(self, data):
        counts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=30).filter(lambda c: max(c) >= 2))
        ids, usable = points(*counts), sum(count >= 2 for count in counts)
        batch = data.draw(st.integers(1, usable))
        pairs = data.draw(st.integers(batch, 100))
        sampler = PairSampler(ids, batch, pairs_per_epoch=pairs, seed=data.draw(st.integers(0, 9)))
        batches = list(sampler.epoch(3))
        assert len(batches) == len(sampler) == pairs // batch
        for anchors, positives in batches:
            assert anchors.shape == positives.shape == (batch,)
            assert torch.equal(ids[anchors], ids[positives])
            assert (anchors != positives).all()
            assert len(ids[anchors].unique()) == batch

    def test_every_usable_point_once_in_a_permutation(self):
        ids = points(*[3] * 12, 1, 1, 0)
        seen = torch.cat([ids[anchors] for anchors, _ in PairSampler(ids, 4).epoch(0)])
        assert sorted(seen.tolist()) == list(range(12))

    def test_members_are_uniform(self):
        """Over many epochs all ordered pairs of a point's four patches are equally frequent."""
        sampler = PairSampler(torch.zeros(4, dtype=torch.long), 1, pairs_per_epoch=12000)
        drawn = torch.tensor([(int(a), int(p)) for a, p in sampler.epoch(0)])
        counts = torch.bincount(4 * drawn[:, 0] + drawn[:, 1], minlength=16).view(4, 4)
        assert (counts.diagonal() == 0).all()
        off = counts[~torch.eye(4, dtype=torch.bool)].double()
        assert ((off - 1000).square() / 1000).sum() < 31.3  # chi-squared, 11 degrees of freedom, p = 0.001

    def test_epochs_are_reproducible_and_different(self):
        ids = points(*[2, 3, 4] * 10)
        first, second = (PairSampler(ids, 8, pairs_per_epoch=64, seed=5) for _ in range(2))
        list(first.epoch(0))  # what was drawn before must not matter
        flat = [torch.stack([torch.stack(pair) for pair in s.epoch(1)]) for s in (first, second)]
        assert torch.equal(*flat)
        other_epoch = torch.stack([torch.stack(pair) for pair in second.epoch(2)])
        other_seed = torch.stack([torch.stack(p) for p in PairSampler(ids, 8, pairs_per_epoch=64, seed=6).epoch(1)])
        assert not torch.equal(flat[0], other_epoch)
        assert not torch.equal(flat[0], other_seed)

    @pytest.mark.parametrize(
        ('batch', 'options', 'message'),
        [
            (4, {}, '3 points have two'),
            (0, {}, 'choose 1 to 3'),
            (2, {'pairs_per_epoch': 1}, 'less than one batch of 2'),
            (3, {'world': 2}, 'rank 0 of 2'),
            (2, {'rank': 2, 'world': 2}, 'rank 2 of 2'),
        ],
    )
    def test_invalid(self, batch, options, message):
        with pytest.raises(ValueError, match=message):
            PairSampler(points(2, 2, 2, 1), batch, **options)


class TestPairBatches:
    def test_plain_batches_are_the_sampled_patches(self):
        data = random_set(*[3] * 9)
        indices = PairSampler(data.point_ids, 4, seed=1).epoch(2)
        for (a, p), (anchors, positives) in zip(indices, PairBatches(data, 4, seed=1).epoch(2), strict=True):
            assert anchors.dtype == torch.float32
            assert torch.equal(anchors, data.patches[a].unsqueeze(1) / 255)
            assert torch.equal(positives, data.patches[p].unsqueeze(1) / 255)

    def test_processes_together_see_one_process_batch(self):
        data, options = random_set(*[3] * 20), {'pairs_per_epoch': 40, 'aug': 'dihedral', 'jitter': Jitter(), 'seed': 3}
        whole = list(PairBatches(data, 8, **options).epoch(1))
        parts = [list(PairBatches(data, 8, rank=rank, world=2, **options).epoch(1)) for rank in range(2)]
        for number, batch in enumerate(whole):
            for side in range(2):
                joined = torch.cat([part[number][side] for part in parts])
                torch.testing.assert_close(joined, batch[side], rtol=0, atol=1e-6)

    def test_wrong_aug_fails_at_once(self):
        with pytest.raises(ValueError, match="aug must be 'hardnet' or 'dihedral', not 'flip'"):
            PairBatches(random_set(2), 1, aug='flip')


class TestAugmentation:
    @pytest.mark.parametrize(('aug', 'number'), [('hardnet', 4), ('dihedral', 8)])
    def test_flips(self, aug, number):
        """The symmetries that occur are the right ones, equally often, and the same for both patches."""
        symmetries = [
            np.rot90(x, k) for x in (np.arange(9).reshape(3, 3), np.arange(9).reshape(3, 3).T) for k in range(4)
        ]
        expected = {s.tobytes() for s in map(np.ascontiguousarray, symmetries)}
        if aug == 'hardnet':
            x = np.arange(9).reshape(3, 3)
            four = (x, x[:, ::-1], x.T, x.T[:, ::-1])
            expected = {np.ascontiguousarray(s).tobytes() for s in four}
        pairs = torch.arange(9).view(1, 1, 3, 3).expand(8000, 2, 3, 3)
        flipped = flip_patches(pairs, flip_coins(8000, aug, torch.Generator().manual_seed(0))).numpy()
        assert np.array_equal(flipped[:, 0], flipped[:, 1])
        kinds, counts = np.unique(flipped[:, 0].reshape(8000, 9), axis=0, return_counts=True)
        assert {kind.tobytes() for kind in kinds} == expected
        assert len(kinds) == number
        assert np.abs(counts - 8000 / number).max() < 5 * np.sqrt(8000 / number)

    def test_no_jitter_is_the_identity(self):
        patches = torch.rand(3, 2, 32, 32, generator=torch.Generator().manual_seed(0))
        draw = draw_jitter(Jitter(*[0.0] * 9), (3, 2, 32), torch.Generator().manual_seed(1))
        torch.testing.assert_close(jitter_patches(patches, draw), patches, rtol=0, atol=1e-5)

    def test_geometry_moves_a_blob_as_drawn(self):
        """A blob's centre and covariance follow the drawn affine map."""
        axis = torch.arange(65.0) - 32
        x, y = torch.meshgrid(axis, axis, indexing='xy')
        blob = torch.exp(-((x - 6) ** 2 + (y + 3) ** 2) / 2 / 4**2).expand(20, 1, 65, 65)
        still = dict.fromkeys(('brightness', 'contrast', 'gamma', 'blur', 'noise'), 0.0)
        draw = draw_jitter(
            Jitter(rotation=20, scale=0.3, shift=0.05, **still), (20, 1, 65), torch.Generator().manual_seed(0)
        )
        for moved, affine in zip(jitter_patches(blob, draw)[:, 0], draw.affine[:, 0], strict=True):
            weight = moved / moved.sum()
            centre = torch.stack([(weight * x).sum(), (weight * y).sum()])
            inverse = torch.linalg.inv(affine[:, :2])
            expected = inverse @ (torch.tensor([6.0, -3.0]) - affine[:, 2] * 65 / 2)
            torch.testing.assert_close(centre, expected, rtol=0, atol=0.15)
            spread = torch.stack([x - centre[0], y - centre[1]]).flatten(1)
            covariance = (weight.flatten() * spread) @ spread.T
            torch.testing.assert_close(covariance, 16 * inverse @ inverse.T, rtol=0.06, atol=0.6)

    def test_jitter_stays_within_its_limits(self):
        jitter = Jitter(shift=0.1, contrast=0.5)
        draw = draw_jitter(jitter, (500, 2, 8), torch.Generator().manual_seed(0))
        assert (draw.affine[..., 2].abs() / 2).max() <= 0.1  # affine_grid's side is 2
        size = torch.linalg.svdvals(draw.affine[..., :2]).log2()
        assert size.abs().max() <= jitter.scale + jitter.stretch
        assert 0.9 < draw.light[..., 1].log2().abs().max() / 0.5 <= 1
        assert not torch.equal(draw.light[:, 0], draw.light[:, 1])
        patches = torch.rand(500, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        changed = jitter_patches(patches, draw)
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert changed.isfinite().all()

    @pytest.mark.parametrize('values', [{'blur': 0.8}, {'noise': -1.0}, {'scale': float('nan')}])
    def test_invalid_jitter(self, values):
        with pytest.raises(ValueError, match=next(iter(values))):
            Jitter(**values)


class TestVerificationPairs:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(1, 5), min_size=2, max_size=20).filter(lambda c: max(c) >= 2), st.data())
    def test_balanced_and_distinct(self, counts, data):
        patch_set = random_set(*counts, size=2)
        same = sum(c * (c - 1) // 2 for c in counts)
        different = len(patch_set) * (len(patch_set) - 1) // 2 - same
        half = data.draw(st.integers(1, min(same, different)))
        pairs = verification_pairs(patch_set, 2 * half, seed=4)
        ids = patch_set.point_ids
        assert torch.equal(ids[pairs.index1] == ids[pairs.index2], pairs.is_match)
        assert int(pairs.is_match.sum()) == half
        unordered = {frozenset(p) for p in zip(pairs.index1.tolist(), pairs.index2.tolist(), strict=True)}
        assert len(unordered) == 2 * half
        assert {len(p) for p in unordered} == {2}
        for field, again in zip(pairs, verification_pairs(patch_set, 2 * half, seed=4), strict=True):
            assert torch.equal(field, again)

    def test_points_not_patches_are_uniform(self):
        pairs = verification_pairs(data := random_set(2000, *[2] * 10, size=2), 20, seed=0)
        of_large = data.point_ids[pairs.index1[pairs.is_match]] == 0
        assert of_large.sum() < 6  # drawn by patches or by pairs, all ten would be of the large point

    def test_invalid(self):
        with pytest.raises(ValueError, match='8 pairs of this set: their number must be even, from 2 to 6'):
            verification_pairs(random_set(3, 1), 8)
        with pytest.raises(ValueError, match='3 pairs'):
            verification_pairs(random_set(3, 3), 3)


class TestFPR:
    def test_ties_count_against_the_descriptor(self):
        positives, negatives = np.arange(20) / 20, (10 + np.arange(20)) / 20
        truth = np.repeat([True, False], 20)
        assert fpr_at_recall(np.concatenate([positives, negatives]), truth) == pytest.approx(0.45)
        assert fpr_at_recall(torch.zeros(40), torch.from_numpy(truth)) == 1

    @given(
        st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=40).filter(
            lambda pairs: len({match for _, match in pairs}) == 2
        ),
        st.integers(1, 100),
    )
    def test_equals_a_search_over_thresholds(self, pairs, percent):
        """The least rate of any threshold that accepts at least the asked share of matching pairs."""
        matching = [d for d, match in pairs if match]
        others = [d for d, match in pairs if not match]
        rates = [
            sum(d <= threshold for d in others) / len(others)
            for threshold in range(9)
            if 100 * sum(d <= threshold for d in matching) >= percent * len(matching)
        ]
        distances, truth = map(np.array, zip(*pairs, strict=True))
        assert fpr_at_recall(distances, truth, percent / 100) == pytest.approx(min(rates), abs=1e-12)

    def test_float64_keeps_close_distances_apart(self):
        truth = [True, False]
        assert fpr_at_recall(np.array([1.0, 1 + 1e-12]), truth) == 0

    @pytest.mark.parametrize(
        ('distances', 'truth', 'recall', 'message'),
        [
            ([0.1, float('nan')], [True, False], 0.95, '1 of 2 distances are NaN'),
            ([0.1, 0.2], [True, True], 0.95, '2 matching and 0 non-matching'),
            ([], [], 0.95, '0 matching and 0'),
            ([0.1], [True, False], 0.95, 'one shape'),
            ([0.1, 0.2], [True, False], 0.0, 'recall is 0.0'),
        ],
    )
    def test_invalid(self, distances, truth, recall, message):
        with pytest.raises(ValueError, match=message):
            fpr_at_recall(np.array(distances), np.array(truth), recall)


class TestAveragePrecision:
    def test_golden(self):
        """Labels 0110010101 in the order of the ranking."""
        trapezoid, step = average_precision(torch.tensor([1, 1, 3, 4, 5]), 5)
        assert trapezoid.item() == pytest.approx(0.44397, abs=5e-6)
        assert step.item() == pytest.approx(0.53333, abs=5e-6)

    def test_extremes(self):
        areas = average_precision(torch.tensor([[0, 0], [95, 95]]), 2)
        assert [area.tolist() for area in areas] == [
            [1, pytest.approx((1 / 96 + 2 / 97 + 1 / 96) / 4)],
            [1, pytest.approx((1 / 96 + 2 / 97) / 2)],
        ]
        assert [area.item() for area in average_precision(torch.zeros(0), 3)] == [0, 0]


class TestRatioMap:
    @pytest.mark.parametrize('integer', [False, True])
    def test_equals_loops(self, integer):
        """Every ordered pair of a point against the nearest stranger in its image."""
        rng = np.random.default_rng(0)
        points, images = rng.integers(0, 12, 90), rng.integers(0, 4, 90)
        points[images == 3], images[0] = 7, 9  # images of one point and of one patch do not count
        x = rng.standard_normal((12, 3))[points] + rng.standard_normal((90, 3))
        x = np.rint(2 * x) if integer else x
        scores = []
        for image in range(3):
            rows, ranking = np.flatnonzero(images == image), []
            for a in rows:
                others = [np.linalg.norm(x[a] - x[n]) for n in rows if points[n] != points[a]]
                for p in rows:
                    if p != a and points[p] == points[a]:
                        right, wrong = np.linalg.norm(x[a] - x[p]), min(others)
                        largest = max(right, wrong)
                        ranking.append((min(right, wrong) / largest if largest else 1.0, right < wrong))
            hits = np.array([correct for _, correct in sorted(ranking)])
            scores.append((hits.cumsum() / np.arange(1, len(hits) + 1))[hits].mean())
        assert phototour_ratio_map(x, points, images) == pytest.approx(np.mean(scores), abs=1e-9)
        assert phototour_ratio_map(torch.from_numpy(x).float(), points, torch.from_numpy(images)) == pytest.approx(
            np.mean(scores), abs=1e-5
        )
        assert 0.1 < np.mean(scores) < 0.9

    def test_constant_and_perfect(self):
        points = np.array([0, 0, 1, 1, 2])
        assert phototour_ratio_map(np.full((5, 7), 0.3, np.float32), points, np.zeros(5, int)) == 0
        assert phototour_ratio_map(np.eye(3)[points], points, np.zeros(5, int)) == 1

    def test_invalid(self):
        points = np.array([0, 0, 1])
        with pytest.raises(ValueError, match='none of 2 images'):
            phototour_ratio_map(np.eye(3), points, np.array([0, 1, 1]))
        with pytest.raises(ValueError, match=r'3 descriptors need as many point_ids'):
            phototour_ratio_map(np.eye(3), points[:2], points)
        with pytest.raises(ValueError, match='NaN'):
            phototour_ratio_map(np.diag([1, np.nan, 1]), points, np.zeros(3, int))


class TestSIFT:
    @pytest.fixture(autouse=True)
    def opencv(self):
        pytest.importorskip('cv2')

    @pytest.mark.parametrize('side', [32, 64])
    def test_a_grating_has_one_orientation(self, side):
        """Light that changes along x alone: bins 0 and 4 of the eight, in all sixteen cells, mirrored left to right."""
        wave = 128 + 100 * np.sin(np.arange(side) * 8 * np.pi / side)
        patches = np.tile(wave.astype(np.uint8), (2, side, 1))
        patches[1] = patches[1].T
        along_x, along_y = sift_descriptors(patches).reshape(2, 16, 8)
        for bins, first in ((along_x, 0), (along_y, 2)):
            share = bins[:, [first, first + 4]].sum() / bins.sum()
            assert share > 0.95
            assert (bins.sum(1) > 0).all()

    def test_root_and_flat_patches(self):
        patches = np.random.default_rng(0).integers(0, 256, (300, 32, 32), dtype=np.uint8)
        patches[7] = 90
        sift, root = sift_descriptors(patches), sift_descriptors(torch.from_numpy(patches), root=True)
        assert sift.shape == root.shape == (300, 128)
        assert not sift[7].any()
        assert not root[7].any()
        used = np.arange(300) != 7
        assert np.allclose(root[used] ** 2, sift[used] / sift[used].sum(1, keepdims=True), atol=1e-7)
        assert np.allclose(np.linalg.norm(root[used], axis=1), 1, atol=1e-5)
        assert np.array_equal(sift_descriptors(patches[250:260]), sift[250:260])
        with pytest.raises(ValueError, match=r'uint8 of shape \(N, S, S\), not float64'):
            sift_descriptors(patches / 255)

    @pytest.mark.skipif(not PHOTOTOUR.is_dir(), reason='CSA_ZOO_DATA names no folder with phototour/')
    @pytest.mark.parametrize(('scene', 'sift', 'root'), [('sceaux', 6.5, 8.4), ('buddha', 4.8, 11.5)])
    def test_real_scene(self, scene, sift, root):
        data = load_phototour(PHOTOTOUR / scene, size=64)
        for expected, kind in ((sift, False), (root, True)):
            x = torch.from_numpy(sift_descriptors(data.patches, kind))
            distances = (x[data.pairs.index1] - x[data.pairs.index2]).norm(dim=1)
            assert 100 * fpr_at_recall(distances, data.pairs.is_match) == pytest.approx(expected, abs=0.06)
