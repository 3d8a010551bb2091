"""Attention between the stages of timm backbones: nothing else about the backbone changes."""

import copy

import pytest
import timm
import torch
from timm.models import FeatureListNet, create_feature_extractor
from torch import nn

from csa_zoo import CompressedSelfAttention, SelfAttention, inject_attention

# where the module of stages 0, 1, 2 lands
PLACES = {
    'resnet18': ['layer1', 'layer2', 'layer3'],
    'resnetv2_18': ['stages.0.blocks', 'stages.1.blocks', 'stages.2.blocks'],
    'mobilenetv3_small_050': ['blocks.0', 'blocks.1', 'blocks.3'],
    'test_efficientnet': ['blocks.0', 'blocks.1', 'blocks.2'],
    'test_convnext': ['stages.0.blocks', 'stages.1.blocks', 'stages.2.blocks'],
    'test_nfnet': ['stages.0', 'stages.1', 'stages.2'],
    'test_byobnet': ['stages.0', 'stages.1', 'stages.2'],
}
# a module of this size exercises every path and costs little
SMALL = {'num_maps': 4, 'groups': 1}


def make(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def inject(model: nn.Module, alpha: float = 0.0, **kwargs) -> nn.Module:
    torch.manual_seed(1)
    return inject_attention(model, alpha=alpha, **{**SMALL, **kwargs})


def images(batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize('name', PLACES)
def test_backbone_is_unchanged(name):
    plain, model = make(name), inject(make(name))
    assert [key for key, module in model.named_modules() if isinstance(module, CompressedSelfAttention)] == [
        f'{place}.csa' for place in PLACES[name]
    ]
    before, after = plain.state_dict(), model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())  # batch norm statistics too
    added = {f'{place}.csa.{key}' for place in PLACES[name] for key in ('maps.weight', 'value.weight', 'alpha')}
    assert set(after) - set(before) == added

    missing, unexpected = model.load_state_dict(timm.create_model(name).state_dict(), strict=False)
    assert (set(missing), unexpected) == (added, [])

    model.load_state_dict(before, strict=False)
    assert torch.equal(model.eval()(images()), plain.eval()(images()))


@pytest.mark.parametrize('name', PLACES)
def test_attention_ends_the_stage(name):
    """The feature level of the stage is the attention of what it was, seen by everything that follows."""
    plain, model = make(name).eval(), inject(make(name), alpha=0.5, stages=(1,)).eval()
    if not hasattr(plain, 'forward_intermediates'):
        pytest.skip('this version of timm gives no feature levels of this network')
    place = PLACES[name][1]
    level = next(i for i, info in enumerate(plain.feature_info) if place.startswith(info['module']) and info['module'])
    with torch.no_grad():
        expected_output, expected = plain.forward_intermediates(images())
        output, levels = model.forward_intermediates(images())
        assert all(torch.equal(a, b) for a, b in zip(levels[:level], expected[:level], strict=True))
        torch.testing.assert_close(levels[level], model.get_submodule(f'{place}.csa')(expected[level]))
        assert not torch.allclose(levels[level], expected[level], rtol=1e-3)
        assert not torch.allclose(levels[level + 1], expected[level + 1], rtol=1e-3)
        assert not torch.allclose(output, expected_output, rtol=1e-3)
        torch.testing.assert_close(output, model.forward_features(images()))


@pytest.mark.parametrize('name', PLACES)
def test_gradient_checkpointing_runs_the_attention(name):
    model = inject(make(name), alpha=0.5).train()
    calls = []
    for module in model.modules():
        if isinstance(module, CompressedSelfAttention):
            module.register_forward_pre_hook(lambda module, _: calls.append(module))

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        twin = copy.deepcopy(model)
        twin.set_grad_checkpointing(checkpointing)
        calls.clear()
        twin(images()).square().sum().backward()
        assert len(set(calls)) == 3  # run again in the backward pass if checkpointed
        assert len(calls) == (6 if checkpointing else 3)
        return {key: parameter.grad for key, parameter in twin.named_parameters()}

    expected, actual = gradients(False), gradients(True)
    assert all(gradient is not None and gradient.any() for key, gradient in expected.items() if '.csa.' in key)
    torch.testing.assert_close(actual, expected)


def test_copies_are_independent():
    model = inject(make('test_resnet'), alpha=0.5).eval()
    before = model(images())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layer1.csa.alpha.zero_()
    assert not torch.allclose(twin(images()), before, rtol=1e-3)
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize('name', ['resnet18', 'test_convnext'])
def test_feature_lists_include_it(name):
    model = inject(make(name), alpha=0.5).eval()
    levels = [i for i, info in enumerate(model.feature_info) if info['module'].startswith(('layer', 'stages'))]
    flatten = name != 'resnet18'
    features = FeatureListNet(copy.deepcopy(model), out_indices=levels, flatten_sequential=flatten).eval()
    assert sum('csa.maps' in key for key in features.state_dict()) == 3
    with torch.no_grad():
        expected = model.forward_intermediates(images(), indices=levels, intermediates_only=True)
        torch.testing.assert_close(features(images()), expected)


def test_traced_with_fx():
    model = inject(make('resnet18'), alpha=0.5).eval()
    extractor = create_feature_extractor(model, ['layer1.1.act2', 'layer1.csa', 'fc']).eval()
    with torch.no_grad():
        features = extractor(images())
        torch.testing.assert_close(features['layer1.csa'], model.layer1.csa(features['layer1.1.act2']))
        torch.testing.assert_close(features['fc'], model(images()))


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'test_efficientnet'])
def test_compile_export_script(name):
    model = inject(make(name), alpha=0.5).eval()
    with torch.no_grad():
        expected = model(images(3))
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='aot_eager')(images(3)), expected)
        program = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim('batch')},))
        torch.testing.assert_close(program.module()(images(3)), expected)
        torch.testing.assert_close(torch.jit.script(model)(images(3)), expected)


