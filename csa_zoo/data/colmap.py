"""COLMAP reconstructions: read a sparse model, or make one from overlapping photographs.

The format is COLMAP's own (Schönberger & Frahm, "Structure-from-Motion Revisited", CVPR 2016): files `cameras`,
`images` and `points3D`, each as .bin or .txt. Reading needs nothing but numpy; making a model needs pycolmap.
"""

import json
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm.auto import tqdm

from .patches import file_stamps
from .photographs import find_photographs

# In COLMAP's numbering, with the number of parameters of each.
CAMERA_MODELS = {
    0: ('SIMPLE_PINHOLE', 3),
    1: ('PINHOLE', 4),
    2: ('SIMPLE_RADIAL', 4),
    3: ('RADIAL', 5),
    4: ('OPENCV', 8),
    5: ('OPENCV_FISHEYE', 8),
    6: ('FULL_OPENCV', 12),
    7: ('FOV', 5),
    8: ('SIMPLE_RADIAL_FISHEYE', 4),
    9: ('RADIAL_FISHEYE', 5),
    10: ('THIN_PRISM_FISHEYE', 12),
    11: ('RAD_TAN_THIN_PRISM_FISHEYE', 16),
    12: ('SIMPLE_DIVISION', 4),
    13: ('DIVISION', 5),
    14: ('SIMPLE_FISHEYE', 3),
    15: ('FISHEYE', 4),
    16: ('EUCM', 6),
    17: ('EQUIRECTANGULAR', 2),
}
PHOTOS_AT_ONCE = 8  # between two saved states of a reconstruction
_FILES = ('cameras', 'images', 'points3D')
_Record = TypeVar('_Record')


@dataclass(frozen=True)
class Camera:
    """A camera of a COLMAP model.

    Attributes:
        camera_id: Its number in the model.
        model: COLMAP's name of the camera model.
        width: Pixels.
        height: Pixels.
        params: In COLMAP's order for the camera model.

    Raises:
        ValueError: If the camera model is unknown, or the numbers are not a camera's.
    """

    camera_id: int
    model: str
    width: int
    height: int
    params: tuple[float, ...]

    def __post_init__(self) -> None:
        counts = dict(CAMERA_MODELS.values())
        if self.model not in counts:
            raise ValueError(f'camera {self.camera_id} has the model {self.model!r}, none of {", ".join(counts)}')
        finite = bool(np.isfinite(self.params).all())
        if len(self.params) != counts[self.model] or not finite or min(self.width, self.height) < 1:
            raise ValueError(
                f'camera {self.camera_id} ({self.model}, {self.width}x{self.height}) has the parameters {self.params}, '
                f'but it needs {counts[self.model]} finite ones and a size above 0'
            )

    def project(self, points: np.ndarray) -> np.ndarray:
        """Pixel positions of points before the camera.

        Args:
            points: (..., 3) in the camera's frame: x to the right, y down, z forwards and above 0.

        Returns:
            (..., 2); the centre of the upper left pixel is at (0.5, 0.5), as everywhere in COLMAP.

        Raises:
            ValueError: If the camera model is none of the five that are supported.
        """
        fx, fy, cx, cy, k1, k2, p1, p2 = self._opencv_params()
        x, y = points[..., 0] / points[..., 2], points[..., 1] / points[..., 2]
        r2 = x * x + y * y
        radial = 1 + k1 * r2 + k2 * r2 * r2
        bent_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
        bent_y = y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y)
        return np.stack([fx * bent_x + cx, fy * bent_y + cy], -1)

    def _opencv_params(self) -> tuple[float, ...]:
        """The simpler models are OPENCV with zeros: fx, fy, cx, cy, k1, k2, p1, p2."""
        given = self.params
        if self.model in ('SIMPLE_PINHOLE', 'SIMPLE_RADIAL', 'RADIAL'):
            given = (given[0], *given)
        elif self.model not in ('PINHOLE', 'OPENCV'):
            raise ValueError(
                f'camera {self.camera_id} is {self.model}, which is not supported: undistort the reconstruction first '
                '(colmap image_undistorter)'
            )
        return (*given, *(0.0,) * (8 - len(given)))


class PosedImage(NamedTuple):
    """A photograph's pose and keypoints.

    Attributes:
        name: Path of the photograph, relative to the folder of photographs.
        camera: The camera that took it.
        rotation: (3, 3), from the world's frame to the camera's.
        translation: (3,), likewise.
        keypoints: (K, 2) pixels; the centre of the upper left pixel is at (0.5, 0.5).
        point_ids: (K,) int64 id of the point that each keypoint shows, -1 for none.
    """

    name: str
    camera: Camera
    rotation: np.ndarray
    translation: np.ndarray
    keypoints: np.ndarray
    point_ids: np.ndarray


