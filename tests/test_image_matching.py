"""Matching of whole images with known homographies, on sequences that are made from a photograph."""

import numpy as np
import pytest
from PIL import Image

from csa_zoo.cli import main
from csa_zoo.data.hpatches import find_hpatches_sequences
from csa_zoo.features import root_sift
from csa_zoo.image_matching import image_matching_metrics

cv2 = pytest.importorskip('cv2')


@pytest.fixture(scope='module')
def release(tmp_path_factory):
    """One sequence in HPatches' layout: a photograph, turned and tilted five times."""
    data = pytest.importorskip('skimage.data')
    folder = tmp_path_factory.mktemp('release') / 'v_cat'
    folder.mkdir()
    image = cv2.resize(cv2.cvtColor(data.chelsea(), cv2.COLOR_RGB2GRAY), (320, 213))
    Image.fromarray(image).convert('RGB').save(folder / '1.ppm')
    for number in range(2, 7):
        angle = np.radians(5 * number)
        cos, sin = np.cos(angle), np.sin(angle)
        homography = np.array([[cos, -sin, 40], [sin, cos, -20], [1e-4 * number, 0, 1]])
        seen = cv2.warpPerspective(image, homography, (360, 300))
        Image.fromarray(seen).convert('RGB').save(folder / f'{number}.ppm')
        np.savetxt(folder / f'H_1_{number}', homography)
    return folder.parent


def test_metrics(release):
    sequences = find_hpatches_sequences(release)
    rng = np.random.default_rng(0)
    descriptors = {
        'RootSIFT': root_sift,
        'random': lambda image, keypoints: rng.random((len(keypoints), 8), np.float32),
        'none': lambda image, keypoints: np.empty((0, 8), np.float32),
    }
    metrics = image_matching_metrics(descriptors, sequences, 200)
    assert metrics['RootSIFT']['MMA@3'] > 0.6
    assert metrics['RootSIFT']['AUC@3'] > 0.5
    assert metrics['RootSIFT']['MMA@1'] <= metrics['RootSIFT']['MMA@3'] <= metrics['RootSIFT']['MMA@5']
    assert metrics['random']['MMA@3'] < 0.1
    assert set(metrics['none'].values()) == {0.0}
    with pytest.raises(ValueError, match='at least one sequence'):
        image_matching_metrics(descriptors, [])


def test_command(release, capsys):
    assert main(['evaluate', 'l2net_hardnet_csa', '--untrained', '0', '--images', str(release)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ['l2net_hardnet_csa', 'RootSIFT']
    assert [line.split()[0] for line in lines[1:]] == ['matches', 'MMA@1', 'MMA@3', 'MMA@5', 'AUC@1', 'AUC@3', 'AUC@5']
