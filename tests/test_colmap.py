"""COLMAP reconstructions: a made scene of known cameras, in both forms of the format, and patches cut from it."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from csa_zoo.cli import main
from csa_zoo.data.colmap import Camera, read_reconstruction, reconstruct
from csa_zoo.data.patches import PatchSet
from csa_zoo.data.phototour import load_phototour, load_reference_images, save_phototour
from csa_zoo.data.reconstructions import cut_reconstruction, make_patches

cv2 = pytest.importorskip('cv2', reason='patches are cut from photographs with OpenCV')

MODEL_IDS = {'SIMPLE_PINHOLE': 0, 'PINHOLE': 1, 'SIMPLE_RADIAL': 2, 'RADIAL': 3, 'OPENCV': 4, 'FOV': 7}
WIDTH, HEIGHT = 480, 400
CAMERAS = {
    1: ('PINHOLE', (500.0, 500.0, 240.0, 200.0)),
    2: ('OPENCV', (500.0, 510.0, 236.0, 204.0, 0.05, -0.02, 0.003, -0.002)),
    3: ('SIMPLE_RADIAL', (420.0, 240.0, 200.0, -0.06)),
}
# Degrees of roll about the optical axis, of tilt, the tilt's axis, distance in units of the plane, camera.
VIEWS = [(0, 4, 0, 300, 1), (35, 8, 90, 260, 2), (90, 7, 200, 300, 1), (180, 6, 20, 420, 3), (-70, 8, 300, 220, 1)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('CSA_ZOO_CACHE', str(tmp_path / 'cache'))


def rotation(axis, degrees: float) -> np.ndarray:
    return cv2.Rodrigues(np.asarray(axis, float) * np.radians(degrees))[0]


def poses() -> list[tuple[np.ndarray, np.ndarray, int]]:
    """World to camera; all cameras look at the origin of the plane z = 0 from in front, which is from below."""
    made = []
    for roll, tilt, axis, distance, camera in VIEWS:
        around = (np.cos(np.radians(axis)), np.sin(np.radians(axis)), 0)
        made.append((rotation((0, 0, 1), roll) @ rotation(around, tilt), np.array([0.0, 0, distance]), camera))
    return made


def make_texture(rng: np.random.Generator, side: int, scales: tuple[int, ...]) -> np.ndarray:
    """Smooth noise of several scales, which has points everywhere."""
    noise = sum(s * cv2.GaussianBlur(rng.standard_normal((side, side)), (0, 0), s) for s in scales)
    return (128 + 45 * noise / noise.std()).clip(0, 255).astype(np.uint8)


def lens(camera: tuple[str, tuple[float, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """OpenCV's matrix and distortion."""
    model, p = camera
    p = (p[0], *p) if model.startswith('SIMPLE') or model == 'RADIAL' else p
    return np.array([(p[0], 0, p[2]), (0, p[1], p[3]), (0, 0, 1)]), np.array([*p[4:], 0, 0, 0, 0][:4])


def project(xyz: np.ndarray, turn: np.ndarray, shift: np.ndarray, camera: tuple) -> np.ndarray:
    return cv2.projectPoints(xyz.astype(float), cv2.Rodrigues(turn)[0], shift, *lens(camera))[0][:, 0]