class Reconstruction(NamedTuple):
    """A sparse model.

    Attributes:
        images: In the order of their names.
        point_ids: (P,) int64, rising.
        xyz: (P, 3) positions of the points in the world's frame.
    """

    images: list[PosedImage]
    point_ids: np.ndarray
    xyz: np.ndarray


def is_reconstruction(folder: str | Path) -> bool:
    """Whether a folder holds any file of a COLMAP model."""
    return any((Path(folder) / f'{name}.{kind}').is_file() for name in _FILES for kind in ('bin', 'txt'))


def read_reconstruction(folder: str | Path) -> Reconstruction:
    """Read a COLMAP sparse model; of two forms the binary one is taken.

    Args:
        folder: Holds `cameras`, `images` and `points3D`, all .bin or all .txt, such as `sparse/0` of a COLMAP project.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is cut short, is none of this format, or names what another lacks.
    """
    folder = Path(folder).expanduser()
    kinds = [kind for kind in ('bin', 'txt') if all((folder / f'{name}.{kind}').is_file() for name in _FILES)]
    if not kinds:
        raise FileNotFoundError(
            f'{folder} lacks cameras, images or points3D (all three as .bin, or as .txt): name the folder of a COLMAP '
            'sparse model, such as PROJECT/sparse/0'
        )
    camera_file, image_file, point_file = (folder / f'{name}.{kinds[0]}' for name in _FILES)
    if kinds[0] == 'bin':
        cameras = _read_binary(camera_file, _binary_camera)
        images = _read_binary(image_file, _binary_image)
        points = _read_binary(point_file, _binary_point)
    else:
        cameras = _read_lines(camera_file, _text_camera)
        images = _read_images_text(image_file)
        points = _read_lines(point_file, _text_point)

    by_id = {camera.camera_id: camera for camera in cameras}
    posed = sorted((_as_posed(image, by_id, image_file) for image in images), key=lambda image: image.name)
    ids = np.array([point[0] for point in points], np.int64)
    xyz = np.array([point[1] for point in points], float).reshape(-1, 3)
    if not np.isfinite(xyz).all():
        raise ValueError(f'{point_file}: point {ids[~np.isfinite(xyz).all(1)][0]} is not at a finite position')
    for image in posed:
        unknown = np.setdiff1d(image.point_ids, np.append(ids, -1))
        if len(unknown):
            raise ValueError(
                f'{image_file}: {image.name} shows point {unknown[0]}, which {point_file.name} lacks: '
                'copy both from one model'
            )
    order = np.argsort(ids)
    return Reconstruction(posed, ids[order], xyz[order])


class _Image(NamedTuple):
    quaternion: Sequence[float]
    translation: Sequence[float]
    camera_id: int
    name: str
    keypoints: np.ndarray
    point_ids: np.ndarray


def _as_posed(image: _Image, cameras: dict[int, Camera], path: Path) -> PosedImage:
    pose = np.array([*image.quaternion, *image.translation], float)
    length = np.linalg.norm(pose[:4])
    if not np.isfinite(pose).all() or length < 1e-6 or not np.isfinite(image.keypoints).all():
        raise ValueError(f'{path}: the pose {pose.tolist()} or a keypoint of {image.name} is no finite number')
    if image.camera_id not in cameras:
        raise ValueError(f'{path}: {image.name} has camera {image.camera_id}, but there is {sorted(cameras)}')
    w, x, y, z = pose[:4] / length
    cross = np.array([(0, -z, y), (z, 0, -x), (-y, x, 0)])
    rotation = np.eye(3) + 2 * w * cross + 2 * cross @ cross
    return PosedImage(image.name, cameras[image.camera_id], rotation, pose[4:], image.keypoints, image.point_ids)


class _Binary:
    """The bytes of a .bin file, little-endian, and how far they are read."""

    def __init__(self, path: Path) -> None:
        self.data, self.offset = path.read_bytes(), 0

    def take(self, layout: str) -> tuple:
        return struct.unpack(f'<{layout}', self._bytes(struct.calcsize(f'<{layout}')))

    def table(self, dtype: np.dtype, rows: int) -> np.ndarray:
        return np.frombuffer(self._bytes(rows * dtype.itemsize), dtype)

    def text(self) -> str:
        end = self.data.find(b'\0', self.offset)
        if end < 0:
            raise EOFError
        text = self.data[self.offset : end].decode()
        self.offset = end + 1
        return text

    def _bytes(self, count: int) -> bytes:
        start, self.offset = self.offset, self.offset + count
        if self.offset > len(self.data):
            raise EOFError
        return self.data[start : self.offset]


