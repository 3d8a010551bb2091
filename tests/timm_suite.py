"""timm's own tests of its models, unchanged, on the models of csa_zoo: `python tests/timm_suite.py [pytest options]`.

The tests are in timm's source distribution, not in its wheel; pip fetches it in the version that is installed. They run
in a folder of their own, as the `timm` beside them would hide the installed one. Left out are those that download
weights. Those for intermediate features name the modules of timm alone, so this file, copied beside them, calls them on
ours.
"""

import inspect
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import timm

MODULES = ('pcb', 'l2net')
INTERMEDIATES = (
    'test_model_forward_intermediates',
    'test_model_forward_intermediates_features',
    'test_prune_intermediate_layers_contract',
)


@pytest.mark.parametrize('name', [name for module in MODULES for name in timm.list_models(module=module)])
@pytest.mark.parametrize('function', INTERMEDIATES)
def test_intermediates(function: str, name: str) -> None:
    import test_models  # timm's

    test = getattr(test_models, function, None)
    if test is None:
        pytest.skip(f'timm {timm.__version__} has no {function}')
    arguments = {'model_name': name, 'batch_size': 1}
    test(**{key: arguments[key] for key in inspect.signature(test).parameters})


def fetch_tests(folder: Path) -> None:
    """Put timm's tests of its models into a folder.

    Raises:
        subprocess.CalledProcessError: If pip finds no source distribution.
    """
    requirement = f'timm=={timm.__version__}'
    command = ['download', '--quiet', '--no-deps', '--no-binary', 'timm', '--dest', folder, requirement]
    subprocess.run([sys.executable, '-m', 'pip', *command], check=True)
    archive = next(folder.glob('timm-*.tar.gz'))
    with tarfile.open(archive) as tar:
        for name in ('test_models.py', 'conftest.py'):
            member = tar.extractfile(f'{archive.name.removesuffix(".tar.gz")}/tests/{name}')
            (folder / name).write_bytes(member.read())
    archive.unlink()


def main() -> int:
    """Run the tests; pytest's exit status, 0 if they could not be had."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            fetch_tests(folder)
        except subprocess.CalledProcessError as error:
            print(f'skipped: pip could not fetch the source distribution of timm {timm.__version__} ({error})')
            return 0
        shutil.copy(__file__, folder / 'test_intermediates.py')
        chosen = f'({" or ".join(MODULES)}) and not pretrained'
        command = ['pytest', '-p', 'csa_zoo', '-k', chosen, '-W', 'ignore', *sys.argv[1:]]
        command += ['test_models.py', 'test_intermediates.py']
        environment = {**os.environ, 'HF_HUB_OFFLINE': '1'}
        return subprocess.run([sys.executable, '-m', *command], cwd=folder, env=environment).returncode


if __name__ == '__main__':
    sys.exit(main())
