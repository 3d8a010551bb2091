"""The Hugging Face Hub: a run's model card, and publishing the run.

Loading needs nothing from here: after `import csa_zoo`, `timm.create_model('hf-hub:owner/name', pretrained=True)`.
The card's metadata follow https://huggingface.co/docs/hub/model-cards, results are in its `model-index`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .attention import CompressedSelfAttention
from .checkpoints import CARDS, CONFIG, WEIGHTS, check_weights, model_without_memory, read_json, registered_checkpoints
from .recipes import RECIPE_FILE
from .runs import CURVES, METRICS
from .version import __version__

try:
    from huggingface_hub.utils import httpx  # httpx2 since huggingface_hub 2
except ImportError:  # before 1.31
    import httpx

CARD = 'README.md'
REQUIRED = (WEIGHTS, CONFIG, METRICS, RECIPE_FILE)
FIGURES = (CURVES, 'attention.png')  # ranked lists are pictures of many people: they stay at home
TEMPLATE = CARDS / 'card.md'

DATA_SETS = {
    'market1501': 'Market-1501',
    'dukemtmcreid': 'DukeMTMC-reID',
    'cuhk03np': 'CUHK03-NP',
    'msmt17': 'MSMT17',
    'pedestrians': 'rendered pedestrians',
    'folder': "the publisher's own images",
    'csv': "the publisher's own images",
    'scikit-image': "scikit-image's test photographs",
}
PATCH_METRICS = 'patches.json'  # of csa-zoo evaluate --patches
DATA_NOTES = 'DATA.md'  # the publisher's words on the training data: sources, licences, attribution
METRIC_NAMES = {
    'mAP': 'mAP',
    'mAP_market': "mAP (Market-1501's, by trapezoids)",
    'mINP': 'mINP',
    'fpr95': 'false positive rate at 95 % recall',
    'ratio_map': 'mAP of matching by ratio',
    'verification': 'mAP of patch verification',
    'matching': 'mAP of image matching',
    'retrieval': 'mAP of patch retrieval',
}


class Task(NamedTuple):
    """What a card says about all runs of a task."""

    title: str
    tag: str
    script: str
    protocol: str


REID = 'person re-identification'
TASKS = {
    REID: Task(
        'Person re-identification',
        'person-re-identification',
        'train/reid.py',
        'Single query, Euclidean distance between embeddings; gallery images of the same person by the same camera and '
        'junk are left out; a tie counts against the model. No re-ranking.',
    ),
    'patch-verification': Task(
        'Patch verification',
        'local-descriptor',
        'train/descriptor.py',
        'False positive rate: share of non-matching pairs accepted (the lower, the better) at the distance that '
        'accepts 95 % of the matching ones. Verification, matching and retrieval are the tasks of HPatches, on '
        'sequences cut from the photographs. A tie counts against the model.',
    ),
}


class RunFiles(NamedTuple):
    """The parsed files of a finished run."""

    config: dict[str, Any]
    metrics: dict[str, Any]
    recipe: dict[str, Any]


def publish(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    create_pr: bool = False,
    license: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a run in one commit: weights, config, metrics, recipe, figures and a freshly rendered card.

    The weights are the run's file as it is; training's auxiliary branches are not in it. Files that the repository has
    already are not sent again, and if nothing changed there is no new commit. Absolute paths in the recipe are
    shortened to their last part.

    Args:
        run: Folder of a finished run.
        repo_id: `owner/name`; made if it does not exist.
        private: Make a repository that only its owner sees.
        dry_run: Print what would be uploaded, and the card, and contact nobody.
        create_pr: Propose the change to an existing repository as a pull request.
        license: Licence of the weights, as the Hub abbreviates it; that of the base weights, or apache-2.0, if None.
        token: The Hub's access token with the right to write; the one that `hf auth login` stored, or the environment
            variable HF_TOKEN, if None.

    Returns:
        Where it is now: the pull request, or else the commit (the last one if nothing changed); in a dry run, where
        the repository would be.

    Raises:
        FileNotFoundError: If the run lacks a file, or `create_pr` names no repository.
        ValueError: If a file of the run is damaged or does not fit the others, a weight or metric is not finite, or
            `repo_id` is no name.
        PermissionError: Without a token, or if it may not do this.
        ConnectionError: If the Hub cannot be reached.
        OSError: If the Hub refuses for another reason.
    """
    folder = Path(run)
    if repo_id.count('/') != 1:
        raise ValueError(f'a repository is named owner/name, such as me/resnet50_pcb_csa.market1501, got {repo_id!r}')
    card = render_card(folder, repo_id, license)
    _check_finite(folder / WEIGHTS)
    files = _files_to_publish(folder, card)
    if dry_run:
        for name, content in files.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            print(f'{size:>13,} bytes  {name}')
        print(f'\n{card}')
        return f'{constants.ENDPOINT}/{repo_id}'
    if not (token or get_token()):
        raise PermissionError(
            'publishing needs a token of the Hub: run `hf auth login`, or set HF_TOKEN '
            f'(tokens are made at {constants.ENDPOINT}/settings/tokens)'
        )
    api = HfApi(token=token, library_name='csa_zoo', library_version=__version__)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    with _errors_that_say_what_to_do(repo_id):
        if not create_pr:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise PermissionError(
                f'{repo_id} exists and is public: choose another name, or make it private in its settings first'
            )
        message = f'Publish {card.data.model_name} with csa_zoo {__version__}'
        commit = api.create_commit(repo_id, operations, commit_message=message, create_pr=create_pr)
    return str(commit.pr_url or commit.commit_url)


