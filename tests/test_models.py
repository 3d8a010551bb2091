"""The registered models: timm's contract on all of them, PCB and L2-Net against their literal definitions."""

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import group_parameters, save_for_hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import csa_zoo

RESNET50 = [f'resnet50_{head}{attention}' for head in ('pcb', 'pcb_rpp') for attention in ('', '_sa', '_csa')]
RESNET18 = [f'resnet18_pcb{attention}' for attention in ('', '_sa', '_csa')]
L2NET = [f'l2net_{loss}{attention}' for loss in ('hardnet', 'ralnet') for attention in ('', '_sa', '_csa')]
PCB = RESNET50 + RESNET18
# each architecture once, where weights are needed and not only shapes
LIGHT = [*RESNET18, *L2NET[:3]]


def make(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def make_trained(name: str, **kwargs) -> nn.Module:
    """With attention that is not the identity, and batch norm statistics and gains of a network that was trained."""
    model = make(name, **kwargs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith('alpha'):
                tensor.fill_(0.5)
            elif tensor.ndim == 1 and key.endswith(('weight', 'bias')):  # batch norm's gain and shift
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
        for module in model.train().modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None  # the average of all batches
        model(images(model, batch=8))
    return model.eval()


def images(model: nn.Module, batch: int = 2) -> torch.Tensor:
    channels, height, width = model.default_cfg['input_size']
    if not model.default_cfg['fixed_input_size']:
        height, width = 96, 32
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def test_registry():
    assert sorted(timm.list_models(module='pcb') + timm.list_models(module='l2net')) == sorted(PCB + L2NET)
    with_csa = {name for name in PCB + L2NET if name.endswith('_csa')}
    assert set(timm.list_models('*_csa')) == with_csa
    assert with_csa <= set(timm.list_models('*csa*'))
    # weights are promised where there are some: ImageNet's under PCB, those in the package
    assert set(timm.list_pretrained('*pcb*')) == {f'{name}.tv_in1k' for name in PCB}
    shipped = ('l2net_hardnet', 'l2net_hardnet_sa', 'l2net_hardnet_csa', 'l2net_ralnet_csa')
    assert set(timm.list_pretrained('l2net*')) == {f'{name}.photographs' for name in shipped}
    for name in shipped:
        assert Path(timm.get_pretrained_cfg(f'{name}.photographs').file).is_file()
    for name in PCB:
        assert timm.get_pretrained_cfg(f'{name}.tv_in1k').hf_hub_id == f'timm/{name.split("_")[0]}.tv_in1k'
    for name in PCB + L2NET:
        assert timm.is_model(name)
        assert timm.model_entrypoint(name).__doc__


@pytest.mark.parametrize('name', PCB + L2NET)
def test_contract(name):
    """Shapes, devices, types, names: on the meta device, at the size of the cfg."""
    meta = {'device': 'meta', 'dtype': torch.float32}
    model = make(name, **meta).eval()
    cfg = model.default_cfg
    assert model.in_chans == cfg['input_size'][0]
    assert model.num_classes == cfg['num_classes'] == 0
    x = torch.empty(2, *cfg['input_size'], device='meta')
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, *cfg['pool_size'])
    descriptor = (2, model.head_hidden_size)
    assert model.forward_head(features, pre_logits=True).shape == descriptor
    assert model(x).shape == model.forward_head(features).shape == descriptor

    model = make(name, num_classes=42, **meta)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {'meta'}
    output = model(x)
    assert output.shape == (2, 42)
    output.sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []

    assert model.get_classifier() is model.get_submodule(model.get_classifier(name_only=True))
    assert model.get_classifier(name_only=True) == cfg['classifier']
    assert f'{cfg["classifier"]}.weight' in model.state_dict()
    assert model.state_dict()[f'{cfg["first_conv"]}.weight'].shape[1] == cfg['input_size'][0]
    model.double().eval().reset_classifier(7)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    model.float()
    assert (model.num_classes, model(x).shape) == (7, (2, 7))
    model.reset_classifier(0)
    assert (model.num_classes, model(x).shape) == (0, descriptor)
    model.reset_classifier(0, '')
    assert model(x).shape == features.shape
    assert make(name, num_classes=0, global_pool='', **meta)(x).shape == features.shape

    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert len(set(groups.values())) > 1
    with pytest.raises(TypeError, match='not_an_argument'):
        make(name, not_an_argument=1)


@pytest.mark.parametrize('name', PCB + L2NET)
def test_feature_levels(name):
    model = make(name, features_only=True, device='meta')
    assert len(model.feature_info) >= 3
    x = torch.empty(2, *model.default_cfg['input_size'], device='meta')
    for level, info in zip(model(x), model.feature_info.get_dicts(), strict=True):
        height, width = (side // info['reduction'] for side in x.shape[2:])
        assert level.shape == (2, info['num_chs'], height, width)
    attended = {key.split('.')[0] for key in model.state_dict() if key.endswith('.alpha')}
    places = {'layer3'} if name in L2NET else {'layer1', 'layer2', 'layer3'}
    assert attended == (places if name.endswith('sa') else set())

    # nothing is left over that gets no gradient, which DistributedDataParallel would not forgive
    getter = make(name, features_only=True, feature_cls='getter', device='meta')
    sum(level.sum() for level in getter(x)).backward()
    assert [key for key, parameter in getter.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize('name', LIGHT)
def test_intermediates_and_checkpointing(name):
    model = make_trained(name, num_classes=5)
    x = images(model)

    def outputs_and_gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        return {'output': output, **{key: parameter.grad for key, parameter in model.named_parameters()}}

    expected = outputs_and_gradients()
    assert all(gradient is not None and gradient.any() for gradient in expected.values())
    final, levels = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [level.shape[1] for level in levels] == [info['num_chs'] for info in model.feature_info]
    torch.testing.assert_close(levels[-1], final)
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    torch.testing.assert_close(last_two, levels[-2:])
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, [levels[1]])

    model.set_grad_checkpointing()
    torch.testing.assert_close(outputs_and_gradients(), expected)
    torch.testing.assert_close(model.forward_intermediates(x), (final, levels))


@pytest.mark.parametrize('name', LIGHT)
def test_strict_round_trip(name):
    model = make_trained(name, num_classes=5)
    twin = timm.create_model(name, num_classes=5).eval()
    x = images(model)
    assert not torch.allclose(twin(x), model(x))
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize('name', LIGHT)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(name, dtype):
    model = make_trained(name)
    x = images(model, batch=4)
    half = make(name, dtype=dtype).eval()
    half.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected, actual = model(x), half(x.to(dtype))
        assert actual.dtype == dtype
        assert (F.cosine_similarity(actual.float(), expected) > 0.99).all()
        with torch.autocast('cpu', dtype):
            actual = model(x)
        assert (F.cosine_similarity(actual.float(), expected) > 0.99).all()
        torch.testing.assert_close(actual.float().norm(dim=1), torch.ones(4))


@pytest.mark.parametrize('name', PCB)
def test_person_transform(name):
    """The whole image, squashed to the input size: timm's default would cut off what is near the edges."""
    model = make(name, device='meta')
    _, height, width = model.default_cfg['input_size']
    transform = create_transform(**resolve_data_config(model=model), is_training=False)
    pixels = np.random.default_rng(0).integers(0, 256, (211, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    squashed = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    expected = (squashed - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    actual = transform(image).numpy()
    assert actual.shape == model.default_cfg['input_size']
    np.testing.assert_allclose(actual, expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize('name', L2NET)
def test_patch_transform(name):
    transform = create_transform(**resolve_data_config(model=make(name, device='meta')), is_training=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (65, 65), dtype=np.uint8))
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32)[None] / 255
    np.testing.assert_allclose(transform(image).numpy(), expected, atol=1e-6)


def test_resnet50_at_the_size_of_the_paper():
    model = make('resnet50_pcb_csa', device='meta', num_classes=751)
    x = torch.empty(2, 3, 384, 128, device='meta')
    levels = model.forward_intermediates(x, indices=4, intermediates_only=True)
    assert [tuple(level.shape[1:]) for level in levels] == [
        (256, 96, 32),
        (512, 48, 16),
        (1024, 24, 8),
        (2048, 24, 8),
    ]
    assert model.forward_parts(levels[-1]).shape == (2, 6, 751)
    assert model.forward_descriptor(levels[-1]).shape == (2, 12288)
    for index, channels in enumerate((256, 512, 1024), 1):
        csa = model.get_submodule(f'layer{index}.csa')
        assert csa.maps.weight.shape == (2 * 32, channels // 2, 1, 1)
        assert csa.value.weight.shape == (channels, channels // 2, 1, 1)
    assert not hasattr(model.layer4, 'csa')
    assert (model.head.drop.p, model.head.reduction.weight.shape) == (0.5, (256, 2048))
    assert model.head.fc.weight.shape == (6, 751, 256)


def test_attention_arguments():
    model = make('resnet18_pcb_csa', attn_stages=(1, 3), attn_kwargs={'num_maps': 8, 'groups': 4, 'alpha': 0.1})
    placed = [key for key, module in model.named_modules() if isinstance(module, csa_zoo.CompressedSelfAttention)]
    assert placed == ['layer2.csa', 'layer4.csa']
    assert (model.layer2.csa.num_maps, model.layer2.csa.groups) == (8, 4)
    assert model.layer2.csa.alpha.item() == pytest.approx(0.1)
    assert make('resnet18_pcb_sa', attn_kwargs={'embed_dim': 5}).layer1.sa.query.out_channels == 5
    with pytest.raises(ValueError, match='stage 4 does not exist'):
        make('resnet18_pcb_csa', attn_stages=(4,))


def features(batch: int = 3, channels: int = 512) -> torch.Tensor:
    """A feature map of a last stage, 12×4 positions, non-negative as after a ReLU."""
    return torch.randn(batch, channels, 12, 4, generator=torch.Generator().manual_seed(4)).relu()


@pytest.mark.parametrize('pool', ['avg', 'max'])
def test_stripes(pool):
    model, x = make('resnet18_pcb', global_pool=pool), features()
    parts = model.global_pool(x)
    assert parts.shape == (3, 6, 512)
    for i in range(6):
        stripe = x[:, :, 2 * i : 2 * i + 2]
        torch.testing.assert_close(parts[:, i], stripe.mean((2, 3)) if pool == 'avg' else stripe.amax((2, 3)))


@pytest.mark.parametrize('name', ['resnet18_pcb', 'resnet50_pcb_rpp'])
def test_descriptor(name):
    model = make(name).eval()
    x = features(channels=model.num_features)
    parts = model.global_pool(x)
    descriptors = model.forward_head(x)
    assert descriptors.shape == (3, 6 * model.num_features)
    torch.testing.assert_close(descriptors.norm(dim=1), torch.ones(3))
    by_part = descriptors.view(3, 6, -1)
    torch.testing.assert_close(by_part.norm(dim=2), torch.full((3, 6), 1 / math.sqrt(6)))
    for i in range(6):
        torch.testing.assert_close(by_part[:, i], F.normalize(parts[:, i]) / math.sqrt(6))
    cosines = F.cosine_similarity(parts[0], parts[1], dim=1)
    torch.testing.assert_close(descriptors[0] @ descriptors[1], cosines.mean())


def test_descriptor_options():
    x = features()
    parts = make('resnet18_pcb').global_pool(x)
    torch.testing.assert_close(make('resnet18_pcb', norm='').eval().forward_head(x), parts.flatten(1))
    whole = make('resnet18_pcb', norm='global').eval().forward_head(x)
    torch.testing.assert_close(whole, parts.flatten(1) / parts.flatten(1).norm(dim=1, keepdim=True))

    reduced = make_trained('resnet18_pcb', descriptor='reduced')
    assert reduced.head_hidden_size == 6 * 256
    descriptors = reduced.forward_head(x).view(3, 6, 256)
    torch.testing.assert_close(descriptors, F.normalize(reduced.head.reduce(parts), dim=2) / math.sqrt(6))
    torch.testing.assert_close(descriptors.flatten(1).norm(dim=1), torch.ones(3))

    three = make('resnet18_pcb', num_parts=3, num_classes=4).eval()
    assert (three.head_hidden_size, three.head.fc.weight.shape) == (3 * 512, (3, 4, 256))


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('shared', [True, False])
def test_part_classifiers(shared, training):
    """Six stripes, a 1×1 convolution with batch norm and ReLU (shared or one each), six linear classifiers."""
    model = make_trained('resnet18_pcb', num_classes=11, shared_reduction=shared, drop_rate=0.0)
    head, x = model.head, features()
    nn.init.normal_(head.fc.weight)
    expected_shape = (256, 512) if shared else (6, 256, 512)
    assert head.reduction.weight.shape == expected_shape
    statistics = {key: value.clone() for key, value in head.bn.state_dict().items()}
    assert statistics['weight'].numel() == (256 if shared else 6 * 256)

    def literal_reduction(part: torch.Tensor, weight: torch.Tensor, index: slice) -> torch.Tensor:
        norm = nn.BatchNorm2d(256).train(training)
        norm.load_state_dict({key: value[index] if value.ndim else value for key, value in statistics.items()})
        return norm(F.conv2d(part, weight[:, :, None, None])).relu()

    pooled = F.avg_pool2d(x, (2, 4))  # (B, C, 6, 1)
    if shared:
        reduced = literal_reduction(pooled, head.reduction.weight, slice(None))
    else:
        parts = [pooled[:, :, i : i + 1] for i in range(6)]
        slices = [slice(256 * i, 256 * (i + 1)) for i in range(6)]
        reduced = torch.cat(list(map(literal_reduction, parts, head.reduction.weight, slices)), dim=2)
    expected = []
    for i in range(6):
        classifier = nn.Linear(256, 11)
        classifier.load_state_dict({'weight': head.fc.weight[i], 'bias': head.fc.bias[i]})
        expected.append(classifier(reduced[:, :, i, 0]))
    expected = torch.stack(expected, dim=1)

    model.train(training)
    torch.testing.assert_close(model.forward_parts(x), expected, rtol=1e-4, atol=1e-4)
    model.head.bn.load_state_dict(statistics)
    torch.testing.assert_close(model.forward_head(x), expected.mean(1), rtol=1e-4, atol=1e-4)


def test_part_head_initialisation():
    head = make('resnet18_pcb', num_classes=200).head
    assert not head.fc.bias.any()
    assert head.fc.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert head.reduction.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)  # Kaiming, fan out


def test_dropout_is_before_the_reduction():
    model, x = make('resnet18_pcb', num_classes=4).train(), features()
    seen = []
    model.head.reduction.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.forward_parts(x)
    parts = model.global_pool(x)
    kept = seen[0] != 0
    assert 0.45 < kept.float().mean() < 0.55
    torch.testing.assert_close(seen[0], torch.where(kept, 2 * parts, 0))
    torch.testing.assert_close(model.forward_head(x, pre_logits=True), model.eval().forward_head(x, pre_logits=True))


@pytest.mark.parametrize('variant', ['paper', 'released'])
def test_refined_parts(variant):
    """Soft assignment of every position to the parts, position by position."""
    model = make('resnet18_pcb', rpp=variant).eval()
    pool, x = model.global_pool, features()
    assert pool.classifier.weight.shape == ((6, 512, 1, 1) if variant == 'paper' else (6, 64, 1, 1))
    assert (pool.classifier.bias is None) == (variant == 'paper')
    nn.init.normal_(pool.classifier.weight, std=0.2)
    weight = pool.classifier.weight[:, :, 0, 0]
    if variant == 'released':
        nn.init.normal_(pool.classifier.bias)
        groups = torch.stack([x[:, 8 * g : 8 * g + 8].mean(1) for g in range(64)], dim=1)
        inputs = groups - groups.mean((2, 3), keepdim=True)
    else:
        inputs = x
    expected, probabilities = torch.zeros(3, 6, 512), torch.zeros(3, 6, 12, 4)
    for row in range(12):
        for column in range(4):
            scores = inputs[:, :, row, column] @ weight.T
            if variant == 'released':
                scores = scores + pool.classifier.bias
            p = scores.softmax(1)
            probabilities[:, :, row, column] = p
            expected += 6 / 48 * p[:, :, None] * x[:, None, :, row, column]
    torch.testing.assert_close(pool.part_probabilities(x), probabilities)
    torch.testing.assert_close(pool(x), expected)

    pool.train()
    if variant == 'released':
        assert not torch.allclose(pool(x), pool(x))  # dropout on what the part classifier sees
    else:
        assert torch.equal(pool(x), pool(x))


def test_uniform_refined_parts_have_the_scale_of_stripes():
    model, x = make('resnet18_pcb', rpp='paper').eval(), features()
    nn.init.zeros_(model.global_pool.classifier.weight)
    torch.testing.assert_close(model.global_pool(x), x.mean((2, 3))[:, None].expand(-1, 6, -1))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'descriptor': 'H'}, "descriptor must be 'pooled' or 'reduced', got 'H'"),
        ({'norm': 'l2'}, r"norm must be 'part', 'global' or '' \(none\), got 'l2'"),
        ({'rpp': 'soft'}, "rpp must be 'paper', 'released' or None, got 'soft'"),
        ({'global_pool': 'gem'}, "global_pool must be 'avg', 'max' or '' .*, got 'gem'"),
        ({'rpp': 'paper', 'global_pool': 'max'}, "global_pool must be 'avg' or '' .* with rpp, got 'max'"),
        ({'num_parts': 0}, 'num_parts must be at least 1, got 0'),
        ({'reduction_dim': 0}, 'reduction_dim must be at least 1, got 0'),
        ({'attention': 'cbam'}, "unknown attention 'cbam'"),
        ({'attention': 'csa', 'attn_kwargs': {'groups': 3}}, 'groups must divide the 64 channels, got groups=3'),
    ],
    ids=str,
)
def test_invalid_pcb_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make('resnet18_pcb', **arguments)


def imagenet(path, **kwargs) -> dict:
    """Arguments that load a file where the weights of ImageNet would come from."""
    overlay = {'hf_hub_id': None, 'url': '', 'file': str(path)}
    return {'pretrained': True, 'pretrained_cfg_overlay': overlay, **kwargs}


def keep_last_resolution(resnet: nn.Module) -> nn.Module:
    resnet.layer4[0].conv1.stride = resnet.layer4[0].downsample[0].stride = (1, 1)
    return resnet


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A file like timm's for ImageNet: a plain ResNet-18 with 1000 classes."""
    path = tmp_path_factory.mktemp('imagenet') / 'model.safetensors'
    save_file(make_trained('resnet18').state_dict(), path)
    return path


@pytest.mark.parametrize('name', RESNET18)
def test_pretrained_backbone(checkpoint, name):
    resnet = keep_last_resolution(timm.create_model('resnet18', **imagenet(checkpoint))).eval()
    model = timm.create_model(name, **imagenet(checkpoint)).eval()
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in resnet.state_dict().items() if key[:3] != 'fc.')
    x = images(model)
    expected = resnet.forward_features(x)
    assert expected.shape[2:] == (6, 2)
    assert torch.equal(model.forward_features(x), expected)

    classifier = timm.create_model(name, **imagenet(checkpoint, num_classes=10)).eval()
    assert classifier(x).shape == (2, 10)
    assert torch.equal(classifier.forward_features(x), expected)
    levels = timm.create_model(name, **imagenet(checkpoint, features_only=True)).eval()(x)
    assert torch.equal(levels[-1], expected)
    grey = timm.create_model(name, **imagenet(checkpoint, in_chans=1)).eval()
    expected = timm.create_model('resnet18', **imagenet(checkpoint, in_chans=1)).eval()
    assert torch.equal(grey.forward_features(x[:, :1]), keep_last_resolution(expected).forward_features(x[:, :1]))


