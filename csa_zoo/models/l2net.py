"""L2-Net patch descriptors, with or without attention after the third layer.

The network of L2-Net (Tian et al., CVPR 2017) as HardNet simplified it (Mishchuk et al., NIPS 2017,
https://arxiv.org/abs/1705.10872): seven convolutions, no biases, batch norm without affine parameters, 1,334,560
weights. HardNet and RAL-Net (Xu et al., ACCV 2018, https://arxiv.org/abs/1901.07076) are this one architecture trained
with two losses; each has its names and its weights here.
"""

from pathlib import Path
from typing import Any

import torch
from timm.layers import get_device_dtype, to_2tuple
from timm.layers.trace_utils import _assert
from timm.models import (
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import nn

from ..attention import inject_attention
from .safetensors_only import build_model_from_safetensors

__all__ = ['L2Net']


class PatchNorm(nn.Module):
    """Each patch to zero mean and unit (unbiased) standard deviation, statistics without gradient.

    In float32 whatever the input, so that a constant patch stays finite in half precision.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = x.float()
        pixels = patches.detach().flatten(1)
        mean = pixels.mean(1)[:, None, None, None]
        std = pixels.std(1)[:, None, None, None]
        return ((patches - mean) / (std + 1e-7)).to(x.dtype)


class L2Net(nn.Module):
    """Descriptor of a grey patch.

    Shape:
        - input: (B, 1, 32, 32), any affine scale of grey values
        - output: (B, 128), unit length; logits (B, `num_classes`) if `num_classes` is not 0
    """

    def __init__(
        self,
        num_classes: int = 0,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 32,
        embed_dim: int = 128,
        global_pool: str = 'conv',
        drop_rate: float = 0.3,
        attention: str | None = None,
        attn_stages: tuple[int, ...] = (2,),
        attn_kwargs: dict | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Create the model.

        Args:
            num_classes: Classes of a linear classifier on the descriptor; 0 for the descriptor.
            in_chans: Channels of the input.
            img_size: Side of the patch in pixels, a multiple of 4.
            embed_dim: Length of the descriptor.
            global_pool: `'conv'`, the last convolution, which spans the map; `''` with `num_classes=0` for the map.
            drop_rate: Dropout before the last convolution.
            attention: `'csa'`, `'sa'` or None.
            attn_stages: Layers that the attention follows, from 0: 2 is the third, the paper's place.
            attn_kwargs: Arguments of the attention module; `groups` is 1 if not given, as in the paper.
            device: Where to create the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If the patch size or `global_pool` is not possible.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        height, width = to_2tuple(img_size)
        if height % 4 or width % 4:
            raise ValueError(f'img_size must be a multiple of 4, got {img_size}')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.embed_dim = self.head_hidden_size = embed_dim
        self.num_features = 128
        self.grad_checkpointing = False
        self.feature_info = []

        self.patch_norm = PatchNorm()
        channels, reduction = in_chans, 1
        for index, (out_channels, stride) in enumerate([(32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)], 1):
            reduction *= stride
            self.add_module(f'layer{index}', _conv_layer(channels, out_channels, stride, **dd))
            self.feature_info.append({'num_chs': out_channels, 'reduction': reduction, 'module': f'layer{index}'})
            channels = out_channels
        self.drop = nn.Dropout(drop_rate)
        self.layer7 = nn.Sequential(
            nn.Conv2d(channels, embed_dim, (height // 4, width // 4), bias=False, **dd),
            nn.BatchNorm2d(embed_dim, affine=False, **dd),
        )
        self._set_head(num_classes, global_pool, **dd)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _init_orthogonal(module.weight, gain=0.6)
        if attention:
            defaults = {'groups': 1} if attention == 'csa' else {}
            inject_attention(self, attention, attn_stages, **{**defaults, **(attn_kwargs or {})})

    def _set_head(self, num_classes: int, global_pool: str, device=None, dtype=None) -> None:
        if global_pool not in ('conv', ''):
            raise ValueError(f"global_pool must be 'conv' or '' (no pooling), got {global_pool!r}")
        self.global_pool = global_pool
        self.fc = nn.Linear(self.embed_dim, num_classes, device=device, dtype=dtype) if num_classes else nn.Identity()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers in order, for layer-wise learning rates."""
        return {'stem': r'^layer1', 'blocks': r'^layer(\d+)'}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer in the backward pass, to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier, or its name."""
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if `global_pool` is given."""
        self.num_classes = num_classes
        self._set_head(num_classes, self.global_pool if global_pool is None else global_pool, **get_device_dtype(self))
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Feature maps of the first six layers, with the arguments of timm's models.

        Args:
            x: Patches (B, 1, 32, 32).
            indices: Which layers, from 0; the last n if an int, all if None.
            norm: Unused, there is no norm after the layers.
            stop_early: Stop after the last layer that is asked for.
            output_fmt: Must be `'NCHW'`.
            intermediates_only: Return the list alone.

        Returns:
            The output of `forward_features` and the list of maps, or the list.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        x = self.patch_norm(x)
        for index, info in enumerate(self.feature_info):
            if stop_early and index > last:
                break
            layer = self.get_submodule(info['module'])
            x = checkpoint_seq(layer, x) if self.grad_checkpointing else layer(x)
            if index in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers after the last of `indices`, and the head with them."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        for info in self.feature_info[last + 1 :]:
            self.set_submodule(info['module'], nn.Sequential())
        if last < len(self.feature_info) - 1:
            self.num_features = self.head_hidden_size = self.feature_info[last]['num_chs']
        if prune_head or last < len(self.feature_info) - 1:
            self.layer7 = nn.Identity()
            self.reset_classifier(0, '')
        return take

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map of the sixth layer: (B, 1, 32, 32) to (B, 128, 8, 8)."""
        x = self.patch_norm(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            layers = [self.layer1, self.layer2, self.layer3, self.layer4, self.layer5, self.layer6]
            return checkpoint_seq(layers, x, flatten=True)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.layer5(x)
        return self.layer6(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Descriptor of the feature map, or its logits: (B, 128, 8, 8) to (B, 128) or (B, classes)."""
        if not self.global_pool:
            return x
        x = self.layer7(self.drop(x))
        _assert(x.shape[2] * x.shape[3] == 1, 'L2-Net describes patches of 32x32 pixels: resize them')
        x = x.flatten(1)
        x = x.float()  # also under autocast, where a rounded descriptor would not be of unit length
        x = (x * torch.rsqrt((x * x).sum(1, keepdim=True) + 1e-10)).to(self.layer7[0].weight.dtype)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Descriptors of patches: (B, 1, 32, 32) to (B, 128), or logits."""
        return self.forward_head(self.forward_features(x))


def _conv_layer(in_channels: int, out_channels: int, stride: int, device=None, dtype=None) -> nn.Sequential:
    dd = {'device': device, 'dtype': dtype}
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False, **dd),
        nn.BatchNorm2d(out_channels, affine=False, **dd),
        nn.ReLU(),
    )


@torch.no_grad()
def _init_orthogonal(weight: torch.Tensor, gain: float) -> None:
    single = torch.empty_like(weight, dtype=torch.float32)  # half precision has no QR decomposition
    weight.copy_(nn.init.orthogonal_(single, gain))


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: L2Net) -> dict[str, torch.Tensor]:
    """Accept the key names of the original HardNet and of kornia: `features.N` in one flat Sequential."""
    if not any(key.startswith('features.') for key in state_dict):
        return state_dict
    convolutions = (0, 3, 6, 9, 12, 15, 19)  # a dropout sits at 18
    names = {str(index): f'layer{n}.0' for n, index in enumerate(convolutions, 1)}
    names.update({str(index + 1): f'layer{n}.1' for n, index in enumerate(convolutions, 1)})
    renamed = {}
    for key, value in state_dict.items():
        _, index, tensor = key.split('.', 2)
        renamed[f'{names[index]}.{tensor}'] = value
    return renamed


def _cfg(**kwargs) -> dict[str, Any]:
    return {
        'num_classes': 0,
        'input_size': (1, 32, 32),
        'pool_size': (8, 8),
        'fixed_input_size': True,
        'crop_pct': 1.0,
        'crop_mode': 'squash',
        'interpolation': 'bilinear',
        'mean': (0.0,),  # the model normalises each patch by itself
        'std': (1.0,),
        'first_conv': 'layer1.0',
        'classifier': 'fc',
        'license': 'apache-2.0',
        **kwargs,
    }


def _shipped(name: str) -> dict[str, Any]:
    """Weights that come with the package, stored in float16."""
    return _cfg(file=str(Path(__file__).parent.parent / 'weights' / f'{name}.safetensors'))


default_cfgs = generate_default_cfgs(
    {
        'l2net_hardnet.photographs': _shipped('l2net_hardnet.photographs'),
        'l2net_hardnet_sa.photographs': _shipped('l2net_hardnet_sa.photographs'),
        'l2net_hardnet_csa.photographs': _shipped('l2net_hardnet_csa.photographs'),
        'l2net_ralnet': _cfg(),
        'l2net_ralnet_sa': _cfg(),
        'l2net_ralnet_csa.photographs': _shipped('l2net_ralnet_csa.photographs'),
    }
)


def _create_l2net(variant: str, pretrained: bool = False, **kwargs) -> L2Net:
    return build_model_from_safetensors(
        L2Net,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'out_indices': (1, 3, 5)},
        **kwargs,
    )


@register_model
def l2net_hardnet(pretrained: bool = False, **kwargs) -> L2Net:
    """L2-Net for the HardNet loss."""
    return _create_l2net('l2net_hardnet', pretrained, **kwargs)


@register_model
def l2net_hardnet_sa(pretrained: bool = False, **kwargs) -> L2Net:
    """L2-Net for the HardNet loss, with full self-attention after the third layer."""
    return _create_l2net('l2net_hardnet_sa', pretrained, **{'attention': 'sa', **kwargs})


@register_model
def l2net_hardnet_csa(pretrained: bool = False, **kwargs) -> L2Net:
    """L2-Net for the HardNet loss, with compressed self-attention after the third layer."""
    return _create_l2net('l2net_hardnet_csa', pretrained, **{'attention': 'csa', **kwargs})


@register_model
def l2net_ralnet(pretrained: bool = False, **kwargs) -> L2Net:
    """L2-Net for the RAL loss."""
    return _create_l2net('l2net_ralnet', pretrained, **kwargs)


@register_model
def l2net_ralnet_sa(pretrained: bool = False, **kwargs) -> L2Net:
    """L2-Net for the RAL loss, with full self-attention after the third layer."""
    return _create_l2net('l2net_ralnet_sa', pretrained, **{'attention': 'sa', **kwargs})


@register_model
def l2net_ralnet_csa(pretrained: bool = False, **kwargs) -> L2Net:
    """L2-Net for the RAL loss, with compressed self-attention after the third layer."""
    return _create_l2net('l2net_ralnet_csa', pretrained, **{'attention': 'csa', **kwargs})