def render(texture: np.ndarray, scale: float, turn: np.ndarray, shift: np.ndarray, camera: tuple) -> np.ndarray:
    """The plane z = 0 through a camera: each pixel is where the ray of its centre meets the plane."""
    pixels = np.stack(np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5), -1).reshape(-1, 2)
    matrix, distortion = lens(camera)
    rays = cv2.undistortPoints(pixels, matrix, distortion, criteria=(3, 40, 1e-10)).reshape(-1, 2)
    rays = np.concatenate([rays, np.ones((len(rays), 1))], 1) @ turn
    centre = -shift @ turn
    plane = centre - rays * (centre[2] / rays[:, 2:])
    assert np.abs(project(plane, turn, shift, camera) - pixels).max() < 1e-3
    texel = (plane[:, :2] * scale + np.array(texture.shape[::-1]) / 2).astype(np.float32).reshape(HEIGHT, WIDTH, 2)
    return cv2.remap(texture, texel, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def render_relief(folder: Path, photos: int) -> None:
    """Photographs of a textured relief from around it, each pixel's ray met with the surface by iteration."""
    rng = np.random.default_rng(5)
    texture = make_texture(rng, 900, (1, 2, 4, 8, 16))
    relief = make_texture(rng, 900, (40, 80)).astype(np.float32) / 10
    folder.mkdir()
    pixels = np.stack(np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5), -1)
    rays = np.concatenate([(pixels - (240, 200)) / 500, np.ones((HEIGHT, WIDTH, 1))], -1)
    for number in range(photos):
        turn = rotation((0, 0, 1), 30 * number) @ rotation((np.cos(number), np.sin(number), 0), 16)
        world, centre = rays @ turn, -np.array([0, 0, 300.0]) @ turn
        height = np.zeros((HEIGHT, WIDTH, 1), np.float32)
        for _ in range(8):
            surface = centre + world * ((height - centre[2]) / world[..., 2:])
            texel = (surface[..., :2] * 2.2 + 450).astype(np.float32)
            height = cv2.remap(relief, texel, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)[..., None]
        seen = cv2.remap(texture, texel, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        Image.fromarray(seen).save(folder / f'photo {number}.png')


def quaternion(turn: np.ndarray) -> np.ndarray:
    vector = cv2.Rodrigues(turn)[0][:, 0]
    angle = np.linalg.norm(vector)
    return np.array([np.cos(angle / 2), *(np.sin(angle / 2) * vector / max(angle, 1e-12))])


def write_binary(folder, cameras, images, points) -> None:
    folder.mkdir(parents=True)
    data = struct.pack('<Q', len(cameras))
    for number, (model, params) in cameras.items():
        data += struct.pack(f'<iiQQ{len(params)}d', number, MODEL_IDS[model], WIDTH, HEIGHT, *params)
    (folder / 'cameras.bin').write_bytes(data)
    data = struct.pack('<Q', len(images))
    for number, (name, turn, shift, camera, xy, ids) in enumerate(images, 1):
        data += struct.pack('<i7di', number, *quaternion(turn), *shift, camera) + name.encode() + b'\0'
        data += struct.pack('<Q', len(xy)) + b''.join(struct.pack('<ddq', *p, i) for p, i in zip(xy, ids, strict=True))
    (folder / 'images.bin').write_bytes(data)
    data = struct.pack('<Q', len(points))
    for number, (xyz, track) in points.items():
        data += struct.pack('<Q3d3BdQ', number, *xyz, 1, 2, 3, 0.5, len(track))
        data += b''.join(struct.pack('<ii', *element) for element in track)
    (folder / 'points3D.bin').write_bytes(data)


def write_text(folder, cameras, images, points) -> None:
    folder.mkdir(parents=True)
    lines = ['# Camera list'] + [
        ' '.join(map(str, (number, model, WIDTH, HEIGHT, *params))) for number, (model, params) in cameras.items()
    ]
    (folder / 'cameras.txt').write_text('\n'.join(lines) + '\n')
    lines = ['# Image list']
    for number, (name, turn, shift, camera, xy, ids) in enumerate(images, 1):
        lines.append(' '.join(map(str, (number, *quaternion(turn).tolist(), *shift.tolist(), camera, name))))
        lines.append(' '.join(f'{x!r} {y!r} {i}' for (x, y), i in zip(xy.tolist(), ids, strict=True)))
    (folder / 'images.txt').write_text('\n'.join(lines) + '\n')
    lines = [
        ' '.join(map(str, (number, *xyz.tolist(), 1, 2, 3, 0.5, *(n for element in track for n in element))))
        for number, (xyz, track) in points.items()
    ]
    (folder / 'points3D.txt').write_text('\n'.join(lines) + '\n')


@pytest.fixture(scope='module')
def scene(tmp_path_factory):
    """A folder with photographs of a textured plane, and the model of it in both forms."""
    root = tmp_path_factory.mktemp('scene')
    rng = np.random.default_rng(0)
    texture = make_texture(rng, 900, (3, 6, 12, 24))
    (root / 'photos').mkdir()
    xyz = np.concatenate([rng.uniform(-60, 60, (400, 2)), np.zeros((400, 1))], 1)
    ids = rng.permutation(2000)[:400] + 1
    # An image without keypoints, whose line of text is empty, comes first; names may have spaces.
    images = [('0 empty.png', np.eye(3), np.array([0.0, 0, 300]), 1, np.zeros((0, 2)), [])]
    tracks = {number: [] for number in ids}
    for view, pose in enumerate(poses()):
        look = (pose[0], pose[1], CAMERAS[pose[2]])
        Image.fromarray(render(texture, 2.2, *look)).save(root / 'photos' / f'view {view}.png')
        xy = project(xyz, *look)
        shown = ((xy > 0) & (xy < (WIDTH, HEIGHT))).all(1) & (rng.random(400) < 0.9)
        keypoints = np.concatenate([xy[shown], [(5.0, 6.0)]])  # and one that is no point's
        images.append((f'view {view}.png', pose[0], pose[1], pose[2], keypoints, [*ids[shown].tolist(), -1]))
        for row, number in enumerate(ids[shown]):
            tracks[number].append((view + 2, row))
    points = {int(number): (position, tracks[number]) for number, position in zip(ids, xyz, strict=True)}
    write_binary(root / 'bin', CAMERAS, images, points)
    write_text(root / 'txt', CAMERAS, images, points)
    return root, images, points


def correlations(data: PatchSet) -> torch.Tensor:
    """Of all pairs of patches of one point."""
    x = data.patches.flatten(1).double()
    x = torch.nn.functional.normalize(x - x.mean(1, keepdim=True))
    same = (data.point_ids[:, None] == data.point_ids).triu(1)
    return (x @ x.T)[same]


class TestReading:
    @pytest.mark.parametrize('form', ['bin', 'txt'])
    def test_both_forms(self, scene, form):
        root, images, points = scene
        model = read_reconstruction(root / form)
        assert model.point_ids.tolist() == sorted(points)
        assert np.array_equal(model.xyz, [points[number][0] for number in sorted(points)])
        for read, (name, turn, shift, camera, xy, ids) in zip(model.images, images, strict=True):
            assert (read.name, read.camera.model, read.camera.params) == (name, *CAMERAS[camera])
            assert np.allclose(read.rotation, turn, atol=1e-12)
            assert np.array_equal(read.translation, shift)
            assert np.array_equal(read.keypoints, xy)
            assert read.point_ids.tolist() == ids

    @pytest.mark.parametrize('model', ['SIMPLE_PINHOLE', 'PINHOLE', 'SIMPLE_RADIAL', 'RADIAL', 'OPENCV'])
    def test_projection_is_opencvs(self, model):
        rng = np.random.default_rng(1)
        params = {
            'SIMPLE_PINHOLE': (500.0, 240.0, 200.0),
            'PINHOLE': (500.0, 480.0, 240.0, 200.0),
            'SIMPLE_RADIAL': (500.0, 240.0, 200.0, 0.1),
            'RADIAL': (500.0, 240.0, 200.0, 0.1, -0.05),
            'OPENCV': (500.0, 480.0, 240.0, 200.0, 0.1, -0.05, 0.01, -0.02),
        }
        points = rng.uniform((-1, -1, 2), (1, 1, 4), (50, 3))
        expected = project(points, np.eye(3), np.zeros(3), (model, params[model]))
        assert np.allclose(Camera(1, model, 480, 400, params[model]).project(points), expected)

    def test_models_of_pycolmap(self, tmp_path):
        pycolmap = pytest.importorskip('pycolmap')
        options = pycolmap.SyntheticDatasetOptions(
            num_rigs=2,
            num_frames_per_rig=2,
            num_points3D=50,
            camera_model_id=pycolmap.CameraModelId.OPENCV,
            camera_params=[900, 910, 512, 384, 0.05, -0.02, 0.003, -0.002],
        )
        made = pycolmap.synthesize_dataset(options)
        for form, write in (('bin', made.write_binary), ('txt', made.write_text)):
            (tmp_path / form).mkdir()
            write(tmp_path / form)
            model = read_reconstruction(tmp_path / form)
            assert {image.name for image in model.images} == {image.name for image in made.images.values()}
            by_name = {image.name: image for image in made.images.values()}
            for image in model.images:
                theirs = by_name[image.name]
                rows = np.flatnonzero(image.point_ids >= 0)
                assert len(rows)
                for row in rows[:20]:
                    xyz = made.points3D[int(image.point_ids[row])].xyz
                    assert np.allclose(model.xyz[model.point_ids == image.point_ids[row]], xyz)
                    ours = image.camera.project(image.rotation @ xyz + image.translation)
                    assert np.allclose(ours, theirs.project_point(xyz), atol=1e-6)
                    assert np.allclose(image.keypoints[row], theirs.points2D[int(row)].xy)

    @pytest.mark.parametrize('name', ['cameras', 'images', 'points3D'])
    def test_cut_short_or_wrong(self, scene, tmp_path, name):
        """Wherever a file ends, and whatever else lies under its name, the error names it."""
        root, *_ = scene
        for path in (root / 'bin').iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        path, data = tmp_path / f'{name}.bin', (root / 'bin' / f'{name}.bin').read_bytes()
        for length in (0, 5, 8, 30, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:length])
            with pytest.raises(ValueError, match=rf'{name}\.bin ends after {length} bytes.*cut short.*copy it again'):
                read_reconstruction(tmp_path)
        path.write_bytes(data + b'x')
        with pytest.raises(ValueError, match=rf'{name}\.bin has 1 bytes after its'):
            read_reconstruction(tmp_path)
        for wrong in (b'\x89PNG\r\n\x1a\n' + bytes(range(256)), b'# Camera list with one line of data\n' * 9):
            path.write_bytes(wrong)
            with pytest.raises(ValueError, match=rf'{name}\.bin'):
                read_reconstruction(tmp_path)
        path.unlink()
        with pytest.raises(FileNotFoundError, match='lacks cameras, images or points3D'):
            read_reconstruction(tmp_path)

    @pytest.mark.parametrize(
        ('name', 'old', 'new', 'message'),
        [
            ('cameras', 'PINHOLE', 'PINHALE', r"cameras\.txt, line 2: .*'PINHALE', none of SIMPLE_PINHOLE"),
            ('cameras', ' 500.0 500.0', ' 500.0', r'cameras\.txt, line 2: .*needs 4 finite ones'),
            (
                'images',
                'view 1.png\n',
                'view 1.png\n1.5 ',
                r'images\.txt, line 7: .* columns, but keypoints',
            ),
            ('images', ' 2 view 1.png', ' 9 view 1.png', r'view 1\.png has camera 9, but there is \[1, 2, 3\]'),
            ('points3D', ' 1 2 3 0.5 ', ' 1 2 3 ', r'points3D\.txt, line 1: \d+ columns'),
            ('points3D', '\n', '\nx 1 ', r'points3D\.txt, line 2: invalid literal.*x'),
        ],
    )
    def test_wrong_text(self, scene, tmp_path, name, old, new, message):
        root, *_ = scene
        for path in (root / 'txt').iterdir():
            text = path.read_text()
            (tmp_path / path.name).write_text(text.replace(old, new, 1) if path.stem == name else text)
        with pytest.raises(ValueError, match=message):
            read_reconstruction(tmp_path)


