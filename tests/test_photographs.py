"""Patches cut from photographs: made images whose patches are known, and scikit-image's real ones."""

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from csa_zoo.data.patches import PatchSet, verification_pairs
from csa_zoo.data.photographs import ViewChange, bundled_photographs, cut_photographs
from csa_zoo.evaluation.patches import fpr_at_recall

cv2 = pytest.importorskip('cv2', reason='patches are cut from photographs with OpenCV')

STILL = {
    'tilt': 0.0,
    'rotation': 0.0,
    'scale': (1.0, 1.0),
    'position_noise': 0.0,
    'scale_noise': 0.0,
    'angle_noise': 0.0,
    'contrast': 0.0,
    'brightness': 0.0,
    'gamma': 0.0,
    'blur': 0.0,
    'noise': 0.0,
    'jpeg_quality': 95,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('CSA_ZOO_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture(scope='module')
def texture(tmp_path_factory):
    """Smooth noise of several scales, which has keypoints everywhere and nothing near the pixel limit."""
    rng = np.random.default_rng(0)
    image = sum(s * cv2.GaussianBlur(rng.standard_normal((400, 500)), (0, 0), s) for s in (2, 4, 8, 16))
    image = 128 + 45 * image / image.std()
    path = tmp_path_factory.mktemp('photos') / 'texture.png'
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    return path


def against_first(data: PatchSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Every simulated view beside the first patch of its point, both (M, S, S) float."""
    ids = data.point_ids
    starts = torch.searchsorted(ids, torch.arange(data.num_points))
    later = torch.ones(len(ids), dtype=torch.bool)
    later[starts] = False
    return data.patches[starts][ids[later]].float(), data.patches[later].float()


def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = (torch.nn.functional.normalize(x.flatten(1) - x.flatten(1).mean(1, keepdim=True)) for x in (a, b))
    return (a * b).sum(1)


@pytest.mark.parametrize(
    'moved',
    [{}, {'rotation': 180.0}, {'scale': (0.8, 1.4)}, {'rotation': 180.0, 'scale': (0.8, 1.4)}],
    ids=['same', 'turned', 'scaled', 'both'],
)
def test_similar_views_give_equal_patches(texture, moved):
    """Position, scale and orientation follow the view: what a similarity changes, the square undoes."""
    data = cut_photographs(texture, min_side=32, change=ViewChange(**STILL | moved))
    first, views = against_first(data)
    assert len(views) > 300
    assert (first - views).abs().mean() < 2.0  # grey levels; the texture's standard deviation is 45
    assert (first - views).abs().flatten(1).mean(1).max() < 12.0


def test_tilted_views_correspond(texture):
    """At the greatest tilt a patch differs in shape, yet is its point's and no other's."""
    data = cut_photographs(texture, min_side=32, change=ViewChange(**STILL | {'tilt': 50.0, 'rotation': 180.0}))
    first, views = against_first(data)
    same = correlation(first, views)
    assert same.median() > 0.8
    assert correlation(first, views.roll(6, 0)).median() < 0.2
    assert (first - views).abs().mean() > 4.0


def test_square_is_twelve_sigma_around_the_point(tmp_path):
    """Gaussian blobs of known size, off the pixel grid, are cut centred and at 12 sigma, turned or not."""
    y, x = np.mgrid[:240, :320].astype(float)
    image = np.full((240, 320), 60.0)
    sigmas = [3.0, 4.5, 6.0, 9.0]
    for sigma, cx, cy in zip(sigmas, (60.3, 60.7, 170.4, 250.2), (60.6, 170.3, 60.5, 160.8), strict=True):
        image += 150 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 2 / sigma**2)
    Image.fromarray(image.round().astype(np.uint8)).save(tmp_path / 'blobs.png')
    data = cut_photographs(
        tmp_path / 'blobs.png', change=ViewChange(**STILL | {'rotation': 180.0, 'scale': (0.8, 1.4)})
    )
    assert data.num_points == 4
    assert len(data) >= 4 * 5
    # The difference of Gaussians of scales s and 2^(1/3) s answers most to a blob of 2^(1/6) s.
    expected = 32 / 12 * 2 ** (1 / 6)
    y, x = np.mgrid[:32, :32] - 15.5
    for patch in data.patches.numpy().astype(float):
        height = patch - np.median(patch[[0, -1]])
        blob = height > 15
        # The logarithm of a Gaussian is -r^2 / 2 sigma^2, up to what its centre and height add.
        terms = np.stack([x**2 + y**2, x, y, np.ones_like(x)], -1)[blob]
        weight = height[blob][:, None]
        square, dx, dy, _ = np.linalg.lstsq(terms * weight, (np.log(height[blob]) * weight[:, 0]), rcond=None)[0]
        assert np.sqrt(-0.5 / square) == pytest.approx(expected, rel=0.05)
        assert np.hypot(dx, dy) / (-2 * square) < 0.15  # pixels of the patch between its centre and the blob's


def test_minified_squares_do_not_alias(tmp_path):
    """Pixel noise over a coarse, round blob averages out of the blob's patches; skipped pixels would keep it."""
    y, x = np.mgrid[:600, :600].astype(float)
    blob = 100 + 80 * np.exp(-((x - 300) ** 2 + (y - 300) ** 2) / 2 / 40**2)
    noise = np.random.default_rng(0).uniform(-60, 60, blob.shape)
    change = ViewChange(**STILL | {'scale': (0.4, 0.4)})
    patches = []
    for name, image in (('plain', blob), ('noisy', blob + noise)):
        Image.fromarray(image.round().astype(np.uint8)).save(tmp_path / f'{name}.png')
        data = cut_photographs(tmp_path / f'{name}.png', min_side=300, change=change)
        assert data.num_points == 1
        patches.append(data.patches.float())
    # The noise is of 35 grey levels. Cut without a pyramid 12 would be left, seen from afar without averaging 2.4.
    assert (patches[1] - patches[0]).flatten(1).std(1).max() < 2


def test_points_are_distinct_spread_and_capped(texture):
    data = cut_photographs(texture, points_per_photo=60, views=3)
    counts = torch.bincount(data.point_ids)
    assert data.num_points <= 60
    assert counts.min() >= 2
    assert counts.max() <= 3
    assert torch.equal(data.point_ids, data.point_ids.sort().values)
    starts = torch.searchsorted(data.point_ids, torch.arange(data.num_points))
    first = data.patches[starts].float()
    a, b = torch.triu_indices(len(first), len(first), 1)
    assert correlation(first[a], first[b]).max() < 0.97


def test_repeatable_and_independent_of_companions(texture, tmp_path, cache):
    folder = tmp_path / 'photos'
    (folder / 'deeper').mkdir(parents=True)
    grey = np.asarray(Image.open(texture))
    Image.fromarray(grey).save(folder / 'deeper' / 'texture.png')
    Image.fromarray(np.stack([grey.T[:, ::-1]] * 3, -1)).save(folder / 'another.PNG')
    (folder / 'notes.txt').write_text('no photograph')
    options = {'points_per_photo': 50, 'views': 3}
    alone = cut_photographs(folder / 'deeper', **options)
    both = cut_photographs(folder, **options)
    assert len(list(cache.iterdir())) == 2
    assert torch.equal(both.patches[-len(alone) :], alone.patches)
    assert both.point_ids[-1] == alone.point_ids[-1] + int(both.point_ids[-len(alone) - 1]) + 1
    os.environ['CSA_ZOO_CACHE'] = str(cache / 'fresh')
    again = cut_photographs(folder, **options)
    assert torch.equal(again.patches, both.patches)
    other = cut_photographs(folder, seed=1, **options)
    assert not torch.equal(other.patches[: len(both)], both.patches[: len(other)])
    assert cut_photographs(folder / 'deeper', size=64, **options).patches.shape[1:] == (64, 64)


def test_bad_input_is_named(texture, tmp_path):
    with pytest.raises(FileNotFoundError, match='no photograph or folder'):
        cut_photographs(tmp_path / 'absent')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='no photograph in'):
        cut_photographs(tmp_path / 'empty')
    cut = tmp_path / 'cut.png'
    cut.write_bytes(texture.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r'cut\.png cannot be decoded'):
        cut_photographs(cut)
    flat = tmp_path / 'flat.png'
    Image.new('L', (200, 100), 77).save(flat)
    with pytest.warns(UserWarning, match=r'flat\.png'), pytest.raises(ValueError, match='no patch in 1 photographs'):
        cut_photographs(flat)
    Image.new('L', (1, 1), 77).save(flat)
    with pytest.warns(UserWarning, match=r'flat\.png'), pytest.raises(ValueError, match='no patch in 1 photographs'):
        cut_photographs(flat)
    Image.fromarray(np.zeros((50, 50), np.float32)).save(tmp_path / 'range.tif')
    with pytest.raises(ValueError, match=r'range\.tif holds F-type numbers'):
        cut_photographs(tmp_path / 'range.tif')
    for options in ({'size': 48}, {'views': 1}, {'points_per_photo': 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            cut_photographs(texture, **options)
    for options in ({'tilt': 80.0}, {'scale': (1.4, 0.7)}, {'noise': -0.1}, {'jpeg_quality': 0}):
        with pytest.raises(ValueError, match=f'ViewChange {next(iter(options))}'):
            ViewChange(**options)


def test_missing_opencv_is_explained(texture, monkeypatch):
    monkeypatch.setitem(sys.modules, 'cv2', None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "csa_zoo\[photos\]"'):
        cut_photographs(texture)


def test_bundled_photographs_are_neither_trivial_nor_hopeless():
    """SIFT on the held-out photographs: far from chance, far from perfect."""
    pytest.importorskip('skimage')
    split = bundled_photographs()
    assert not {p.name for p in split['train']} & {p.name for p in split['test']}
    data = cut_photographs(split['test'])
    assert data.num_points > 1500
    pairs = verification_pairs(data, 2000)
    used, where = torch.cat(pairs[:2]).unique(return_inverse=True)
    keypoint = [cv2.KeyPoint(31.5, 31.5, 64 / 6, 0)]
    enlarged = [cv2.resize(patch, (64, 64), interpolation=cv2.INTER_LINEAR) for patch in data.patches[used].numpy()]
    sift = cv2.SIFT_create()
    described = torch.from_numpy(np.concatenate([sift.compute(patch, keypoint)[1] for patch in enlarged]))
    root = (described / described.sum(1, keepdim=True)).sqrt()
    first, second = where.chunk(2)
    assert 0.10 < fpr_at_recall((root[first] - root[second]).norm(dim=1), pairs.is_match) < 0.40
