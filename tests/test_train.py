"""The training scripts, run as users run them, on tiny data: what they write, killed and resumed, in two processes."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate import debug_launcher
from safetensors.torch import load_file

import csa_zoo.recipes
from csa_zoo.losses import PartLoss

SCRIPTS = Path(__file__).parent.parent / 'train'
REID = [
    '--data_options={"num_identities": 8, "images_per_camera": 2}',
    '--image_size=[48,24]',
    '--batch_size=8',
    '--epochs=3',
    '--evaluate_every=1',
]
DESCRIPTOR = [
    '--views=3',
    '--points_per_photo=40',
    '--test_pairs=200',
    '--pairs_per_epoch=64',
    '--batch_size=32',
    '--epochs=3',
]


def load_script(name):
    spec = importlib.util.spec_from_file_location(f'train_{name}', SCRIPTS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cache')
    before = os.environ.get('CSA_ZOO_CACHE')
    os.environ['CSA_ZOO_CACHE'] = str(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number would round differently, and no two runs were equal bit for bit
    yield folder
    torch.set_num_threads(threads)
    os.environ.pop('CSA_ZOO_CACHE')
    if before:
        os.environ['CSA_ZOO_CACHE'] = before


@pytest.fixture(scope='module')
def runs(tmp_path_factory, cache):
    """Uninterrupted runs of both scripts: their folders and what their main returned."""
    folder = tmp_path_factory.mktemp('runs')
    return {
        name: (folder / name, load_script(name).main([*arguments, f'--output={folder / name}']))
        for name, arguments in (('reid', REID), ('descriptor', DESCRIPTOR))
    }


@pytest.mark.parametrize(
    ('name', 'image', 'metric'), [('reid', (3, 48, 24), 'rank1'), ('descriptor', (1, 32, 32), 'fpr95_scikit-image')]
)
def test_run_folder(runs, name, image, metric):
    folder, metrics = runs[name]
    written = json.loads((folder / 'metrics.json').read_text())
    assert written['metrics'] == metrics
    assert 0 <= metrics[metric] <= 1
    assert written['epochs'] == 3 == len((folder / 'history.jsonl').read_text().splitlines())
    assert (folder / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert [path.name for path in (folder / 'state').iterdir()] == ['epoch_0003']

    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert tuple(model.pretrained_cfg['input_size']) == image
    trained = load_file(folder / 'model.safetensors')
    assert trained.keys() == model.state_dict().keys()
    assert not any(key.startswith('aux') for key in trained)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, trained[key], rtol=0, atol=0)


def launch(name, arguments, processes=1):
    environment = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1'}
    several = ['--multi_gpu', f'--num_processes={processes}'] if processes > 1 else ['--num_processes=1']
    command = [sys.executable, '-m', 'accelerate.commands.launch', *several, str(SCRIPTS / f'{name}.py'), *arguments]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    if processes == 1 and hasattr(os, 'sched_setaffinity'):  # one thread, as here
        os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
    return process


@pytest.mark.parametrize(('name', 'arguments'), [('reid', REID), ('descriptor', DESCRIPTOR)])
def test_killed_and_resumed_equals_uninterrupted(runs, tmp_path, name, arguments):
    output = tmp_path / 'killed'
    process = launch(name, [*arguments, f'--output={output}'])
    deadline = time.monotonic() + 120
    while not (output / 'state' / 'epoch_0001').exists() and not (output / 'state' / 'epoch_0002').exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / 'metrics.json').exists()

    load_script(name).main([f'--resume={output}'])
    expected, resumed = (load_file(folder / 'model.safetensors') for folder in (runs[name][0], output))
    for key, value in expected.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0, msg=key)
    drop_time = [
        [{k: v for k, v in json.loads(line).items() if k != 'seconds'} for line in text.splitlines()]
        for text in ((runs[name][0] / 'history.jsonl').read_text(), (output / 'history.jsonl').read_text())
    ]
    assert drop_time[0] == drop_time[1]


@pytest.mark.parametrize('name', ['reid', 'descriptor'])
def test_options_of_a_resumed_run_hold(runs, tmp_path, name):
    """More epochs go on at the recipe's learning rate and weight decay as overridden, and the recipe says so."""
    whole, changed, longer = runs[name][0], tmp_path / 'changed', tmp_path / 'longer'
    for folder, options in ((changed, ['--learning_rate=0', '--weight_decay=0.5']), (longer, [])):
        shutil.copytree(whole, folder)
        load_script(name).main([f'--resume={folder}', '--epochs=4', *options])
        assert yaml.safe_load((folder / 'recipe.yaml').read_text())['epochs'] == 4
    assert yaml.safe_load((changed / 'recipe.yaml').read_text())['weight_decay'] == 0.5
    before, still, moved = (
        {key: value for key, value in load_file(folder / 'model.safetensors').items() if key.endswith('.weight')}
        for folder in (whole, changed, longer)
    )
    weights = [key for key in before if before[key].ndim == 4 and 'maps' not in key]
    assert all(torch.equal(before[key], still[key]) for key in weights)
    assert not any(torch.equal(before[key], moved[key]) for key in weights)


