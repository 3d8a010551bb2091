"""The plan of a rendered set: its settings, and every image that it consists of, by Market-1501's rules."""

from dataclasses import asdict, dataclass
from typing import NamedTuple

from .chance import generator

# To be raised with every change that alters a pixel: the manifest and the cache's folder name carry it.
RENDERER_VERSION = 1

_JUNK_PER_TEST_IDENTITY = 3
_DISTRACTORS_PER_TEST_IDENTITY = 2


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
        """The settings as the manifest states them."""
        return {'renderer': RENDERER_VERSION, **asdict(self), 'size': list(self.size)}

    @property
    def folder_name(self) -> str:
        """Another name for other settings: a rendering's folder in the cache."""
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
        """Where the image lies below the root, named as in Market-1501: person, camera, frame and box."""
        label = {'person': f'{self.identity + 1:04d}', 'junk': '-1', 'distractor': '0000'}[self.kind]
        box = {'person': 1, 'junk': 2, 'distractor': 3}[self.kind]
        frame = 100 * (self.identity + 1) + self.index
        return f'{self.folder}/{label}_c{self.camera + 1}s1_{frame:06d}_{box:02d}.jpg'


def plan_shots(settings: Settings) -> list[Shot]:
    """All images of a set, person by person."""
    shots = []
    num_cameras = settings.num_cameras
    for identity in range(settings.num_identities):
        rng = generator(settings.seed, 'itinerary', identity)
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
