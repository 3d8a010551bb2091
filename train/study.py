"""Compare attentions at one recipe over several seeds: a table of mean and standard deviation.

    python train/study.py --output runs/study
    python train/study.py --output runs/study --variants pcb_ds pcb_csa --seeds 5 --epochs 12

Each run is a run of train/reid.py by `accelerate launch`. What is finished is not trained again and what was killed
goes on, so that the same command may be given until the table is whole. Options that are not the study's are handed to
every run.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

TRAIN = Path(__file__).parent
CHOSEN = ('--model', '--attn_stages', '--attn_kwargs', '--aux_stages', '--aux_weight', '--seed', '--config', '--resume')
DEEP = ['--aux_stages=[0,1,2]']


def csa(maps: int = 32, groups: int = 2, stages: tuple[int, ...] = (0, 1, 2)) -> list[str]:
    """Options of compressed self-attention, with deep supervision after each."""
    return [
        f'--attn_kwargs={json.dumps({"num_maps": maps, "groups": groups})}',
        f'--attn_stages={list(stages)}',
        f'--aux_stages={list(stages)}',
    ]


# Name, label in the table, ending of the model's name, options. All are the default of CSA with one thing changed.
VARIANTS = {
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


def main(argv: list[str] | None = None) -> str:
    """Run what is missing; returns the table, which is also in `results.md`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('--output', type=Path, required=True, help='folder of all runs and of the table')
    parser.add_argument('--recipe', type=Path, default=TRAIN / 'recipes' / 'pedestrians.yaml', help='of every run')
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS), help='all if not given')
    parser.add_argument('--seeds', type=int, default=3, help='number of runs of each variant')
    arguments, overrides = parser.parse_known_args(argv)
    for option in overrides:
        if option.split('=')[0] in CHOSEN:
            raise SystemExit(
                f'{option.split("=")[0]} is what the variants differ in: set the model in a --recipe of your own'
            )
    check_same_study(arguments.output, [arguments.recipe.read_text(), *overrides])
    for seed in range(arguments.seeds):  # all variants once before any twice: an unfinished study compares them all
        for variant in arguments.variants:
            run(arguments.output / variant / f'seed{seed}', variant, arguments.recipe, seed, overrides)
            table = results(arguments.output, arguments.variants)
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


def run(folder: Path, variant: str, recipe: Path, seed: int, overrides: list[str]) -> None:
    """Train one model unless it is finished, from where it was interrupted."""
    if (folder / 'metrics.json').exists():
        return
    _, ending, options = VARIANTS[variant]
    model = yaml.safe_load(recipe.read_text())['model'].removesuffix('_csa').removesuffix('_sa') + ending
    new = [f'--config={recipe}', f'--output={folder}', f'--model={model}', *options, f'--seed={seed}', *overrides]
    arguments = [f'--resume={folder}'] if (folder / 'recipe.yaml').exists() else new
    print(f'{variant}, seed {seed}: {folder}', flush=True)
    command = [sys.executable, '-m', 'accelerate.commands.launch', str(TRAIN / 'reid.py'), *arguments]
    if subprocess.run(command).returncode and not (folder / 'metrics.json').exists():
        raise SystemExit(f'{variant} with seed {seed} failed; give the same command to go on from {folder}')


def results(output: Path, variants: list[str]) -> str:
    """Markdown table of all finished runs: mean and sample standard deviation over seeds."""
    lines = ['| model | runs | rank-1 (%) | mAP (%) | training (s) |', '|---|---|---|---|---|']
    for variant in variants:
        runs = [json.loads(path.read_text()) for path in sorted((output / variant).glob('seed*/metrics.json'))]
        if runs:
            rank1, mean_ap = ([100 * run['metrics'][name] for run in runs] for name in ('rank1', 'mAP'))
            cells = [spread(rank1, 1), spread(mean_ap, 1), spread([run['train_seconds'] for run in runs], 0)]
            lines.append(f'| {VARIANTS[variant][0]} | {len(runs)} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def spread(values: list[float], digits: int) -> str:
    """Mean ± sample standard deviation; of one value, the value."""
    mean = f'{statistics.fmean(values):.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean


if __name__ == '__main__':
    main()
