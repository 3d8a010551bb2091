"""Model cards: nothing on them that is not in the run, metadata that the Hub understands, code that runs as pasted."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml
from hub_server import HubServer, client_of, make_run
from huggingface_hub import ModelCard

from csa_zoo.hub import publish, render_card

ARCHITECTURES = {
    'l2net_hardnet_csa': {},
    'l2net_hardnet': {},
    'resnet18_pcb_csa': {'num_classes': 5},
    'resnet18_pcb': {'num_classes': 5},
}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    return {name: make_run(folder / name, name, **arguments) for name, arguments in ARCHITECTURES.items()}


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_model_index_is_metrics_json_and_nothing_else(runs, name, tmp_path):
    render_card(runs[name], f'me/{name}').save(tmp_path / 'README.md')
    data = ModelCard.load(tmp_path / 'README.md').data
    written = json.loads((runs[name] / 'metrics.json').read_text())
    found = {
        result.metric_type + (f'_{result.dataset_type}' if result.metric_type == 'fpr95' else ''): result.metric_value
        for result in data.eval_results
    }
    assert found == written['metrics']
    assert {result.dataset_split for result in data.eval_results} == {'test'}
    assert data.model_name == name
    assert (data.library_name, data.pipeline_tag) == ('timm', 'image-feature-extraction')
    is_reid = 'pcb' in name
    assert ('csa' in data.tags) == name.endswith('csa')
    assert ('person-re-identification' if is_reid else 'local-descriptor') in data.tags
    assert data.datasets == (['market1501'] if is_reid else None)
    assert data.base_model is None and data.license == 'apache-2.0'


def test_numbers_in_the_text(runs):
    text = render_card(runs['resnet18_pcb_csa'], 'me/name').text
    table = re.findall(r'^\| Market-1501 \| test \| (.+) \| (.+) % \|$', text, re.M)
    assert [value for _, value in table] == ['75.00', '50.00', '48.75', '25.00']
    assert table[0][0] == 'rank-1'
    model = timm.create_model('resnet18_pcb_csa', num_classes=5)
    assert f'| {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M |' in text
    assert '1 epoch, 1 process,\n1.5 minutes' in text
    assert 'surveillance' in text and 'without their consent' in text
    assert 'curves.png' in text and 'attention.png)' not in text
    assert 'surveillance' not in render_card(runs['l2net_hardnet'], 'me/name').text


def test_multiply_adds_of_a_network_counted_by_hand(runs):
    sizes = [(9, 1, 32, 32), (9, 32, 32, 32), (9, 32, 64, 16), (9, 64, 64, 16), (9, 64, 128, 8), (9, 128, 128, 8)]
    by_hand = sum(kernel * c_in * c_out * side**2 for kernel, c_in, c_out, side in sizes) + 64 * 128 * 128
    assert f'| {by_hand / 1e9:.2f} G |' in render_card(runs['l2net_hardnet'], 'me/name').text


def test_rendered_people_and_base_weights_are_named(tmp_path):
    run = make_run(tmp_path / 'run', 'resnet18_pcb', num_classes=5)
    edit(run / 'metrics.json', data='pedestrians')
    recipe = yaml.safe_load((run / 'recipe.yaml').read_text())
    (run / 'recipe.yaml').write_text(yaml.safe_dump({**recipe, 'data': 'pedestrians', 'pretrained': True}))
    card = render_card(run, 'me/name')
    assert 'never seen a photograph of a person' in card.text
    assert card.data.datasets is None
    assert card.data.base_model == 'timm/resnet18.tv_in1k'
    assert card.data.license == 'bsd-3-clause'
    assert render_card(run, 'me/name', license='mit').data.license == 'mit'


def test_the_card_tells_nothing_of_the_machine(runs):
    for run in runs.values():
        assert '/home/someone' in (run / 'recipe.yaml').read_text()
        assert '/home' not in str(render_card(run, 'me/name'))
        assert str(run) not in str(render_card(run, 'me/name'))


@pytest.mark.parametrize('name', ['l2net_hardnet_csa', 'resnet18_pcb_csa', 'resnet18_pcb'])
def test_every_python_block_runs_as_pasted(runs, name, tmp_path):
    with HubServer() as hub:
        with client_of(hub, tmp_path / 'cache'):
            publish(runs[name], f'me/{name}.test')
        text = hub.files(f'me/{name}.test')['README.md'].decode()
        blocks = re.findall(r'^```python\n(.*?)^```$', text, re.M | re.S)
        assert len(blocks) == 1 + name.endswith('csa')
        # one process for all blocks, but each in a namespace of its own
        script = f'for block in {blocks!r}:\n    exec(block, {{"__name__": "__main__"}})\n'
        environment = {
            **os.environ,
            'HF_ENDPOINT': hub.endpoint,
            'HF_HOME': str(tmp_path / 'home'),
            'HF_HUB_OFFLINE': '0',
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
        }
        done = subprocess.run(
            [sys.executable, '-W', 'error::UserWarning', '-c', script],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'attention.png').exists() == name.endswith('csa')


def test_card_of_a_run_that_is_not_whole(tmp_path):
    run = make_run(tmp_path / 'run')
    for name in ('metrics.json', 'recipe.yaml', 'config.json', 'model.safetensors'):
        content = (run / name).read_bytes()
        (run / name).unlink()
        with pytest.raises(FileNotFoundError, match=f'no {re.escape(name)}.*--resume'):
            render_card(run, 'me/name')
        (run / name).write_bytes(content)
    render_card(run, 'me/name')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'metrics': {'fpr95_liberty': math.nan}}, 'fpr95_liberty is nan'),
        ({'metrics': {'fpr95_liberty': 'good'}}, 'fpr95_liberty is good'),
        ({'model': 'l2net_ralnet'}, 'several runs.*l2net_hardnet_csa.*l2net_ralnet'),
        ({'task': 'chess'}, "task must be one of.*got 'chess'"),
        ({'metrics': None}, 'not what training writes'),
        ({'task': 'person re-identification'}, r"metrics\.json lacks \['data'\]"),
    ],
)
def test_metrics_that_are_no_results(tmp_path, changes, message):
    run = make_run(tmp_path / 'run')
    edit(run / 'metrics.json', **changes)
    with pytest.raises(ValueError, match=message):
        render_card(run, 'me/name')


def test_damaged_metrics(tmp_path):
    run = make_run(tmp_path / 'run')
    (run / 'metrics.json').write_text('{"model": ')
    with pytest.raises(ValueError, match=r'metrics\.json is damaged'):
        render_card(run, 'me/name')


def test_no_card_in_the_repository_claims_a_result():
    cards = [path for path in (Path(__file__).parent.parent / 'hub_cards').glob('*.md') if path.name != 'card.md']
    registered = {name for name in timm.list_pretrained(['*_pcb*', 'l2net_*']) if not name.endswith('.tv_in1k')}
    assert {path.stem for path in cards} == registered