@pytest.mark.parametrize('num_classes', [0, 10])
@pytest.mark.parametrize('name', ['resnet18', 'resnet18_pcb_csa'])
@pytest.mark.parametrize('with_classifier', [True, False])
def test_incomplete_checkpoint(tmp_path, name, with_classifier, num_classes):
    """Also where the number of classes differs, for which timm would load what there is and say nothing."""
    state = timm.create_model(name, num_classes=7 if with_classifier else 0).state_dict()
    del state['layer2.0.conv1.weight']
    save_file(state, tmp_path / 'model.safetensors')
    with pytest.raises(RuntimeError, match=r'layer2\.0\.conv1\.weight'):
        timm.create_model('resnet18_pcb_csa', **imagenet(tmp_path / 'model.safetensors', num_classes=num_classes))


def test_headless_checkpoint(tmp_path):
    """Saved with `num_classes=0`: a plain ResNet, and a PCB without its classifiers."""
    resnet, pcb = make_trained('resnet18', num_classes=0), make_trained('resnet18_pcb_csa')
    x = images(pcb)
    for source, reference in ((resnet, keep_last_resolution(resnet)), (pcb, pcb)):
        save_file(source.state_dict(), tmp_path / 'model.safetensors')
        for num_classes in (0, 10):
            arguments = imagenet(tmp_path / 'model.safetensors', num_classes=num_classes)
            model = timm.create_model('resnet18_pcb_csa', **arguments).eval()
            assert torch.equal(model.forward_features(x), reference.forward_features(x))


