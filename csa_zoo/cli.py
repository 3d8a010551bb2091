"""`csa-zoo`: the command line."""

import argparse
import json
from collections.abc import Callable

from .mistakes import told_in_a_line
from .version import __version__

PEOPLE_ONLY = ('data', 'root', 'image_size', 'rerank', 'camera_pairs', 'csv')

# each verb imports what it needs when it runs, and waits for nothing that another one needs


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    parser = argparse.ArgumentParser('csa-zoo', description='Models with compressed self-attention, and their data.')
    parser.add_argument('--version', action='version', version=f'csa-zoo {__version__}')
    verbs = parser.add_subparsers(title='verbs', metavar='VERB', required=True)

    verb = _add(verbs, 'list', list_models, 'the registered models', "csa-zoo list '*csa*'")
    verb.add_argument('filter', nargs='?', default='*', help='wildcard, such as *csa*')

    data = verbs.add_parser('data', help='look at data sets, make one', description='Look at data sets, make one.')
    data_verbs = data.add_subparsers(metavar='VERB', required=True)
    verb = _add(
        data_verbs,
        'check',
        check_data,
        'compare a data set on disk with its published counts',
        'csa-zoo data check data/Market-1501',
    )
    verb.add_argument('root', help='folder of the data set')
    verb.add_argument('--name', help='which data set it is; found out from its layout if not given')

    verb = _add(
        data_verbs,
        'crop-people',
        crop_people,
        'make a small set to evaluate on from the people in a video of one static camera',
        'csa-zoo data crop-people vtest.avi data/vtest --same 3,10 --same 4,13,20',
    )
    verb.add_argument('video', help='any file that OpenCV can read')
    verb.add_argument('output', help='folder to write, with the layout of Market-1501')
    verb.add_argument(
        '--same',
        type=lambda text: [int(number) for number in text.split(',')],
        action='append',
        default=[],
        metavar='N,N',
        help='person ids of a run without this option that are one person, who came back; may be given several times',
    )

    verb = _add(
        verbs,
        'render-pedestrians',
        render_pedestrians,
        'write the built-in pedestrians as a Market-1501 folder',
        'csa-zoo render-pedestrians data/pedestrians --identities 1000 --seed 1',
    )
    verb.add_argument('output', help='folder to write')
    verb.add_argument('--identities', type=positive_int, help='people, half of them to train on (default: 340)')
    verb.add_argument('--seed', type=int, default=0, help='another seed gives other people (default: 0)')
    verb.add_argument('--workers', type=positive_int, help='processes (default: one for each core)')

    verb = _add(
        verbs,
        'make-patches',
        make_patches,
        'cut corresponding patches from a COLMAP reconstruction, or from overlapping photographs',
        'csa-zoo make-patches project/sparse/0 data/patches --images project/images',
    )
    verb.add_argument('source', metavar='MODEL_OR_PHOTOS', help='folder of a COLMAP model, or of photographs')
    verb.add_argument('output', help='folder to write, in the PhotoTour layout')
    verb.add_argument('--images', metavar='DIR', help='folder of the photographs of a model')
    verb.add_argument(
        '--max-points', type=positive_int, default=100_000, help='drawn at random from more (default: 100000)'
    )
    verb.add_argument('--seed', type=int, default=0, help='of what is drawn (default: 0)')

    verb = _add(
        verbs,
        'evaluate',
        evaluate,
        'measure a model on a person re-identification set, or a descriptor on patches',
        'csa-zoo evaluate runs/pedestrians --data market1501 --root data/Market-1501 --csv queries.csv',
    )
    verb.add_argument(
        'model', help='folder of a run, name of a timm model, hf-hub:owner/name, or colour-histograms for a baseline'
    )
    _add_people(verb)
    verb.add_argument('--rerank', action='store_true', help='k-reciprocal re-ranking too')
    verb.add_argument(
        '--patches',
        nargs='+',
        metavar='FOLDER',
        help='measure a descriptor beside SIFT and RootSIFT: PhotoTour sets, HPatches, photographs, or scikit-image',
    )
    verb.add_argument(
        '--images', metavar='FOLDER', help="match whole images beside RootSIFT: HPatches' sequences with homographies"
    )
    verb.add_argument('--no-sift', action='store_true', help='with --patches: without SIFT and RootSIFT')
    verb.add_argument('--json', help='write the figures to this file')
    verb.add_argument('--camera-pairs', action='store_true', help='rank-1 and mAP of each pair of cameras too')
    verb.add_argument('--csv', '--per-query', help='write what each query found to this file; .parquet for Parquet')

    verb = _add(
        verbs,
        'benchmark',
        benchmark,
        'measure speed and memory of attentions, in networks and alone, side by side',
        'csa-zoo benchmark --device cuda --dtype bfloat16 --autocast --rounds 20 --output benchmark/cuda_bfloat16',
    )
    verb.add_argument('--model', nargs='*', metavar='NAME', help='timm models (default: resnet50_pcb l2net_hardnet)')
    verb.add_argument(
        '--attention',
        nargs='+',
        metavar='NAME',
        help="none, csa-gG and csa-literal-gG for G groups, sa, sa-naive, sa-padded, efficient, nystrom; timm's se, "
        'eca, cbam, coord, gc, nl, bat, halo, lambda; or package.module:Name, called with the channels '
        '(default: most of these)',
    )
    verb.add_argument(
        '--image-size', type=positive_int, nargs=2, metavar=('H', 'W'), help="default: each model's input size"
    )
    verb.add_argument(
        '--batch-size', type=positive_int, help='default: the pixels of 4 (CPU) or 64 (GPU) images of 384x128'
    )
    verb.add_argument(
        '--stages', type=int, nargs='+', metavar='N', help="that attention follows (default: the paper's)"
    )
    verb.add_argument(
        '--num-maps', type=positive_int, default=32, help='base attention maps of a group of CSA (default: 32)'
    )
    verb.add_argument(
        '--sides',
        type=positive_int,
        nargs='*',
        metavar='H',
        help='heights and widths to measure growth at (default: 16 32 64 128 256)',
    )
    verb.add_argument('--channels', type=positive_int, default=256, help='channels to measure growth at (default: 256)')
    verb.add_argument('--rounds', type=positive_int, default=5, help='in which all take turns (default: 5)')
    verb.add_argument('--device', choices=('cuda', 'cpu'), help='default: cuda where there is one, else cpu')
    verb.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32')
    verb.add_argument('--autocast', action='store_true', help='keep weights in float32, and let autocast use the dtype')
    verb.add_argument('--layout', choices=('channels_last', 'contiguous'), default='channels_last')
    verb.add_argument('--compile', action='store_true', help='by torch.compile')
    verb.add_argument('--threads', type=positive_int, help="of a CPU (default: PyTorch's choice)")
    verb.add_argument(
        '--output', default='benchmark', help='folder for tables, timings and figure (default: benchmark)'
    )

    verb = _add(
        verbs,
        'visualize',
        visualize,
        'draw ranked lists and attention maps of a person re-identification model',
        'csa-zoo visualize runs/pedestrians --output figures',
    )
    verb.add_argument('model', help='folder of a run, name of a timm model, hf-hub:owner/name, or colour-histograms')
    _add_people(verb)
    verb.add_argument('--queries', type=positive_int, default=6, help='ranked lists to draw (default: 6)')
    verb.add_argument('--output', help="folder for the figures (default: the run's, or else the current one)")

    verb = _add(
        verbs,
        'match',
        match,
        'match two photographs with a descriptor, beside RootSIFT',
        'csa-zoo match A.jpg B.jpg --model runs/photographs --output matches.png',
    )
    verb.add_argument('images', nargs=2, metavar='IMAGE', help='photographs of one thing')
    verb.add_argument(
        '--model',
        default='l2net_hardnet_csa',
        help='folder of a run, name of a timm model, or hf-hub:owner/name (default: %(default)s)',
    )
    verb.add_argument('--keypoints', type=positive_int, default=2048, help='most of an image (default: %(default)s)')
    verb.add_argument(
        '--geometry',
        choices=('homography', 'fundamental'),
        default='homography',
        help='which inliers follow: homography for a plane or a camera that only turns (default), fundamental for '
        'a scene with depth',
    )
    verb.add_argument('--output', default='matches.png', help='picture to write (default: %(default)s)')

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

    verb = _add(
        verbs,
        'demo',
        demo,
        'search people, match photographs, see attention in a browser',
        'csa-zoo demo --reid runs/mine',
    )
    verb.add_argument('--reid', metavar='MODEL', help='for people: folder of a run, or hf-hub:owner/name')
    verb.add_argument('--descriptor', metavar='MODEL', help='for patches: the same, or a name with trained weights')
    verb.add_argument('--gallery', metavar='FOLDER', help='images to search (default: rendered people)')
    verb.add_argument('--port', type=int, help='of this machine, which alone can see the page (default: 7860 or next)')

    options = parser.parse_args(argv)
    with told_in_a_line('csa-zoo'):
        return options.run(options) or 0


