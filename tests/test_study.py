"""The study of attentions: which runs it makes, that it goes on where it stopped, and its table."""

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

TRAIN = Path(__file__).parent.parent / 'train'
RECIPE = """
model: resnet18_pcb_csa
pretrained: false
data: pedestrians
data_options: {num_identities: 8, images_per_camera: 2}
image_size: [48, 24]
batch_size: 8
epochs: 1
"""


def load_script(name):
    spec = importlib.util.spec_from_file_location(f'train_{name}', TRAIN / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The script and the folder that its runs go to; trains in this process and notes the command lines."""
    monkeypatch.setenv('CSA_ZOO_CACHE', str(tmp_path / 'cache'))
    module, commands = load_script('study'), []

    def run(command):
        assert command[3] == str(TRAIN / 'reid.py')
        commands.append(command[4:])
        load_script('reid').main(command[4:])
        return SimpleNamespace(returncode=0)

    module.subprocess = SimpleNamespace(run=run)
    recipe = tmp_path / 'tiny.yaml'
    recipe.write_text(RECIPE)
    return module, [f'--recipe={recipe}', f'--output={tmp_path / "study"}'], tmp_path / 'study', commands


def test_study(study):
    module, where, folder, commands = study
    arguments = [*where, '--variants', 'pcb_ds', 'pcb_csa_s23', '--seeds', '2', '--learning_rate=0.01']
    table = module.main(arguments)
    recipe = yaml.safe_load((folder / 'pcb_csa_s23' / 'seed1' / 'recipe.yaml').read_text())
    expected = {
        'model': 'resnet18_pcb_csa',
        'attn_stages': [1, 2],
        'aux_stages': [1, 2],
        'attn_kwargs': {'num_maps': 32, 'groups': 2},
        'seed': 1,
        'learning_rate': 0.01,
        'epochs': 1,
    }
    assert expected.items() <= recipe.items()
    plain = yaml.safe_load((folder / 'pcb_ds' / 'seed0' / 'recipe.yaml').read_text())
    assert (plain['model'], plain['aux_stages'], plain['aux_weight']) == ('resnet18_pcb', [0, 1, 2], 1.0)
    history = json.loads((folder / 'pcb_ds' / 'seed0' / 'history.jsonl').read_text())
    assert history['aux_loss'] == pytest.approx(3 * 1.386, rel=0.05)  # three branches, four people

    runs = [json.loads((folder / 'pcb_ds' / f'seed{seed}' / 'metrics.json').read_text()) for seed in (0, 1)]
    values = [100 * run['metrics']['mAP'] for run in runs]
    assert values[0] != values[1]
    row = next(line for line in table.splitlines() if 'PCB, deep' in line)
    assert row.split(' | ')[1] == '2'
    assert row.split(' | ')[3] == f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}'
    assert (folder / 'results.md').read_text() == table
    assert len(table.splitlines()) == 4

    # finished runs stay, one that was killed goes on
    (folder / 'pcb_ds' / 'seed1' / 'metrics.json').unlink()
    commands.clear()
    assert module.main(arguments) == table
    assert commands == [[f'--resume={folder / "pcb_ds" / "seed1"}']]
    with pytest.raises(SystemExit, match='another recipe'):
        module.main([*where, '--learning_rate=0.02'])
    with pytest.raises(SystemExit, match='--model is what the variants differ in'):
        module.main([*where, '--model', 'resnet50_pcb'])


def test_every_variant_is_a_recipe(study):
    module, where, folder, _ = study
    parser = load_script('reid')
    seen = []

    def parse(command):
        recipe, _ = parser.RecipeParser(parser.Recipe, None, parser.DEFAULT_RECIPE).parse_recipe(command[4:])
        recipe.seed = 0
        seen.append((recipe.model, str(vars(recipe))))
        return SimpleNamespace(returncode=0)

    module.subprocess.run = parse
    module.main([*where, '--seeds=1'])
    assert len(set(seen)) == len(module.STUDIES['reid'].variants)
    assert {model for model, _ in seen} == {'resnet18_pcb', 'resnet18_pcb_sa', 'resnet18_pcb_csa'}
    assert len((folder / 'results.md').read_text().splitlines()) == 2  # nothing was trained, so nothing is listed


def test_a_failed_run_is_named(study):
    module, where, _, _ = study
    module.subprocess.run = lambda command: SimpleNamespace(returncode=1)
    with pytest.raises(SystemExit, match=r'pcb_sa with seed 0 failed.*seed0'):
        module.main([*where, '--variants', 'pcb_sa'])


def test_descriptors_are_measured_beside_sift(study, tmp_path):
    module, _, _, _ = study
    output, figures = tmp_path / 'descriptors', {'hardnet': [0.1, 0.2], 'ralnet_csa': [0.3, 0.3]}

    def run(command, check=False):
        """Train or measure, as far as the study can see."""
        if 'evaluate' in command:
            folder, report = command[4], command[command.index('--json') + 1]
            variant, seed = Path(folder).parts[-2:]
            measured = {folder: {'fpr95': figures[variant][int(seed[-1])]}}
            measured |= {} if '--no-sift' in command else {'SIFT': {'fpr95': 0.5}}
            Path(report).write_text(json.dumps({'scene': measured}))
        else:
            folder = Path(next(a.removeprefix('--output=') for a in command if a.startswith('--output=')))
            folder.mkdir(parents=True)
            (folder / 'metrics.json').write_text(json.dumps({'metrics': {}, 'train_seconds': 1}))
            assert ('--model=l2net_ralnet_csa' in command) == ('--loss=ral' in command)
        return SimpleNamespace(returncode=0)

    module.subprocess.run = run
    arguments = ['--task=descriptor', f'--output={output}', '--seeds=2', '--patches', 'scene']
    table = module.main([*arguments, '--variants', 'hardnet', 'ralnet_csa'])
    assert table.splitlines() == [
        '| model | runs | fpr95 on scene (%) |',
        '|---|---|---|',
        '| L2-Net, HardNet loss | 2 | 15.0 ± 7.1 |',
        '| SIFT | 1 | 50.0 |',
        '| L2-Net + CSA, RAL loss | 2 | 30.0 ± 0.0 |',
    ]
    with pytest.raises(SystemExit, match='no variant pcb of descriptor'):
        module.main([*arguments, '--variants', 'pcb'])
