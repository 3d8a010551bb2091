"""PCB and PCB-RPP for person re-identification, with or without attention between the stages.

Part-based Convolutional Baseline and Refined Part Pooling: `Beyond Part Models` (Sun et al., ECCV 2018),
https://arxiv.org/abs/1711.09349. Compressed self-attention after the first three stages: AAAI 2020.

PCB is a timm ResNet whose last stage keeps its resolution and whose head pools six horizontal stripes, reduces each
to 256 channels and classifies each by itself. Where the paper of PCB and its released code differ, an argument chooses
and the paper's reading is the default.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ..attention import inject_attention
from .safetensors_only import build_model_from_safetensors

__all__ = ['PCB']


class PartPool(nn.Module):
    """Average (or maximum) over horizontal stripes of equal height: (B, C, H, W) to (B, parts, C)."""

    def __init__(self, num_parts: int, pool_type: str = 'avg'):
        super().__init__()
        pools = {'avg': nn.AdaptiveAvgPool2d, 'max': nn.AdaptiveMaxPool2d}
        if pool_type not in pools:
            raise ValueError(f"global_pool must be 'avg', 'max' or '' (no pooling), got {pool_type!r}")
        self.pool = pools[pool_type]((num_parts, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x).squeeze(3).transpose(1, 2)


class RefinedPartPool(nn.Module):
    """Soft parts: a classifier assigns every position to the parts, (B, C, H, W) to (B, parts, C).

    A part's feature is the mean over positions of its probability times the feature vector, times the number of parts.
    The factor is in the released code only; it gives the parts the magnitude of the stripes that they replace, which
    the trained reduction needs while everything but this classifier is frozen. A descriptor that is normalised per
    part does not depend on it.

    The parts are refined from stripes: a network is first trained with `refined` false, which are the stripes.
    """

    def __init__(
        self,
        num_features: int,
        num_parts: int,
        variant: str = 'paper',
        refined: bool = True,
        device=None,
        dtype=None,
    ):
        """Create the part classifier.

        Args:
            num_features: Channels C of the feature map.
            num_parts: Number of parts.
            variant: `'paper'`: a linear classifier on the feature vectors. `'released'`: on the vectors after dropout,
                averaged over 8 neighbouring channels and centred over positions, with a bias.
            refined: Pool the refined parts, not the stripes.
            device: Where to create the parameters.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.num_parts = num_parts
        self.refined = refined
        self.released = variant == 'released'
        self.stride = 8 if self.released else 1
        dd = {'device': device, 'dtype': dtype}
        self.classifier = nn.Conv2d(num_features // self.stride, num_parts, 1, bias=self.released, **dd)
        nn.init.kaiming_normal_(self.classifier.weight, mode='fan_out')

    def part_probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """Probability that a position belongs to a part: (B, C, H, W) to (B, parts, H, W), sums to one over parts."""
        if self.released:
            x = F.dropout(x, 0.5, self.training)
            x = x.unflatten(1, (-1, self.stride)).mean(2)
            x = x - x.mean((2, 3), keepdim=True)
        return self.classifier(x).softmax(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.refined:
            return F.adaptive_avg_pool2d(x, (self.num_parts, 1)).squeeze(3).transpose(1, 2)
        probabilities = self.part_probabilities(x).flatten(2)
        positions = x.flatten(2)
        return (probabilities @ positions.transpose(1, 2)) * (self.num_parts / positions.shape[2])


class PartLinear(nn.Module):
    """One linear layer for each part, all in one product: (B, parts, in) to (B, parts, out)."""

    def __init__(self, num_parts: int, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.weight = nn.Parameter(torch.empty(num_parts, out_features, in_features, **dd))
        self.bias = nn.Parameter(torch.zeros(num_parts, out_features, **dd)) if bias else None
        nn.init.normal_(self.weight, std=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x.transpose(0, 1) @ self.weight.transpose(1, 2)).transpose(0, 1)
        return x if self.bias is None else x + self.bias


class PartHead(nn.Module):
    """Dropout, reduction (1×1 convolution, batch norm, ReLU) and classifier of the parts."""

    def __init__(
        self,
        num_features: int,
        num_parts: int,
        num_classes: int,
        reduction_dim: int = 256,
        shared_reduction: bool = True,
        drop_rate: float = 0.5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_parts = num_parts
        self.reduction_dim = reduction_dim
        self.shared_reduction = shared_reduction
        self.drop = nn.Dropout(drop_rate)
        if shared_reduction:
            self.reduction = nn.Linear(num_features, reduction_dim, bias=False, **dd)
            self.bn = nn.BatchNorm1d(reduction_dim, **dd)  # one set of statistics for all parts
        else:
            self.reduction = PartLinear(num_parts, num_features, reduction_dim, bias=False, **dd)
            self.bn = nn.BatchNorm1d(num_parts * reduction_dim, **dd)
        nn.init.normal_(self.reduction.weight, std=math.sqrt(2 / reduction_dim))  # kaiming, fan out
        self.reset_classifier(num_classes, **dd)

    def reset_classifier(self, num_classes: int, device=None, dtype=None) -> None:
        """Replace the classifiers by fresh ones, or by none if `num_classes` is 0."""
        dd = {'device': device, 'dtype': dtype}
        self.fc = PartLinear(self.num_parts, self.reduction_dim, num_classes, **dd) if num_classes else nn.Identity()

    def reduce(self, parts: torch.Tensor) -> torch.Tensor:
        """Reduced part features H of the paper: (B, parts, C) to (B, parts, reduction_dim)."""
        x = self.reduction(self.drop(parts))
        x = self.bn(x.flatten(0, 1) if self.shared_reduction else x.flatten(1))
        return F.relu(x).view(parts.shape[0], self.num_parts, self.reduction_dim)

    def forward(self, parts: torch.Tensor) -> torch.Tensor:
        """Logits of the parts: (B, parts, C) to (B, parts, classes)."""
        return self.fc(self.reduce(parts))


class PCB(ResNet):
    """ResNet with part pooling for person re-identification.

    Shape:
        - input: (B, 3, H, W), normalised; 384×128 in the paper
        - output: the unit-length descriptor (B, `head_hidden_size`), part after part, if `num_classes` is 0; else the
          mean of the parts' logits (B, `num_classes`). Training takes each part's logits from `forward_parts`.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: tuple[int, ...],
        num_classes: int = 0,
        in_chans: int = 3,
        global_pool: str = 'avg',
        num_parts: int = 6,
        reduction_dim: int = 256,
        shared_reduction: bool = True,
        rpp: str | None = None,
        refined: bool = True,
        descriptor: str = 'pooled',
        norm: str = 'part',
        drop_rate: float = 0.5,
        attention: str | None = None,
        attn_stages: tuple[int, ...] = (0, 1, 2),
        attn_kwargs: dict | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Create the model.

        Args:
            block: Residual block of timm's ResNet.
            layers: Blocks per stage.
            num_classes: Identities to classify; 0 for the descriptor.
            in_chans: Channels of the input.
            global_pool: Pooling of the stripes, `'avg'` or `'max'`; `''` with `num_classes=0` for the feature map.
            num_parts: Horizontal stripes.
            reduction_dim: Channels that each part is reduced to.
            shared_reduction: One reduction for all parts, as in the released code, or one for each.
            rpp: Refined part pooling instead of stripes: `'paper'`, `'released'`, or None.
            refined: With `rpp`: False for the stripes that the network is trained with before its parts are refined.
            descriptor: `'pooled'` (the paper's G, before the reduction) or `'reduced'` (H, after it).
            norm: `'part'`: each part to the same length, the whole to unit length. `'global'`: only the whole.
                `''`: neither.
            drop_rate: Dropout before the reduction.
            attention: `'csa'`, `'sa'` or None.
            attn_stages: Stages that the attention follows, from 0.
            attn_kwargs: Arguments of the attention module, such as `num_maps` and `groups`.
            device: Where to create the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If an argument is not one of its values.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(block, layers, num_classes=0, in_chans=in_chans, **dd)
        if descriptor not in ('pooled', 'reduced'):
            raise ValueError(f"descriptor must be 'pooled' or 'reduced', got {descriptor!r}")
        if norm not in ('part', 'global', ''):
            raise ValueError(f"norm must be 'part', 'global' or '' (none), got {norm!r}")
        if rpp not in ('paper', 'released', None):
            raise ValueError(f"rpp must be 'paper', 'released' or None, got {rpp!r}")
        for name, value in (('num_parts', num_parts), ('reduction_dim', reduction_dim)):
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        del self.fc
        _keep_resolution(self.layer4[0])
        self.feature_info[-1]['reduction'] = 16
        self.num_parts = num_parts
        self.rpp = rpp
        self.refined = refined
        self.descriptor = descriptor
        self.norm = norm
        self.attention = attention
        self.attn_stages = tuple(attn_stages)
        self.num_classes = num_classes
        self.head = PartHead(
            self.num_features, num_parts, num_classes, reduction_dim, shared_reduction, drop_rate, **dd
        )
        self.head_hidden_size = num_parts * (self.num_features if descriptor == 'pooled' else reduction_dim)
        self._reset_pool(global_pool, **dd)
        if attention:
            inject_attention(self, attention, attn_stages, **(attn_kwargs or {}))

    def _reset_pool(self, pool_type: str, device=None, dtype=None) -> None:
        if not pool_type:
            self.global_pool = nn.Identity()
        elif not self.rpp:
            self.global_pool = PartPool(self.num_parts, pool_type)
        elif pool_type == 'avg':
            self.global_pool = RefinedPartPool(self.num_features, self.num_parts, self.rpp, self.refined, device, dtype)
        else:
            raise ValueError(f"global_pool must be 'avg' or '' (no pooling) with rpp, got {pool_type!r}")
        self.pool_type = pool_type

    @torch.jit.ignore
    def set_refined(self, refined: bool) -> None:
        """With RPP: pool the refined parts, or the stripes that the network is trained with before.

        Raises:
            ValueError: If the model has no part classifier.
        """
        if not isinstance(self.global_pool, RefinedPartPool):
            raise ValueError(f'{type(self).__name__} has no parts to refine: create it with rpp')
        self.refined = self.global_pool.refined = refined

    @torch.jit.ignore
    def backbone_parameters(self) -> list[str]:
        """Names of the parameters that a plain ResNet has too, which ImageNet weights are for."""
        return [name for name, _ in self.named_parameters() if _is_resnet_key(name)]

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The part classifiers, or their name."""
        return 'head.fc' if name_only else self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the part classifiers, and the pooling if `global_pool` is given and differs."""
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        self.head.reset_classifier(num_classes, **dd)
        self.head.fc.train(self.training)
        if global_pool is not None and global_pool != self.pool_type:
            self._reset_pool(global_pool, **dd)
            self.global_pool.train(self.training)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and the head where nothing reaches it."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if not self.pool_type:
            self.head = nn.Identity()
        return take

    def forward_parts(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of each part from the feature map of `forward_features`: (B, C, h, w) to (B, parts, classes)."""
        return self.head(self.global_pool(features))

    def forward_descriptor(self, features: torch.Tensor) -> torch.Tensor:
        """Descriptor from the feature map of `forward_features`: (B, C, h, w) to (B, `head_hidden_size`)."""
        parts = self.global_pool(features)
        if self.descriptor == 'reduced':
            parts = self.head.reduce(parts)
        parts = parts.float()  # also under autocast, where a rounded descriptor would not be of unit length
        if self.norm == 'part':
            parts = F.normalize(parts, dim=2) / math.sqrt(self.num_parts)
        flat = parts.flatten(1)
        if self.norm == 'global':
            flat = F.normalize(flat, dim=1)
        return flat.to(self.head.reduction.weight.dtype)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Descriptor if `pre_logits` or without classes, the mean of the parts' logits otherwise."""
        if not self.pool_type:
            return x
        if pre_logits or self.num_classes == 0:
            return self.forward_descriptor(x)
        return self.forward_parts(x).mean(1)


def _keep_resolution(block: nn.Module) -> None:
    """Set the stride of a stage's first block to 1, which no weight depends on."""
    strided = block.conv2 if isinstance(block, Bottleneck) else block.conv1
    strided.stride = (1, 1)
    block.downsample[0].stride = (1, 1)


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: PCB) -> dict[str, torch.Tensor]:
    """Let the weights of a plain ResNet or of another PCB be loaded; see `convert_checkpoint` for the latter.

    Of a ResNet the classifier is left out, and what PCB and attention add is filled in. A file that lacks any other
    weight is an error. timm's loading is not strict if the number of classes differs.
    """
    wanted = model.state_dict()
    state_dict = convert_checkpoint(state_dict)
    if 'global_pool.classifier.bias' in state_dict and model.rpp == 'paper':
        raise RuntimeError(
            "the checkpoint has the part classifier of PCB-RPP's released code: create with rpp='released'"
        )
    if model.num_classes == 0:
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith('head.fc.')}
    if not any(key.startswith('head.') for key in state_dict):
        backbone = {key: value for key, value in state_dict.items() if not key.startswith('fc.')}
        state_dict = {**backbone, **{key: value for key, value in wanted.items() if not _is_resnet_key(key)}}
    missing = sorted(key for key in wanted if key not in state_dict and not key.startswith('head.fc.'))
    if missing:
        raise RuntimeError(f'the checkpoint lacks {len(missing)} weights of {type(model).__name__}: {missing[:3]} ...')
    return state_dict


class _Layout(NamedTuple):
    """Where another implementation of PCB keeps its weights: beginnings of keys."""

    backbone: str
    reduction: str
    bn: str
    classifier: str


_LAYOUTS = (
    _Layout('', 'conv5.layers.0.', 'conv5.layers.1.', 'classifier.{}.'),  # torchreid: pcb_p6, pcb_p4
    _Layout('base.', 'local_conv.', 'feat_bn2d.', 'instance{}.'),  # PCB's authors
)


def convert_checkpoint(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Bring the weights of another implementation of PCB into the layout of this one.

    Known are torchreid's `pcb_p6` and `pcb_p4`, and PCB and PCB-RPP (our `rpp='released'`) as their authors released
    them, https://github.com/syfafterzy/PCB_RPP_for_reID. `create_model` converts by itself:

        weights = torch.load('checkpoint.pth.tar', weights_only=True)['state_dict']
        overlay = {'state_dict': weights, 'num_classes': 751}
        timm.create_model('resnet50_pcb', pretrained=True, num_classes=751, pretrained_cfg_overlay=overlay)

    Args:
        state_dict: Of any of these, also with the prefix of data parallelism.

    Returns:
        The state dict of a `PCB`; what is in none of the known layouts is returned as it is.
    """
    state_dict = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    for layout in _LAYOUTS:
        if f'{layout.reduction}weight' in state_dict:
            return _from_layout(state_dict, layout)
    return state_dict


def _from_layout(state_dict: dict[str, torch.Tensor], layout: _Layout) -> dict[str, torch.Tensor]:
    """`state_dict` is used up."""
    reduction = state_dict.pop(f'{layout.reduction}weight')[:, :, 0, 0]
    classifiers = []
    while f'{layout.classifier.format(len(classifiers))}weight' in state_dict:
        prefix = layout.classifier.format(len(classifiers))
        classifiers.append((state_dict.pop(f'{prefix}weight'), state_dict.pop(f'{prefix}bias')))
    weights, biases = zip(*classifiers, strict=True)
    converted = {'head.fc.weight': torch.stack(weights), 'head.fc.bias': torch.stack(biases)}
    converted['head.reduction.weight'] = reduction
    ours = {layout.bn: 'head.bn.', 'local_mask.': 'global_pool.classifier.', layout.backbone: ''}
    for key, value in state_dict.items():
        if not key.startswith(f'{layout.backbone}fc.'):  # ImageNet's, which the authors' file carries along
            theirs = next((prefix for prefix in ours if key.startswith(prefix)), '')
            converted[ours.get(theirs, '') + key.removeprefix(theirs)] = value
    for key in list(converted):  # which files from before PyTorch 0.4.1 do not have
        if key.endswith('running_var'):
            converted.setdefault(key.replace('running_var', 'num_batches_tracked'), torch.tensor(0))
    return converted


def _is_resnet_key(key: str) -> bool:
    return not key.startswith(('head.', 'global_pool.')) and not {'csa', 'sa'} & set(key.split('.'))


def _cfg(backbone: str, input_size: tuple[int, int, int], **kwargs) -> dict:
    return {
        'hf_hub_id': f'timm/{backbone}.tv_in1k',
        'num_classes': 0,
        'input_size': input_size,
        'pool_size': (input_size[1] // 16, input_size[2] // 16),
        'crop_pct': 1.0,
        'crop_mode': 'squash',  # timm's default crops the centre, which would cut people in half
        'interpolation': 'bilinear',
        'mean': (0.485, 0.456, 0.406),
        'std': (0.229, 0.224, 0.225),
        'first_conv': 'conv1',
        'classifier': 'head.fc',
        'license': 'bsd-3-clause',
        'origin_url': 'https://github.com/pytorch/vision',
        'description': 'backbone from ImageNet, part head and attention not trained yet',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        **{
            f'resnet50_{head}{attention}.tv_in1k': _cfg('resnet50', (3, 384, 128))
            for head in ('pcb', 'pcb_rpp')
            for attention in ('', '_sa', '_csa')
        },
        **{f'resnet18_pcb{attention}.tv_in1k': _cfg('resnet18', (3, 192, 64)) for attention in ('', '_sa', '_csa')},
    }
)


def _create_pcb(variant: str, pretrained: bool = False, **kwargs) -> PCB:
    return build_model_from_safetensors(PCB, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


def _resnet50(variant: str, pretrained: bool, **kwargs) -> PCB:
    return _create_pcb(variant, pretrained, **dict(block=Bottleneck, layers=(3, 4, 6, 3), **kwargs))


def _resnet18(variant: str, pretrained: bool, **kwargs) -> PCB:
    return _create_pcb(variant, pretrained, **dict(block=BasicBlock, layers=(2, 2, 2, 2), **kwargs))


@register_model
def resnet50_pcb(pretrained: bool = False, **kwargs) -> PCB:
    """PCB on ResNet-50."""
    return _resnet50('resnet50_pcb', pretrained, **kwargs)


@register_model
def resnet50_pcb_sa(pretrained: bool = False, **kwargs) -> PCB:
    """PCB on ResNet-50 with full self-attention between the stages."""
    return _resnet50('resnet50_pcb_sa', pretrained, **{'attention': 'sa', **kwargs})


@register_model
def resnet50_pcb_csa(pretrained: bool = False, **kwargs) -> PCB:
    """PCB on ResNet-50 with compressed self-attention between the stages."""
    return _resnet50('resnet50_pcb_csa', pretrained, **{'attention': 'csa', **kwargs})


@register_model
def resnet50_pcb_rpp(pretrained: bool = False, **kwargs) -> PCB:
    """PCB-RPP on ResNet-50."""
    return _resnet50('resnet50_pcb_rpp', pretrained, **{'rpp': 'paper', **kwargs})


@register_model
def resnet50_pcb_rpp_sa(pretrained: bool = False, **kwargs) -> PCB:
    """PCB-RPP on ResNet-50 with full self-attention between the stages."""
    return _resnet50('resnet50_pcb_rpp_sa', pretrained, **{'rpp': 'paper', 'attention': 'sa', **kwargs})


@register_model
def resnet50_pcb_rpp_csa(pretrained: bool = False, **kwargs) -> PCB:
    """PCB-RPP on ResNet-50 with compressed self-attention between the stages."""
    return _resnet50('resnet50_pcb_rpp_csa', pretrained, **{'rpp': 'paper', 'attention': 'csa', **kwargs})


@register_model
def resnet18_pcb(pretrained: bool = False, **kwargs) -> PCB:
    """PCB on ResNet-18, for small machines."""
    return _resnet18('resnet18_pcb', pretrained, **kwargs)


@register_model
def resnet18_pcb_sa(pretrained: bool = False, **kwargs) -> PCB:
    """PCB on ResNet-18 with full self-attention between the stages."""
    return _resnet18('resnet18_pcb_sa', pretrained, **{'attention': 'sa', **kwargs})


@register_model
def resnet18_pcb_csa(pretrained: bool = False, **kwargs) -> PCB:
    """PCB on ResNet-18 with compressed self-attention between the stages."""
    return _resnet18('resnet18_pcb_csa', pretrained, **{'attention': 'csa', **kwargs})
