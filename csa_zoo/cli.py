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

    verb = _add(
        verbs,
        'evaluate',
        evaluate,
        'measure a model on a person re-identification set',
        'csa-zoo evaluate runs/pedestrians --data market1501 --root data/Market-1501 --csv queries.csv',
    )
    verb.add_argument('model', help='folder of a run, name of a timm model, or hf-hub:owner/name')
    verb.add_argument('--data', help="name of the set (default: the run's own)")
    verb.add_argument('--root', help="where the set is (default: the run's own)")
    verb.add_argument('--image-size', type=int, nargs=2, metavar=('H', 'W'), help="default: the model's input size")
    verb.add_argument('--batch-size', type=int, default=256, help='images in a forward pass (default: 256)')
    verb.add_argument('--rerank', action='store_true', help='k-reciprocal re-ranking too')
    verb.add_argument('--csv', help='write what each query found to this file')

    verb = _add(
        verbs,
        'visualize',
        visualize,
        'draw ranked lists and attention maps of a re-identification run',
        'csa-zoo visualize runs/pedestrians --output figures',
    )
    verb.add_argument('model', help='folder of a run')
    verb.add_argument('--queries', type=int, default=6, help='ranked lists to draw (default: 6)')
    verb.add_argument('--output', help='folder for the figures (default: the run)')
    verb.set_defaults(data=None, root=None, image_size=None, batch_size=256)  # the run's own

    for name, run, summary, example in (
        (
            'card',
            card,
            'show the model card of a run',
            'csa-zoo card runs/pedestrians --repo-id me/resnet18_pcb_csa.mine',
        ),
        (
            'publish',
            publish,
            'upload a run to the Hugging Face Hub',
            'csa-zoo publish runs/mine --repo-id me/name --dry-run',
        ),
    ):
        verb = _add(verbs, name, run, summary, example)
        verb.add_argument('folder', metavar='RUN', help='folder of the run')
        verb.add_argument('--repo-id', required=True, help='owner/name on the Hub')
        verb.add_argument(
            '--license', help="of the weights (default: that of the weights they started from, or the zoo's)"
        )
        if run is publish:
            verb.add_argument('--private', action='store_true', help='make a new repository private')
            verb.add_argument('--dry-run', action='store_true', help='show what would be uploaded, and upload nothing')
            verb.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')

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

    import csa_zoo  # noqa: F401

    ours = [name for name in timm.list_models(options.filter) if _is_ours(name)]
    for name in ours:
        for tag, config in timm.models.get_arch_pretrained_cfgs(name).items():
            source = config.hf_hub_id or config.file or 'no weights yet'
            size = 'x'.join(map(str, config.input_size))
            print(f'{name + ("." + tag.split(".")[1] if "." in tag else ""):34} {size:12} {source}')


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


def evaluate(options: argparse.Namespace) -> None:
    """Print the metrics with their 95 % intervals over queries."""
    from .evaluation.confidence import confidence_intervals
    from .evaluation.reranking import rerank
    from .evaluation.retrieval import reid_per_query_from_distances

    _, data, _, people = _embed(options)
    results = people.results()
    intervals = confidence_intervals(results)
    print(
        f'{len(people.query):,} queries, {len(people.gallery):,} gallery images, {people.query.shape[1]} numbers each'
    )
    for name, value in results.metrics().items():
        if name in intervals:
            low, high = intervals[name]
            print(f'{name:>12} {100 * value:6.2f} %   95 % interval {100 * low:6.2f} to {100 * high:6.2f}')
    if options.rerank:
        distances = rerank(people.query, people.gallery)
        print('after k-reciprocal re-ranking:')
        for name, value in reid_per_query_from_distances(distances, *people.labels).metrics().items():
            if name in intervals:
                print(f'{name:>12} {100 * value:6.2f} %')
    if options.csv:
        results.write_csv(options.csv, data['query']['path'][:])
        print(f'each query: {options.csv}')


def visualize(options: argparse.Namespace) -> None:
    """Write `ranked_lists.png` and, with CSA, `attention.png`."""
    from pathlib import Path

    import numpy as np
    import torch

    from .data import normalize
    from .visualize import draw_attention, draw_ranked_lists

    model, _, images, people = _embed(options)
    output = Path(options.output or options.model)
    output.mkdir(parents=True, exist_ok=True)
    queries = np.linspace(0, len(people.query) - 1, options.queries).astype(int)
    figure = draw_ranked_lists(images['query'], images['gallery'], people.ranked_lists(10), queries)
    figure.savefig(output / 'ranked_lists.png', dpi=130)
    print(output / 'ranked_lists.png')
    if getattr(model, 'attention', None) == 'csa':
        picture = images['query'][queries[0]]
        batch = torch.from_numpy(picture.copy())[None].permute(0, 3, 1, 2)
        config = model.pretrained_cfg
        draw_attention(model, normalize(batch, config['mean'], config['std']), picture).savefig(
            output / 'attention.png', dpi=130
        )
        print(output / 'attention.png')


def card(options: argparse.Namespace) -> None:
    """Print the card."""
    from .hub import render_card

    print(render_card(options.folder, options.repo_id, license=options.license))


def publish(options: argparse.Namespace) -> None:
    """Upload, and print where it is."""
    from . import hub

    print(
        hub.publish(
            options.folder,
            options.repo_id,
            private=options.private,
            dry_run=options.dry_run,
            create_pr=options.create_pr,
            license=options.license,
        )
    )


def _embed(options: argparse.Namespace):
    """The model that the options name, the data set, its images, and their embeddings."""
    from pathlib import Path

    import timm
    import yaml
    from accelerate import Accelerator

    import csa_zoo  # noqa: F401

    from .data import cache_splits, load_reid
    from .evaluation.people import embed_people
    from .hub import check_repository
    from .recipes import RECIPE_FILE

    folder = Path(options.model)
    is_run = (folder / 'config.json').is_file()
    recipe = yaml.safe_load((folder / RECIPE_FILE).read_text()) if (folder / RECIPE_FILE).is_file() else {}
    if not (options.data or recipe.get('data')):
        raise ValueError(f'{options.model} does not say which data to evaluate on: give --data and --root')
    own = options.data in (None, recipe.get('data'))
    data = load_reid(
        options.data or recipe['data'],
        options.root or (recipe.get('root') if own else None),
        **(recipe.get('data_options', {}) if own and not options.root else {}),
    )
    if options.model.startswith('hf-hub:'):
        check_repository(options.model.removeprefix('hf-hub:'))
    accelerator = Accelerator()
    name = f'local-dir:{folder}' if is_run else options.model
    model = timm.create_model(name, pretrained=True).to(accelerator.device).eval()
    images = cache_splits(data, options.image_size or model.pretrained_cfg['input_size'][1:])
    return model, data, images, embed_people(model, data, images, accelerator, options.batch_size)


if __name__ == '__main__':
    raise SystemExit(main())
