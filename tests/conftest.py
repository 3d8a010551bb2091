"""What all tests share: no network, and the folder of real data where there is one."""

import os
from pathlib import Path

import pytest

os.environ['HF_HUB_OFFLINE'] = '1'  # read when huggingface_hub is imported, so before any test module
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # workers that each start a thread per core slow each other down


@pytest.fixture(scope='session')
def data_dir() -> Path:
    """Folder of real data sets that the environment variable CSA_ZOO_DATA names."""
    folder = os.environ.get('CSA_ZOO_DATA')
    if not folder:
        pytest.skip('needs real data: set CSA_ZOO_DATA to its folder')
    path = Path(folder)
    assert path.is_dir(), f'CSA_ZOO_DATA is {folder!r}, which is no folder'
    return path


def pytest_itemcollected(item: pytest.Item) -> None:
    """With `-n 2 --dist loadgroup`: a file's tests stay together, and those that launch processes share a port."""
    launches = hasattr(getattr(item, 'module', None), 'debug_launcher')
    item.add_marker(pytest.mark.xdist_group('processes' if launches else item.path.stem))
