"""Rendered pedestrians: a person re-identification set that every machine can make for itself, without a download.

The re-ID job needs a default data set that nobody has to apply for. This one is drawn: figures with a build, skin,
hair, patterned clothes, shoes and bags, walking past cameras that each have their own background, light, colour cast,
blur and noise. The folder has the layout, the file names and the rules of Market-1501 (Zheng et al., "Scalable Person
Re-identification: A Benchmark", ICCV 2015): disjoint identities for training and test, one query per test identity and
camera, badly cut boxes labelled -1 (junk) and strangers or empty boxes labelled 0000 (distractors) in the gallery.

Every image is a function of (seed, what it shows) alone, so the bytes depend neither on the number of processes nor on
how many identities are rendered: a larger set contains the smaller one.

The worker processes run this very file, as a script. They therefore import nothing but NumPy, Pillow and tqdm, need no
`if __name__ == '__main__'` in the caller's script (as `multiprocessing`'s spawn does), and copy no locks held by the
caller's threads (as its fork does).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from io import BytesIO
from math import ceil, cos, hypot, pi, sin
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter
from tqdm import tqdm

__all__ = ['default_root', 'render_pedestrians']

# To be raised with every change that alters a pixel: the manifest and the cache's folder name carry it.
RENDERER_VERSION = 1
MANIFEST = 'pedestrians.json'
FOLDERS = ('bounding_box_train', 'bounding_box_test', 'query')

# Starting a process costs about as much as rendering this many images.
_IMAGES_WORTH_A_WORKER = 50
_JUNK_PER_TEST_IDENTITY = 3
_DISTRACTORS_PER_TEST_IDENTITY = 2

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Settings:
    """What determines every byte of a rendered set."""

    num_identities: int = 340
    num_cameras: int = 6
    images_per_camera: int = 4
    size: tuple[int, int] = (128, 64)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_identities < 4:
            raise ValueError(f'num_identities must be at least 4 (half train, half test), got {self.num_identities}')
        if not 3 <= self.num_cameras <= 9:
            raise ValueError(
                f'num_cameras must lie in 3..9 (everybody is missed by one camera, and the file names have one digit '
                f'for it), got {self.num_cameras}'
            )
        if not 2 <= self.images_per_camera <= 99:
            raise ValueError(f'images_per_camera must lie in 2..99, got {self.images_per_camera}')
        if len(self.size) != 2 or min(self.size) < 16:
            raise ValueError(f'size must be (height, width) of at least 16 pixels each, got {self.size}')
        if self.seed < 0:
            raise ValueError(f'seed must not be negative, got {self.seed}')

    @property
    def manifest(self) -> dict:
        return {'renderer': RENDERER_VERSION, **asdict(self), 'size': list(self.size)}

    @property
    def folder_name(self) -> str:
        height, width = self.size
        return (
            f'v{RENDERER_VERSION}-{self.num_identities}ids-{self.num_cameras}cams-{self.images_per_camera}imgs-'
            f'{height}x{width}-seed{self.seed}'
        )


class Shot(NamedTuple):
    """One image to make: whom or what it shows, and where it is filed."""

    kind: str  # 'person', 'junk' or 'distractor'
    identity: int  # from 0; of junk and distractors, the test identity that they accompany
    camera: int  # from 0
    index: int  # counts the images of this kind, identity and camera
    folder: str

    @property
    def path(self) -> str:
        label = {'person': f'{self.identity + 1:04d}', 'junk': '-1', 'distractor': '0000'}[self.kind]
        box = {'person': 1, 'junk': 2, 'distractor': 3}[self.kind]
        frame = 100 * (self.identity + 1) + self.index
        return f'{self.folder}/{label}_c{self.camera + 1}s1_{frame:06d}_{box:02d}.jpg'


def render_pedestrians(
    root: str | Path | None = None,
    *,
    num_identities: int = Settings.num_identities,
    num_cameras: int = Settings.num_cameras,
    images_per_camera: int = Settings.images_per_camera,
    size: tuple[int, int] = Settings.size,
    seed: int = Settings.seed,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Renders a person re-identification set as a folder in Market-1501's format.

    Odd person ids (1, 3, ...) are the training set, even ones the test set. A complete folder is returned at once; one
    that was left unfinished is completed. The same arguments and the same version of Pillow give the same bytes, for
    any number of workers.

    Args:
        root: the folder to write; None for `default_root` with the same arguments.
        num_identities: people, train and test together.
        num_cameras: 3 to 9. Each person is seen by at least half of them and never by all.
        images_per_camera: images of a person in each camera that sees them, at least 2. One of them is the query for
            test identities.
        size: height and width in pixels. Figures are drawn at 2:1 and squashed to this, as detectors' boxes are.
        seed: another seed gives other people and other cameras.
        workers: processes; None for one per available core.
        progress: shows a progress bar where the standard error is a terminal.

    Returns:
        The folder that holds `bounding_box_train`, `bounding_box_test` and `query`.

    Raises:
        ValueError: for an argument out of its range, and where `root` holds another rendering or other images.
        RuntimeError: where a worker process failed.
    """
    settings = Settings(num_identities, num_cameras, images_per_camera, tuple(size), seed)
    root = Path(root) if root is not None else default_root(**asdict(settings))
    manifest = _read_manifest(root, settings)
    shots = _plan(settings)
    present = _present(root)
    _check_names(root, shots, present)
    if manifest is None:
        _check_bytes(root, settings, shots, present)
    missing = [shot for shot in shots if shot.path not in present]
    if manifest is not None and not missing:
        return root

    for folder in FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    # Images are written here and then moved, so that one cut short never lies among the finished ones.
    with (
        tempfile.TemporaryDirectory(prefix='.partial-', dir=root) as unfinished,
        tqdm(total=len(missing), desc='pedestrians', unit='img', disable=None if progress else True) as bar,
    ):
        workers = min(_num_cores() if workers is None else workers, ceil(len(missing) / _IMAGES_WORTH_A_WORKER))
        if workers > 1:
            _render_in_processes(root, Path(unfinished), settings, missing, workers, bar)
        else:
            for shot in missing:
                _write(root, Path(unfinished), settings, shot)
                bar.update()
        counts = {folder: sum(shot.folder == folder for shot in shots) for folder in FOLDERS}
        text = json.dumps({**settings.manifest, 'counts': counts}, indent=2) + '\n'
        _write_atomically(root / MANIFEST, Path(unfinished), text.encode())
    return root


def default_root(
    *,
    num_identities: int = Settings.num_identities,
    num_cameras: int = Settings.num_cameras,
    images_per_camera: int = Settings.images_per_camera,
    size: tuple[int, int] = Settings.size,
    seed: int = Settings.seed,
) -> Path:
    """The cache folder of a rendering: below `$CSA_ZOO_CACHE`, or `~/.cache/csa_zoo`, named by its parameters."""
    cache = Path(os.environ.get('CSA_ZOO_CACHE') or '~/.cache/csa_zoo').expanduser()
    settings = Settings(num_identities, num_cameras, images_per_camera, tuple(size), seed)
    return cache / 'pedestrians' / settings.folder_name


def _read_manifest(root: Path, settings: Settings) -> dict | None:
    path = root / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f'{path} is not a manifest of rendered pedestrians ({error}); remove it or the folder'
        ) from error
    differences = [
        f'{key} is {manifest.get(key)!r} there and {value!r} here'
        for key, value in settings.manifest.items()
        if manifest.get(key) != value
    ]
    if differences:
        raise ValueError(
            f'{root} holds another rendering of pedestrians: {"; ".join(differences)}. Render into another folder, ask '
            f'for the parameters in {path}, or remove the folder.'
        )
    return manifest


