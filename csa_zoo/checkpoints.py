"""Trained weights: loaded by name, checked before they are read; and the list of those that the zoo publishes.

Weights are safetensors, in the folder of a run, in a repository on the Hugging Face Hub, or beside the models.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
CARDS = Path(__file__).parent.parent / 'hub_cards'  # beside the package, in a checkout and installed
CHECKPOINTS = CARDS / 'checkpoints.json'
KEY_METRICS = ('rank1', 'matching', 'fpr95')


class Checkpoint(NamedTuple):
    """An entry of `hub_cards/checkpoints.json`: trained weights of the zoo, and what they must be.

    Attributes:
        source: A file's name beside the models, or `owner/name@commit` on the Hub.
        sha256: Of the safetensors file, in hexadecimal.
    """

    source: str
    sha256: str


def load_model(name: str, channels: int, seed: int | None = None) -> nn.Module:
    """A model in evaluation mode, by the name that a user gives; its weights are checked before they are read.

    Args:
        name: Folder of a run, `hf-hub:owner/name`, or the name of a timm model, with or without tag.
        channels: Of the images it is for: 3 for people, 1 for patches.
        seed: Of random weights, instead of the trained ones.

    Raises:
        FileNotFoundError: If the folder is not that of a run.
        ValueError: If there is no such model, it has no trained weights, they are damaged, or it takes other images.
    """
    if name.startswith('hf-hub:'):
        repo_id, _, revision = name.removeprefix('hf-hub:').partition('@')
        source = f'hf-hub:{repo_id}@{check_repository(repo_id, revision or None)}'
    elif Path(name).is_dir():
        if not (Path(name) / CONFIG).is_file():
            raise FileNotFoundError(f'{name} has no {CONFIG}: give the folder of a run that finished an epoch')
        check_weights(name)
        source = f'local-dir:{name}'
    elif seed is None and timm.is_model(name) and not timm.models.is_model_pretrained(name):
        raise ValueError(f'{name} has no trained weights yet: give the folder of a run, or hf-hub:owner/name')
    elif name in {*timm.list_models(), *timm.list_pretrained()}:
        source = name
    else:
        raise ValueError(
            f'{name} is no folder, no hf-hub:owner/name and no model of timm with trained weights; `csa-zoo list` '
            'shows those of the zoo'
        )
    with torch.device('meta'):  # before weights are downloaded
        found = timm.create_model(source).pretrained_cfg['input_size'][0]
    if found != channels:
        raise ValueError(f'{name} takes images of {found} channels, not of {channels}: it is for another task')
    if seed is not None:
        torch.manual_seed(seed)
    return timm.create_model(source, pretrained=seed is None).eval()


def check_repository(repo_id: str, revision: str | None = None, token: str | None = None) -> str:
    """Download a repository's config and weights, and make sure that they fit, before anything is built from them.

    What is downloaded is in the cache when timm looks for it. Only `config.json` and `model.safetensors` are ever
    asked for.

    Args:
        repo_id: `owner/name`.
        revision: Branch, tag or commit; the newest of the main branch if None.
        token: The Hub's access token, for a private repository.

    Returns:
        The commit that was checked, to load that and no other: `hf-hub:owner/name@commit`.

    Raises:
        ValueError: If the repository has no safetensors, or they are damaged or not this architecture's, or not the
            ones that the zoo's list of checkpoints has for this commit.
    """
    try:
        config = Path(hf_hub_download(repo_id, CONFIG, revision=revision, token=token))
        commit = config.parent.name
        hf_hub_download(repo_id, WEIGHTS, revision=commit, token=token)
    except RemoteEntryNotFoundError as error:
        raise ValueError(f'{repo_id} lacks {CONFIG} or {WEIGHTS}; weights in any other format are not read') from error
    for name, checkpoint in read_checkpoints().items():
        if checkpoint.source == f'{repo_id}@{commit}':
            _check_sha256(config.parent / WEIGHTS, checkpoint.sha256, name)
    check_weights(config.parent)
    return commit


def check_weights(folder: str | Path) -> None:
    """Make sure that `model.safetensors` is complete and fits `config.json`, without reading or allocating a tensor.

    The names and shapes in the file's header are compared with those of the model, built on PyTorch's meta device.

    Args:
        folder: With both files: a run, or a downloaded repository.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If a file is damaged, the architecture is unknown, or a weight is missing, too many or of another
            shape.
    """
    folder = Path(folder)
    path = folder / WEIGHTS
    try:
        with safe_open(path, 'pt') as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f'{path} is damaged or no safetensors file, get it again: {error}') from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model_without_memory(folder).state_dict().items()}
    problems = [f'{name} is missing' for name in wanted.keys() - found.keys()]
    problems += [f'{name} is not of this architecture' for name in found.keys() - wanted.keys()]
    problems += [
        f'{name} is {found[name]} in the file and {wanted[name]} in the model'
        for name in wanted.keys() & found.keys()
        if found[name] != wanted[name]
    ]
    if problems:
        more = f', and {len(problems) - 3} more' if len(problems) > 3 else ''
        raise ValueError(f'{path} does not fit {folder / CONFIG}: {"; ".join(sorted(problems)[:3])}{more}')


def registered_checkpoints() -> dict[str, timm.models.PretrainedCfg]:
    """The zoo's own trained weights by `name.tag`, as timm's registry has them; without timm's ImageNet backbones."""
    return {
        name: config
        for architecture in timm.list_models()
        if timm.models.model_entrypoint(architecture).__module__.startswith('csa_zoo.')
        for name, config in timm.models.get_arch_pretrained_cfgs(architecture).items()
        if config.has_weights and not (config.hf_hub_id or '').startswith('timm/')
    }