def test_follows_the_model():
    """Type, device and mode of the stage; the model's input channels; the random numbers of nothing else."""
    model = inject(make('test_resnet', in_chans=1).half().eval())
    assert (model.layer1.csa.maps.weight.dtype, model.layer1.csa.training) == (torch.float16, False)
    assert torch.isfinite(model(images(channels=1).half())).all()
    assert inject(make('test_resnet')).layer1.csa.training
    assert inject(make('test_resnet', device='meta')).layer1.csa.maps.weight.device.type == 'meta'

    dropout = make('test_efficientnet', drop_rate=0.5, drop_path_rate=0.5).train()
    state = torch.get_rng_state()
    inject_attention(dropout, lambda dim: nn.Identity())
    assert torch.equal(torch.get_rng_state(), state)


def test_choice_of_stages():
    def modules(**kwargs) -> list[str]:
        model = inject_attention(make('test_resnet'), **kwargs)
        return [key for key, _ in model.named_modules() if key.endswith(('.csa', '.sa'))]

    assert modules() == ['layer1.csa', 'layer2.csa', 'layer3.csa']
    assert modules(stages=(3, 0), attention='sa') == ['layer1.sa', 'layer4.sa']
    assert modules(stages=[1, 1]) == ['layer2.csa']
    assert modules(stages=()) == []
    model = inject_attention(
        make('test_resnet'), 'csa', stages=(1,), num_maps=7, groups=4, alpha=0.5, learnable_alpha=False
    )
    csa = model.layer2.csa
    assert (csa.num_maps, csa.groups, csa.alpha.item(), csa.alpha.requires_grad) == (7, 4, 0.5, False)
    model = inject_attention(model, 'sa', stages=(0,), embed_dim=3)
    assert isinstance(model.layer1.sa, SelfAttention)
    assert model.layer1.sa.query.out_channels == 3


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'mobilenetv3_small_050'])
def test_any_attention(name):
    class Scale(nn.Module):
        def __init__(self, dim: int, factor: float):
            super().__init__()
            self.gain = nn.Parameter(torch.full((dim, 1, 1), factor))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gain * x

    plain, model = make(name).eval(), inject_attention(make(name), Scale, factor=2.0).eval()
    added = [key for key, module in model.named_modules() if isinstance(module, Scale)]
    assert [key.rsplit('.', 1)[1] for key in added] == ['attention'] * 3
    assert not torch.allclose(model(images()), plain(images()), rtol=1e-3)
    assert torch.equal(inject_attention(make(name), Scale, factor=1.0).eval()(images()), plain(images()))