def test_foreign_checkpoint(tmp_path):
    save_file(timm.create_model('resnet26', device='cpu').state_dict(), tmp_path / 'model.safetensors')
    with pytest.raises(RuntimeError, match='conv3'):
        timm.create_model('resnet18_pcb_csa', **imagenet(tmp_path / 'model.safetensors'))


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        ('resnet18_pcb_csa', {'attn_kwargs': {'groups': 4, 'num_maps': 8}, 'attn_stages': [0, 2], 'rpp': 'released'}),
        ('resnet18_pcb_sa', {'descriptor': 'reduced', 'num_parts': 3, 'shared_reduction': False}),
        ('l2net_hardnet_csa', {'attn_kwargs': {'groups': 4}, 'embed_dim': 64}),
    ],
)
def test_saved_for_the_hub(tmp_path, name, arguments):
    model = make_trained(name, num_classes=7, **arguments)
    save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.json', 'model.safetensors']
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images(model)
    assert torch.equal(loaded(x), model(x))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    descriptor = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=0).eval()
    assert torch.equal(descriptor(x), model.forward_head(model.forward_features(x), pre_logits=True))


def patches(batch: int = 8) -> torch.Tensor:
    """Smooth grey patches in [0, 1]."""
    noise = torch.rand(batch, 1, 40, 40, generator=torch.Generator().manual_seed(5))
    return F.avg_pool2d(noise, 9, stride=1)