def positive_int(text: str) -> int:
    """A whole number from 1, of an option."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {number}')
    return number


def _add_people(verb: argparse.ArgumentParser) -> None:
    """The options of what `_embed` does."""
    verb.add_argument('--data', help="name of the set (default: the run's own)")
    verb.add_argument('--root', help="where the set is (default: the run's own)")
    verb.add_argument(
        '--image-size', type=positive_int, nargs=2, metavar=('H', 'W'), help="default: the model's input size"
    )
    verb.add_argument('--batch-size', type=positive_int, default=256, help='images in a forward pass (default: 256)')
    verb.add_argument('--untrained', type=int, metavar='SEED', help='random weights: the score before any training')


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
    """Print the zoo's models: name and tag, input, parameters, key metric, and where the weights come from."""
    import timm
    import torch

    from .checkpoints import key_metric

    names = [name for name in timm.list_models(options.filter) if _is_ours(name)]
    if not names:
        raise ValueError(f"no model of the zoo matches {options.filter!r}: quote wildcards, such as '*csa*'")
    print(f'{"model":34} {"input":10} {"parameters":>10}  {"key metric":36} weights')
    for name in names:
        with torch.device('meta'):
            parameters = sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())
        for tagged, config in timm.models.get_arch_pretrained_cfgs(name).items():
            size = 'x'.join(map(str, config.input_size))
            source = config.hf_hub_id or config.file or 'no weights yet'
            print(f'{tagged:34} {size:10} {parameters / 1e6:8.2f} M  {key_metric(tagged) or "-":36} {source}')


