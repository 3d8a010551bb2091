"""Sequences that are cut like HPatches', and descriptors measured on them, on PhotoTour sets and on HPatches' files."""

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image

import csa_zoo  # noqa: F401
from csa_zoo.checkpoints import registered_checkpoints
from csa_zoo.data.hpatches import PATCH_TYPES, STRIP_WIDTH
from csa_zoo.data.pairs import MixedBatches, PairBatches
from csa_zoo.data.patches import PatchSet
from csa_zoo.data.phototour import save_phototour
from csa_zoo.data.sequences import cut_sequences
from csa_zoo.evaluation.descriptors import describe_with, descriptor_metrics
from csa_zoo.evaluation.sift import sift_descriptors

pytest.importorskip('cv2')


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """A folder with two photographs that no shipped model was trained on, smaller than they are."""
    data = pytest.importorskip('skimage.data')
    folder = tmp_path_factory.mktemp('photographs')
    for name in ('coffee', 'chelsea'):
        Image.fromarray(getattr(data, name)()).resize((300, 200)).save(folder / f'{name}.png')
    return folder


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CSA_ZOO_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


def correlation(a, b):
    """Of each patch with its counterpart."""
    a, b = (x.flatten(1).double() for x in (a, b))
    a, b = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (a, b))
    return (a * b).mean(1)


def test_sequences(photographs, cache):
    sequences = cut_sequences(photographs, points_per_photo=60)
    assert list(sequences) == ['i_chelsea', 'i_coffee', 'v_chelsea', 'v_coffee']
    for name, stack in sequences.items():
        assert stack.dtype == torch.uint8
        assert stack.shape == (16, stack.shape[1], 32, 32)
        assert 10 < stack.shape[1] <= 60
        likeness = {kind: correlation(stack[0], stack[PATCH_TYPES.index(f'{kind}1')]).median() for kind in 'eht'}
        assert likeness['e'] > likeness['h'] > likeness['t'], name
        assert likeness['e'] > 0.8, name  # the affine frames follow the view
        stranger = correlation(stack[0], stack[1].roll(1, 0)).median()
        assert stranger < 0.5 * likeness['e'], name
    again = cut_sequences(photographs / 'coffee.png', points_per_photo=60)
    assert torch.equal(again['v_coffee'], sequences['v_coffee'])  # whatever else is in the folder
    other = cut_sequences(photographs / 'coffee.png', points_per_photo=60, seed=1)
    assert not torch.equal(other['v_coffee'], sequences['v_coffee'])


def test_a_flat_photograph_is_named(tmp_path, cache):
    Image.new('L', (200, 200), 128).save(tmp_path / 'flat.png')
    with pytest.raises(ValueError, match=r'no sequence.*flat\.png'):
        cut_sequences(tmp_path)


def test_metrics_of_every_kind_of_folder(photographs, tmp_path, cache, monkeypatch):
    """One descriptor, of raw pixels, on three layouts; a constant one is no better than chance anywhere."""
    rng = np.random.default_rng(0)
    points = rng.integers(0, 256, (40, 64, 64)).astype(np.uint8)
    noisy = (np.repeat(points, 3, 0).astype(float) + rng.normal(0, 10, (120, 64, 64))).clip(0, 255).astype(np.uint8)
    ids = torch.arange(40).repeat_interleave(3)
    save_phototour(tmp_path / 'tour', PatchSet(torch.from_numpy(noisy), ids))
    for name in ('i_a', 'v_b'):
        (tmp_path / 'release' / name).mkdir(parents=True)
        scene = rng.integers(0, 256, (12, STRIP_WIDTH, STRIP_WIDTH)).astype(np.uint8)
        for kind in PATCH_TYPES:
            Image.fromarray(scene.reshape(-1, STRIP_WIDTH)).save(tmp_path / 'release' / name / f'{kind}.png')

    describe = {'pixels': lambda p: p.flatten(1).float(), 'constant': lambda p: torch.ones(len(p), 8)}
    tour = {name: descriptor_metrics(d, tmp_path / 'tour', pairs=100) for name, d in describe.items()}
    assert tour == {'pixels': {'fpr95': 0.0}, 'constant': {'fpr95': 1.0}}
    release = {name: descriptor_metrics(d, tmp_path / 'release', pairs=200) for name, d in describe.items()}
    photos = {name: descriptor_metrics(d, photographs, pairs=200) for name, d in describe.items()}
    for task in ('verification', 'matching', 'retrieval'):
        assert release['pixels'][task] == pytest.approx(1)
        assert release['constant'][task] < 0.6
        assert release['constant'][task] <= photos['constant'][task] + 0.3 < photos['pixels'][task] + 0.3
    with pytest.raises(FileNotFoundError, match='no photograph'):
        descriptor_metrics(describe['pixels'], tmp_path / 'nowhere')


@pytest.mark.parametrize('name', registered_checkpoints())
def test_shipped_descriptors_match_better_than_rootsift(name, photographs, cache):
    model = timm.create_model(name, pretrained=True)
    metrics = descriptor_metrics(describe_with(model, Accelerator(cpu=True)), photographs, pairs=2000)
    rootsift = descriptor_metrics(lambda p: torch.from_numpy(sift_descriptors(p, root=True)), photographs, pairs=2000)
    for task in ('verification', 'matching', 'retrieval'):
        assert metrics[task] > rootsift[task]


def test_every_batch_has_its_share_of_every_source():
    sets = [
        PatchSet(torch.full((20, 8, 8), value, dtype=torch.uint8), torch.arange(10).repeat_interleave(2))
        for value in (0, 255)
    ]
    sources = [PairBatches(s, pairs, pairs_per_epoch=3 * pairs) for s, pairs in zip(sets, (2, 6), strict=True)]
    batches = list(MixedBatches(sources).epoch(0))
    assert len(batches) == len(MixedBatches(sources)) == 3
    for anchors, positives in batches:
        assert anchors.shape == positives.shape == (8, 1, 8, 8)
        assert anchors.mean((1, 2, 3)).tolist() == positives.mean((1, 2, 3)).tolist() == [0] * 2 + [1] * 6