def read_checkpoints(path: str | Path = CHECKPOINTS) -> dict[str, Checkpoint]:
    """The list of checkpoints by `name.tag`.

    Raises:
        ValueError: If the file is damaged, or an entry has other fields.
    """
    try:
        return {name: Checkpoint(**entry) for name, entry in read_json(Path(path)).items()}
    except TypeError as error:
        raise ValueError(f'{path}: every entry has a source and a sha256: {error}') from error


def check_checkpoints(
    listed: Mapping[str, Checkpoint], registered: Mapping[str, timm.models.PretrainedCfg]
) -> list[str]:
    """Compare the list of checkpoints with the registry, and files on this machine with their SHA-256.

    A repository is not contacted; its file is compared when `check_repository` has downloaded it.

    Returns:
        What is wrong, a sentence each.
    """
    problems = [f'{name} is registered and not listed' for name in registered.keys() - listed.keys()]
    problems += [f'{name} is listed and not registered' for name in listed.keys() - registered.keys()]
    for name in listed.keys() & registered.keys():
        config, checkpoint = registered[name], listed[name]
        source = Path(config.file).name if config.file else config.hf_hub_id
        if source != checkpoint.source:
            problems.append(f'{name} comes from {source} in the registry and from {checkpoint.source} in the list')
        elif config.file:
            try:
                _check_sha256(Path(config.file), checkpoint.sha256, name)
            except (OSError, ValueError) as error:
                problems.append(str(error))
        elif not re.fullmatch(r'[^/@]+/[^/@]+@[0-9a-f]{40}', source or ''):
            problems.append(f'{name} must come from a file or from owner/name@commit, not from {source}')
    return sorted(problems)


def _check_sha256(path: Path, wanted: str, name: str) -> None:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != wanted:
        raise ValueError(
            f'{path} is not the checkpoint {name}: its SHA-256 is {digest.hexdigest()}, in {CHECKPOINTS.name} {wanted}'
        )


def key_metric(name: str) -> str | None:
    """The main result of a registered checkpoint, from its card; None if there is no card or no such result.

    Args:
        name: `name.tag`.
    """
    path = CARDS / f'{name}.md'
    if not path.is_file():
        return None
    for result in ModelCard.load(path).data.eval_results or []:
        if result.metric_type in KEY_METRICS:
            return f'{result.metric_type} {100 * result.metric_value:.1f} % ({result.dataset_name})'
    return None


def model_without_memory(folder: Path) -> nn.Module:
    """The model that `config.json` describes, on the meta device."""
    architecture = read_json(folder / CONFIG).get('architecture')
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f'{folder / CONFIG} names the architecture {architecture!r}, which timm does not know')
    try:
        with torch.device('meta'):
            return timm.create_model(f'local-dir:{folder}', pretrained=False)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'{folder / CONFIG}: {architecture} cannot be built from it: {error}') from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} is damaged: it holds a {type(content).__name__}, not a dictionary')
    return content