def _read_binary(path: Path, read: Callable[[_Binary], _Record]) -> list[_Record]:
    """All records of a file that begins with their number, and has nothing after them."""
    file, records, count = _Binary(path), [], 0
    try:
        (count,) = file.take('Q')
        while len(records) < count:
            records.append(read(file))
    except EOFError:
        raise ValueError(
            f'{path} ends after {len(file.data)} bytes, within record {len(records) + 1} of {count}: it is cut short '
            'or no COLMAP file; copy it again'
        ) from None
    except ValueError as error:
        raise ValueError(f'{path}, record {len(records) + 1} of {count}: {error}') from error
    if file.offset < len(file.data):
        raise ValueError(
            f'{path} has {len(file.data) - file.offset} bytes after its {count} records: it is no COLMAP file of this '
            'name; copy it again'
        )
    return records


def _binary_camera(file: _Binary) -> Camera:
    camera_id, model, width, height = file.take('iiQQ')
    if model not in CAMERA_MODELS:
        raise ValueError(f'camera model {model}, but there are 0 to {max(CAMERA_MODELS)}: it is no cameras.bin')
    name, count = CAMERA_MODELS[model]
    return Camera(camera_id, name, width, height, file.take(f'{count}d'))


def _binary_image(file: _Binary) -> _Image:
    _, *pose, camera_id = file.take('i7di')
    name = file.text()
    (count,) = file.take('Q')
    table = file.table(np.dtype([('xy', '<f8', 2), ('point', '<i8')]), count)
    return _Image(pose[:4], pose[4:], camera_id, name, table['xy'], table['point'].astype(np.int64))


def _binary_point(file: _Binary) -> tuple[int, tuple[float, ...]]:
    point_id, x, y, z, _red, _green, _blue, _error, track = file.take('Q3d3BdQ')
    file.table(np.dtype('<i4'), 2 * track)  # images.bin says the same
    return point_id, (x, y, z)