def test_l2net_layers():
    model = make('l2net_hardnet').eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_334_560
    shapes = {}
    for key, module in model.named_children():
        module.register_forward_hook(lambda _, __, output, key=key: shapes.update({key: tuple(output.shape[1:])}))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(patches(1))
    assert [shapes[f'layer{i}'] for i in range(1, 8)] == [
        (32, 32, 32),
        (32, 32, 32),
        (64, 16, 16),
        (64, 16, 16),
        (128, 8, 8),
        (128, 8, 8),
        (128, 1, 1),
    ]
    weights = [model.get_submodule(f'layer{i}.0').weight for i in range(1, 8)]
    assert [weight.numel() for weight in weights] == [288, 9216, 18432, 36864, 73728, 147456, 1048576]
    assert counter.get_total_flops() == 2 * 39_092_224
    for weight in weights:  # orthogonal, gain 0.6
        rows = weight.flatten(1)
        product = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
        torch.testing.assert_close(product, 0.36 * torch.eye(len(product)), rtol=0, atol=1e-5)


@pytest.mark.parametrize('side', [33, 64])
def test_l2net_takes_no_other_patches(side):
    with pytest.raises(AssertionError, match='32x32'):
        make('l2net_hardnet_csa').eval()(torch.rand(2, 1, side, side))


