"""The demo: search people by an image, match two photographs, look at attention. A Gradio app for `csa-zoo demo`.

On a Hugging Face Space it is `python app.py`, and the Space's variables CSA_ZOO_REID and CSA_ZOO_DESCRIPTOR name the
models. It sends nothing to anybody: Gradio's analytics are off, and what is uploaded is deleted within two hours.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # Gradio reads it when it is imported

import gradio as gr
import matplotlib
import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import nn

import csa_zoo  # noqa: F401
from csa_zoo.attention import CompressedSelfAttention
from csa_zoo.checkpoints import load_model, registered_checkpoints
from csa_zoo.data import cache_images, load_reid, normalize
from csa_zoo.evaluation.embedding import embed

RANKS = 10
EXAMPLES = 8
PICTURE_HEIGHT = 384
KEYPOINTS = 2000
HOUR = 3600
IMAGE_FILES = {'.jpg', '.jpeg', '.png', '.bmp', '.webp'}
# other people than those that training renders by default
RENDERED = {'num_identities': 60, 'images_per_camera': 2, 'seed': 1}

CAUTION = """
**What this is for, and what not.** Re-identification is a technique of surveillance. This page is for research on
metric learning, on drawn people or on pictures of people who have agreed to it. Do not use it to follow, identify or
profile anybody else, and never as the ground for a decision about a person: a small distance means that two pictures
look alike to the model, not that they show the same person. Uploads stay on the machine that runs this page, and are
deleted within two hours.
"""
NO_MODEL = """
**No {kind} model.** Nothing is shown here without trained weights. Start the demo with `csa-zoo demo --{option} ...`,
on a Space set the variable `CSA_ZOO_{variable}`; either names a run's folder, such as `runs/{example}`, or a published
run, `hf-hub:owner/name`.
"""


def load_trained(name: str, channels: int) -> nn.Module:
    """A model whose weights were trained for its task, not those of timm's ImageNet backbones.

    Args:
        name: Folder of a run, `hf-hub:owner/name`, or a name of the zoo that has trained weights.
        channels: Of its input images: 3 for people, 1 for patches.

    Raises:
        FileNotFoundError: If the folder is not a run's.
        ValueError: If nothing trained has this name, the files are damaged, or the model takes other images.
    """
    trained = registered_checkpoints()
    if not (name.startswith('hf-hub:') or Path(name).is_dir() or name in trained):
        raise ValueError(
            f'{name} is no folder, no hf-hub:owner/name, and no model of the zoo with trained weights '
            f'({", ".join(trained) or "none has any yet"})'
        )
    return load_model(name, channels)


class Gallery:
    """Images to search, by their distance to a query in a model's embedding."""

    def __init__(self, model: nn.Module, paths: Sequence[str]):
        """Embed the images, each the picture of one person.

        Args:
            model: From `load_trained`.
            paths: Image files.
        """
        config = model.pretrained_cfg
        self.model = model
        self.paths = list(paths)
        self.mean, self.std = config['mean'], config['std']
        self.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        images = cache_images(self.paths, config['input_size'][1:], interpolation=config['interpolation'])
        self.embeddings = F.normalize(embed(model, images, self._preprocess, Accelerator(cpu=True), 64, 'gallery'))

    def _preprocess(self, batch: torch.Tensor) -> torch.Tensor:
        return normalize(batch.permute(0, 3, 1, 2), self.mean, self.std)

    @torch.inference_mode()
    def search(self, query: Image.Image | None) -> list[tuple[str, str]]:
        """The nearest images and a caption for each: rank, and the distance of unit-length embeddings, from 0 to 2."""
        if query is None:
            raise gr.Error('Choose a query image first.')
        image = self.transform(query.convert('RGB'))[None]
        embedding = F.normalize(self.model.forward_head(self.model.forward_features(image), pre_logits=True))
        distances = (embedding - self.embeddings).norm(dim=1)
        nearest = distances.topk(min(RANKS, len(self.paths)), largest=False)
        return [
            (self.paths[index], f'{rank}: distance {distance:.3f}')
            for rank, (distance, index) in enumerate(zip(nearest.values, nearest.indices.tolist(), strict=True), 1)
        ]