def _files_to_publish(folder: Path, card: ModelCard) -> dict[str, Path | bytes]:
    """Names in the repository, and where their content is or what it is."""
    figures = [name for name in FIGURES if (folder / name).is_file()]
    more = [name for name in (PATCH_METRICS, DATA_NOTES) if (folder / name).is_file()]
    files: dict[str, Path | bytes] = {name: folder / name for name in (WEIGHTS, CONFIG, METRICS, *figures, *more)}
    return {**files, RECIPE_FILE: _public_recipe(_read_run(folder).recipe).encode(), CARD: str(card).encode()}


def _public_recipe(recipe: Mapping[str, Any]) -> str:
    """The recipe as YAML that tells nothing of the machine it ran on: of absolute paths only the last part."""

    def shorten(value: Any) -> Any:
        if isinstance(value, str) and (value.startswith('~') or re.match(r'/|\\|[A-Za-z]:[\\/]', value)):
            return re.split(r'[\\/]', value.rstrip('\\/'))[-1]
        if isinstance(value, list):
            return [shorten(item) for item in value]
        if isinstance(value, dict):
            return {key: shorten(item) for key, item in value.items()}
        return value

    return yaml.safe_dump(shorten(recipe), sort_keys=False)


@contextmanager
def _errors_that_say_what_to_do(repo_id: str) -> Iterator[None]:
    """Turn the Hub's refusals into built-in exceptions with a remedy. None of them shows a token."""
    try:
        yield
    except httpx.TransportError as error:
        raise ConnectionError(
            f'{constants.ENDPOINT} cannot be reached ({error}): check the connection and publish again'
        ) from error
    except (HfHubHTTPError, RuntimeError) as error:
        # huggingface_hub wraps what happens to a large file in a RuntimeError
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if not isinstance(answer, HfHubHTTPError):
            raise OSError(f'the upload to {repo_id} failed, publish again: {error} {answer or ""}') from error
        raise _with_remedy(answer, repo_id) from error