def failing_on_the_second(dim: int, made: list) -> nn.Module:
    made.append(dim)
    if len(made) == 2:
        raise ValueError(f'no module for {dim} channels')
    return nn.Identity()


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        (
            'swin_tiny_patch4_window7_224',
            {},
            r'layers\.0 of SwinTransformer gives .* where attention needs \(B, 96, H, W\)',
        ),
        ('mambaout_femto', {}, r'stages\.0 of MambaOut gives'),
        ('levit_128s', {}, r'stages\.0 of LevitDistilled gives \(2, 196, 128\).*token sequences'),
        # 96 rows of 96 pixels of 96 channels
        (
            'swinv2_cr_tiny_384',
            {'stages': (0,)},
            r'stages\.0 of .* gives \(2, 96, 96, 96\) with the channels last',
        ),
        ('hrnet_w18_small', {'stages': (1,)}, r'stage2 of HighResolutionNet gives a list where .* several tensors'),
        ('vit_tiny_patch16_224', {}, r'of VisionTransformer does not end in an nn\.Sequential'),
        ('vgg11', {}, r'of VGG does not end in an nn\.Sequential'),
        ('regnety_002', {}, r's1 of RegNet does not end in an nn\.Sequential'),
        ('test_resnet', {'stages': (0, 4)}, 'stage 4 does not exist: ResNet has stages 0 to 3'),
        ('test_resnet', {'stages': (-1,)}, 'stage -1 does not exist: ResNet has stages 0 to 3'),
        ('test_resnet', {'attention': 'cbam'}, r"unknown attention 'cbam', choose from \['csa', 'sa'\]"),
        ('test_resnet', {'groups': 7}, 'groups must divide the .* channels, got groups=7'),
        ('test_resnet', {'attention': failing_on_the_second, 'made': []}, 'no module for .* channels'),
    ],
)
def test_errors_leave_the_model_unchanged(name, arguments, message):
    model = make(name, device='meta')
    keys = [key for key, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        inject_attention(model, **arguments)
    assert [key for key, _ in model.named_modules()] == keys
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize('name', ['maxvit_tiny_rw_256', 'repvit_m1_0', 'regnetz_d8'])
def test_as_many_channels_as_columns(name):
    """Is no reason to take (B, C, H, W) for channels-last."""
    shapes = []

    class Recorder(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(x.shape))
            return x

    model = inject_attention(make(name, device='meta'), lambda dim: Recorder(), stages=(0,))
    model(torch.empty(2, *model.pretrained_cfg['input_size'], device='meta'))
    (shape,) = shapes
    assert len(set(shape[1:])) == 1, shape


@pytest.mark.parametrize(('name', 'size'), [('maxvit_tiny_rw_224', (384, 128)), ('coatnet_nano_rw_224', (256, 256))])
def test_size_that_the_model_was_created_for(name, size):
    """And not the one of its weights, which `pretrained_cfg` goes on naming."""
    model = make(name, img_size=size, device='meta')
    assert tuple(model.pretrained_cfg['input_size'][1:]) != size
    if not hasattr(model, 'img_size'):
        pytest.skip('this version of timm does not note the size in the network')
    inject(model)
    assert model(torch.empty(2, 3, *size, device='meta')).shape == (2, 1000)


def test_size_that_cannot_be_known():
    """Stages that run before the failure are checked all the same, the others when the size is named."""
    model = make('botnet26t_256', img_size=(384, 128), device='meta')
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r'ByobNet fails on images of \(3, 256, 256\).*AssertionError.*created for'):
        inject(model)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.modules())
    inject(model, stages=(0, 1))
    model.pretrained_cfg['input_size'] = (3, 384, 128)
    inject(model, stages=(2,))
    assert sum(key.endswith('csa.alpha') for key in model.state_dict()) == 3
    assert model(torch.empty(2, 3, 384, 128, device='meta')).shape == (2, 1000)


def test_errors_about_the_model():
    with pytest.raises(ValueError, match='Sequential has no feature_info'):
        inject_attention(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(ValueError, match='FeatureListNet has no feature_info list'):
        inject_attention(make('test_resnet', features_only=True))
    model = inject(make('test_resnet'), stages=(1,))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="layer2 of ResNet already has a child named 'csa'"):
        inject(model, stages=(0, 1))
    assert list(model.state_dict()) == keys
    with pytest.raises(TypeError, match='heads'):
        inject_attention(model, stages=(0,), heads=8)
    assert list(model.state_dict()) == keys
    model.forward = lambda images: images
    with pytest.raises(ValueError, match=r'layer1 of ResNet gives nothing where attention needs'):
        inject(model, stages=(0,))