def _is_ours(name: str) -> bool:
    import timm

    return timm.models.model_entrypoint(name).__module__.startswith('csa_zoo.')


def check_data(options: argparse.Namespace) -> int:
    """Print the report; status 1 if something is wrong."""
    from .data import check_reid

    report = check_reid(options.name, options.root)
    print(report)
    return 0 if report.ok else 1


def crop_people(options: argparse.Namespace) -> None:
    """Cut them out, and say how to use them."""
    from .data.tracks import crop_people

    root = crop_people(options.video, options.output, options.same)
    print(f'{root}: use it with --data folder --root {root}')
    if not options.same:
        print('people who left and came back have several ids; look at the images, and join these ids with --same')


def render_pedestrians(options: argparse.Namespace) -> None:
    """Render, and say where."""
    from .data.pedestrians import render_pedestrians

    given = {'num_identities': options.identities} if options.identities else {}
    root = render_pedestrians(options.output, seed=options.seed, workers=options.workers, **given)
    print(f'{root}: use it with --data pedestrians --root {root}, or as any Market-1501 folder')


def make_patches(options: argparse.Namespace) -> None:
    """Write the folder, and say what is in it and what was left out."""
    from .data.reconstructions import make_patches

    made = make_patches(
        options.source, options.output, options.images, max_points=options.max_points, seed=options.seed
    )
    left_out = '; '.join(f'{count:,} {reason}' for reason, count in made.rejected.items() if count)
    print(f'{options.output}: {len(made.patches):,} patches of {made.patches.num_points:,} points')
    print(f'points left out: {left_out or "none"}')