def test_attention_follows_the_third_layer():
    model = make('l2net_ralnet_csa')
    placed = [key for key, module in model.named_modules() if isinstance(module, csa_zoo.CompressedSelfAttention)]
    assert placed == ['layer3.csa']
    assert model.layer3.csa.maps.weight.shape == (32, 64, 1, 1)  # 32 maps, one group
    assert list(model.layer3._modules) == ['0', '1', '2', 'csa']  # after batch norm and ReLU
    assert [key for key, _ in make('l2net_ralnet_sa').named_modules() if key.endswith('.sa')] == ['layer3.sa']


def test_patch_norm():
    """Mean and unbiased deviation of each patch, as constants in the gradient."""
    norm = make('l2net_hardnet').patch_norm
    x = patches().requires_grad_()
    pixels = x.detach().numpy().astype(np.float64).reshape(8, -1)
    deviation = pixels.std(1, ddof=1) + 1e-7
    expected = ((pixels.T - pixels.mean(1)) / deviation).T
    y = norm(x)
    np.testing.assert_allclose(y.detach().numpy().reshape(8, -1), expected, atol=1e-4)
    y.sum().backward()
    np.testing.assert_allclose(x.grad.flatten(1).numpy(), np.repeat(1 / deviation[:, None], 1024, axis=1), rtol=1e-4)