def test_options_that_the_state_does_not_fit_are_not_kept(runs, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(runs['descriptor'][0], folder)
    recipe = (folder / 'recipe.yaml').read_bytes()
    with pytest.raises((RuntimeError, ValueError)):
        load_script('descriptor').main([f'--resume={folder}', '--model=l2net_hardnet', '--epochs=4'])
    assert (folder / 'recipe.yaml').read_bytes() == recipe


def test_two_processes_run(tmp_path):
    for attempt in range(2):  # gloo may abort at exit after all is done, so files are what counts
        output = tmp_path / f'two{attempt}'
        process = launch('reid', [*REID, '--epochs=1', f'--output={output}'], processes=2)
        _, errors = process.communicate(timeout=240)
        if (output / 'metrics.json').exists():
            break
    written = json.loads((output / 'metrics.json').read_text())
    assert written['processes'] == 2, errors
    assert 0 < written['metrics']['rank1'] <= 1


def _part_loss_in_two_processes():
    torch.set_num_threads(1)  # a forked process has none of its parent's threads, and would wait for them
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    def build():
        torch.manual_seed(0)
        model = timm.create_model('resnet18_pcb_csa', num_classes=5, attn_kwargs={'alpha': 0.5})
        return PartLoss(model, (0, 1, 2)).eval()  # batch norm and dropout are a process's own in training

    images, labels = torch.randn(4, 3, 48, 24, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 1, 4])
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    shared, alone = build(), build()
    wrapped = DistributedDataParallel(shared, broadcast_buffers=False)
    value = wrapped(images[rows], labels[rows])['loss']
    value.backward()
    expected = alone(images, labels)['loss']
    expected.backward()
    mean = value.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, expected.detach())
    for (name, parameter), reference in zip(shared.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_part_loss_and_gradient_in_two_processes_equal_one():
    debug_launcher(_part_loss_in_two_processes, num_processes=2)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--learning_rat=1'], "'learning_rate' instead of 'learning_rat'"),
        (['--epochs=many'], 'epochs'),
        (['--optimizer=sdg'], 'adamw'),
        (['--resume=nowhere'], 'no run to resume at nowhere'),
    ],
)
def test_wrong_options_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        load_script('reid').main(arguments)
    assert exit_.value.code != 0
    assert message in capsys.readouterr().err


def test_wrong_key_in_a_recipe_file(tmp_path, capsys):
    recipe = tmp_path / 'mine.yaml'
    recipe.write_text('batchsize: 3\n')
    with pytest.raises(SystemExit):
        load_script('descriptor').main([f'--config={recipe}'])
    assert "'batch_size' instead of 'batchsize'" in capsys.readouterr().err


@pytest.mark.parametrize('stages', [None, [], [1]])
def test_attention_stages_of_a_recipe(stages):
    module = load_script('reid')
    options = [] if stages is None else [f'--attn_stages={stages}']
    recipe, _ = module.RecipeParser(module.Recipe, None, module.DEFAULT_RECIPE).parse_recipe(options)
    model = timm.create_model(recipe.model, **csa_zoo.recipes.model_arguments(recipe))
    found = [name for name, _ in model.named_modules() if name.endswith('.csa')]
    assert found == [f'layer{stage + 1}.csa' for stage in ([0, 1, 2] if stages is None else stages)]


@pytest.mark.parametrize('option', ['epochs', 'batch_size', 'evaluate_every'])
def test_nothing_can_be_done_zero_times(option, capsys):
    with pytest.raises(SystemExit):
        load_script('reid').main([f'--{option}=0'])
    assert option in capsys.readouterr().err


def test_test_sets_of_one_name_are_refused(monkeypatch):
    module = load_script('descriptor')
    monkeypatch.setattr(module, 'load_patches', lambda *_: None)
    monkeypatch.setattr(module, 'with_pairs', lambda *_: None)
    with pytest.raises(ValueError, match='photos'):
        module.test_sets(module.Recipe(test=['home/photos', 'city/photos']))


def test_a_folder_with_a_run_is_not_overwritten(runs):
    before = (runs['descriptor'][0] / 'model.safetensors').read_bytes()
    with pytest.raises(FileExistsError, match='--resume'):
        load_script('descriptor').main([*DESCRIPTOR, f'--output={runs["descriptor"][0]}'])
    assert (runs['descriptor'][0] / 'model.safetensors').read_bytes() == before


@pytest.mark.parametrize('path', sorted((SCRIPTS / 'recipes').rglob('*.yaml')), ids=lambda path: path.stem)
def test_every_recipe_parses(path):
    name = 'descriptor' if 'l2net' in path.read_text() else 'reid'
    module = load_script(name)
    recipe, launch_ = module.RecipeParser(module.Recipe, None, path).parse_recipe(['--seed=3'])
    assert recipe.seed == 3
    assert recipe.model in timm.list_models()
    assert launch_.resume is None