def evaluate(options: argparse.Namespace) -> None:
    """Measure people, patches or whole images, whichever the options name."""
    from pathlib import Path

    for_people = {f'--{name.replace("_", "-")}': getattr(options, name) for name in PEOPLE_ONLY}
    given = [name for name, value in for_people.items() if value]
    if given and (options.patches or options.images):
        raise ValueError(f'{", ".join(given)}: for person re-identification, without --patches and --images')
    for file in filter(None, (options.csv, options.json)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)  # now, not after all the work
    if options.patches:
        figures = evaluate_patches(options)
    elif options.images:
        figures = evaluate_images(options)
    else:
        figures = evaluate_people(options)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + '\n')


def evaluate_people(options: argparse.Namespace) -> dict[str, dict]:
    """Print the metrics with their 95 % intervals over queries."""
    from .evaluation.confidence import confidence_intervals
    from .evaluation.reranking import rerank
    from .evaluation.retrieval import camera_pair_metrics, reid_per_query_from_distances
    from .evaluation.verification import reid_verification

    _, data, _, people = _embed(options)
    results = people.results()
    intervals = confidence_intervals(results)
    figures = {'metrics': results.metrics(), 'intervals': intervals}
    print(
        f'{len(people.query):,} queries, {len(people.gallery):,} gallery images, {people.query.shape[1]} numbers each'
    )
    for name, (low, high) in intervals.items():
        value = figures['metrics'][name]
        print(f'{name:>12} {100 * value:6.2f} %   95 % interval {100 * low:6.2f} to {100 * high:6.2f}')
    print('of pairs up to a distance (2 - 2 cosine is its square) taken for one person:')
    figures['verification'] = reid_verification(people.query, people.gallery, *people.labels, (1e-3, 1e-2))
    rates = list(figures['verification'].items())
    for (name, value), (_, threshold) in zip(rates[::2], rates[1::2], strict=True):
        print(f'{name:>12} {100 * value:6.2f} %   at distance {threshold:.4f}')
    if options.rerank:
        distances = rerank(people.query, people.gallery)
        figures['reranked'] = reid_per_query_from_distances(distances, *people.labels).metrics()
        print('after k-reciprocal re-ranking:')
        for name in intervals:
            print(f'{name:>12} {100 * figures["reranked"][name]:6.2f} %')
    if options.camera_pairs:
        print('query camera, gallery camera: queries, rank-1, mAP')
        pairs = camera_pair_metrics(people.query, people.gallery, *people.labels)
        figures['camera_pairs'] = {f'{query}-{gallery}': pair for (query, gallery), pair in pairs.items()}
        for (query, gallery), pair in pairs.items():
            scores = f'{100 * pair["rank1"]:6.2f} % {100 * pair["mAP"]:6.2f} %'
            print(f'{query:4} {gallery:4} {pair["num_queries"]:6,} {scores}')
    if options.csv:
        write = results.write_parquet if options.csv.endswith('.parquet') else results.write_csv
        write(options.csv, data['query']['path'][:])
        print(f'each query: {options.csv}')
    return figures


