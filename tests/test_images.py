"""The image cache against timm's own transform, broken files among good ones, and batches against their definition."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import functional as TF

import csa_zoo.data.images
from csa_zoo.data import BrokenImagesError, PersonBatches, cache_images, cache_splits, load_reid, normalize
from csa_zoo.data.images import flip_images, pad_crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """Photograph-like files of all kinds that people have: JPEG, PNG with palette or alpha, grey, 16 bit, large."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((61, 127), Image.Resampling.BICUBIC)
    grey16 = Image.fromarray(rng.integers(0, 2**16, (50, 20), dtype=np.uint16))
    files = {
        'rgb.jpg': image,
        'same_size.png': image.resize((32, 96)),
        'large.jpg': image.resize((400, 900)),
        'grey.jpg': image.convert('L'),
        'palette.png': image.quantize(16),
        'alpha.png': image.convert('RGBA'),
        'deep.png': grey16,
        'cmyk.jpg': image.convert('CMYK'),
    }
    folder = tmp_path / 'photos'
    folder.mkdir()
    for name, file in files.items():
        file.save(folder / name)
    return [str(folder / name) for name in files]


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic', 'nearest'])
def test_pixels_are_those_of_timms_transform(photos, tmp_path, interpolation):
    images = cache_images(photos, (96, 32), interpolation=interpolation, cache_dir=tmp_path / 'cache')
    assert isinstance(images, np.memmap) and images.shape == (len(photos), 96, 32, 3) and images.dtype == np.uint8
    transform = create_transform(
        (3, 96, 32), interpolation=interpolation, crop_mode='squash', crop_pct=1.0, mean=MEAN, std=STD
    )
    expected = torch.stack([transform(Image.open(path).convert('RGB')) for path in photos])
    ours = normalize(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2), MEAN, STD)
    assert torch.equal(ours, expected)


