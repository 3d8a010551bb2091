"""Rendered pedestrians: a person re-identification set that every machine can make for itself, without a download.

The re-ID job needs a default data set that nobody has to apply for. This one is drawn: figures with a build, skin,
hair, patterned clothes, shoes and bags, walking past cameras that each have their own background, light, colour cast,
blur and noise. The folder has the layout, the file names and the rules of Market-1501 (Zheng et al., "Scalable Person
Re-identification: A Benchmark", ICCV 2015): disjoint identities for training and test, one query per test identity and
camera, badly cut boxes labelled -1 (junk) and strangers or empty boxes labelled 0000 (distractors) in the gallery.

Every image is a function of (seed, what it shows) alone, so the bytes depend neither on the number of processes nor on
how many identities are rendered: a larger set contains the smaller one.

This file is the folder and the processes that fill it; `pedestrian_renderer` says what it holds and draws it.

The worker processes run this very file, as a script. They therefore import nothing but NumPy, Pillow, tqdm and the
renderer (PyTorch takes longer to import than a small set to render), need no `if __name__ == '__main__'` in the
caller's script (as `multiprocessing`'s spawn does), and copy no locks held by the caller's threads (as its fork does).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path

from tqdm import tqdm

if __package__:
    from .pedestrian_renderer import RENDERER_VERSION, Settings, Shot, plan_shots, render_shot
else:  # run as a script, or imported without csa_zoo
    from pedestrian_renderer import RENDERER_VERSION, Settings, Shot, plan_shots, render_shot

__all__ = ['default_root', 'render_pedestrians']

MANIFEST = 'pedestrians.json'
FOLDERS = ('bounding_box_train', 'bounding_box_test', 'query')

# Starting a process costs about as much as rendering this many images.
_IMAGES_WORTH_A_WORKER = 50


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
        root: The folder to write; None for `default_root` with the same arguments.
        num_identities: People, train and test together.
        num_cameras: 3 to 9. Each person is seen by at least half of them and never by all.
        images_per_camera: Images of a person in each camera that sees them, at least 2. One of them is the query for
            test identities.
        size: Height and width in pixels. Figures are drawn at 2:1 and squashed to this, as detectors' boxes are.
        seed: Another seed gives other people and other cameras.
        workers: Processes; None for one per available core.
        progress: Shows a progress bar where the standard error is a terminal.

    Returns:
        The folder that holds `bounding_box_train`, `bounding_box_test` and `query`.

    Raises:
        ValueError: For an argument out of its range, and where `root` holds another rendering or other images.
        RuntimeError: Where a worker process failed.
    """
    settings = Settings(num_identities, num_cameras, images_per_camera, tuple(size), seed)
    root = Path(root) if root is not None else default_root(**asdict(settings))
    manifest = _read_manifest(root, settings)
    shots = plan_shots(settings)
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


def _present(root: Path) -> set[str]:
    """The images that the folder holds, as `Shot.path` names them."""
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
    if shot is not None and (root / shot.path).read_bytes() != render_shot(settings, shot):
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
    _write_atomically(root / shot.path, unfinished, render_shot(settings, shot))


def _render_in_processes(
    root: Path, unfinished: Path, settings: Settings, shots: Sequence[Shot], workers: int, bar: tqdm
) -> None:
    """Gives each worker every n-th image; all of them report through one pipe, a byte for each image."""
    reports, report_to = os.pipe()
    processes: list[subprocess.Popen] = []
    logs = [unfinished / f'worker{number}.log' for number in range(workers)]
    common = {'root': str(root), 'unfinished': str(unfinished), 'settings': asdict(settings)}
    # A script finds the renderer beside it, unless Python is told not to look there.
    env = {**os.environ, 'PYTHONSAFEPATH': ''}
    try:
        try:
            for number, log in enumerate(logs):
                job = unfinished / f'worker{number}.json'
                job.write_text(json.dumps({**common, 'shots': shots[number::workers]}))
                with job.open('rb') as stdin, log.open('wb') as stderr:
                    command = [sys.executable, __file__]
                    processes.append(subprocess.Popen(command, stdin=stdin, stdout=report_to, stderr=stderr, env=env))
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


if __name__ == '__main__':
    _work()