def _plan(settings: Settings) -> list[Shot]:
    """All images of a set, person by person."""
    shots = []
    num_cameras = settings.num_cameras
    for identity in range(settings.num_identities):
        rng = _rng(settings.seed, 'itinerary', identity)
        seen_by = rng.permutation(num_cameras)[: rng.integers(max(2, num_cameras // 2), num_cameras)]
        is_test = identity % 2 == 1
        for camera in sorted(int(camera) for camera in seen_by):
            for index in range(settings.images_per_camera):
                folder = 'bounding_box_train' if not is_test else 'query' if index == 0 else 'bounding_box_test'
                shots.append(Shot('person', identity, camera, index, folder))
        if is_test:
            kinds = ['junk'] * _JUNK_PER_TEST_IDENTITY + ['distractor'] * _DISTRACTORS_PER_TEST_IDENTITY
            for index, kind in enumerate(kinds):
                shots.append(Shot(kind, identity, int(rng.integers(num_cameras)), index, 'bounding_box_test'))
    return shots


def _present(root: Path) -> set[str]:
    return {
        f'{folder}/{entry.name}'
        for folder in FOLDERS
        if (root / folder).is_dir()
        for entry in os.scandir(root / folder)
        if not entry.name.startswith('.')
    }


def _check_names(root: Path, shots: Sequence[Shot], present: set[str]) -> None:
    foreign = present - {shot.path for shot in shots}
    if foreign:
        raise ValueError(
            f'{root} holds {len(foreign)} files not of this rendering, such as {min(foreign)}. Render into another '
            f'folder, or remove this one.'
        )


def _check_bytes(root: Path, settings: Settings, shots: Sequence[Shot], present: set[str]) -> None:
    """Renders one image again, where no manifest says what an unfinished folder holds.

    Not done where there is one: other versions of Pillow may encode other bytes, and do not make a folder invalid.
    """
    shot = next((shot for shot in shots if shot.path in present), None)
    if shot is not None and (root / shot.path).read_bytes() != _encode(settings, shot):
        raise ValueError(
            f'{root / shot.path} is not what seed {settings.seed}, size {settings.size} and version {RENDERER_VERSION} '
            f'of the renderer give. Render into another folder, or remove this one.'
        )


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _remove_leftovers(root: Path) -> None:
    """Removes what killed renderings left. One at work changes its folder every few milliseconds."""
    for folder in root.glob('.partial-*'):
        if time.time() - folder.stat().st_mtime > 60:
            for path in folder.iterdir():
                path.unlink(missing_ok=True)
            folder.rmdir()


def _write_atomically(path: Path, unfinished: Path, data: bytes) -> None:
    draft = unfinished / path.name
    draft.write_bytes(data)
    os.replace(draft, path)


def _write(root: Path, unfinished: Path, settings: Settings, shot: Shot) -> None:
    _write_atomically(root / shot.path, unfinished, _encode(settings, shot))


def _render_in_processes(
    root: Path, unfinished: Path, settings: Settings, shots: Sequence[Shot], workers: int, bar: tqdm
) -> None:
    """Gives each worker every n-th image; all of them report through one pipe, a byte for each image."""
    reports, report_to = os.pipe()
    processes: list[subprocess.Popen] = []
    logs = [unfinished / f'worker{number}.log' for number in range(workers)]
    common = {'root': str(root), 'unfinished': str(unfinished), 'settings': asdict(settings)}
    try:
        try:
            for number, log in enumerate(logs):
                job = unfinished / f'worker{number}.json'
                job.write_text(json.dumps({**common, 'shots': shots[number::workers]}))
                with job.open('rb') as stdin, log.open('wb') as stderr:
                    command = [sys.executable, __file__]
                    processes.append(subprocess.Popen(command, stdin=stdin, stdout=report_to, stderr=stderr))
        finally:
            # The reader sees the end once the last writer has closed the pipe, this process included.
            os.close(report_to)
        while done := os.read(reports, 4096):
            bar.update(len(done))
        for process, log in zip(processes, logs, strict=True):
            if process.wait() != 0:
                text = log.read_text(errors='replace')
                raise RuntimeError(f'a process that renders pedestrians ended with {process.returncode}:\n{text}')
    finally:
        for process in processes:
            process.kill()
            process.wait()
        os.close(reports)


def _work() -> None:
    """What a worker process does: reads its job from standard input, reports on standard output."""
    job = json.load(sys.stdin)
    settings = Settings(**{**job['settings'], 'size': tuple(job['settings']['size'])})
    for shot in job['shots']:
        _write(Path(job['root']), Path(job['unfinished']), settings, Shot(*shot))
        os.write(sys.stdout.fileno(), b'.')


_STREAMS = ('itinerary', 'person', 'stranger', 'camera', 'track', 'person image', 'junk image', 'distractor image')


def _rng(seed: int, stream: str, *key: int) -> np.random.Generator:
    """Random numbers that belong to (seed, stream, key) alone. A stream's keys must all have one length."""
    return np.random.default_rng(np.random.SeedSequence((seed, _STREAMS.index(stream), *key)))


# Colours people wear, by how often one meets them: mostly dark, grey, blue and white.
_UPPER_COLOURS: dict[Colour, int] = {
    (28, 28, 32): 26,
    (62, 64, 70): 12,
    (128, 130, 134): 11,
    (226, 226, 222): 21,
    (34, 42, 78): 14,
    (60, 94, 160): 7,
    (150, 182, 216): 5,
    (168, 38, 44): 6,
    (196, 176, 142): 4,
    (58, 88, 62): 4,
    (206, 178, 62): 2,
    (212, 138, 156): 3,
    (92, 60, 110): 2,
    (98, 70, 52): 4,
    (214, 112, 52): 2,
}
_LOWER_COLOURS: dict[Colour, int] = {
    (26, 27, 31): 28,
    (40, 52, 88): 22,
    (82, 108, 150): 11,
    (70, 72, 78): 12,
    (140, 138, 134): 6,
    (176, 156, 120): 8,
    (222, 220, 214): 4,
    (84, 62, 48): 4,
    (76, 82, 60): 3,
    (136, 44, 50): 2,
}
_ACCENT_COLOURS: dict[Colour, int] = {
    (236, 236, 232): 28,
    (30, 30, 34): 20,
    (184, 40, 46): 12,
    (44, 80, 160): 11,
    (226, 190, 60): 8,
    (150, 152, 156): 8,
    (66, 130, 84): 5,
    (230, 126, 60): 4,
    (216, 132, 166): 4,
}
_SKINS: dict[Colour, int] = {
    (238, 200, 174): 5,
    (222, 176, 142): 5,
    (196, 144, 106): 3,
    (142, 96, 68): 2,
    (88, 60, 46): 2,
}
_HAIRS: dict[Colour, int] = {
    (26, 22, 22): 9,
    (58, 40, 30): 6,
    (112, 78, 48): 3,
    (190, 156, 102): 2,
    (150, 146, 142): 2,
    (128, 56, 32): 1,
}
_BAG_COLOURS: dict[Colour, int] = {
    (30, 30, 34): 10,
    (40, 50, 86): 4,
    (104, 72, 48): 4,
    (160, 44, 48): 3,
    (120, 122, 126): 3,
    (70, 90, 66): 2,
    (206, 120, 60): 1,
    (204, 192, 168): 2,
}
_SHOE_COLOURS: dict[Colour, int] = {
    (26, 26, 28): 9,
    (228, 228, 226): 7,
    (92, 64, 44): 3,
    (110, 112, 118): 3,
    (172, 46, 48): 1,
    (48, 76, 140): 1,
}
_PATTERNS: dict[str, int] = {
    'plain': 40,
    'stripes': 13,
    'pinstripes': 5,
    'checks': 9,
    'band': 10,
    'yoke': 8,
    'halves': 6,
    'quarters': 5,
    'dots': 5,
    'print': 13,
}


def _choose(rng: np.random.Generator, weights: dict):
    """A key of `weights`, with probability in proportion to its weight."""
    keys = list(weights)
    cumulative = np.cumsum(list(weights.values()))
    return keys[int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side='right'))]


def _dye(rng: np.random.Generator, weights: dict[Colour, int], spread: float = 5.0) -> Colour:
    """A colour of a palette, a little off, as no two garments are the same."""
    shade = np.asarray(_choose(rng, weights)) + spread * rng.standard_normal() + 0.5 * spread * rng.standard_normal(3)
    return tuple(int(value) for value in shade.clip(8, 247))


def _normal(rng: np.random.Generator, mean: float, deviation: float, low: float, high: float) -> float:
    return min(max(float(rng.normal(mean, deviation)), low), high)


@dataclass(frozen=True)
class Person:
    """All that stays the same about a person between cameras. Lengths are in units of the stature."""

    stature: float
    girth: float
    shoulders: float
    waist: float
    hip_height: float
    skin: Colour
    hair: Colour
    hair_style: str
    hat: str
    hat_colour: Colour
    upper_colours: tuple[Colour, Colour, Colour]
    pattern: str
    pattern_size: float
    open_front: bool
    back_print: bool
    sleeve_length: float
    sleeve_colour: Colour
    hem: float
    flare: float
    lower: str
    lower_colours: tuple[Colour, Colour]
    lower_length: float
    lower_width: float
    side_stripe: bool
    shoes: Colour
    sole: Colour
    boots: bool
    bag: str
    bag_colour: Colour
    bag_side: int
    motif_seed: int

    @cached_property
    def upper_texture(self) -> np.ndarray:
        return _draw_upper(self)

    @cached_property
    def lower_texture(self) -> np.ndarray:
        return _draw_lower(self)


@lru_cache(maxsize=64)
def _person(seed: int, stream: str, *key: int) -> Person:
    rng = _rng(seed, stream, *key)
    upper = _dye(rng, _UPPER_COLOURS)
    accents = (_dye(rng, _ACCENT_COLOURS), _dye(rng, _ACCENT_COLOURS))
    lower_kind = _choose(rng, {'trousers': 62, 'shorts': 18, 'skirt': 12, 'dress': 8})
    lower_length = {
        'trousers': rng.choice([0.8, 0.98, 0.98, 0.98]),
        'shorts': rng.uniform(0.3, 0.58),
        'skirt': rng.uniform(0.3, 0.75),
        'dress': 0.1,
    }[lower_kind]
    is_dress = lower_kind == 'dress'
    return Person(
        stature=_normal(rng, 1, 0.05, 0.88, 1.1),
        girth=_normal(rng, 1, 0.14, 0.75, 1.4),
        shoulders=_normal(rng, 1, 0.09, 0.8, 1.2),
        waist=_normal(rng, 0.9, 0.1, 0.7, 1.2),
        hip_height=_normal(rng, 0.5, 0.015, 0.46, 0.54),
        skin=_dye(rng, _SKINS, 5),
        hair=_dye(rng, _HAIRS, 6),
        hair_style=_choose(rng, {'short': 40, 'bald': 6, 'long': 20, 'bob': 10, 'bun': 8, 'tail': 10, 'curly': 6}),
        hat=_choose(rng, {'none': 84, 'cap': 8, 'beanie': 4, 'hood': 4}),
        hat_colour=_dye(rng, _ACCENT_COLOURS),
        upper_colours=(upper, *accents),
        pattern=_choose(rng, _PATTERNS),
        pattern_size=float(rng.random()),
        open_front=bool(rng.random() < 0.2) and not is_dress,
        back_print=bool(rng.random() < 0.15),
        sleeve_length=_choose(rng, {0.0: 6, 0.33: 20, 0.42: 20, 0.7: 8, 0.97: 46}),
        sleeve_colour=accents[0] if rng.random() < 0.18 else upper,
        hem=rng.uniform(0.22, 0.36) if is_dress else _choose(rng, {0.5: 20, 0.47: 30, 0.44: 28, 0.4: 14, 0.3: 8}),
        flare=float(rng.uniform(1.1, 1.6) if is_dress else rng.uniform(0.98, 1.15)),
        lower=lower_kind,
        lower_colours=(_dye(rng, _LOWER_COLOURS), _dye(rng, _ACCENT_COLOURS)),
        lower_length=float(lower_length),
        lower_width=float(rng.uniform(0.85, 1.4)),
        side_stripe=bool(rng.random() < 0.14),
        shoes=_dye(rng, _SHOE_COLOURS),
        sole=_dye(rng, _SHOE_COLOURS),
        boots=bool(rng.random() < 0.12),
        bag=_choose(rng, {'none': 44, 'backpack': 26, 'shoulder bag': 18, 'handbag': 12}),
        bag_colour=_dye(rng, _BAG_COLOURS),
        bag_side=1 if rng.random() < 0.5 else -1,
        motif_seed=int(rng.integers(2**31)),
    )


# Garments are drawn unrolled: a column for each direction around the body, from the back over the person's right side,
# the front (the middle) and the left side to the back again; the first row is the collar, the last the hem.
_AROUND, _DOWN = 128, 64
_FRONT, _BACK = _AROUND // 2, 0


def _draw_upper(person: Person) -> np.ndarray:
    """The upper garment unrolled, uint8 (_DOWN, _AROUND, 3)."""
    rng = np.random.default_rng(person.motif_seed)
    base, accent, other = person.upper_colours
    image = Image.new('RGB', (_AROUND, _DOWN), base)
    draw = ImageDraw.Draw(image)
    _draw_pattern(draw, person, rng)
    if person.back_print:
        _draw_motif(draw, rng, _BACK + 2, 24, rng.uniform(6, 11), accent)
        _draw_motif(draw, rng, _AROUND - 2, 24, rng.uniform(4, 8), accent)
    if person.open_front:
        gap = rng.integers(5, 12)
        draw.rectangle((_FRONT - gap, 0, _FRONT + gap, _DOWN), fill=other)
        if rng.random() < 0.4:
            _draw_motif(draw, rng, _FRONT, 26, gap * 0.8, accent)
    elif rng.random() < 0.25:
        draw.line((_FRONT, 0, _FRONT, _DOWN), fill=_scaled(base, 0.55), width=2)
    if rng.random() < 0.35:
        draw.rectangle((0, _DOWN - 4, _AROUND, _DOWN), fill=accent if rng.random() < 0.5 else _scaled(base, 0.6))
    neckline = rng.integers(3, 11)
    draw.ellipse((_FRONT - 9, -neckline, _FRONT + 9, neckline), fill=person.skin if rng.random() < 0.7 else accent)
    _draw_straps(draw, person)
    return np.asarray(image)


def _draw_pattern(draw: ImageDraw.ImageDraw, person: Person, rng: np.random.Generator) -> None:
    base, accent, other = person.upper_colours
    size = person.pattern_size
    if person.pattern in ('stripes', 'checks'):
        period = 6 + 9 * size
        for row in np.arange(rng.uniform(0, period), _DOWN, period):
            draw.rectangle((0, row, _AROUND, row + period * 0.42), fill=accent)
    if person.pattern in ('pinstripes', 'checks'):
        colour = accent if person.pattern == 'pinstripes' else other if rng.random() < 0.4 else _scaled(base, 0.6)
        period = _AROUND / round(12 + 10 * (1 - size))
        for column in np.arange(0, _AROUND, period):
            draw.rectangle((column, 0, column + period * 0.35, _DOWN), fill=colour)
    if person.pattern == 'band':
        top = 14 + 22 * size
        height = rng.uniform(6, 16)
        draw.rectangle((0, top, _AROUND, top + height), fill=accent)
        if rng.random() < 0.5:
            draw.rectangle((0, top + height * 0.35, _AROUND, top + height * 0.6), fill=other)
    if person.pattern == 'yoke':
        draw.rectangle((0, 0, _AROUND, 13 + 10 * size), fill=accent)
    if person.pattern == 'halves':
        draw.rectangle((0, 30 + 8 * size, _AROUND, _DOWN), fill=accent)
    if person.pattern == 'quarters':
        draw.rectangle((_FRONT, 0, _AROUND, _DOWN), fill=accent)
    if person.pattern == 'dots':
        radius = 1.6 + 2.2 * size
        for row, top in enumerate(np.arange(4, _DOWN, 3.6 * radius)):
            for left in np.arange(row % 2 * 1.8 * radius, _AROUND, 3.6 * radius):
                draw.ellipse((left - radius, top - radius, left + radius, top + radius), fill=accent)
    if person.pattern == 'print':
        if size < 0.3:
            _draw_motif(draw, rng, _FRONT + 11 * person.bag_side, 17, 4.5, accent)
        else:
            _draw_motif(draw, rng, _FRONT, rng.uniform(22, 32), 9 + 8 * size, accent)
            _draw_motif(draw, rng, _FRONT, rng.uniform(22, 32), 5, other)


def _draw_motif(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, column: float, row: float, radius: float, colour: Colour
) -> None:
    """A printed sign: a disc, ring, bar, square, triangle, diamond, cross, arrow or lines of lettering."""
    shape = rng.integers(8)
    box = (column - radius, row - radius, column + radius, row + radius)
    if shape == 0:
        draw.ellipse(box, fill=colour)
    elif shape == 1:
        draw.ellipse(box, outline=colour, width=max(2, int(radius * 0.4)))
    elif shape == 2:
        draw.rectangle((column - radius, row - radius * 0.35, column + radius, row + radius * 0.35), fill=colour)
    elif shape == 3:
        draw.rectangle(box, fill=colour)
    elif shape == 4:
        corners = rng.permutation([(-1, -1), (1, -1), (0, 1), (-1, 1)])[:3]
        draw.polygon([(column + radius * x, row + radius * y) for x, y in corners], fill=colour)
    elif shape == 5:
        draw.polygon(
            [(column + radius * x, row + radius * y) for x, y in ((0, -1), (1, 0), (0, 1), (-1, 0))], fill=colour
        )
    elif shape == 6:
        draw.rectangle((column - radius, row - radius * 0.3, column + radius, row + radius * 0.3), fill=colour)
        draw.rectangle((column - radius * 0.3, row - radius, column + radius * 0.3, row + radius), fill=colour)
    else:
        for line in (-0.7, 0.0, 0.7):
            left, right = rng.uniform(0.5, 1, 2) * radius
            draw.line((column - left, row + line * radius, column + right, row + line * radius), fill=colour, width=2)


def _draw_straps(draw: ImageDraw.ImageDraw, person: Person) -> None:
    if person.bag == 'backpack':
        for side in (-1, 1):
            column = _FRONT + 12 * side
            draw.line((column, 0, column + 4 * side, _DOWN * 0.62), fill=person.bag_colour, width=5)
    elif person.bag == 'shoulder bag':
        near, far = 12 * person.bag_side, -14 * person.bag_side
        draw.line((_FRONT + far, 0, _FRONT + 2 * near, _DOWN), fill=person.bag_colour, width=3)
        for back in (0, _AROUND):
            draw.line((back - far, 0, back - 2 * near, _DOWN), fill=person.bag_colour, width=3)


def _draw_lower(person: Person) -> np.ndarray:
    """A skirt unrolled, or the seat of trousers; uint8 (_DOWN, _AROUND, 3)."""
    rng = np.random.default_rng(person.motif_seed + 1)
    base, accent = person.lower_colours
    image = Image.new('RGB', (_AROUND, _DOWN), base)
    draw = ImageDraw.Draw(image)
    if person.lower == 'skirt':
        kind = rng.integers(5)
        if kind == 0:
            draw.rectangle((0, _DOWN - rng.integers(8, 20), _AROUND, _DOWN), fill=accent)
        elif kind == 1:
            for column in range(0, _AROUND, 8):
                draw.rectangle((column, 0, column + 2, _DOWN), fill=_scaled(base, 0.6))
        elif kind == 2:
            for row in range(4, _DOWN, 12):
                draw.rectangle((0, row, _AROUND, row + 4), fill=accent)
    if rng.random() < 0.4:
        draw.rectangle((0, 0, _AROUND, 5), fill=_scaled(base, 0.45))
    return np.asarray(image)


def _faded(colour: Colour) -> Colour:
    grey = sum(colour) // 3
    return tuple((value + grey) // 2 for value in colour)


def _scaled(colour: Colour, factor: float) -> Colour:
    return tuple(min(255, int(value * factor)) for value in colour)


class View(NamedTuple):
    """How a figure stands before the camera."""

    yaw: float  # 0 faces the camera, pi turns the back to it; at pi/2 the person walks to the image's right
    phase: float  # of the walking cycle, in radians
    stride: float  # amplitude of the legs' swing, in radians
    pitch: float  # how far the camera looks down, in radians
    light: float  # -1 from the left, 1 from the right
    scale: float  # pixels per stature
    left: float  # pixel column of the body's axis
    ground: float  # pixel row of the feet

    def project(self, lateral: float, height: float, forward: float) -> tuple[float, float]:
        """Pixel of a body point; `lateral` grows to the person's left, `forward` to where the chest points."""
        depth = self.depth(lateral, forward)
        column = self.left + self.scale * (lateral * cos(self.yaw) + forward * sin(self.yaw))
        return column, self.ground - self.scale * (height * cos(self.pitch) - depth * sin(self.pitch))

    def depth(self, lateral: float, forward: float) -> float:
        """How much nearer to the camera than the body's axis a point lies."""
        return forward * cos(self.yaw) - lateral * sin(self.yaw)


class Canvas:
    """A colour layer and a layer of light that multiplies it, drawn on in step."""

    def __init__(self, image: Image.Image):
        self.colour = image
        self.shade = Image.new('L', image.size, 235)
        self.draw_colour = ImageDraw.Draw(self.colour)
        self.draw_shade = ImageDraw.Draw(self.shade)

    def ellipse(
        self, centre: tuple[float, float], across: float, down: float, colour: Colour, light: float = 0
    ) -> None:
        x, y = centre
        self.draw_colour.ellipse((x - across, y - down, x + across, y + down), fill=colour)
        self.draw_shade.ellipse((x - across, y - down, x + across, y + down), fill=165)
        x += 0.3 * light * across
        y -= 0.2 * down
        self.draw_shade.ellipse((x - 0.7 * across, y - 0.7 * down, x + 0.7 * across, y + 0.7 * down), fill=230)

    def polygon(self, points: Sequence[tuple[float, float]], colour: Colour, shade: int = 205) -> None:
        self.draw_colour.polygon(points, fill=colour)
        self.draw_shade.polygon(points, fill=shade)

    def limb(self, start, end, radius: float, end_radius: float, colour: Colour, light: float) -> None:
        """A tapered capsule from pixel to pixel, lit from one side."""
        _capsule(self.draw_colour, start, end, radius, end_radius, colour)
        _capsule(self.draw_shade, start, end, radius, end_radius, 160)
        shift = 0.4 * light
        lit_start = (start[0] + shift * radius, start[1])
        lit_end = (end[0] + shift * end_radius, end[1])
        _capsule(self.draw_shade, lit_start, lit_end, 0.6 * radius, 0.6 * end_radius, 232)


def _capsule(draw: ImageDraw.ImageDraw, start, end, radius: float, end_radius: float, fill) -> None:
    (x0, y0), (x1, y1) = start, end
    length = hypot(x1 - x0, y1 - y0)
    if length > 0.5:
        across, down = (y1 - y0) / length, (x0 - x1) / length
        draw.polygon(
            (
                (x0 + across * radius, y0 + down * radius),
                (x1 + across * end_radius, y1 + down * end_radius),
                (x1 - across * end_radius, y1 - down * end_radius),
                (x0 - across * radius, y0 - down * radius),
            ),
            fill=fill,
        )
    draw.ellipse((x0 - radius, y0 - radius, x0 + radius, y0 + radius), fill=fill)
    draw.ellipse((x1 - end_radius, y1 - end_radius, x1 + end_radius, y1 + end_radius), fill=fill)


def _paint_person(canvas: Canvas, person: Person, view: View, rng: np.random.Generator) -> None:
    """Draws the parts of a figure from the farthest to the nearest."""
    facing = cos(view.yaw)
    parts = [
        (0.0, partial(_paint_trunk, canvas, person, view, rng)),
        (0.01 + 0.02 * facing, partial(_paint_head, canvas, person, view)),
    ]
    for side in (-1, 1):
        swing = view.stride * sin(view.phase) * side
        # Legs hang below the trunk's garment: they go behind it, the farther one first.
        parts.append(
            (view.depth(0.06 * side, 0.1 * swing) - 0.2, partial(_paint_leg, canvas, person, view, side, swing))
        )
        parts.append((view.depth(0.15 * side, -0.1 * swing), partial(_paint_arm, canvas, person, view, side, swing)))
    if person.bag == 'backpack':
        parts.append((-0.13 * facing, partial(_paint_backpack, canvas, person, view)))
    elif person.bag == 'shoulder bag':
        depth = view.depth(0.19 * person.bag_side, 0)
        parts.append((depth, partial(_paint_bag, canvas, person, view, 0.15, 0.46, 0.065)))
    for _, paint in sorted(parts, key=lambda part: part[0]):
        paint()


def _paint_leg(canvas: Canvas, person: Person, view: View, side: int, swing: float) -> None:
    thigh = 0.47 * person.hip_height
    shank = 0.45 * person.hip_height
    bend = 0.15 + 0.9 * view.stride * max(0.0, -side * cos(view.phase))
    lateral = 0.045 * person.girth * side
    knee_forward = thigh * sin(swing)
    knee_height = person.hip_height - thigh * cos(swing)
    ankle_forward = knee_forward + shank * sin(swing - bend)
    ankle_height = knee_height - shank * cos(swing - bend)
    hip = view.project(lateral, person.hip_height, 0)
    knee = view.project(lateral, knee_height, knee_forward)
    ankle = view.project(lateral, ankle_height, ankle_forward)
    toe = view.project(lateral * 1.3, ankle_height - 0.025, ankle_forward + 0.095)
    heel = view.project(lateral, ankle_height - 0.02, ankle_forward)

    size, light = view.scale * person.girth**0.5, view.light
    colour = person.lower_colours[0]
    canvas.limb(knee, ankle, 0.034 * size, 0.022 * size, person.skin, light)
    canvas.limb(heel, toe, 0.027 * size, 0.022 * size, person.shoes, light)
    canvas.draw_colour.line(
        (heel[0], heel[1] + 0.018 * size, toe[0], toe[1] + 0.016 * size), person.sole, max(1, int(0.014 * size))
    )
    if person.boots:
        canvas.limb(_between(knee, ankle, 0.35), ankle, 0.034 * size, 0.03 * size, person.shoes, light)
    thigh_radius, knee_radius = 0.056 * size, 0.036 * size * person.lower_width
    if person.lower_length <= 0.5 or person.lower in ('skirt', 'dress'):
        canvas.limb(hip, knee, 0.048 * size, 0.034 * size, person.skin, light)
        if person.lower not in ('skirt', 'dress'):
            canvas.limb(
                hip, _between(hip, knee, 2 * person.lower_length), thigh_radius, knee_radius * 1.15, colour, light
            )
    else:
        cuff = _between(knee, ankle, 2 * person.lower_length - 1)
        canvas.limb(hip, knee, thigh_radius, knee_radius, colour, light)
        canvas.limb(knee, cuff, knee_radius, 0.027 * size * person.lower_width, colour, light)
        if person.side_stripe and view.depth(side, 0) > -0.5:
            shift = 0.03 * size * side * cos(view.yaw)
            line = [(x + shift, y) for x, y in (hip, knee, cuff)]
            canvas.draw_colour.line(line, person.lower_colours[1], max(2, int(0.016 * size)))


def _between(start: tuple[float, float], end: tuple[float, float], fraction: float) -> tuple[float, float]:
    return start[0] + fraction * (end[0] - start[0]), start[1] + fraction * (end[1] - start[1])


def _paint_arm(canvas: Canvas, person: Person, view: View, side: int, swing: float) -> None:
    upper_arm, forearm = 0.165, 0.15
    lateral = 0.104 * person.shoulders * (0.6 + 0.4 * person.girth) * side
    swing = -0.8 * swing
    bend = 0.25 + 0.5 * max(0.0, swing)
    elbow_at = (lateral * 1.16, 0.8 - upper_arm * cos(swing), upper_arm * sin(swing))
    wrist_at = (lateral * 1.2, elbow_at[1] - forearm * cos(swing + bend), elbow_at[2] + forearm * sin(swing + bend))
    shoulder, elbow, wrist = view.project(lateral, 0.8, 0), view.project(*elbow_at), view.project(*wrist_at)
    size, light = view.scale * person.girth**0.5, view.light
    length = person.sleeve_length
    canvas.ellipse(wrist, 0.024 * size, 0.03 * size, person.skin, light)
    canvas.limb(elbow, wrist, 0.025 * size, 0.019 * size, person.skin, light)
    if length <= 0.5:
        canvas.limb(shoulder, elbow, 0.033 * size, 0.026 * size, person.skin, light)
        if length > 0:
            canvas.limb(
                shoulder, _between(shoulder, elbow, 2 * length), 0.041 * size, 0.036 * size, person.sleeve_colour, light
            )
    else:
        cuff = _between(elbow, wrist, 2 * length - 1)
        canvas.limb(shoulder, elbow, 0.041 * size, 0.034 * size, person.sleeve_colour, light)
        canvas.limb(elbow, cuff, 0.034 * size, 0.028 * size, person.sleeve_colour, light)
    if person.bag == 'handbag' and side == person.bag_side:
        _paint_bag(canvas, person, view, abs(wrist_at[0]), wrist_at[1] - 0.1, 0.06, wrist_at[2])


def _paint_bag(
    canvas: Canvas, person: Person, view: View, lateral: float, height: float, radius: float, forward: float = 0.0
) -> None:
    """A bag at the side that it hangs from: broad from the side, narrow from the front."""
    x, y = view.project(lateral * person.bag_side, height, forward)
    across = view.scale * (radius * abs(sin(view.yaw)) + 0.4 * radius * abs(cos(view.yaw)) + 0.012)
    down = view.scale * radius * 0.85
    canvas.polygon(
        ((x - across, y - down), (x + across, y - down), (x + across, y + down), (x - across, y + down)),
        person.bag_colour,
    )
    canvas.draw_colour.line(
        (x - across * 0.6, y - down, x, y - 1.9 * down, x + across * 0.6, y - down), person.bag_colour, 2
    )
    canvas.draw_colour.line(
        (x - across, y - down * 0.3, x + across, y - down * 0.3), _scaled(person.bag_colour, 0.6), 2
    )


def _paint_backpack(canvas: Canvas, person: Person, view: View) -> None:
    x, y = view.project(0, 0.7, -0.125)
    across = view.scale * (0.085 * abs(cos(view.yaw)) + 0.06 * abs(sin(view.yaw)))
    down = view.scale * (0.1 + 0.02 * person.pattern_size)
    box = (x - across, y - down, x + across, y + down)
    canvas.draw_colour.rounded_rectangle(box, 0.4 * across, fill=person.bag_colour)
    canvas.draw_shade.rounded_rectangle(box, 0.4 * across, fill=170)
    lit = 0.25 * view.light * across
    canvas.draw_shade.rounded_rectangle(
        (x + lit - 0.7 * across, y - 0.85 * down, x + lit + 0.7 * across, y + 0.7 * down), 0.4 * across, fill=228
    )
    pocket = person.upper_colours[2] if person.motif_seed % 3 == 0 else _scaled(person.bag_colour, 0.7)
    shift = 0.3 * across * sin(view.yaw)
    canvas.draw_colour.rectangle(
        (x - 0.65 * across - shift, y + 0.1 * down, x + 0.65 * across - shift, y + 0.75 * down), fill=pocket
    )


def _paint_trunk(canvas: Canvas, person: Person, view: View, rng: np.random.Generator) -> None:
    girth, shoulders = person.girth, person.shoulders
    hips = 0.088 * (0.5 + 0.5 * girth)
    waist = 0.088 * person.waist * girth
    top = person.hip_height + 0.09
    if person.lower in ('skirt', 'dress'):
        bottom = person.hip_height * (1 - person.lower_length)
        lower = (
            (top, waist, 0.75 * waist),
            (person.hip_height, hips * 1.08, hips * 0.9),
            (bottom, hips * 1.35, hips * 1.2),
        )
    else:
        lower = ((top, waist, 0.75 * waist), (person.hip_height - 0.04, hips * 1.05, hips * 0.85))
    _paint_cloth(canvas, view, person.lower_texture, lower, rng)
    hem = min(person.hem, person.hip_height)
    upper = (
        (0.865, 0.036, 0.035),
        (0.845, 0.07 * shoulders, 0.05),
        (0.825, 0.1 * shoulders, 0.056),
        (0.79, 0.118 * shoulders * (0.6 + 0.4 * girth), 0.062 * girth),
        (0.73, 0.108 * shoulders * (0.5 + 0.5 * girth), 0.075 * girth),
        (0.6, max(waist, 0.08), 0.07 * girth),
        (hem, hips * 1.08 * person.flare, hips * 0.9 * person.flare),
    )
    _paint_cloth(canvas, view, person.upper_texture, upper, rng)


def _paint_cloth(
    canvas: Canvas,
    view: View,
    texture: np.ndarray,
    profile: Sequence[tuple[float, float, float]],
    rng: np.random.Generator,
) -> None:
    """Wraps an unrolled garment around a body whose cross-sections are ellipses.

    `profile` lists (height, half the breadth, half the depth) from the top down. A direction t on the garment
    (0 in front) lies at column A sin(t) cos(yaw) + B cos(t) sin(yaw) = R sin(t + delta), which is solved for t.
    """
    heights, breadths, depths = np.asarray(profile).T
    rise = view.scale * cos(view.pitch)
    first, last = (int(view.ground - rise * height) for height in (heights[0], heights[-1]))
    rows = np.arange(first, max(last, first + 1))
    height = (view.ground - rows) / rise
    breadth = np.interp(-height, -heights, breadths) * cos(view.yaw)
    depth = np.interp(-height, -heights, depths) * sin(view.yaw)
    radius = np.hypot(breadth, depth) * view.scale
    left, right = int(view.left - radius.max()), ceil(view.left + radius.max())
    across = (np.arange(left, right + 1) - view.left)[None] / radius[:, None]
    inside = np.abs(across) <= 1
    across = across.clip(-1, 1)
    direction = np.arcsin(across) - np.arctan2(depth, breadth)[:, None]
    columns = ((direction / (2 * pi) + 0.5) * _AROUND).astype(int) % _AROUND
    down = np.linspace(0, 1, len(rows), endpoint=False)
    patch = texture[(down * _DOWN).astype(int)[:, None], columns]

    waves, slant, shift = rng.uniform(1, 3), rng.uniform(-2, 2), rng.uniform(0, 2 * pi)
    folds = 12 * np.sin(2 * pi * (waves * down[:, None] + slant * across) + shift)
    shade = (222 + 38 * view.light * across - 48 * across**2 + folds).clip(0, 255)
    mask = Image.fromarray(inside.astype(np.uint8) * 255)
    canvas.colour.paste(Image.fromarray(patch), (left, first), mask)
    canvas.shade.paste(Image.fromarray(shade.astype(np.uint8)), (left, first), mask)


def _paint_head(canvas: Canvas, person: Person, view: View) -> None:
    size, light = view.scale, view.light
    facing, turned = cos(view.yaw), sin(view.yaw)
    neck, head = view.project(0, 0.86, 0), view.project(0, 0.93, 0.012)
    across, down = 0.05 * size * (0.9 + 0.1 * person.girth), 0.066 * size
    style = person.hair_style
    if style in ('long', 'bob'):
        drop = 0.17 if style == 'long' else 0.09
        fall = view.project(0, 0.93 - drop, -0.03)
        canvas.limb(head, fall, across * 1.12, across * (0.95 if style == 'long' else 1.1), person.hair, light)
    canvas.limb(neck, head, 0.026 * size, 0.03 * size, person.skin, light)
    if style == 'bald':
        canvas.ellipse(head, across, down, person.skin, light)
    else:
        bulk = 1.3 if style == 'curly' else 1.08
        canvas.ellipse(
            (head[0] - 0.1 * across * turned, head[1] - 0.06 * down), across * bulk, down * bulk, person.hair, light
        )
        if facing > -0.45:
            width = across * (0.85 if facing > 0.3 else 0.62)
            canvas.ellipse(
                (head[0] + 0.42 * across * turned, head[1] + 0.22 * down), width, down * 0.76, person.skin, light
            )
    if style == 'long' and facing < -0.2:
        canvas.limb(head, view.project(0, 0.77, -0.07), across, across * 0.9, person.hair, light)
    if style == 'bun':
        canvas.ellipse(view.project(0, 0.985, -0.045), 0.03 * size, 0.028 * size, person.hair, light)
    if style == 'tail' and (facing < 0.5 or abs(turned) > 0.5):
        canvas.limb(
            view.project(0, 0.95, -0.06), view.project(0, 0.82, -0.085), 0.02 * size, 0.014 * size, person.hair, light
        )
    _paint_hat(canvas, person, view, head, across, down)


def _paint_hat(
    canvas: Canvas, person: Person, view: View, head: tuple[float, float], across: float, down: float
) -> None:
    x, y = head
    if person.hat == 'none':
        return
    if person.hat == 'hood':
        canvas.ellipse((x, y), across * 1.25, down * 1.15, person.upper_colours[0], view.light)
        if cos(view.yaw) > -0.3:
            canvas.ellipse(
                (x + 0.35 * across * sin(view.yaw), y + 0.1 * down), across * 0.75, down * 0.8, person.skin, view.light
            )
        return
    top = y - 1.1 * down if person.hat == 'cap' else y - 1.3 * down
    for draw, fill in ((canvas.draw_colour, person.hat_colour), (canvas.draw_shade, 215)):
        draw.chord((x - 1.12 * across, top, x + 1.12 * across, y + 0.75 * down), 180, 360, fill=fill)
    if person.hat == 'cap' and cos(view.yaw) > -0.5:
        brim = x + 1.2 * across * sin(view.yaw)
        canvas.ellipse((brim, y - 0.18 * down), across * 0.85, down * 0.14, _scaled(person.hat_colour, 0.8), view.light)


@dataclass(frozen=True)
class Camera:
    """A place and a sensor: what its images have in common."""

    scene: Image.Image
    horizon: int
    paths: tuple[float, float]  # yaws of the two ways along which people walk
    pitch: float
    light: float
    sun: float  # 0 overcast to 1 hard shadows
    gains: tuple[float, float, float]
    gamma: float
    haze: float
    saturation: float
    resolution: float
    blur: float
    noise: float
    quality: int
    obstacle: str


_SCENE_SIZE = (960, 420)


@lru_cache(maxsize=16)
def _camera(seed: int, camera: int) -> Camera:
    rng = _rng(seed, 'camera', camera)
    horizon = int(rng.integers(170, 225))
    path = rng.uniform(0, 2 * pi)
    warmth, tint = rng.normal(0, 0.05), rng.normal(0, 0.02)
    exposure = rng.normal(0.05, 0.08)
    return Camera(
        scene=_draw_scene(rng, horizon),
        horizon=horizon,
        paths=(path, path + pi + rng.normal(0, 0.5)),
        pitch=float(rng.uniform(0.03, 0.32)),
        light=float(rng.uniform(-1, 1)),
        sun=float(rng.uniform(0, 1)),
        gains=tuple(float(np.exp(exposure + shift)) for shift in (warmth, tint, -warmth)),
        gamma=float(np.exp(rng.normal(-0.08, 0.09))),
        haze=float(rng.uniform(0, 0.07)),
        saturation=float(rng.uniform(0.8, 1.2)),
        resolution=float(rng.uniform(0.4, 0.9)),
        blur=float(rng.uniform(0.2, 0.9)),
        noise=float(rng.uniform(1, 6)),
        quality=int(rng.integers(55, 92)),
        obstacle=_choose(rng, {'pole': 1, 'bicycle': 1, 'railing': 1, 'bush': 1}),
    )


def _draw_scene(rng: np.random.Generator, horizon: int) -> Image.Image:
    """A wide backdrop: a facade, hedge, wall or fence down to the horizon, ground below it, and things left about."""
    width, height = _SCENE_SIZE
    wall, ground = (
        _dye(rng, {(150, 146, 138): 3, (168, 162, 150): 2, (134, 116, 104): 2, (116, 120, 124): 2}, 10)
        for _ in range(2)
    )
    image = Image.new('RGB', _SCENE_SIZE, wall)
    draw = ImageDraw.Draw(image)
    backdrop = _choose(rng, {'bricks': 2, 'windows': 3, 'hedge': 2, 'fence': 2, 'shops': 2})
    _draw_backdrop(draw, rng, backdrop, wall, horizon)
    floor = _choose(rng, {'tiles': 3, 'asphalt': 2, 'grass': 2})
    if floor == 'grass':
        ground = _dye(rng, {(112, 122, 96): 1, (130, 132, 104): 1}, 10)
    draw.rectangle((0, horizon, width, height), fill=ground)
    if floor == 'tiles':
        vanishing = rng.uniform(0, width)
        for column in range(-2 * width, 3 * width, 110):
            draw.line(
                (vanishing + (column - vanishing) * 0.3, horizon, column, height), fill=_scaled(ground, 0.82), width=2
            )
        for row in horizon + (height - horizon) * np.linspace(0.05, 1, 9) ** 1.6:
            draw.line((0, row, width, row), fill=_scaled(ground, 0.82), width=2)
    elif floor == 'asphalt':
        for column in range(int(rng.integers(200)), width, 260):
            draw.polygon(
                (
                    (column, height - 60),
                    (column + 90, height - 60),
                    (column + 70, height - 44),
                    (column - 25, height - 44),
                ),
                fill=(216, 214, 206),
            )
    draw.rectangle((0, horizon - 3, width, horizon + 7), fill=_scaled(ground, 1.18))
    for _ in range(rng.integers(4, 9)):
        _draw_thing(draw, rng, horizon)
    grain = (
        _cloud(rng, (height, width), 4) * 10
        + _cloud(rng, (height, width), 40) * 16
        + rng.standard_normal((height, width)) * 5
    )
    return Image.fromarray((np.asarray(image) + grain[..., None]).clip(0, 255).astype(np.uint8))


def _draw_backdrop(draw: ImageDraw.ImageDraw, rng: np.random.Generator, kind: str, wall: Colour, horizon: int) -> None:
    width = _SCENE_SIZE[0]
    if kind == 'bricks':
        for row, top in enumerate(range(0, horizon, 14)):
            draw.line((0, top, width, top), fill=_scaled(wall, 0.78), width=2)
            for left in range(row % 2 * 16, width, 32):
                draw.line((left, top, left, top + 14), fill=_scaled(wall, 0.78), width=2)
    elif kind in ('windows', 'shops'):
        step = int(rng.integers(60, 130))
        top = horizon - (110 if kind == 'windows' else 190)
        for left in range(int(rng.integers(step)), width, step):
            glass = _dye(rng, {(74, 80, 88): 3, (104, 114, 122): 2, (148, 154, 156): 1, (130, 108, 88): 1}, 14)
            draw.rectangle((left, top, left + 0.62 * step, horizon - (40 if kind == 'windows' else 8)), fill=glass)
            draw.line((left + 0.31 * step, top, left + 0.31 * step, horizon - 30), fill=_scaled(wall, 1.15), width=4)
    elif kind == 'hedge':
        for _ in range(900):
            x, y, radius = rng.uniform(0, width), rng.uniform(0, horizon), rng.uniform(4, 18)
            green = _dye(rng, {(78, 92, 70): 2, (94, 106, 82): 2, (62, 74, 60): 1, (118, 124, 96): 1}, 8)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=green)
    else:
        rail = _dye(rng, {(60, 62, 66): 2, (196, 196, 190): 1, (70, 92, 80): 1})
        for left in range(0, width, int(rng.integers(14, 30))):
            draw.rectangle((left, horizon - 120, left + 4, horizon), fill=rail)
        for top in (horizon - 118, horizon - 16):
            draw.rectangle((0, top, width, top + 6), fill=rail)


def _draw_thing(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int) -> None:
    """Something that stands about: a bin, a box, a sign, a parked car or a lamp post."""
    x, base = rng.uniform(0, _SCENE_SIZE[0]), horizon + rng.uniform(0, 90)
    colour = _faded(_dye(rng, _ACCENT_COLOURS, 14))
    kind = rng.integers(4)
    if kind == 0:
        draw.rectangle((x, base - 50, x + 30, base), fill=colour)
        draw.rectangle((x - 2, base - 56, x + 32, base - 48), fill=_scaled(colour, 0.6))
    elif kind == 1:
        draw.rounded_rectangle((x, base - 48, x + 170, base - 8), 12, fill=colour)
        draw.rounded_rectangle((x + 34, base - 78, x + 136, base - 40), 14, fill=_scaled(colour, 0.5))
        for wheel in (x + 36, x + 132):
            draw.ellipse((wheel - 15, base - 26, wheel + 15, base + 4), fill=(24, 24, 26))
    elif kind == 2:
        draw.rectangle((x, base - 190, x + 7, base), fill=(84, 86, 90))
    else:
        draw.rectangle((x + 10, base - 120, x + 14, base), fill=(110, 112, 114))
        draw.rectangle((x - 8, base - 150, x + 32, base - 112), fill=colour)


def _cloud(rng: np.random.Generator, shape: tuple[int, int], grain: int) -> np.ndarray:
    """Smooth noise of unit strength whose blots are about `grain` pixels wide."""
    height, width = shape
    coarse = rng.standard_normal((height // grain + 2, width // grain + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _encode(settings: Settings, shot: Shot) -> bytes:
    """Renders one image and returns its JPEG file."""
    rng = _rng(settings.seed, f'{shot.kind} image', shot.identity, shot.camera, shot.index)
    camera = _camera(settings.seed, shot.camera)
    canvas = _paint(settings, shot, camera, rng)
    image, quality = _expose(canvas, camera, settings.size, rng)
    buffer = BytesIO()
    image.save(buffer, 'JPEG', quality=quality)
    return buffer.getvalue()


def _paint(settings: Settings, shot: Shot, camera: Camera, rng: np.random.Generator) -> Canvas:
    """What stands before the camera, at twice the height of the image and in natural proportions."""
    height = 2 * settings.size[0]
    width = height // 2
    person = _person(settings.seed, 'person', shot.identity)
    if shot.kind == 'distractor':
        person = _person(settings.seed, 'stranger', shot.identity, shot.camera, shot.index)
    # People walk past a camera once: the images of one pass share way, place and pace.
    track = _rng(settings.seed, 'track', shot.identity, shot.camera)
    yaw = camera.paths[track.integers(2)] + track.normal(0, 0.45) + rng.normal(0, 0.2)
    near, across = track.uniform(0.1, 0.9), track.uniform(0.12, 0.88)
    near = float(np.clip(near + rng.normal(0, 0.08), 0, 1))
    view = View(
        yaw=yaw,
        phase=rng.uniform(0, 2 * pi),
        stride=track.uniform(0.2, 0.55) if track.random() < 0.85 else 0.05,
        pitch=camera.pitch * (0.7 + 0.6 * near),
        light=camera.light * (0.4 + 0.6 * camera.sun),
        scale=height * 0.94 * person.stature**0.5 * rng.normal(1, 0.05),
        left=width * (0.5 + rng.normal(0, 0.06)),
        ground=height * (0.955 + rng.normal(0, 0.025)),
    )
    if shot.kind == 'junk':
        view = _misplace(view, height, width, rng)
    canvas = Canvas(_backdrop(camera, view, near, across + rng.normal(0, 0.03), (width, height)))
    if rng.random() < 0.2:
        _paint_passer_by(canvas, settings, camera, view, width, rng, behind=True)
    if shot.kind != 'distractor' or rng.random() < 0.7:
        _paint_shadow(canvas, camera, view)
        _paint_person(canvas, person, view, rng)
    if rng.random() < 0.1:
        _paint_passer_by(canvas, settings, camera, view, width, rng, behind=False)
    if rng.random() < 0.2:
        _paint_obstacle(canvas, camera.obstacle, view, width, rng)
    return canvas


def _misplace(view: View, height: int, width: int, rng: np.random.Generator) -> View:
    """A box that a detector cut badly: half of a body, a figure at the rim, or one that is far too small."""
    kind = rng.integers(3)
    if kind == 0:
        scale = view.scale * rng.uniform(1.7, 2.4)
        return view._replace(scale=scale, ground=height * rng.choice([1.0, 1.85]))
    if kind == 1:
        return view._replace(left=view.left + width * rng.choice([-0.45, 0.45]))
    return view._replace(scale=view.scale * rng.uniform(0.4, 0.55), left=width * rng.uniform(0.2, 0.8))


def _backdrop(camera: Camera, view: View, near: float, across: float, size: tuple[int, int]) -> Image.Image:
    """The part of the scene behind a figure: far ones stand near the horizon and are small in it."""
    width, height = size
    scene_width, scene_height = _SCENE_SIZE
    feet = camera.horizon + 30 + near * (scene_height - camera.horizon - 42)
    zoom = (120 + 110 * near) / view.scale
    box_width, box_height = min(width * zoom, scene_width), min(height * zoom, scene_height)
    left = min(max(across * scene_width - view.left * zoom, 0), scene_width - box_width)
    top = min(max(feet - view.ground * zoom, 0), scene_height - box_height)
    return camera.scene.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + box_width, top + box_height))


def _paint_shadow(canvas: Canvas, camera: Camera, view: View) -> None:
    size = view.scale
    x, y = view.left, view.ground
    canvas.draw_shade.ellipse((x - 0.14 * size, y - 0.025 * size, x + 0.14 * size, y + 0.025 * size), fill=150)
    if camera.sun > 0.35:
        reach, rise = -0.6 * camera.light * size, -0.12 * size
        dark = int(215 - 95 * camera.sun)
        points = (
            (x - 0.07 * size, y),
            (x + 0.07 * size, y),
            (x + reach + 0.06 * size, y + rise),
            (x + reach - 0.06 * size, y + rise),
        )
        canvas.draw_shade.polygon(points, fill=dark)


def _paint_passer_by(
    canvas: Canvas,
    settings: Settings,
    camera: Camera,
    view: View,
    width: int,
    rng: np.random.Generator,
    *,
    behind: bool,
) -> None:
    """A stranger in part of the image: smaller and anywhere when behind, at the rim when in front."""
    stranger = _person(settings.seed, 'stranger', *rng.integers(2**20, size=3).tolist())
    side = rng.choice([-1, 1])
    size = view.scale * (rng.uniform(0.55, 0.9) if behind else rng.uniform(0.98, 1.12))
    shift = width * side * (rng.uniform(0.2, 0.5) if behind else rng.uniform(0.42, 0.55))
    ground = view.ground - (view.scale - size) * 0.35
    other = view._replace(
        yaw=camera.paths[rng.integers(2)] + rng.normal(0, 0.5),
        phase=rng.uniform(0, 2 * pi),
        scale=size,
        left=view.left + shift,
        ground=ground,
    )
    _paint_person(canvas, stranger, other, rng)


def _paint_obstacle(canvas: Canvas, kind: str, view: View, width: int, rng: np.random.Generator) -> None:
    """Something between the camera and the person."""
    size, x, y = view.scale, width * rng.uniform(0.1, 0.9), view.ground
    grey = _dye(rng, {(70, 72, 76): 3, (150, 150, 148): 2, (60, 84, 70): 1}, 10)
    if kind == 'pole':
        thick = size * rng.uniform(0.02, 0.05)
        canvas.polygon(((x - thick, 0), (x + thick, 0), (x + thick, y + size), (x - thick, y + size)), grey)
    elif kind == 'railing':
        top = y - size * rng.uniform(0.3, 0.45)
        for row in (top, top + 0.14 * size, top + 0.28 * size):
            canvas.polygon(((0, row), (width, row), (width, row + 0.025 * size), (0, row + 0.025 * size)), grey)
    elif kind == 'bicycle':
        hub, radius = y - 0.15 * size, 0.16 * size
        for wheel in (x - 0.25 * size, x + 0.25 * size):
            canvas.draw_colour.ellipse(
                (wheel - radius, hub - radius, wheel + radius, hub + radius), outline=(30, 30, 32), width=4
            )
        frame = [
            (x - 0.25 * size, hub),
            (x - 0.1 * size, hub - 0.2 * size),
            (x + 0.18 * size, hub - 0.2 * size),
            (x, hub),
            (x - 0.1 * size, hub - 0.24 * size),
        ]
        canvas.draw_colour.line(frame, fill=_dye(rng, _ACCENT_COLOURS), width=4)
        canvas.draw_colour.line(((x + 0.25 * size, hub), (x + 0.17 * size, hub - 0.3 * size)), fill=grey, width=4)
    else:
        for _ in range(40):
            radius = size * rng.uniform(0.015, 0.05)
            centre = (x + size * rng.normal(0, 0.12), y - size * abs(rng.normal(0, 0.1)))
            canvas.ellipse(centre, radius, radius, _dye(rng, {(52, 78, 44): 2, (84, 108, 62): 1}, 8))


def _expose(canvas: Canvas, camera: Camera, size: tuple[int, int], rng: np.random.Generator) -> tuple[Image.Image, int]:
    """Light, lens, sensor and compression: what a camera makes of what stands before it."""
    shade = np.asarray(canvas.shade.filter(ImageFilter.BoxBlur(canvas.shade.height / 150)), dtype=np.float32)
    slope, fall = rng.normal(0, 0.08) + 0.1 * camera.light * camera.sun, rng.normal(0, 0.08)
    field = 1 + slope * np.linspace(-1, 1, shade.shape[1]) + fall * np.linspace(-1, 1, shade.shape[0])[:, None]
    if rng.random() < 0.15 * camera.sun:
        edge = rng.uniform(0.2, 0.8)
        field[int(edge * shade.shape[0]) :] *= 0.65
    light = Image.fromarray((shade * field).clip(0, 255).astype(np.uint8))
    image = ImageChops.multiply(canvas.colour, Image.merge('RGB', (light, light, light)))

    height, width = size
    sharpness = camera.resolution * rng.uniform(0.75, 1)
    image = image.resize((max(8, round(width * sharpness)), max(16, round(height * sharpness))), Image.Resampling.BOX)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    image = image.filter(ImageFilter.GaussianBlur(camera.blur * height / 128 * rng.uniform(0.7, 1.3)))
    image = ImageEnhance.Color(image).enhance(camera.saturation * rng.uniform(0.9, 1.1))

    exposure = np.exp(rng.normal(0.1, 0.08) + rng.normal(0, 0.02, 3))
    levels = np.linspace(0, 1, 256)[:, None] * np.asarray(camera.gains) * exposure
    levels = camera.haze + (1 - camera.haze) * levels.clip(0, 1) ** camera.gamma
    image = image.point((255 * levels.T).round().astype(int).ravel().tolist())
    noise = camera.noise * rng.uniform(0.7, 1.3) * rng.standard_normal((height, width, 3), dtype=np.float32)
    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image, camera.quality + int(rng.integers(-8, 9))


if __name__ == '__main__':
    _work()
