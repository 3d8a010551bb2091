"""`csa-zoo`: the command line."""

import argparse
from collections.abc import Callable

from .version import __version__

# each verb imports what it needs when it runs, so that --help answers at once


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    parser = argparse.ArgumentParser('csa-zoo', description='Models with compressed self-attention, and their data.')
    parser.add_argument('--version', action='version', version=f'csa-zoo {__version__}')
    verbs = parser.add_subparsers(title='verbs', metavar='VERB', required=True)

    verb = _add(verbs, 'list', list_models, 'the registered models', "csa-zoo list '*csa*'")
    verb.add_argument('filter', nargs='?', default='*', help='wildcard, such as *csa*')

    data = verbs.add_parser('data', help='look at data sets', description='Look at data sets.')
    verb = _add(
        data.add_subparsers(metavar='VERB', required=True),
        'check',
        check_data,
        'compare a data set on disk with its published counts',
        'csa-zoo data check data/Market-1501',
    )
    verb.add_argument('root', help='folder of the data set')
    verb.add_argument('--name', help='which data set it is; found out from its layout if not given')

    verb = _add(
        verbs,
        'render-pedestrians',
        render_pedestrians,
        'write the built-in pedestrians as a Market-1501 folder',
        'csa-zoo render-pedestrians data/pedestrians --identities 1000 --seed 1',
    )
    verb.add_argument('output', help='folder to write')
    verb.add_argument('--identities', type=int, help='people, half of them to train on')
    verb.add_argument('--seed', type=int, default=0, help='another seed gives other people (default: 0)')
    verb.add_argument('--workers', type=int, help='processes (default: one for each core)')

    options = parser.parse_args(argv)
    try:
        return options.run(options) or 0
    except (OSError, ValueError, ImportError) as error:
        parser.exit(1, f'csa-zoo: {error}\n')


def _add(verbs, name: str, run: Callable, summary: str, example: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        name,
        help=summary,
        description=f'{summary[0].upper()}{summary[1:]}.',
        epilog=f'example: {example}',
    )
    verb.set_defaults(run=run)
    return verb


def list_models(options: argparse.Namespace) -> None:
    """Print the zoo's models with their tags and where the weights come from."""
    import timm

    import csa_zoo

    ours = [name for name in timm.list_models(options.filter) if _is_ours(name)]
    for name in ours:
        for tag, config in timm.models.get_arch_pretrained_cfgs(name).items():
            source = config.hf_hub_id or config.file or 'no weights yet'
            size = 'x'.join(map(str, config.input_size))
            print(f'{name + ("." + tag.split(".")[1] if "." in tag else ""):34} {size:12} {source}')
    assert csa_zoo


def _is_ours(name: str) -> bool:
    import timm

    return timm.models.model_entrypoint(name).__module__.startswith('csa_zoo.')


def check_data(options: argparse.Namespace) -> int:
    """Print the report; status 1 if something is wrong."""
    from .data import check_reid

    report = check_reid(options.name, options.root)
    print(report)
    return 0 if report.ok else 1


def render_pedestrians(options: argparse.Namespace) -> None:
    """Render, and say where."""
    from .data.pedestrians import render_pedestrians

    given = {'num_identities': options.identities} if options.identities else {}
    root = render_pedestrians(options.output, seed=options.seed, workers=options.workers, **given)
    print(f'{root}: use it with --data pedestrians --root {root}, or as any Market-1501 folder')


if __name__ == '__main__':
    raise SystemExit(main())
