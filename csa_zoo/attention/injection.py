"""Attention between the stages of any timm backbone.

The module is appended as a named child to the `nn.Sequential` that makes up a stage, or to the one that ends it. So the
backbone's forward, its state-dict keys and everything timm does with a stage (feature extraction, gradient
checkpointing, layer decay, scripting) go on as before; a hook would be skipped by timm's checkpointing, and a wrapper
would rename the backbone's weights.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from .compressed import CompressedSelfAttention
from .full import SelfAttention

ATTENTIONS: dict[str, type[nn.Module]] = {'csa': CompressedSelfAttention, 'sa': SelfAttention}


class _Stage(NamedTuple):
    module: str
    channels: int
    end: nn.Sequential | None
    """The Sequential whose last child ends the stage."""


def inject_attention(
    model: nn.Module,
    attention: str | Callable[..., nn.Module] = 'csa',
    stages: Sequence[int] = (0, 1, 2),
    **kwargs,
) -> nn.Module:
    """Append an attention module to stages of a timm model, in place.

    Example:
        >>> import timm
        >>> model = inject_attention(timm.create_model('resnet50'), 'csa', stages=(0, 1, 2), groups=2)
        >>> type(model.layer1.csa).__name__
        'CompressedSelfAttention'

    Args:
        model: Any timm model that lists its stages in `feature_info` (the plain model, not a `features_only` wrapper).
        attention: `'csa'`, `'sa'`, or a callable that makes a module from a number of channels.
        stages: Which stages get one, counted from 0 without the stem (0 is `layer1` of a ResNet).
        **kwargs: Handed to the attention module: `num_maps`, `groups`, `alpha` and so on.

    Returns:
        The same model, each of the stages ending in a child named `csa` or `sa` (`attention` for a callable).

    Raises:
        ValueError: If the attention is unknown, the model has no `feature_info`, or a stage does not exist, already has
            such a child, has no place that an appended module would run in, or is not (B, C, H, W) there; or if the
            model fails before that place at the image size that it names (`img_size`, else its `pretrained_cfg`). The
            model is unchanged then.
    """
    if isinstance(attention, str):
        if attention not in ATTENTIONS:
            raise ValueError(f'unknown attention {attention!r}, choose from {sorted(ATTENTIONS)} or pass a callable')
        make, name = ATTENTIONS[attention], attention
    else:
        make, name = attention, 'attention'
    all_stages = _stages(model)
    for index in stages:
        if not 0 <= index < len(all_stages):
            raise ValueError(
                f'stage {index} does not exist: {type(model).__name__} has stages 0 to {len(all_stages) - 1}'
            )
    chosen = [all_stages[index] for index in sorted(set(stages))]
    _check_stages(model, chosen, name)
    modules = []
    for stage in chosen:
        weight = next(stage.end.parameters())
        modules.append(make(stage.channels, **kwargs).to(weight.device, weight.dtype).train(stage.end.training))
    for stage, module in zip(chosen, modules, strict=True):
        stage.end.add_module(name, module)
    return model


def _stages(model: nn.Module) -> list[_Stage]:
    """The stages that `feature_info` lists, without the stem."""
    infos = getattr(model, 'feature_info', None)
    if not infos or not isinstance(infos, list):
        raise ValueError(
            f'{type(model).__name__} has no feature_info list, which says where its stages are; '
            'use a timm model that supports features_only=True'
        )
    modules = dict(model.named_modules())
    stages = [_Stage(info['module'], info['num_chs'], _end(modules.get(info['module']))) for info in infos]
    # a stem that is listed as a feature level is no stage
    return stages[1:] if stages[0].end is None and len(stages) > 1 else stages


def _end(stage: nn.Module | None) -> nn.Sequential | None:
    """Where an appended module would run last: in the stage itself, or in the `blocks` that it ends in."""
    if isinstance(stage, nn.Sequential):
        return stage
    children = list(stage.named_children()) if stage is not None else []
    if children and children[-1][0] == 'blocks' and isinstance(children[-1][1], nn.Sequential):
        return children[-1][1]
    return None


def _check_stages(model: nn.Module, stages: list[_Stage], name: str) -> None:
    """Raise unless each stage ends in a place to append to, still free, whose output is (B, C, H, W)."""
    owner = type(model).__name__
    for stage in stages:
        if stage.end is None:
            raise ValueError(
                f'{stage.module} of {owner} does not end in an nn.Sequential that attention could be appended to'
            )
        if hasattr(stage.end, name):
            raise ValueError(f'{stage.module} of {owner} already has a child named {name!r}')
    if not getattr(model, 'pretrained_cfg', None):  # a model under construction knows its own layout
        return
    for stage, layout in zip(stages, _layouts(model, stages), strict=True):
        if not isinstance(layout, tuple) or len(layout) != 4 or layout[1] != stage.channels:
            raise ValueError(
                f'{stage.module} of {owner} gives {layout} where attention needs (B, {stage.channels}, H, W): '
                'stages that are channels-last, token sequences or several tensors inside are not supported'
            )


def _layouts(model: nn.Module, stages: list[_Stage]) -> list[tuple[int, ...] | str]:
    """Run the model on the meta device, without data or memory, and note in what each stage ends: a shape, or words."""
    layouts: dict[nn.Module, tuple[int, ...] | str] = {}
    hooks = [
        # on the last child, since timm's checkpointing calls the children and not the Sequential
        stage.end[-1].register_forward_hook(lambda *call: layouts.update({call[0]: _layout(*call)}))
        for stage in stages
    ]
    tensors = {key: tensor.to('meta') for key, tensor in [*model.named_parameters(), *model.named_buffers()]}
    images = torch.empty(2, *_input_size(model), device='meta', dtype=next(model.parameters()).dtype)
    try:
        with torch.no_grad():
            functional_call(model, tensors, images)
    except Exception as error:  # of any type: it is the network's own
        if len(layouts) < len(stages):
            raise ValueError(
                f'{type(model).__name__} fails on images of {tuple(images.shape[1:])}, so that its stages cannot be '
                f'checked ({type(error).__name__}: {error}); if it was created for another size, name that first: '
                "model.pretrained_cfg['input_size'] = (channels, height, width)"
            ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return [layouts.get(stage.end[-1], 'nothing') for stage in stages]


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    """What the model was created for, which its `pretrained_cfg` does not follow: (C, H, W)."""
    channels, *size = model.pretrained_cfg['input_size']
    channels = getattr(model, 'in_chans', channels)
    for module in (model, getattr(model, 'patch_embed', None)):
        built_for = getattr(module, 'img_size', None)
        if built_for:
            size = (built_for, built_for) if isinstance(built_for, int) else built_for
            break
    return channels, *size


def _layout(block: nn.Module, inputs: tuple, output: object) -> tuple[int, ...] | str:
    """The shape in which the block ends, or why that says nothing about its layout."""
    if not isinstance(output, torch.Tensor):
        return f'a {type(output).__name__}'
    shape = tuple(output.shape)
    if len(shape) != 4 or shape[1] != shape[3]:
        return shape
    # (B, C, H, C) may be (B, H, W, C) as well: the same weights take a map twice as wide, but not twice the channels
    try:
        block.forward(torch.cat([inputs[0], inputs[0]], dim=-1), *inputs[1:])
    except Exception:
        return f'{shape} with the channels last'
    return shape
