"""The command line on tiny data, as a user types it."""

import csv
import json

import pytest
import timm

from csa_zoo.cli import main
from csa_zoo.recipes import RECIPE_FILE


@pytest.fixture(scope='module')
def pedestrians(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'pedestrians'
    assert main(['render-pedestrians', str(folder), '--identities', '8', '--seed', '3']) == 0
    return folder


@pytest.fixture(scope='module')
def run(tmp_path_factory, pedestrians):
    """A run folder with an untrained model."""
    folder = tmp_path_factory.mktemp('run')
    model = timm.create_model('resnet18_pcb_csa', num_classes=4)
    model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': (3, 48, 24)}
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    (folder / RECIPE_FILE).write_text(f'data: pedestrians\nroot: {pedestrians}\ndata_options: {{}}\n')
    return folder


def test_list(capsys):
    main(['list', '*csa*'])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ['model', 'input', 'parameters', 'key', 'metric', 'weights']
    assert list(dict.fromkeys(line.split('.')[0].split()[0] for line in lines)) == timm.list_models('*_csa')
    person = next(line for line in lines if line.startswith('resnet50_pcb_csa.tv_in1k'))
    parameters = sum(parameter.numel() for parameter in timm.create_model('resnet50_pcb_csa').parameters())
    cells = ['resnet50_pcb_csa.tv_in1k', '3x384x128', f'{parameters / 1e6:.2f}', 'M', '-', 'timm/resnet50.tv_in1k']
    assert person.split() == cells


def test_demo_without_trained_weights(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(['demo'])
    assert exit_.value.code == 1
    assert 'the demo needs a trained model: give --reid or --descriptor' in capsys.readouterr().err


def test_rendered_pedestrians_are_a_market_folder(pedestrians, capsys):
    status = main(['data', 'check', str(pedestrians)])
    assert status == 0
    assert 'train' in capsys.readouterr().out


def test_data_check_fails_on_a_broken_set(tmp_path, capsys):
    (tmp_path / 'bounding_box_train').mkdir()
    assert main(['data', 'check', str(tmp_path), '--name', 'market1501']) == 1
    assert 'query' in capsys.readouterr().out


def test_evaluate_and_visualize(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('CSA_ZOO_CACHE', str(tmp_path / 'cache'))
    assert main(['evaluate', str(run), '--csv', str(tmp_path / 'queries.csv'), '--rerank']) == 0
    printed = capsys.readouterr().out
    assert 'rank1' in printed and 're-ranking' in printed
    rows = list(csv.DictReader((tmp_path / 'queries.csv').open()))
    assert all(int(row['first_rank']) >= 1 for row in rows)
    assert main(['visualize', str(run), '--queries', '2', '--output', str(tmp_path / 'figures')]) == 0
    for name in ('ranked_lists.png', 'attention.png'):
        assert (tmp_path / 'figures' / name).read_bytes().startswith(b'\x89PNG')


def test_errors_are_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(['evaluate', 'resnet18_pcb_csa'])
    assert exit_.value.code == 1
    assert capsys.readouterr().err.startswith('csa-zoo: resnet18_pcb_csa is no run that says which data')


def test_patches_of_one_name_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(['evaluate', 'l2net_hardnet', '--patches', 'home/photos', 'city/photos'])
    assert 'two of home/photos, city/photos have one' in capsys.readouterr().err


VERBS = [
    *('list', 'data check', 'data crop-people', 'render-pedestrians', 'make-patches', 'evaluate', 'benchmark'),
    *('visualize', 'match', 'card', 'publish', 'demo'),
]


@pytest.mark.parametrize('verb', VERBS)
def test_help_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*verb.split(), '--help'])
    assert exit_.value.code == 0
    assert f'example: csa-zoo {verb}' in ' '.join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        ('evaluate nowhere', 'nowhere is no run that says which data'),
        ('evaluate nowhere --patches scikit-image', 'nowhere is no folder, no hf-hub:owner/name and no model'),
        ('evaluate resnet18_pcb --patches scikit-image', 'takes images of 3 channels, not of 1'),
        ('evaluate l2net_hardnet_csa --patches nowhere', 'nowhere does not exist'),
        ('evaluate l2net_hardnet_csa --patches scikit-image --rerank', '--rerank: for person re-identification'),
        ('evaluate l2net_hardnet_csa --data pedestrians --root {people}', 'takes images of 1 channels, not of 3'),
        ('match nowhere.jpg nowhere.jpg', 'no photograph nowhere.jpg'),
        ('data check nowhere', None),
        ('list nothing*', "no model of the zoo matches 'nothing*'"),
        ('benchmark --attention csa-g3 --model l2net_hardnet --sides', 'no attention fits l2net_hardnet'),
        ('benchmark --rounds 0', 'argument --rounds: must be at least 1, got 0'),
    ],
)
def test_mistakes_are_told(command, message, pedestrians, capsys):
    arguments = command.format(people=pedestrians).split()
    if message is None:
        assert main(arguments) == 1
        assert 'problem: nowhere does not exist' in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code in (1, 2)
    assert message in capsys.readouterr().err


def test_evaluate_writes_figures(run, tmp_path, monkeypatch):
    monkeypatch.setenv('CSA_ZOO_CACHE', str(tmp_path / 'cache'))
    file = tmp_path / 'new' / 'figures.json'
    assert main(['evaluate', str(run), '--rerank', '--camera-pairs', '--json', str(file)]) == 0
    figures = json.loads(file.read_text())
    low, high = figures['intervals']['rank1']
    assert low <= figures['metrics']['rank1'] <= high
    assert figures.keys() == {'metrics', 'intervals', 'verification', 'reranked', 'camera_pairs'}
