"""Checkpoints of other implementations of PCB, in their exact key layout: the same logits and the same descriptor."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet50

import csa_zoo  # noqa: F401
from csa_zoo.models.pcb import convert_checkpoint

CLASSES = 11


class DimReduce(nn.Module):
    """`DimReduceLayer` of torchreid."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2048, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


def trunk():
    """ResNet-50 of torchvision, whose last stage keeps the resolution."""
    resnet = resnet50(weights=None)
    resnet.layer4[0].conv2.stride = resnet.layer4[0].downsample[0].stride = (1, 1)
    return resnet


def feature_map(resnet, x):
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    return resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x))))


class TorchreidPCB(nn.Module):
    """The modules of torchreid's `pcb_p6` (`parts=6`) and `pcb_p4`, and what they do in evaluation."""

    def __init__(self, parts=6):
        super().__init__()
        self.parts = parts
        resnet = trunk()
        for name in ('conv1', 'bn1', 'relu', 'maxpool', 'layer1', 'layer2', 'layer3', 'layer4'):
            self.add_module(name, getattr(resnet, name))
        self.conv5 = DimReduce()
        self.classifier = nn.ModuleList(nn.Linear(256, CLASSES) for _ in range(parts))

    def forward(self, x):
        pooled = F.adaptive_avg_pool2d(feature_map(self, x), (self.parts, 1))
        reduced = self.conv5(pooled)
        logits = [self.classifier[i](reduced[:, :, i, 0]) for i in range(self.parts)]
        return F.normalize(pooled, dim=1).flatten(1), torch.stack(logits, 1)


class ReleasedPCB(nn.Module):
    """The modules of the PCB (and, with a mask, PCB-RPP) that the authors released, and what they do in evaluation."""

    def __init__(self, refined=False):
        super().__init__()
        self.base = trunk()  # with the classifier of ImageNet, which nothing uses
        self.local_conv = nn.Conv2d(2048, 256, 1, bias=False)
        self.feat_bn2d = nn.BatchNorm2d(256)
        for i in range(6):
            self.add_module(f'instance{i}', nn.Linear(256, CLASSES))
        self.local_mask = nn.Conv2d(256, 6, 1) if refined else None

    def parts_of(self, x):
        if self.local_mask is None:
            height = x.size(2) // 6
            return F.avg_pool2d(x, (x.size(2) - 5 * height, x.size(3)), stride=(height, x.size(3)))
        y = F.avg_pool3d(x.unsqueeze(1), (8, 1, 1), stride=(8, 1, 1)).squeeze(1)
        mask = self.local_mask(y - F.avg_pool2d(y, y.shape[2:])).softmax(1)
        parts = [F.avg_pool2d(6 * x * mask[:, i : i + 1], x.shape[2:]) for i in range(6)]
        return torch.cat(parts, 2)

    def forward(self, x):
        pooled = self.parts_of(feature_map(self.base, x))
        descriptor = pooled / pooled.norm(2, 1, keepdim=True)
        reduced = self.feat_bn2d(self.local_conv(pooled)).relu()
        logits = [self.get_submodule(f'instance{i}')(reduced[:, :, i, 0]) for i in range(6)]
        return descriptor.flatten(1), torch.stack(logits, 1)


def randomised(net):
    """Every weight and statistic different from what a fresh model has."""
    generator = torch.Generator().manual_seed(7)
    for key, tensor in net.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.3)
        elif tensor.is_floating_point():
            tensor.normal_(std=math.sqrt(2 / tensor[0].numel()), generator=generator)
        else:
            tensor.fill_(5)
        assert torch.isfinite(tensor).all(), key
    return net.eval()


CASES = {
    'torchreid': (TorchreidPCB, {}, 'resnet50_pcb', {}),
    'torchreid_p4': (TorchreidPCB, {'parts': 4}, 'resnet50_pcb', {'num_parts': 4}),
    'released': (ReleasedPCB, {}, 'resnet50_pcb', {}),
    'released_rpp': (ReleasedPCB, {'refined': True}, 'resnet50_pcb_rpp', {'rpp': 'released'}),
}


@pytest.mark.parametrize('source', ['state_dict', 'file'])
@pytest.mark.parametrize('case', CASES)
def test_same_logits_and_descriptor(case, source, tmp_path):
    make, arguments, name, model_args = CASES[case]
    theirs = randomised(make(**arguments))
    weights = theirs.state_dict()
    if case == 'released':  # written by PyTorch 0.3
        weights = {key: value for key, value in weights.items() if not key.endswith('num_batches_tracked')}
    if source == 'file':
        path = tmp_path / 'model.safetensors'
        save_file(weights, path)
        overlay = {'file': str(path), 'num_classes': CLASSES}
    else:
        data_parallel = {f'module.{key}': value for key, value in weights.items()}
        overlay = {'state_dict': data_parallel, 'num_classes': CLASSES}

    def load(num_classes):
        return timm.create_model(
            name, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **model_args
        ).eval()

    x = torch.randn(2, 3, 12 * 16, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        descriptor, logits = theirs(x)
        model = load(CLASSES)
        features = model.forward_features(x)
        tolerance = {'rtol': 0, 'atol': 1e-5 * logits.std().item()}
        torch.testing.assert_close(model.forward_parts(features), logits, **tolerance)
        # theirs keeps the parts of a channel together, ours the channels of a part
        parts = descriptor.view(2, 2048, model.num_parts).transpose(1, 2).flatten(1)
        torch.testing.assert_close(load(0)(x), parts / math.sqrt(model.num_parts), rtol=1e-4, atol=1e-5)


def test_converted_is_a_whole_state_dict():
    converted = convert_checkpoint(ReleasedPCB().state_dict())
    model = timm.create_model('resnet50_pcb', num_classes=CLASSES)
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert convert_checkpoint(model.state_dict()).keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ('make', 'name', 'message'),
    [
        (lambda: ReleasedPCB(refined=True), 'resnet50_pcb', 'global_pool.classifier'),
        (lambda: ReleasedPCB(refined=True), 'resnet50_pcb_rpp', "rpp='released'"),
        (ReleasedPCB, 'resnet50_pcb_rpp', 'lacks 1 weights'),
        (TorchreidPCB, 'resnet50_pcb_csa', 'lacks 9 weights'),
    ],
    ids=['refined parts for stripes', 'the other refinement', 'stripes for refined parts', 'without attention'],
)
def test_checkpoint_of_another_model(make, name, message):
    overlay = {'state_dict': make().state_dict(), 'num_classes': CLASSES}
    with pytest.raises(RuntimeError, match=message):
        timm.create_model(name, pretrained=True, num_classes=CLASSES, pretrained_cfg_overlay=overlay)
