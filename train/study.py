"""Compare attentions at one recipe over several seeds: a table of mean and standard deviation.

    python train/study.py --output runs/study
    python train/study.py --output runs/study --variants pcb_ds pcb_csa --seeds 5 --epochs 12
    python train/study.py --task descriptor --output runs/descriptors --patches scikit-image

Each run is a run of train/reid.py, or train/descriptor.py, by `accelerate launch`. What is finished is not trained
again and what was killed goes on, so that the same command may be given until the table is whole. Options that are not
the study's are handed to every run.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

TRAIN = Path(__file__).parent
PATCH_METRICS = 'patches.json'
CHOSEN = (
    '--model',
    '--attn_stages',
    '--attn_kwargs',
    '--aux_stages',
    '--aux_weight',
    '--loss',
    '--seed',
    '--config',
    '--resume',
)
DEEP = ['--aux_stages=[0,1,2]']


def csa(maps: int = 32, groups: int = 2, stages: tuple[int, ...] = (0, 1, 2)) -> list[str]:
    """Options of compressed self-attention, with deep supervision after each."""
    return [
        f'--attn_kwargs={json.dumps({"num_maps": maps, "groups": groups})}',
        f'--attn_stages={list(stages)}',
        f'--aux_stages={list(stages)}',
    ]


# Name, label in the table, ending of the model's name, options. All are the default of CSA with one thing changed.
PEOPLE = {
    'pcb': ('PCB', '', ['--aux_weight=0']),
    'pcb_ds': ('PCB, deep supervision (DS)', '', DEEP),
    'pcb_sa': ('PCB + SA, DS', '_sa', [*DEEP, '--attn_stages=[0,1,2]']),
    'pcb_csa': ('PCB + CSA, DS: 32 maps, 2 groups, stages 1, 2, 3', '_csa', csa()),
    'pcb_csa_no_ds': ('PCB + CSA without DS', '_csa', [*csa(), '--aux_weight=0']),
    'pcb_csa_g1': ('PCB + CSA, DS: 1 group', '_csa', csa(groups=1)),
    'pcb_csa_g8': ('PCB + CSA, DS: 8 groups', '_csa', csa(groups=8)),
    'pcb_csa_d8': ('PCB + CSA, DS: 8 maps', '_csa', csa(maps=8)),
    'pcb_csa_s1': ('PCB + CSA, DS: stage 1', '_csa', csa(stages=(0,))),
    'pcb_csa_s23': ('PCB + CSA, DS: stages 2, 3', '_csa', csa(stages=(1, 2))),
}
PATCHES = {
    'hardnet': ('L2-Net, HardNet loss', '', []),
    'hardnet_sa': ('L2-Net + SA, HardNet loss', '_sa', []),
    'hardnet_csa': ('L2-Net + CSA, HardNet loss', '_csa', []),
    'ralnet_csa': ('L2-Net + CSA, RAL loss', '_csa', ['--loss=ral']),
}


PERCENT, SECONDS = (100, 1), (1, 0)  # factor and digits


class Study(NamedTuple):
    """What is compared: a script of this folder, its recipe, the variants, and the columns of the table."""

    script: str
    recipe: str
    variants: dict[str, tuple[str, str, list[str]]]
    columns: dict[str, tuple[int, int]]


STUDIES = {
    'reid': Study('reid.py', 'pedestrians.yaml', PEOPLE, {'rank1': PERCENT, 'mAP': PERCENT, 'train_seconds': SECONDS}),
    'descriptor': Study(
        'descriptor.py',
        'photographs.yaml',
        PATCHES,
        dict.fromkeys(('fpr95', 'ratio_map', 'verification', 'matching', 'retrieval'), PERCENT),
    ),
}


def main(argv: list[str] | None = None) -> str:
    """Run what is missing; returns the table, which is also in `results.md`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('--task', choices=STUDIES, default='reid', help='what is studied (default: reid)')
    parser.add_argument('--output', type=Path, required=True, help='folder of all runs and of the table')
    parser.add_argument('--recipe', type=Path, help="of every run (default: the task's small one)")
    parser.add_argument('--variants', nargs='+', help='all of the task if not given')
    parser.add_argument('--seeds', type=int, default=3, help='number of runs of each variant')
    parser.add_argument('--patches', nargs='+', default=[], help='measure descriptors on these: see csa-zoo evaluate')
    arguments, overrides = parser.parse_known_args(argv)
    study = STUDIES[arguments.task]
    variants = arguments.variants or list(study.variants)
    unknown = set(variants) - set(study.variants)
    if unknown:
        raise SystemExit(f'no variant {", ".join(unknown)} of {arguments.task}: there are {", ".join(study.variants)}')
    for option in overrides:
        if option.split('=')[0] in CHOSEN:
            raise SystemExit(
                f'{option.split("=")[0]} is what the variants differ in: set the model in a --recipe of your own'
            )
    recipe = arguments.recipe or TRAIN / 'recipes' / study.recipe
    check_same_study(arguments.output, [recipe.read_text(), *overrides])
    table = ''
    for seed in range(arguments.seeds):  # all variants once before any twice: an unfinished study compares them all
        for variant in variants:
            folder = arguments.output / variant / f'seed{seed}'
            run(folder, study, variant, recipe, seed, overrides)
            if arguments.patches and not (folder / PATCH_METRICS).exists():
                measure(folder, arguments.patches, sift=seed == 0 and variant == variants[0])
            table = results(arguments.output, study, variants)
            (arguments.output / 'results.md').write_text(table)
    print(table)
    return table