def gallery_files(folder: str | None) -> tuple[list[str], list[str]]:
    """Images to search and a few to search for, in a folder and those below it, or rendered ones.

    Raises:
        FileNotFoundError: If there is no image.
    """
    if folder is None:
        data = load_reid('pedestrians', **RENDERED)
        junk_free = data['gallery'].filter(lambda person: person >= 0, input_columns='person_id')
        people = junk_free['path'][:]
        queries = data['query']['path'][:]
    else:
        people = sorted(str(path) for path in Path(folder).rglob('*') if path.suffix.lower() in IMAGE_FILES)
        queries = people
        if not people:
            raise FileNotFoundError(f'{folder} holds no image: give a folder of {", ".join(sorted(IMAGE_FILES))} files')
    return people, queries[:: max(1, len(queries) // EXAMPLES)][:EXAMPLES]


@torch.inference_mode()
def attention_at(model: nn.Module, image: torch.Tensor, at: tuple[float, float]) -> dict[str, torch.Tensor]:
    """The full attention maps of one position, from each CSA module of a model.

    Args:
        model: In evaluation mode.
        image: Its input, (1, C, H, W).
        at: The position, from the top and from the left, as fractions of height and width in [0, 1).

    Returns:
        (groups, h, w) by the module's name: how much the position takes from each other one, sums to one over (h, w).
        It is the sum over the base maps of the position's weights times the base maps, equation [4] of the paper.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, CompressedSelfAttention)}
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, module in modules.items()
    ]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    maps = {}
    for name, module in modules.items():
        base, weights = (tensor[0] for tensor in module.attention_maps(inputs[name]))  # (G, D, h, w)
        y, x = (int(fraction * size) for fraction, size in zip(at, base.shape[2:], strict=True))
        maps[name] = (weights[:, :, y, x, None, None] * base).sum(1)
    return maps


def draw_map(picture: Image.Image, attention: torch.Tensor, at: tuple[float, float]) -> Image.Image:
    """A map (h, w) over the dimmed picture, scaled to its own maximum, with a cross in the cell of the position."""
    width, height = round(PICTURE_HEIGHT * picture.width / picture.height), PICTURE_HEIGHT
    map_ = F.interpolate(attention[None, None], size=(height, width), mode='bilinear')[0, 0].numpy()
    colors = matplotlib.colormaps['inferno'](map_ / map_.max(), bytes=True)[..., :3]
    drawn = Image.blend(picture.convert('RGB').resize((width, height)), Image.fromarray(colors.copy()), 0.65)
    rows, columns = attention.shape
    y, x = (int(at[0] * rows) + 0.5) * height / rows, (int(at[1] * columns) + 0.5) * width / columns
    pen = ImageDraw.Draw(drawn)
    for arm in ((x - 8, y, x + 8, y), (x, y - 8, x, y + 8)):
        pen.line(arm, fill='white', width=2)
    return drawn


def show_attention(model: nn.Module, picture: Image.Image, at: tuple[float, float]) -> list[tuple[Image.Image, str]]:
    """Pictures and captions of the maps of one position: one for each module and channel group."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = transform(picture.convert('L' if model.pretrained_cfg['input_size'][0] == 1 else 'RGB'))[None]
    return [
        (draw_map(picture, map_, at), f'{name}, group {group}, {map_.shape[0]}×{map_.shape[1]}')
        for name, maps in attention_at(model, image, at).items()
        for group, map_ in enumerate(maps, 1)
    ]


def has_csa(model: nn.Module | None) -> bool:
    """Whether there is attention to show."""
    return model is not None and any(isinstance(module, CompressedSelfAttention) for module in model.modules())


def build_app(reid: str | None = None, descriptor: str | None = None, gallery: str | None = None) -> gr.Blocks:
    """The page with its three tabs; a tab whose model is missing says so.

    Args:
        reid: Model for people, as in `load_trained`.
        descriptor: Model for patches, as in `load_trained`.
        gallery: Folder of images to search; a few rendered people if None.
    """
    people = load_trained(reid, 3) if reid else None
    patches = load_trained(descriptor, 1) if descriptor else None
    with gr.Blocks(title='csa_zoo', analytics_enabled=False, delete_cache=(HOUR, HOUR)) as app:
        gr.Markdown('# Compressed self-attention')
        with gr.Tab('Search people'):
            gr.Markdown(CAUTION)
            if people is None:
                gr.Markdown(NO_MODEL.format(kind='person', option='reid', variable='REID', example='pedestrians'))
            else:
                _search_tab(people, gallery)
        with gr.Tab('Match photographs'):
            if patches is None:
                gr.Markdown(
                    NO_MODEL.format(
                        kind='descriptor', option='descriptor', variable='DESCRIPTOR', example='photographs'
                    )
                )
            else:
                _match_tab(patches)
        with gr.Tab('Attention'):
            model = next(filter(has_csa, (people, patches)), None)
            if model is None:
                gr.Markdown('**No model with compressed self-attention** was given, so there is no attention to show.')
            else:
                _attention_tab(model)
    return app


# All of them share one queue: attention listens in on a forward pass, so that there must be no second one.
ONE_AT_A_TIME: dict[str, Any] = {'concurrency_limit': 1, 'concurrency_id': 'model'}


def _search_tab(model: nn.Module, folder: str | None) -> None:
    files, queries = gallery_files(folder)
    searched = Gallery(model, files)
    with gr.Row():
        with gr.Column(scale=1):
            query = gr.Image(
                type='pil', sources=['upload', 'clipboard'], label='Query: one person', elem_id='query', height=320
            )
            button = gr.Button('Search', variant='primary', elem_id='search')
            gr.Examples([[path] for path in queries], inputs=query, examples_per_page=EXAMPLES, label='Queries to try')
        ranked = gr.Gallery(
            label=f'Nearest of {len(files):,} images', columns=5, object_fit='contain', scale=3, elem_id='ranked'
        )
    button.click(searched.search, query, ranked, **ONE_AT_A_TIME)


def _match_tab(model: nn.Module) -> None:
    from csa_zoo.features import PatchDescriptor, create_sift, match_features
    from csa_zoo.visualize import draw_matches

    features = PatchDescriptor(model, create_sift(KEYPOINTS))
    name = model.pretrained_cfg['architecture']

    def match(first: np.ndarray | None, second: np.ndarray | None) -> tuple[Figure, str]:
        if first is None or second is None:
            raise gr.Error('Choose two photographs first.')
        # OpenCV has colors the other way round
        found = [features.detectAndCompute(image[..., ::-1]) for image in (first, second)]
        matches = match_features(*found[0], *found[1], geometry='fundamental')
        summary = (
            f'{len(found[0][0])} and {len(found[1][0])} keypoints, {len(matches.points0)} mutual nearest neighbours, '
            f'{matches.is_inlier.sum()} of which follow one geometry'
        )
        return draw_matches(first, second, {name: matches}), summary

    with gr.Row():
        pair = [
            gr.Image(sources=['upload', 'clipboard'], label=label, elem_id=elem_id)
            for label, elem_id in (('First photograph', 'first'), ('Second photograph', 'second'))
        ]
    button = gr.Button('Match', variant='primary', elem_id='match')
    summary = gr.Markdown(elem_id='summary')
    button.click(match, pair, [gr.Plot(label='Matches', elem_id='matches'), summary], **ONE_AT_A_TIME)


def _attention_tab(model: nn.Module) -> None:
    def enlarge(picture: Image.Image | None) -> tuple[Image.Image | None, Image.Image | None]:
        # here, because Gradio tells positions in images that CSS has enlarged wrongly
        factor = -(-PICTURE_HEIGHT // picture.height) if picture else 1
        return picture, picture and picture.resize((factor * picture.width, factor * picture.height), Image.NEAREST)

    def clicked(
        original: Image.Image | None, shown: Image.Image, event: gr.SelectData
    ) -> list[tuple[Image.Image, str]]:
        x, y = event.index
        return show_attention(model, original or shown, (y / shown.height, x / shown.width))

    gr.Markdown(
        'Upload an image and click on a position in it. Each map shows, for one attention module and channel group, '
        'where that position takes its context from; the brightest place is the largest weight of that map.'
    )
    with gr.Row():
        original = gr.State()
        picture = gr.Image(type='pil', sources=['upload'], height=480, label='Click on a position', elem_id='picture')
        maps = gr.Gallery(
            label='Attention', columns=3, height=840, format='png', object_fit='contain', scale=3, elem_id='maps'
        )
    picture.upload(enlarge, picture, [original, picture], **ONE_AT_A_TIME)
    picture.select(clicked, [original, picture], maps, **ONE_AT_A_TIME)


def launch(app: gr.Blocks, **options: Any) -> None:
    """Serve the page, to this machine alone unless GRADIO_SERVER_NAME says otherwise, as it does on a Space.

    Args:
        app: From `build_app`.
        **options: Of `gradio.Blocks.launch`.
    """
    theme = gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace'])
    app.launch(theme=theme, share=False, ssr_mode=False, footer_links=[], max_file_size='20mb', **options)


if __name__ == '__main__':
    launch(build_app(os.environ.get('CSA_ZOO_REID'), os.environ.get('CSA_ZOO_DESCRIPTOR')))