def test_every_broken_image_is_named_in_one_error(photos, tmp_path):
    good = Path(photos[0]).read_bytes()
    folder = tmp_path / 'many'
    folder.mkdir()
    for number in range(200):
        (folder / f'{number:03}.jpg').write_bytes(good)
    png = Path(photos[1]).read_bytes()
    broken = {
        '017.jpg': (b'', 'empty'),
        '101.jpg': (good[: len(good) // 2], 'truncated'),
        '102.jpg': (b'<html>404</html>', 'cannot identify'),
        '103.jpg': (png[: len(png) * 2 // 3], ''),
        '104.jpg': (png[:200] + bytes(50) + png[250:], ''),
    }
    for name, (content, _) in broken.items():
        (folder / name).write_bytes(content)
    paths = [str(folder / f'{number:03}.jpg') for number in range(200)] + [str(folder / 'absent.jpg')]
    with pytest.raises(BrokenImagesError) as caught:
        cache_images(paths, (16, 8), cache_dir=tmp_path / 'cache', workers=3)
    assert list(caught.value.broken) == [str(folder / name) for name in [*broken, 'absent.jpg']]
    for name, (_, reason) in broken.items():
        assert reason in caught.value.broken[str(folder / name)]
        assert str(folder / name) in str(caught.value)
    assert 'no such file' in caught.value.broken[str(folder / 'absent.jpg')]
    assert '6 of 201' in str(caught.value)
    assert not [name for name in os.listdir(tmp_path / 'cache') if name.endswith(('.npy', '.partial'))]


def test_cache_is_reused_until_a_file_changes(photos, tmp_path, monkeypatch):
    monkeypatch.setenv('CSA_ZOO_CACHE', str(tmp_path / 'cache'))
    first = cache_images(photos, (16, 8))
    stamp = os.stat(first.filename).st_mtime_ns
    assert cache_images([Path(path) for path in photos], (16, 8)).filename == first.filename
    assert os.stat(first.filename).st_mtime_ns == stamp
    assert Path(first.filename).is_relative_to(tmp_path / 'cache')
    others = [
        cache_images(photos, (8, 16)),
        cache_images(photos[::-1], (16, 8)),
        cache_images(photos, (16, 8), interpolation='bicubic'),
    ]
    assert len({first.filename, *(other.filename for other in others)}) == 4
    np.testing.assert_array_equal(others[1], first[::-1])

    Image.new('RGB', (9, 9), 'red').save(photos[0])
    changed = cache_images(photos, (16, 8))
    assert (changed[0] - (254, 0, 0)).max() <= 1
    np.testing.assert_array_equal(changed[1:], first[1:])


def test_killed_run_leaves_nothing_that_is_believed(photos, tmp_path):
    """SIGKILL in the middle of decoding; the next run takes the lock, removes the remains and is right."""
    script = (
        'import sys, time\n'
        'from csa_zoo.data import images\n'
        'decode = images._decode\n'
        'images._decode = lambda *args: time.sleep(0.05) or decode(*args)\n'
        'images._IMAGES_PER_ROUND = 4\n'
        'images.cache_images(sys.argv[2:] * 100, (16, 8), cache_dir=sys.argv[1], workers=1, progress=False)\n'
    )
    cache = tmp_path / 'cache'
    process = subprocess.Popen([sys.executable, '-c', script, str(cache), *photos])
    try:
        deadline = time.monotonic() + 60
        while not list(cache.glob('*.partial')) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert len(list(cache.glob('*.partial'))) == 1 and not list(cache.glob('*.npy'))
    images = cache_images(photos * 100, (16, 8), cache_dir=cache)
    np.testing.assert_array_equal(images[: len(photos)], images[-len(photos) :])
    np.testing.assert_array_equal(images[: len(photos)], cache_images(photos, (16, 8), cache_dir=cache))
    assert not list(cache.glob('*.partial'))


def test_those_who_ask_at_once_wait_for_one(photos, tmp_path, monkeypatch):
    decoded = []
    decode = csa_zoo.data.images._decode
    monkeypatch.setattr(csa_zoo.data.images, '_decode', lambda path, *args: decoded.append(path) or decode(path, *args))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: cache_images(photos * 20, (96, 32), cache_dir=tmp_path / 'cache'), range(4)))
    assert len(decoded) == 20 * len(photos)
    for images in results:
        np.testing.assert_array_equal(images, results[0])


def test_impossible_requests(photos, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='lanczos'):
        cache_images(photos, (16, 8), interpolation='cubic', cache_dir=tmp_path)
    with pytest.raises(ValueError, match='0 images'):
        cache_images([], (16, 8), cache_dir=tmp_path)
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match='CSA_ZOO_CACHE'):
        cache_images(photos, (16, 8), cache_dir=tmp_path)


def test_splits_share_one_error(photos, tmp_path):
    lines = ['path,person_id,camera_id,split']
    splits = ['train', 'query', 'gallery', 'train', 'query', 'gallery', 'gallery', 'train']
    lines += [f'{path},{number % 3},1,{split}' for number, (path, split) in enumerate(zip(photos, splits, strict=True))]
    (tmp_path / 'people.csv').write_text('\n'.join(lines))
    data = load_reid('csv', tmp_path / 'people.csv')
    images = cache_splits(data, (16, 8), cache_dir=tmp_path / 'cache')
    for split, rows in data.items():
        alone = cache_images(rows['path'], (16, 8), cache_dir=tmp_path / 'cache')
        np.testing.assert_array_equal(images[split], alone)
    for number in (0, 1, 2):
        Path(photos[number]).write_bytes(b'')
    with pytest.raises(BrokenImagesError) as caught:
        cache_splits(data, (16, 8), cache_dir=tmp_path / 'cache')
    assert set(caught.value.broken) == set(photos[:3])


def numbered_images(count: int) -> np.ndarray:
    """Images that differ from one another and from their mirror images."""
    return np.random.default_rng(1).integers(0, 256, (count, 6, 4, 3), dtype=np.uint8)


def test_batches_hold_each_image_once_with_its_label():
    images, labels = numbered_images(23), np.arange(23) % 7
    batches = PersonBatches(images, labels, 5, flip=False, seed=3)
    seen = []
    for pixels, batch_labels in batches.epoch(0):
        assert pixels.shape == (5, 3, 6, 4) and pixels.dtype == torch.uint8
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(pixels.permute(0, 2, 3, 1).numpy(), batch_labels.tolist(), strict=True):
            (index,) = np.flatnonzero((images == image).all((1, 2, 3)))
            assert labels[index] == label
            seen.append(int(index))
    assert len(batches) == 4 and len(seen) == len(set(seen)) == 20

    def first_labels(epoch: int, seed: int = 3) -> list[int]:
        return next(iter(PersonBatches(images, np.arange(23), 20, seed=seed).epoch(epoch)))[1].tolist()

    assert first_labels(0) == first_labels(0) != first_labels(1) != first_labels(0, seed=4)


def test_processes_see_together_what_one_sees():
    images, labels = numbered_images(40), np.arange(40)
    options = {'flip': True, 'padding': 2, 'seed': 7}
    alone = list(PersonBatches(images, labels, 8, **options).epoch(2))
    shares = [list(PersonBatches(images, labels, 8, rank=rank, world=4, **options).epoch(2)) for rank in range(4)]
    for step, (pixels, batch_labels) in enumerate(alone):
        assert torch.equal(torch.cat([share[step][0] for share in shares]), pixels)
        assert torch.equal(torch.cat([share[step][1] for share in shares]), batch_labels)


def test_flips_are_half_and_shifts_reach_every_place():
    images = np.zeros((4000, 5, 5, 3), np.uint8)
    images[:, 2, 3] = 255
    batches = PersonBatches(images, np.zeros(4000, int), 4000, flip=True, padding=1)
    pixels, _ = next(iter(batches.epoch(0)))
    assert (pixels == 255).sum() == 4000 * 3
    places = torch.nonzero(pixels[:, 0])[:, 1:].tolist()
    counts = {(row, column): places.count([row, column]) for row in (1, 2, 3) for column in (0, 1, 2, 3, 4)}
    assert sum(counts.values()) == 4000
    # Column 3, or 1 if mirrored, then one of three places: weights 1, 1, 2, 1, 1 of 6; the bound is 5 sigma.
    for (_, column), count in counts.items():
        p = (2 if column == 2 else 1) / 18
        assert abs(count - 4000 * p) < 5 * (4000 * p * (1 - p)) ** 0.5


def test_abandoned_epoch_and_wrong_arguments():
    images, labels = numbered_images(9), np.arange(9)
    next(PersonBatches(images, labels, 3).epoch(0))  # the thread ends with the iterator, or this would hang
    for arguments, message in (
        ((images, labels, 10), '1 to 9'),
        ((images, labels[:5], 3), '5 labels'),
        ((images.astype(float), labels, 3), 'uint8'),
        ((images[0], labels, 3), 'shape'),
    ):
        with pytest.raises(ValueError, match=message):
            PersonBatches(*arguments)
    with pytest.raises(ValueError, match='multiple of 2'):
        PersonBatches(images, labels, 3, world=2)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_augmentation_is_that_of_single_images(layout):
    images = torch.from_numpy(numbered_images(6)).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    coins = torch.tensor([True, False, True, True, False, False])
    expected = torch.stack([TF.hflip(x) if coin else x for x, coin in zip(images, coins, strict=True)])
    assert torch.equal(flip_images(images, coins), expected)

    shifts = torch.tensor([[0, 0], [3, -2], [-3, 3], [1, 0], [0, -1], [-2, -3]])
    expected = torch.stack(
        [
            TF.crop(TF.pad(image, [3]), 3 - down, 3 - right, 6, 4)
            for image, (down, right) in zip(images, shifts.tolist(), strict=True)
        ]
    )
    assert torch.equal(pad_crop(images, shifts), expected)
    half = normalize(images, MEAN, STD, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.is_contiguous(memory_format=layout)
    with pytest.raises(ValueError, match='uint8'):
        normalize(half, MEAN, STD)