@pytest.mark.parametrize('name', L2NET[:3])
def test_descriptor_of_a_patch(name):
    model = make_trained(name)
    descriptors = model(patches())
    assert descriptors.shape == (8, 128)
    torch.testing.assert_close(descriptors.norm(dim=1), torch.ones(8))
    assert (descriptors @ descriptors.T).triu(1).max() < 0.999
    # brightness and contrast of the patch do not matter
    torch.testing.assert_close(model(255 * patches() + 3), descriptors, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(0.1 * patches() - 7), descriptors, rtol=0, atol=1e-3)


@pytest.mark.parametrize('name', ['l2net_hardnet', 'l2net_hardnet_csa'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_constant_patches(name, dtype):
    model = make(name, dtype=dtype, num_classes=3).train()
    x = torch.cat([torch.full((1, 1, 32, 32), value) for value in (0.0, 0.1, 1.0, 255.0)] + [patches(2)]).to(dtype)
    output = model(x)
    output.sum().backward()
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert torch.isfinite(model.eval()(x)).all()


def trained_kornia_hardnet() -> nn.Module:
    kornia = pytest.importorskip('kornia')
    torch.manual_seed(6)
    hardnet = kornia.feature.HardNet(pretrained=False).train()
    with torch.no_grad():
        for _ in range(10):
            hardnet(patches(32))  # statistics of its batch norms
    return hardnet.eval()


@pytest.mark.parametrize('source', ['state_dict', 'file'])
def test_equals_kornia_hardnet(tmp_path, source):
    hardnet = trained_kornia_hardnet()
    state = hardnet.state_dict()
    save_file(state, tmp_path / 'hardnet.safetensors')
    overlay = {'state_dict': state} if source == 'state_dict' else {'file': str(tmp_path / 'hardnet.safetensors')}
    model = timm.create_model('l2net_hardnet', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(patches()), hardnet(patches()), rtol=0, atol=2e-5)


def test_patch_sizes():
    model = make('l2net_hardnet_csa', img_size=64).eval()
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 128)
    assert model.layer7[0].kernel_size == (16, 16)
    with pytest.raises(ValueError, match='img_size must be a multiple of 4, got 30'):
        make('l2net_hardnet', img_size=30)
    with pytest.raises(ValueError, match=r"global_pool must be 'conv' or '' .*, got 'avg'"):
        make('l2net_hardnet', global_pool='avg')