class TestCutting:
    @pytest.mark.parametrize('form', ['bin', 'txt'])
    def test_patches_of_a_point_correspond(self, scene, form):
        """Turned by any angle, nearer or farther, through three lenses: scale and orientation follow."""
        root, *_ = scene
        data, reference, _ = cut_reconstruction(read_reconstruction(root / form), root / 'photos', max_side=100)
        assert data.num_points > 60
        assert len(data) > 3 * data.num_points
        assert correlations(data).min() > 0.9
        assert correlations(data).median() > 0.98
        assert correlations(PatchSet(data.patches, torch.zeros_like(data.point_ids))).median() < 0.3
        assert reference.shape == data.point_ids.shape
        assert (data.point_ids.diff() >= 0).all()

    def test_patches_do_not_depend_on_the_world_frame(self, scene, tmp_path):
        """The same model, moved, turned and enlarged as a whole."""
        root, images, points = scene
        turn, shift = rotation((0.6, 0.0, 0.8), 50), np.array([10.0, -20.0, 30.0])
        moved = [(n, r @ turn.T, 3 * t - r @ turn.T @ shift, c, xy, ids) for n, r, t, c, xy, ids in images]
        points = {number: (3 * turn @ xyz + shift, track) for number, (xyz, track) in points.items()}
        write_binary(tmp_path / 'moved', CAMERAS, moved, points)
        first = cut_reconstruction(read_reconstruction(root / 'bin'), root / 'photos')
        second = cut_reconstruction(read_reconstruction(tmp_path / 'moved'), root / 'photos')
        assert torch.equal(first.patches.point_ids, second.patches.point_ids)
        assert (first.patches.patches.int() - second.patches.patches.int()).abs().max() <= 2

    def test_written_folder_is_read(self, scene, tmp_path):
        root, *_ = scene
        written = make_patches(root / 'bin', tmp_path / 'set', root / 'photos', pairs=200, max_points=40, seed=3)
        data = load_phototour(tmp_path / 'set', size=64)
        assert 30 < data.num_points == written.patches.num_points <= 40
        assert torch.equal(data.patches, written.patches.patches)
        assert torch.equal(data.point_ids, written.patches.point_ids)
        assert all(torch.equal(a, b) for a, b in zip(data.pairs, written.patches.pairs, strict=True))
        assert torch.equal(load_reference_images(tmp_path / 'set'), written.reference_images)
        lines = (tmp_path / 'set' / f'm50_{len(data.pairs[0])}_{len(data.pairs[0])}_0.txt').read_text().splitlines()
        assert {len(line.split()) for line in lines} == {7}
        again = make_patches(root / 'txt', tmp_path / 'again', root / 'photos', pairs=200, max_points=40, seed=3)
        assert torch.equal(again.patches.patches, data.patches)
        other = make_patches(root / 'bin', tmp_path / 'other', root / 'photos', pairs=200, max_points=40, seed=4)
        assert not torch.equal(other.patches.patches[:30], data.patches[:30])
        with pytest.raises(FileExistsError, match='holds a PhotoTour set'):
            make_patches(root / 'bin', tmp_path / 'set', root / 'photos')

    def test_ragged_last_mosaic(self, tmp_path):
        patches = torch.randint(256, (300, 64, 64), dtype=torch.uint8)
        save_phototour(tmp_path, PatchSet(patches, torch.arange(300) // 2))
        assert torch.equal(load_phototour(tmp_path, size=64).patches, patches)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != 'cache') == [
            'info.txt',
            'patches0000.bmp',
            'patches0001.bmp',
        ]

    def test_bad_observations_are_left_out(self, scene, tmp_path):
        """Keypoints off their point, points twice at one place, points behind a camera, and flat ones."""
        root, images, points = scene
        points, images = dict(points), [list(image) for image in images]
        before = cut_reconstruction(read_reconstruction(root / 'bin'), root / 'photos', max_side=100).patches
        wrong = images[2][5][:40]
        images[2][4] = images[2][4].copy()
        images[2][4][:40] += 25
        twin = {number: 5000 + number for number in points}
        for image in images:
            image[4] = np.concatenate([image[4], image[4]])
            image[5] = image[5] + [twin.get(number, -1) for number in image[5]]
        points |= {twin[number]: value for number, value in points.items()}
        write_binary(tmp_path / 'bad', CAMERAS, images, points)
        cut = cut_reconstruction(read_reconstruction(tmp_path / 'bad'), root / 'photos', max_side=100)
        assert correlations(cut.patches).min() > 0.9
        assert cut.rejected['near-duplicates'] >= before.num_points
        assert cut.patches.num_points <= before.num_points
        assert len(cut.patches) < len(before)
        assert wrong

    def test_what_cannot_be_cut(self, scene, tmp_path, capsys):
        root, images, points = scene
        photos = tmp_path / 'photos'
        photos.mkdir()
        for view in range(4):
            Image.open(root / 'photos' / f'view {view}.png').save(photos / f'view {view}.png')
        with pytest.raises(FileNotFoundError, match=r'photos lacks 1 of the 5 photographs.*first being view 4\.png'):
            cut_reconstruction(read_reconstruction(root / 'bin'), photos)
        Image.new('L', (WIDTH, HEIGHT + 1)).save(photos / 'view 4.png')
        with pytest.raises(ValueError, match=r'view 4\.png is 480x401, but its camera 1 480x400'):
            cut_reconstruction(read_reconstruction(root / 'bin'), photos)
        (photos / 'view 4.png').write_bytes((root / 'photos' / 'view 4.png').read_bytes()[:5000])
        with pytest.raises(ValueError, match=r'view 4\.png cannot be decoded'):
            cut_reconstruction(read_reconstruction(root / 'bin'), photos)
        for view in range(5):
            Image.new('L', (WIDTH, HEIGHT), 128).save(photos / f'view {view}.png')
        with pytest.raises(ValueError, match=r'0 of 400 points are left.*without a scale'):
            cut_reconstruction(read_reconstruction(root / 'bin'), photos)
        write_binary(tmp_path / 'fov', CAMERAS | {1: ('FOV', (500.0, 500.0, 240.0, 200.0, 0.9))}, images, points)
        with pytest.raises(ValueError, match='camera 1 is FOV, which is not supported: undistort'):
            cut_reconstruction(read_reconstruction(tmp_path / 'fov'), root / 'photos')
        write_binary(tmp_path / 'few', CAMERAS, images[:3], points)
        with pytest.raises(ValueError, match=r'0 of 400 points are left.*[0-9]+ in fewer than 3 photographs'):
            cut_reconstruction(read_reconstruction(tmp_path / 'few'), root / 'photos')

        def fails(*arguments) -> str:
            with pytest.raises(SystemExit):
                main(['make-patches', *map(str, arguments)])
            return capsys.readouterr().err

        assert 'is a COLMAP model: name the folder of its photographs too' in fails(root / 'bin', tmp_path / 'out')
        assert 'no COLMAP model' in fails(photos, tmp_path / 'out', '--images', photos)


class TestPhotographs:
    def test_folder_of_photographs(self, tmp_path):
        """Reconstructed, cut, and with the reconstruction kept for the next time."""
        pytest.importorskip('pycolmap')
        render_relief(tmp_path / 'photos', 4)
        data, *_ = make_patches(tmp_path / 'photos', tmp_path / 'set')
        assert data.num_points > 200
        same = correlations(data)
        assert same.median() > 0.85
        others = PatchSet(data.patches[::20], torch.zeros(len(data.patches[::20]), dtype=torch.int64))
        assert (same > torch.quantile(correlations(others), 0.95)).double().mean() > 0.8

        kept = tmp_path / 'set' / 'reconstruction'
        made = {path: path.stat().st_mtime_ns for path in kept.rglob('*')}
        assert reconstruct(tmp_path / 'photos', kept) == kept / 'sparse' / '0'
        assert made == {path: path.stat().st_mtime_ns for path in kept.rglob('*')}
        (tmp_path / 'photos' / 'photo 3.png').unlink()
        with pytest.raises(ValueError, match='from other photographs or settings: remove it'):
            reconstruct(tmp_path / 'photos', kept)

    def test_what_cannot_be_reconstructed(self, tmp_path):
        pytest.importorskip('pycolmap')
        (tmp_path / 'photos').mkdir()
        with pytest.raises(FileNotFoundError, match='no photograph in'):
            reconstruct(tmp_path / 'photos', tmp_path / 'out')
        for number in range(3):
            noise = np.random.default_rng(number).integers(0, 256, (100, 100), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / 'photos' / f'{number}.png')
            if number == 1:
                with pytest.raises(ValueError, match='has 2 photographs, but a reconstruction needs at least 3'):
                    reconstruct(tmp_path / 'photos', tmp_path / 'out')
        with pytest.raises(ValueError, match='no model in the 3 photographs'):
            reconstruct(tmp_path / 'photos', tmp_path / 'out')
        (tmp_path / 'photos' / '2.png').write_bytes(b'nothing')
        with pytest.raises(ValueError, match=r'COLMAP cannot read .*2\.png'):
            reconstruct(tmp_path / 'photos', tmp_path / 'other')


def test_command_line(scene, tmp_path, capsys):
    root, *_ = scene
    assert not main(['make-patches', str(root / 'bin'), str(tmp_path / 'set'), '--images', str(root / 'photos')])
    data = load_phototour(tmp_path / 'set')
    assert f'{len(data):,} patches of {data.num_points:,} points' in capsys.readouterr().out