def _content(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, without comments."""
    try:
        lines = path.read_text(encoding='utf-8').splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is no text ({error}): copy it again') from error
    return ((number, line) for number, line in enumerate(lines, 1) if not line.startswith('#'))


def _parse(path: Path, number: int, line: str, parse: Callable[[list[str]], _Record]) -> _Record:
    try:
        return parse(line.split())
    except (ValueError, IndexError) as error:
        raise ValueError(f'{path}, line {number}: {error}; the line is {line[:80]!r}') from error


def _read_lines(path: Path, parse: Callable[[list[str]], _Record]) -> list[_Record]:
    return [_parse(path, number, line, parse) for number, line in _content(path) if line.strip()]


def _text_camera(words: list[str]) -> Camera:
    return Camera(int(words[0]), words[1], int(words[2]), int(words[3]), tuple(map(float, words[4:])))


def _text_point(words: list[str]) -> tuple[int, tuple[float, ...]]:
    if len(words) < 8 or len(words) % 2:
        raise ValueError(f'{len(words)} columns, but a point has 8 and two for each observation')
    return int(words[0]), tuple(map(float, words[1:4]))


def _read_images_text(path: Path) -> list[_Image]:
    """Two lines an image: the second, its keypoints, may be empty, so that only empty lines before a first are."""
    images, lines = [], _content(path)
    for number, line in lines:
        if not line.strip():
            continue
        # A name may have spaces in it.
        head = _parse(path, number, line, lambda words: ([float(w) for w in words[1:8]], int(words[8])))
        name = line.split(maxsplit=9)[-1].rstrip()
        if len(line.split()) < 10:
            raise ValueError(f'{path}, line {number}: it needs 10 columns, the name last; it is {line[:80]!r}')
        number, line = next(lines, (number + 1, None))
        if line is None:
            raise ValueError(f'{path} ends before the keypoints of {name}: it is cut short; copy it again')
        keypoints, ids = _parse(path, number, line, _text_keypoints)
        images.append(_Image(head[0][:4], head[0][4:], head[1], name, keypoints, ids))
    return images


def _text_keypoints(words: list[str]) -> tuple[np.ndarray, np.ndarray]:
    if len(words) % 3:
        raise ValueError(f'{len(words)} columns, but keypoints have three each: x, y, point')
    xy = np.array([words[0::3], words[1::3]], float).T
    return xy, np.array(words[2::3], np.int64)


def reconstruct(
    photos: str | Path, folder: str | Path, *, max_image_side: int = 3200, seed: int = 0, progress: bool = True
) -> Path:
    """Make a COLMAP model from overlapping photographs, on the CPU: SIFT, all pairs, incremental mapping.

    What is done is kept in `folder`: a second call goes on where a killed one was, except within the mapping,
    and returns a finished model at once. The effort grows with the square of the number of photographs; for more than
    a few hundred run COLMAP itself. COLMAP's threads make models that differ a little from run to run.

    Args:
        photos: Folder with at least three photographs of one scene, searched with its subfolders.
        folder: Where the database (`database.db`) and the models (`sparse/0`, ...) are kept.
        max_image_side: Longer photographs are reduced to it for the detection of keypoints.
        seed: Seed of COLMAP's random numbers.
        progress: Show progress bars, on a terminal.

    Returns:
        The folder of the model with the most photographs.

    Raises:
        ModuleNotFoundError: If pycolmap is not installed.
        FileNotFoundError: If there is no photograph.
        ValueError: If there are too few photographs, one cannot be read, `folder` was made from other ones, or they do
            not overlap enough for a model.
    """
    photos, folder = Path(photos).expanduser().resolve(), Path(folder).expanduser().resolve()
    files = find_photographs(photos)
    if len(files) < 3:
        raise ValueError(f'{photos} has {len(files)} photographs, but a reconstruction needs at least 3 of one scene')
    pycolmap = _pycolmap()
    names = [file.relative_to(photos).as_posix() for file in files]
    folder.mkdir(parents=True, exist_ok=True)
    _check_made_from(folder, [str(photos), max_image_side, seed, names, file_stamps(files)])
    sparse = folder / 'sparse'
    if not sparse.is_dir():
        pycolmap.logging.minloglevel = pycolmap.logging.Level.FATAL.value  # what goes wrong is said below
        pycolmap.set_random_seed(seed)
        database = folder / 'database.db'
        _detect_and_match(pycolmap, database, photos, names, max_image_side, progress)
        _map_incrementally(pycolmap, database, photos, sparse, seed, len(names), progress)
    models = sorted(path for path in sparse.iterdir() if is_reconstruction(path))
    return max(models, key=lambda path: len(_read_binary(path / 'images.bin', _binary_image)))


def _pycolmap() -> Any:
    try:
        import pycolmap
    except ImportError as error:
        message = 'a reconstruction from photographs needs pycolmap: pip install "csa_zoo[sfm]", or give a COLMAP model'
        raise ModuleNotFoundError(message) from error
    return pycolmap


def _check_made_from(folder: Path, photographs: list) -> None:
    record = folder / 'photographs.json'
    text = json.dumps(photographs)
    if not record.exists():
        record.write_text(text)
    elif record.read_text() != text:
        raise ValueError(
            f'{folder} holds a reconstruction from other photographs or settings: remove it, or name another folder'
        )


def _detect_and_match(
    pycolmap: Any, database: Path, photos: Path, names: Sequence[str], max_side: int, progress: bool
) -> None:
    """A few photographs at a time, each time with all before; COLMAP passes over what the database has."""
    options = pycolmap.FeatureExtractionOptions(max_image_size=max_side)
    with tqdm(desc='detecting and matching', total=len(names), unit='photo', disable=None if progress else True) as bar:
        for start in range(0, len(names), PHOTOS_AT_ONCE):
            some = names[start : start + PHOTOS_AT_ONCE]
            pycolmap.extract_features(
                database, photos, image_names=some, extraction_options=options, device=pycolmap.Device.cpu
            )
            pycolmap.match_exhaustive(database, device=pycolmap.Device.cpu)
            bar.update(len(some))
    with pycolmap.Database.open(database) as opened:
        missing = sorted(set(names) - {image.name for image in opened.read_all_images()})
    if missing:
        raise ValueError(f'COLMAP cannot read {photos / missing[0]} ({len(missing)} such): repair it or leave it out')


def _map_incrementally(
    pycolmap: Any, database: Path, photos: Path, sparse: Path, seed: int, count: int, progress: bool
) -> None:
    with tempfile.TemporaryDirectory(dir=sparse.parent, prefix='.mapping-') as work:
        with tqdm(desc='mapping', total=count, unit='photo', disable=None if progress else True) as bar:
            models = pycolmap.incremental_mapping(
                database,
                photos,
                work,
                pycolmap.IncrementalPipelineOptions(random_seed=seed),
                initial_image_pair_callback=lambda: bar.update(2),
                next_image_callback=bar.update,
            )
        if not models:
            raise ValueError(
                f'COLMAP found no model in the {count} photographs of {photos}: they must overlap, show texture, and '
                'be taken from different places'
            )
        models_folder = Path(work) / 'sparse'
        models_folder.mkdir()
        for number in models:
            (Path(work) / str(number)).rename(models_folder / str(number))
        models_folder.rename(sparse)