def _with_remedy(error: HfHubHTTPError, repo_id: str) -> OSError:
    owner, status = repo_id.split('/')[0], error.response.status_code
    if status == 401:
        return PermissionError('the Hub does not accept the token: run `hf auth login --force`, or renew HF_TOKEN')
    if status == 403:
        return PermissionError(
            f'the token may not write to {repo_id}: it needs the right to write, and {owner} must be you or an '
            'organization of yours; propose the change to the repository of others with a pull request'
        )
    if status == 404:
        return FileNotFoundError(
            f'there is no repository {repo_id} that this token may see: check the name, or publish without a pull '
            'request to make it'
        )
    if status in (409, 412):
        return OSError(f'{repo_id} was changed by someone else meanwhile: look at it, and publish again')
    if status == 413:
        return OSError(f'a file is too large for the Hub: {error}')
    if status == 429 or status >= 500:
        return OSError(f'the Hub is not able to answer now ({status}), nothing was published: publish again later')
    return error


def render_card(run: str | Path, repo_id: str, license: str | None = None) -> ModelCard:
    """The model card of a run, with no result that is not in its `metrics.json`.

    Args:
        run: Folder of a finished run.
        repo_id: `owner/name` that the card tells people to load, or the `name.tag` of a checkpoint in our registry.
        license: Licence of the weights; that of the base weights, or apache-2.0, if None.

    Raises:
        FileNotFoundError: If the run lacks a file.
        ValueError: If a file of the run is damaged or does not fit the others, or `repo_id` is no name.
    """
    shipped = repo_id in registered_checkpoints()
    if not shipped:
        validate_repo_id(repo_id)
    folder = Path(run)
    config, metrics, recipe = files = _read_run(folder)
    check_weights(folder)
    model, task = model_without_memory(folder), TASKS[metrics['task']]
    name, cfg, base_model = repo_id.split('/')[-1], model.pretrained_cfg, _base_model(files)
    has_csa = any(isinstance(module, CompressedSelfAttention) for module in model.modules())
    results, is_reid = _results(files), metrics['task'] == REID
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-feature-extraction',
        tags=['timm', task.tag, *(['csa', 'compressed-self-attention'] if has_csa else [])],
        license=license or (cfg.get('license') if base_model else None) or 'apache-2.0',
        base_model=base_model,
        datasets=[metrics['data']] if is_reid and metrics['data'] in list(DATA_SETS)[:4] else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)),
        model_name=name,
        eval_results=results,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        source=repo_id if shipped else f'hf-hub:{repo_id}',
        shipped=shipped,
        name=name,
        summary=_summary(model, config['architecture'], is_reid),
        is_reid=is_reid,
        is_rendered=metrics.get('data') == 'pedestrians',
        has_csa=has_csa,
        embed_dim=model.head_hidden_size,
        num_classes=model.num_classes,
        input_size=cfg['input_size'],
        interpolation=cfg['interpolation'],
        mean=list(cfg['mean']),
        std=list(cfg['std']),
        figures=[] if shipped else [figure for figure in FIGURES if (folder / figure).is_file()],
        results=results,
        protocol=task.protocol,
        trained_on=_trained_on(files),
        data_notes=(folder / DATA_NOTES).read_text(encoding='utf-8') if (folder / DATA_NOTES).is_file() else '',
        epochs=metrics['epochs'],
        processes=metrics['processes'],
        train_time=_duration(metrics['train_seconds']),
        versions=', '.join(f'{library} {version}' for library, version in metrics['versions'].items()),
        script=task.script,
        recipe=_public_recipe(recipe),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=_multiply_adds(model, cfg['input_size']),
    )


def _read_run(folder: Path) -> RunFiles:
    """Read and compare the small files of a run."""
    for name in REQUIRED:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f'{folder} has no {name}: publish the folder of a finished run; --resume finishes one that was stopped'
            )
    config, metrics = (read_json(folder / name) for name in (CONFIG, METRICS))
    recipe = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding='utf-8'))
    if (folder / PATCH_METRICS).is_file():
        metrics['metrics'] = {**metrics['metrics'], **_patch_results(folder / PATCH_METRICS)}
    try:
        names = {config['architecture'], recipe['model'].split('.')[0], metrics['model'].split('.')[0]}
        task, values = metrics['task'], metrics['metrics'].items()
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f'{CONFIG}, {METRICS} or {RECIPE_FILE} of {folder} is not what training writes') from error
    needed = ['epochs', 'processes', 'train_seconds', 'versions'] + ['data'] * (task == REID)
    if missing := [key for key in needed if key not in metrics]:
        raise ValueError(f'{folder / METRICS} lacks {missing}, which training writes')
    if len(names) != 1:
        raise ValueError(f'{folder} is put together from several runs: its files name the models {sorted(names)}')
    if task not in TASKS:
        raise ValueError(f'{folder / METRICS}: the task must be one of {list(TASKS)}, got {task!r}')
    for metric, value in values:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f'{folder / METRICS}: {metric} is {value}, which is no result to publish')
    return RunFiles(config, metrics, recipe)


