"""What `train/reid.py` can do besides its defaults: stages, averages, triplets; interrupted anywhere and resumed."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import debug_launcher
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

from csa_zoo.data.images import person_order
from csa_zoo.losses import PartLoss, TripletLoss

SCRIPT = Path(__file__).parent.parent / 'train' / 'reid.py'
TINY = [
    '--data_options={"num_identities": 8, "images_per_camera": 2}',
    '--model=resnet18_pcb',
    '--image_size=[48,24]',
    '--batch_size=8',
]
# two epochs of stripes, one of the part classifier, one of everything
STAGES = [
    *TINY,
    '--model_args={"rpp": "paper"}',
    '--epochs=4',
    '--induce_epochs=1',
    '--finetune_epochs=1',
    '--evaluate_every=1',
]
EXTRAS = [
    '--accumulate=2',
    '--ema_decay=0.9',
    '--random_erasing=0.5',
    '--padding=4',
    '--images_per_person=2',
    '--triplet_weight=1',
    '--label_smoothing=0.1',
]
CLASSIFIER = 'global_pool.classifier.weight'


def load_script():
    spec = importlib.util.spec_from_file_location('train_reid', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def train(*arguments):
    return load_script().main(list(arguments))


class Killed(Exception):
    pass


def train_until(epoch, *arguments):
    """Train, but be stopped when so many epochs are finished."""
    module = load_script()
    train_epoch = module.Trainer.train_epoch

    def stop(self, number):
        if number == epoch:
            raise Killed
        return train_epoch(self, number)

    module.Trainer.train_epoch = stop
    with pytest.raises(Killed):
        module.main(list(arguments))


def state(folder):
    """Weights and buffers of the model in training after the last epoch."""
    (path,) = (folder / 'state').iterdir()
    weights = load_file(path / 'model.safetensors')
    return {key.removeprefix('model.'): value for key, value in weights.items() if key.startswith('model.')}


def history(folder):
    lines = [json.loads(line) for line in (folder / 'history.jsonl').read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != 'seconds'} for line in lines]


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CSA_ZOO_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='module')
def staged(tmp_path_factory, cache):
    """Folder of an uninterrupted run through all stages, with everything that can be switched on."""
    folder = tmp_path_factory.mktemp('runs') / 'staged'
    train(*STAGES, *EXTRAS, f'--output={folder}')
    return folder


def test_stages_killed_and_resumed_at_each_boundary(staged, tmp_path):
    """Each stage trains what it should, and the interruptions leave no trace."""
    folder = tmp_path / 'run'

    def model_args():
        arguments = json.loads((folder / 'config.json').read_text())['model_args']
        return {name: value for name, value in arguments.items() if name not in ('num_classes', 'in_chans')}

    train_until(1, *STAGES, *EXTRAS, f'--output={folder}')
    first = state(folder)
    assert model_args() == {'rpp': 'paper', 'refined': False}
    stripes = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    features = torch.randn(1, 512, 6, 2)
    torch.testing.assert_close(stripes.global_pool(features), features.mean(3).transpose(1, 2))

    train_until(2, f'--resume={folder}')
    second = state(folder)
    changed = {key for key, value in second.items() if not torch.equal(value, first[key])}
    assert changed == set(second) - {CLASSIFIER}

    train_until(3, f'--resume={folder}')
    induced = state(folder)
    assert {key for key, value in induced.items() if not torch.equal(value, second[key])} == {CLASSIFIER}
    assert model_args() == {'rpp': 'paper'}
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).global_pool.refined

    train(f'--resume={folder}')
    final, expected = state(folder), state(staged)
    assert all(not torch.equal(value, induced[key]) for key, value in final.items())
    assert all(torch.equal(final[key], value) for key, value in expected.items())
    assert history(folder) == history(staged)
    for file in ('model.safetensors', 'best/model.safetensors', 'best/metrics.json'):
        assert (folder / file).read_bytes() == (staged / file).read_bytes()


def test_learning_rate_goes_on_over_all_stages(tmp_path):
    module = load_script()
    rates, begin = [], module.Trainer.begin

    def watch(self, stage):
        begin(self, stage)
        step, optimizer = self.schedule.step_update, self.optimizer

        def record(update):
            step(update)
            groups = {len(group['params']): group['lr'] for group in optimizer.param_groups}
            rates.append((stage, round(groups[min(groups)], 6), round(groups[max(groups)], 6)))

        self.schedule.step_update = record

    module.Trainer.begin = watch
    schedule = ['--optimizer=sgd', '--schedule=step', '--decay_epochs=2', '--warmup_epochs=0', '--learning_rate=0.1']
    once = ['--evaluate_every=4', '--backbone_learning_rate_scale=0.1', f'--output={tmp_path / "run"}']
    module.main([*STAGES, *schedule, *once])
    assert list(dict.fromkeys(rates)) == [('pcb', 0.1, 0.01), ('induce', 0.01, 0.01), ('finetune', 0.01, 0.001)]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--induce_epochs=1'], 'resnet18_pcb has no parts to refine'),
        (['--model_args={"rpp": "paper"}', '--epochs=2', '--finetune_epochs=3'], 'must be within the 2 epochs'),
        (['--accumulate=3'], 'batch_size is 8, but must be a multiple of accumulate=3'),
        (['--triplet_weight=1'], 'images_per_person is 0: set it from 2 to 4'),
        (['--images_per_person=3'], 'multiple of 3 per person'),
    ],
)
def test_impossible_recipes(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        train(*TINY, *arguments, f'--output={tmp_path / "run"}')


def test_shares_of_a_batch_make_one_step(tmp_path):
    """Where images do not meet in batch statistics or dropout, that is while the part classifier is induced."""
    alone = [*TINY, '--epochs=1', '--induce_epochs=1', '--model_args={"rpp": "paper", "drop_rate": 0.0}']
    fixed = ['--optimizer=sgd', '--learning_rate=1', '--warmup_epochs=0']
    for accumulate in (1, 2):
        train(*alone, *fixed, f'--accumulate={accumulate}', f'--output={tmp_path / str(accumulate)}')
    whole, shared = (load_file(tmp_path / run / 'model.safetensors')[CLASSIFIER] for run in '12')
    torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-5)
    assert history(tmp_path / '1')[0]['loss'] == pytest.approx(history(tmp_path / '2')[0]['loss'], rel=1e-4)


def test_the_average_is_saved_and_evaluated(tmp_path, monkeypatch):
    steps = []
    update = ModelEmaV3.update

    def watch(self, model, step):
        steps.append({key: value.clone() for key, value in model.state_dict().items()})
        assert step == len(steps)
        update(self, model, step)

    monkeypatch.setattr(ModelEmaV3, 'update', watch)
    train(*TINY, '--epochs=2', '--ema_decay=0.6', f'--output={tmp_path / "run"}')
    saved = load_file(tmp_path / 'run' / 'model.safetensors')
    expected = {key: value.double() for key, value in steps[0].items()}
    for number, weights in enumerate(steps[1:], 1):
        decay = min(0.6, 1 - (1 + number) ** (-2 / 3))
        expected = {key: decay * mean + (1 - decay) * weights[key] for key, mean in expected.items()}
    for key, value in saved.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[key].float(), rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(saved[key], value) for key, value in steps[-1].items())


def test_best_is_the_epoch_of_highest_map(staged):
    records = history(staged)
    best = json.loads((staged / 'best' / 'metrics.json').read_text())
    values = [record['mAP'] for record in records]
    assert best['epoch'] == 1 + int(np.argmax(values))
    assert best['metrics']['mAP'] == max(values)
    assert json.loads((staged / 'metrics.json').read_text())['metrics']['mAP'] == values[-1]
    timm.create_model(f'local-dir:{staged / "best"}', pretrained=True)
    assert all(record['triplet_loss'] > 0 for record in records)


def test_trackers(tmp_path):
    with pytest.raises(ValueError, match='Choose between'):
        train(*TINY, '--tracker=notebook')
    if importlib.util.find_spec('tensorboard') is None:
        with pytest.raises(ImportError, match='pip install tensorboard'):
            train(*TINY, '--tracker=tensorboard')
        return
    train(*TINY, '--epochs=1', '--tracker=tensorboard', f'--output={tmp_path / "run"}')
    assert list((tmp_path / 'run' / 'tracker').rglob('events.*'))


def test_stages_in_two_processes(tmp_path):
    environment = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes=2', str(SCRIPT)]
    for attempt in range(2):  # gloo may abort at exit after all is done, so files are what counts
        folder = tmp_path / f'run{attempt}'
        arguments = [*STAGES, *EXTRAS, '--epochs=3', f'--output={folder}']
        done = subprocess.run([*command, *arguments], env=environment, stderr=subprocess.PIPE, text=True, timeout=240)
        if (folder / 'metrics.json').exists():
            break
    assert json.loads((folder / 'metrics.json').read_text())['processes'] == 2, done.stderr
    assert [record['epoch'] for record in history(folder)] == [1, 2, 3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 1000))
def test_person_order(counts, size, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    order = person_order(labels, size, np.random.default_rng(seed))
    groups = order.reshape(-1, size)
    assert (labels[groups] == labels[groups][:, :1]).all()
    assert set(order) == set(range(len(labels)))
    assert len(groups) == sum(-(-count // size) for count in counts)
    for group in groups:
        assert len(set(group)) == min(size, counts[labels[group[0]]])


def naive_triplets(descriptors, labels, margin):
    total = 0.0
    for i, anchor in enumerate(descriptors):
        distances = [((anchor - other).square().sum() + 1e-6).sqrt() for other in descriptors]
        positive = max(d for d, label in zip(distances, labels, strict=True) if label == labels[i])
        negative = min(d for d, label in zip(distances, labels, strict=True) if label != labels[i])
        total = total + F.relu(margin + positive - negative)
    return total / len(descriptors)


def triplet_batch():
    descriptors = F.normalize(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    return descriptors, torch.tensor([0, 0, 1, 1, 2, 0, 3, 2])


def test_triplet_loss_against_loops():
    descriptors, labels = triplet_batch()
    ours, theirs = (descriptors.clone().requires_grad_() for _ in range(2))
    loss = TripletLoss(0.3)(ours, labels)
    expected = naive_triplets(theirs, labels.tolist(), 0.3)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert ours.grad.any()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def _triplets_in_two_processes():
    torch.set_num_threads(1)  # a forked process has none of its parent's threads, and would wait for them
    import torch.distributed as dist

    descriptors, labels = triplet_batch()
    whole = descriptors.clone().requires_grad_()
    expected = naive_triplets(whole, labels.tolist(), 0.3)
    expected.backward()
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    part = descriptors[mine].clone().requires_grad_()
    loss = TripletLoss(0.3)(part, labels[mine])
    loss.backward()
    torch.testing.assert_close(loss.detach() / 2, expected.detach())
    torch.testing.assert_close(part.grad / 2, whole.grad[mine], rtol=1e-4, atol=1e-5)  # as DDP averages


def test_triplets_of_two_processes_equal_those_of_one():
    debug_launcher(_triplets_in_two_processes, num_processes=2)


def test_part_loss_adds_triplets_of_the_descriptor():
    torch.manual_seed(0)
    model = timm.create_model('resnet18_pcb', num_classes=4).eval()
    images, labels = torch.randn(8, 3, 96, 32), triplet_batch()[1]
    plain, both = PartLoss(model).eval()(images, labels), PartLoss(model, triplet_weight=2.0).eval()(images, labels)
    triplets = TripletLoss()(model.forward_head(model.forward_features(images), pre_logits=True), labels)
    torch.testing.assert_close(both['triplet_loss'], triplets.detach())
    torch.testing.assert_close(both['loss'], plain['loss'] + 2 * triplets)
    assert 'triplet_loss' not in plain


def test_every_command_of_the_readme_parses():
    """The table that reproduces the paper: each command, on each data set that the paper has figures of."""
    readme = (SCRIPT.parent.parent / 'README.md').read_text()
    section = readme.split('<!-- reproduce:')[1].split('<!-- end of reproduce -->')[0]
    lines = [line for line in section.splitlines() if line.startswith('|') and '`reid' in line]
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert Counter(row[0] for row in rows) == {'1': 6, '2': 4, '3': 4, '4': 4, '5': 4}
    module = load_script()
    recipes = {}
    for table, name, command, *figures, _ in rows:
        for data, figure in zip(('market1501', 'dukemtmcreid', 'cuhk03np'), figures, strict=True):
            if figure == '—':
                continue
            config = SCRIPT.parent / 'recipes' / data / 'pcb_csa.yaml'
            _, *options = shlex.split(command.strip('`'))
            arguments = [f'--config={config}', '--root=data', *options]
            recipe, _ = module.RecipeParser(module.Recipe, None, config).parse_recipe(arguments)
            assert recipe.data == data
            recipes[data, table, name] = recipe
            model_args = module.model_arguments(recipe)
            model = timm.create_model(recipe.model, num_classes=3, device='meta', **model_args)
            assert bool(model.rpp) == ('RPP' in name) == bool(recipe.finetune_epochs)
            assert {module.stage_of(recipe, epoch) for epoch in (0, 39)} == {'pcb' if model.rpp else 'finetune'}
            if 'group' in name or 'maps' in name:
                number, of = name.split()
                csa = model.layer1.csa
                assert {'map': csa.num_maps, 'group': csa.groups}[of.rstrip('s')] == int(number)
            if name.startswith('stage'):
                assert list(model.attn_stages) == [int(stage) - 1 for stage in re.findall(r'\d', name)]
    default = recipes['market1501', '1', 'PCB + CSA']
    assert (default.epochs, default.decay_epochs, default.weight_decay, default.batch_size) == (100, 40, 1e-4, 64)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--model=l2net_hardnet'], 'this script trains resnet18_pcb'),
        (['--model=resnet18_pbc'], '--model resnet18_pbc: this script trains'),
        (['--attn_kwargs={"num_map": 2}', '--model=resnet18_pcb_csa'], '--attn_kwargs or --model_args: .*num_map'),
        (['--data_options={"num_people": 8}'], '--data_options: .*num_people'),
    ],
)
def test_mistakes_are_told_before_training(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(*TINY, f'--output={tmp_path}', *arguments)


def test_data_of_one_camera_is_refused_before_training(tmp_path):
    lines = ['path,person_id,camera_id,split']
    lines += [f'{split}{person}.jpg,{person},1,{split}' for split in ('train', 'query', 'gallery') for person in (1, 2)]
    table = tmp_path / 'people.csv'
    table.write_text('\n'.join(lines))
    for line in lines[1:]:
        Image.new('RGB', (24, 48)).save(tmp_path / line.split(',')[0])
    command = [sys.executable, str(SCRIPT), '--data=csv', f'--root={table}', f'--output={tmp_path / "run"}']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('train/reid.py: none of 2 queries has an image of its person')
    assert 'Traceback' not in done.stderr