def evaluate_patches(options: argparse.Namespace) -> dict[str, dict]:
    """Print a descriptor's metrics on each folder, beside those of SIFT and RootSIFT on the same patches."""
    from pathlib import Path

    import torch
    from accelerate import Accelerator

    from .checkpoints import load_model
    from .evaluation.descriptors import by_name, describe_with, descriptor_metrics
    from .evaluation.sift import sift_descriptors
    from .runs import keep_freed_memory

    sources = by_name(options.patches)
    accelerator = Accelerator()
    keep_freed_memory(accelerator)
    model = load_model(options.model, 1, options.untrained).to(accelerator.device)
    descriptors = {options.model: describe_with(model, accelerator)}
    if not options.no_sift:
        descriptors['RootSIFT'] = lambda patches: torch.from_numpy(sift_descriptors(patches, root=True))
        descriptors['SIFT'] = lambda patches: torch.from_numpy(sift_descriptors(patches))
    figures = {}
    for folder, source in sources.items():
        measured = {name: descriptor_metrics(describe, source) for name, describe in descriptors.items()}
        figures[folder] = measured
        print(f'{source + " (%)":32}' + ''.join(f'{Path(name).name[-20:]:>22}' for name in measured))
        for metric in measured[options.model]:
            print(f'{metric:32}' + ''.join(f'{100 * values[metric]:22.2f}' for values in measured.values()))
    return figures


def evaluate_images(options: argparse.Namespace) -> dict[str, dict]:
    """Print how well whole images are matched with a descriptor, and with RootSIFT at the same keypoints."""
    from pathlib import Path

    from accelerate import Accelerator

    from .checkpoints import load_model
    from .data.hpatches import find_hpatches_sequences
    from .features import PatchDescriptor, root_sift
    from .image_matching import image_matching_metrics

    model = PatchDescriptor(load_model(options.model, 1, options.untrained).to(Accelerator().device))
    descriptors = {
        Path(options.model).name: lambda image, keypoints: model.compute(image, keypoints)[1],
        'RootSIFT': root_sift,
    }
    metrics = image_matching_metrics(descriptors, find_hpatches_sequences(options.images))
    print(' ' * 12 + ''.join(f'{name[-20:]:>22}' for name in metrics))
    for metric in next(iter(metrics.values())):
        form = '22.0f' if metric == 'matches' else '22.1%'
        print(f'{metric:12}' + ''.join(f'{values[metric]:{form}}' for values in metrics.values()))
    return metrics