def _patch_results(path: Path) -> dict[str, float]:
    """The model's main figures in what `csa-zoo evaluate --patches` wrote, which names the model first."""
    return {
        f'{metric} on {source}' if metric != 'fpr95' else f'fpr95_{source}': value
        for source, measured in read_json(path).items()
        for metric, value in next(iter(measured.values())).items()
        if metric in METRIC_NAMES
    }


def _results(files: RunFiles) -> list[EvalResult]:
    """An entry of the model index for each figure of `metrics.json`."""
    metrics, results = files.metrics, []
    for key, value in metrics['metrics'].items():
        if key.startswith('fpr95_'):
            metric, data = 'fpr95', key.removeprefix('fpr95_')
        elif ' on ' in key:
            metric, data = key.split(' on ', 1)
        else:
            metric, data = key, metrics['data']
        results.append(
            EvalResult(
                task_type='image-feature-extraction',
                task_name=TASKS[metrics['task']].title,
                dataset_type=data,
                dataset_name=DATA_SETS.get(data, data),
                dataset_split='test',
                dataset_args=files.recipe.get('data_options') or None,
                metric_type=metric,
                metric_name=METRIC_NAMES.get(metric) or re.sub(r'^rank(\d+)$', r'rank-\1', metric),
                metric_value=value,
            )
        )
    return results


def _base_model(files: RunFiles) -> str | None:
    """The repository of the weights that training started from."""
    if not files.recipe.get('pretrained'):
        return None
    tag = files.config['pretrained_cfg'].get('tag')
    return timm.get_pretrained_cfg(
        f'{files.config["architecture"]}.{tag}' if tag else files.config['architecture']
    ).hf_hub_id


def _trained_on(files: RunFiles) -> str:
    if files.metrics['task'] == REID:
        return DATA_SETS.get(files.metrics['data'], files.metrics['data'])
    names = yaml.safe_load(_public_recipe(files.recipe)).get('train')
    return ', '.join(names) if names else 'the photographs that come with scikit-image'


def _summary(model: nn.Module, architecture: str, is_reid: bool) -> str:
    if is_reid:
        kind = {'pooled': 'before', 'reduced': 'after'}[model.descriptor]
        unit = {'part': 'each part normalised', 'global': 'normalised as a whole', '': 'not normalised'}[model.norm]
        return (
            f'`{architecture}` turns the image of a person into an embedding of {model.head_hidden_size} numbers '
            f'({model.num_parts} parts, {kind} the reduction, {unit}); images of the same person are close together.'
        )
    return (
        f'`{architecture}` turns a grey patch around a keypoint into a descriptor of {model.head_hidden_size} numbers, '
        'of unit length; patches that show the same point are close together.'
    )


def _duration(seconds: float) -> str:
    return f'{seconds / 3600:.1f} hours' if seconds >= 5400 else f'{seconds / 60:.1f} minutes'


def _multiply_adds(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-adds of the embedding of one input, counted on shapes alone."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval().forward_head(model.forward_features(torch.empty(1, *input_size, device='meta')), pre_logits=True)
    return counter.get_total_flops() // 2


def _check_finite(path: Path) -> None:
    with safe_open(path, 'pt') as file:
        for name in file.keys():  # noqa: SIM118
            if not torch.isfinite(file.get_tensor(name)).all():
                raise ValueError(f'{path}: {name} holds NaN or infinity, training diverged: nothing is published')