def check_same_study(output: Path, settings: list[str]) -> None:
    """Refuse to mix runs of different recipes in one table."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / 'study.json'
    if file.exists() and json.loads(file.read_text()) != settings:
        raise SystemExit(f'{output} holds a study with another recipe or other options: choose another --output')
    file.write_text(json.dumps(settings, indent=1))


def run(folder: Path, study: Study, variant: str, recipe: Path, seed: int, overrides: list[str]) -> None:
    """Train one model unless it is finished, from where it was interrupted."""
    if (folder / 'metrics.json').exists():
        return
    _, ending, options = study.variants[variant]
    model = yaml.safe_load(recipe.read_text())['model'].removesuffix('_csa').removesuffix('_sa') + ending
    if '--loss=ral' in options:
        model = model.replace('hardnet', 'ralnet')
    new = [f'--config={recipe}', f'--output={folder}', f'--model={model}', *options, f'--seed={seed}', *overrides]
    arguments = [f'--resume={folder}'] if (folder / 'recipe.yaml').exists() else new
    print(f'{variant}, seed {seed}: {folder}', flush=True)
    command = [sys.executable, '-m', 'accelerate.commands.launch', str(TRAIN / study.script), *arguments]
    if subprocess.run(command).returncode and not (folder / 'metrics.json').exists():
        raise SystemExit(f'{variant} with seed {seed} failed; give the same command to go on from {folder}')


def measure(folder: Path, sources: list[str], sift: bool) -> None:
    """Measure a descriptor on patches, and SIFT beside it if wanted: it is the same beside every run."""
    command = [sys.executable, '-m', 'csa_zoo.cli', 'evaluate', str(folder), '--patches', *sources]
    command += [] if sift else ['--no-sift']
    partial = folder / 'patches.tmp'
    subprocess.run([*command, '--json', str(partial)], check=True)
    partial.replace(folder / PATCH_METRICS)


def results(output: Path, study: Study, variants: list[str]) -> str:
    """Markdown table of all finished runs: mean and sample standard deviation over seeds."""
    rows = {}
    for variant in variants:
        for run in sorted(path.parent for path in (output / variant).glob('seed*/metrics.json')):
            for name, figures in read_figures(run).items():
                label = name or study.variants[variant][0]
                rows.setdefault(label, []).append(figures)
    # 'matching on graf' is a figure of the column 'matching'
    measured = next(iter(rows.values()), [study.columns])[0]
    columns = {n: form for metric, form in study.columns.items() for n in measured if n.split(' on ')[0] == metric}
    heads = [f'{name} ({"%" if form == PERCENT else "s"})' for name, form in columns.items()]
    lines = [f'| model | runs | {" | ".join(heads)} |', '|---' * (len(columns) + 2) + '|']
    for label, runs in rows.items():
        cells = [spread([run[name] for run in runs if name in run], *form) for name, form in columns.items()]
        lines.append(f'| {label} | {len(runs)} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def read_figures(run: Path) -> dict[str, dict[str, float]]:
    """Figures of a finished run, under '', and of what was measured beside it."""
    metrics = json.loads((run / 'metrics.json').read_text())
    figures = {'': {**metrics['metrics'], 'train_seconds': metrics['train_seconds']}}
    if (run / PATCH_METRICS).exists():
        for source, measured in json.loads((run / PATCH_METRICS).read_text()).items():
            for name, values in measured.items():
                own = figures.setdefault('' if name == str(run) else name, {})
                own.update({f'{metric} on {source}': value for metric, value in values.items()})
    return figures


def spread(values: list[float], factor: int, digits: int) -> str:
    """Mean ± sample standard deviation; of one value, the value."""
    if not values:
        return '-'
    mean = f'{factor * statistics.fmean(values):.{digits}f}'
    return f'{mean} ± {factor * statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean


if __name__ == '__main__':
    main()