def benchmark(options: argparse.Namespace) -> None:
    """Print the tables, and write them with all timings and a figure."""
    import torch

    from .benchmark import Setting, benchmark

    device = torch.device(options.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError('--device cuda: PyTorch finds no CUDA device')
    if options.threads:
        torch.set_num_threads(options.threads)
    setting = Setting(
        device,
        getattr(torch, options.dtype),
        options.autocast,
        channels_last=options.layout == 'channels_last',
        compile=options.compile,
    )
    given = {
        name: value
        for name, value in (('models', options.model), ('attentions', options.attention), ('sides', options.sides))
        if value is not None
    }
    measured = benchmark(
        setting,
        image_size=options.image_size,
        batch_size=options.batch_size,
        stages=options.stages,
        num_maps=options.num_maps,
        channels=options.channels,
        rounds=options.rounds,
        **given,
    )
    measured.save(options.output)
    print(measured.markdown(), end='')
    print(f'written to {options.output}')


def visualize(options: argparse.Namespace) -> None:
    """Write `ranked_lists.png` and, with CSA, `attention.png`."""
    from pathlib import Path

    import numpy as np
    import torch

    from .data import normalize
    from .visualize import draw_attention, draw_ranked_lists

    model, _, images, people = _embed(options)
    output = Path(options.output or (options.model if Path(options.model).is_dir() else '.'))
    output.mkdir(parents=True, exist_ok=True)
    queries = np.linspace(0, len(people.query) - 1, min(options.queries, len(people.query))).astype(int)
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


def match(options: argparse.Namespace) -> None:
    """Print how many keypoints, matches and inliers there are, and draw them."""
    from pathlib import Path

    from accelerate import Accelerator

    from .checkpoints import load_model
    from .data.photographs import read_grey
    from .features import PatchDescriptor, create_sift, match_features, root_sift
    from .visualize import draw_matches

    images = [read_grey(Path(path), max_side=1600) for path in options.images]
    model = PatchDescriptor(load_model(options.model, 1).to(Accelerator().device), create_sift(options.keypoints))
    keypoints = [model.detect(image) for image in images]
    for path, image, found in zip(options.images, images, keypoints, strict=True):
        if not len(found):
            raise ValueError(f'{path}: SIFT finds no keypoint in it, there is nothing to match')
        print(f'{path}: {len(found):,} keypoints in {image.shape[1]}x{image.shape[0]} pixels')
    name = Path(options.model).name
    descriptors = {
        name: [model.compute(image, found)[1] for image, found in zip(images, keypoints, strict=True)],
        'RootSIFT': [root_sift(image, found) for image, found in zip(images, keypoints, strict=True)],
    }
    matches = {}
    print(f'{"":24}{"matches":>8}{"inliers":>8}')
    for name, (first, second) in descriptors.items():
        matches[name] = match_features(keypoints[0], first, keypoints[1], second, options.geometry)
        print(f'{name:24}{len(matches[name].is_inlier):8,}{matches[name].is_inlier.sum():8,}')
    draw_matches(*images, matches).savefig(options.output, dpi=130)
    print(options.output)


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


def demo(options: argparse.Namespace) -> None:
    """Serve the page until interrupted."""
    from importlib.util import module_from_spec, spec_from_file_location

    from .checkpoints import CARDS, registered_checkpoints

    if not (options.reid or options.descriptor):
        trained = ', '.join(registered_checkpoints()) or 'none yet'
        raise ValueError(
            'the demo needs a trained model: give --reid or --descriptor the folder of a run, or hf-hub:owner/name '
            f'(--descriptor a name with trained weights, too: {trained})'
        )
    spec = spec_from_file_location('csa_zoo_demo', CARDS / 'space' / 'app.py')
    app = module_from_spec(spec)
    try:
        spec.loader.exec_module(app)
    except ModuleNotFoundError as error:
        if error.name != 'gradio':
            raise
        raise ModuleNotFoundError('the demo needs Gradio: pip install "csa_zoo[demo]"') from error
    page = app.build_app(options.reid, options.descriptor, options.gallery)
    app.launch(page, server_name='127.0.0.1', server_port=options.port)


def _embed(options: argparse.Namespace):
    """The model that the options name, the data set, the images of query and gallery, and their embeddings."""
    from pathlib import Path

    import yaml
    from accelerate import Accelerator

    from .checkpoints import load_model
    from .data import cache_splits, load_reid
    from .evaluation.people import describe_colours, embed_people
    from .recipes import RECIPE_FILE
    from .runs import keep_freed_memory

    file = Path(options.model) / RECIPE_FILE
    recipe = yaml.safe_load(file.read_text()) if file.is_file() else {}
    if not (options.data or recipe.get('data')):
        raise ValueError(f'{options.model} is no run that says which data to evaluate on: give --data and --root')
    own = options.data in (None, recipe.get('data'))
    data = load_reid(
        options.data or recipe['data'],
        options.root or (recipe.get('root') if own else None),
        **(recipe.get('data_options', {}) if own and not options.root else {}),
    )
    data.pop('train')
    if options.model == 'colour-histograms':
        images = cache_splits(data, options.image_size or (128, 64))
        return None, data, images, describe_colours(data, images)
    accelerator = Accelerator()
    keep_freed_memory(accelerator)
    model = load_model(options.model, 3, options.untrained).to(accelerator.device)
    images = cache_splits(data, options.image_size or model.pretrained_cfg['input_size'][1:])
    return model, data, images, embed_people(model, data, images, accelerator, options.batch_size)


if __name__ == '__main__':
    raise SystemExit(main())
