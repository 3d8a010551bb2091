"""What the splits of the public re-identification sets hold according to their authors.

Sources: Market-1501, Zheng et al. (ICCV 2015); DukeMTMC-reID, Ristani et al. (ECCV-W 2016) and Zheng et al. (ICCV
2017); CUHK03, Li et al. (CVPR 2014) in the 767/700 protocol of Zhong et al. (CVPR 2017); MSMT17, Wei et al. (CVPR
2018). The counts are those of the original archives; the name lists' hashes were computed from them.
"""

import hashlib
import os
from collections.abc import Iterable
from typing import NamedTuple


class Published(NamedTuple):
    """What a split holds according to its authors.

    Attributes:
        images: Files.
        identities: Different persons; junk and distractors are none. None, here and below, where unknown.
        junk: Images labelled -1.
        distractors: Images labelled 0, where that means "nobody in the query".
        cameras: Images of camera 1, 2, ...; empty where unknown.
        sha256: Of the sorted base names joined by newlines, or how it begins; empty where unknown.
    """

    images: int
    identities: int | None
    junk: int | None = 0
    distractors: int | None = 0
    cameras: tuple[int, ...] = ()
    sha256: str = ''


PUBLISHED: dict[str, dict[str, Published]] = {
    'market1501': {
        'train': Published(
            12936,
            751,
            cameras=(2017, 1709, 2707, 920, 2338, 3245),
            sha256='6665d2f686d98426d2253ab9acc5c60a3abd81ce7207726c72b49ab40178d4d6',
        ),
        'query': Published(
            3368,
            750,
            cameras=(668, 530, 717, 248, 622, 583),
            sha256='6981ba13f71377071831b5f258dbe603ced4fd90e4cfed179918ca3842e4f470',
        ),
        'gallery': Published(
            19732,
            750,
            junk=3819,
            distractors=2798,
            cameras=(3156, 2944, 3803, 1671, 3814, 4344),
            sha256='234d677d2896ea6522b9d9a7a12d4e21767fffed21a731d305e2b065e7a38568',
        ),
    },
    'dukemtmcreid': {
        'train': Published(
            16522,
            702,
            cameras=(2809, 3009, 1088, 1395, 1685, 3700, 1330, 1506),
            sha256='c89c6d312a1d91c89eca2f79bbf7c2a2c1d010704d20dafe04516e97c3f71a49',
        ),
        'query': Published(
            2228,
            702,
            cameras=(413, 383, 190, 155, 216, 369, 239, 263),
            sha256='481693f88c7ddf1feb7575a398641edc8f0b62b18b658ded253014a22bfe3589',
        ),
        'gallery': Published(
            17661,
            1110,
            cameras=(2704, 2798, 828, 1139, 1209, 3308, 1255, 4420),
            sha256='091ba192f88fe0573d4d5d500dc79e8b03010e93dd4d31c8a6af1642f525fa8f',
        ),
    },
    'msmt17': {
        'train': Published(32621, 1041),
        'query': Published(11659, 3060),
        'gallery': Published(82161, 3060),
    },
    'cuhk03np detected': {
        'train': Published(7365, 767),
        'query': Published(1400, 700, cameras=(700, 700)),
        'gallery': Published(5332, 700, cameras=(2617, 2715)),
    },
    'cuhk03np labeled': {
        'train': Published(7368, 767),
        'query': Published(1400, 700, cameras=(700, 700)),
        'gallery': Published(5328, 700, cameras=(2615, 2713)),
    },
}


# The same images have other names in the raw set (pair_person_view_image) and in the ready-made folders.
CUHK03_NAMES = {
    ('raw', 'detected'): ('2ae21c93220859752eda694c', '733c2e4458d53dc55d8cbc17', '01e9153b3dc4159e69b3208b'),
    ('raw', 'labeled'): ('9588692c6efb3ccc5e2b35ec', '1df2968a18eb631acc9adc9e', 'fce5a751cf5f436001d5b96b'),
    ('ready', 'detected'): ('9669258a77070b400ea00e17', 'd3e5f69ba0b835998fd35f3b', 'fc1aa2382fc9d412bd29b5af'),
    ('ready', 'labeled'): ('17dc73c733b84e642c35a684', '2127961e2607499d9f27dde9', '05eac6451295bc99b877b145'),
}


def name_list_sha256(paths: Iterable[str]) -> str:
    """Hash of a list of images that depends on their base names only: joined by newlines in sorted order."""
    return hashlib.sha256('\n'.join(sorted(map(os.path.basename, paths))).encode()).hexdigest()
