"""What is measured: networks with an attention between their stages, and the attention alone."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import psutil
import timm
import torch
import torch.nn.functional as F
from torch import nn

from ..attention import inject_attention
from ..losses import HardNetLoss, PartLoss
from ..models import PCB, L2Net
from .attentions import NO_ATTENTION, MakeAttention, misfit
from .measure import Call, peak_bytes, time_interleaved

MARKET_IDENTITIES = 751  # people that Market-1501 trains on: the classifiers of PCB


@dataclass(frozen=True)
class Setting:
    """How everything of a run is computed."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    """Of weights and activations; with `autocast`, of what autocast computes in it, and weights are float32."""
    autocast: bool = False
    channels_last: bool = True
    compile: bool = False

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, its type and its layout."""
        return module.to(
            self.device,
            torch.float32 if self.autocast else self.dtype,
            memory_format=torch.channels_last if self.channels_last else torch.preserve_format,
        )

    def compiled(self, module: nn.Module) -> nn.Module:
        """The module as it is called: compiled for its own shapes, as a network with one attention would be."""
        if not self.compile:
            return module
        # attentions and sizes share the code of their networks, of which PyTorch compiles eight versions and then none
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
        return torch.compile(module, dynamic=False)

    def random(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal random numbers (B, C, H, W), of `dtype` if not given."""
        x = torch.randn(shape, device=self.device).to(dtype or self.dtype)
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def precision(self) -> AbstractContextManager:
        """Context to compute in."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.autocast)


@dataclass(frozen=True)
class Subject:
    """A network or a module, and what can be measured of it, any number of times."""

    module: nn.Module
    infer: Call
    """Forward without gradients."""
    backward: Call
    """Forward and backward."""
    step: Call
    """Forward, backward and, of a network, the optimiser."""


@dataclass(frozen=True)
class Measurement:
    """One attention in one mode."""

    attention: str
    mode: str
    """`'inference'` or `'training'`."""
    seconds: list[float]
    """Of one batch, in each round."""
    peak_bytes: int
    """Most memory of one batch, over weights, their gradients, optimiser state and input."""


@dataclass(frozen=True)
class Comparison:
    """Attentions measured side by side in one place."""

    subject: str
    """Name of the network, or `'module'` for the attention alone."""
    shape: tuple[int, int, int]
    """Of one input, (C, H, W)."""
    batch_size: int
    unit: str
    measurements: list[Measurement]
    skipped: dict[str, str]
    """Attentions that were left out, and why."""


class TrainingLoss(nn.Module):
    """A network with the loss that it is trained by: PCB's parts, HardNet for descriptors, cross-entropy otherwise."""

    def __init__(self, model: nn.Module):
        """Wrap a model."""
        super().__init__()
        self.model = model
        self.part_loss = PartLoss(model) if isinstance(model, PCB) else None
        self.pair_loss = HardNetLoss()

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of a batch; descriptors of its first half correspond to those of its second."""
        if self.part_loss is not None:
            return self.part_loss(images, labels)['loss']
        output = self.model(images)
        if self.model.num_classes:
            return F.cross_entropy(output.float(), labels)
        return self.pair_loss(*output.chunk(2))


def create_network(name: str, image_size: tuple[int, int] | None = None) -> nn.Module:
    """A timm model with random weights, PCB with Market-1501's number of identities."""
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise ValueError(f'timm has no model {name!r}; timm.list_models() has all names')
    resized = {'img_size': image_size} if image_size and config.fixed_input_size else {}
    model = timm.create_model(name, **resized)
    if isinstance(model, PCB):
        model.reset_classifier(MARKET_IDENTITIES)
    return model


@dataclass(frozen=True)
class Network:
    """A timm model, and where attention goes in it."""

    name: str
    shape: tuple[int, int, int]
    """Of one input, (C, H, W)."""
    unit: str
    """What an input is: `'images'` or `'patches'`."""
    stages: tuple[int, ...]
    """Stages that attention follows, from 0."""
    stage_shapes: tuple[tuple[int, int, int], ...]
    """(C, H, W) of what these stages give to it."""


def find_places(name: str, image_size: tuple[int, int] | None = None, stages: Sequence[int] | None = None) -> Network:
    """Look at a timm model.

    Args:
        name: Its name.
        image_size: Height and width of its input; its own if not given.
        stages: Stages that attention is to follow; if not given the paper's, which are the third layer of L2-Net and
            the first three stages of anything else.

    Raises:
        ValueError: If there is no such model, or no place for attention after a stage.
    """
    model = create_network(name, image_size)
    channels, *own_size = model.pretrained_cfg['input_size']
    shape = (channels, *(image_size or own_size))
    is_patches = isinstance(model, L2Net)
    if stages is None:
        stages = (2,) if is_patches else (0, 1, 2)
    stage_shapes = []

    class Recorder(nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            stage_shapes.append(tuple(x.shape[1:]))
            return x

    inject_attention(model, lambda dim: Recorder(), stages)
    with torch.inference_mode():
        model.eval()(torch.zeros(2, *shape))
    unit = 'patches' if is_patches else 'images'
    return Network(name, shape, unit, tuple(stages), tuple(stage_shapes))


def network_subject(model: nn.Module, images: torch.Tensor, setting: Setting) -> Subject:
    """A network on a batch of images (B, C, H, W), trained by SGD with momentum at a learning rate of 0.

    So that the work is that of training, and every step the same.
    """
    loss = setting.place(TrainingLoss(model))
    labels = torch.arange(len(images), device=setting.device) % max(model.num_classes, 1)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    run_model, run_loss = setting.compiled(model), setting.compiled(loss)

    @torch.inference_mode()
    def infer() -> torch.Tensor:
        with setting.precision():
            return run_model(images)

    def backward() -> None:
        with setting.precision():
            value = run_loss(images, labels)
        value.backward()

    def step() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    return Subject(loss, infer, backward, step)


def module_subject(module: nn.Module, x: torch.Tensor, setting: Setting) -> Subject:
    """An attention by itself on x (B, C, H, W); backward gives the gradients of x and of the parameters."""
    run = setting.compiled(setting.place(module))
    gradient = torch.randn_like(x)
    leaf = x.detach().requires_grad_()

    @torch.inference_mode()
    def infer() -> torch.Tensor:
        with setting.precision():
            return run(x)

    def backward() -> None:
        with setting.precision():
            y = run(leaf)
        y.backward(gradient.to(y.dtype))
        leaf.grad = None

    return Subject(module, infer, backward, backward)


def compare(
    subjects: dict[str, Subject],
    rounds: int,
    device: torch.device,
    progress: Callable[[], object] = lambda: None,
) -> list[Measurement]:
    """Measure inference of all subjects turn by turn, and then training.

    Raises:
        ValueError: If an output is not finite.
    """
    for name, subject in subjects.items():
        subject.module.eval()
        if not subject.infer().isfinite().all():
            raise ValueError(f'{name} gives numbers that are not finite in this precision: choose another dtype')
    inference = {name: subject.infer for name, subject in subjects.items()}
    measurements = _measure('inference', inference, inference, rounds, device, progress)
    for subject in subjects.values():
        subject.module.train()
    steps = {name: subject.step for name, subject in subjects.items()}
    backwards = {name: subject.backward for name, subject in subjects.items()}
    return measurements + _measure('training', steps, backwards, rounds, device, progress)


def _measure(
    mode: str,
    timed: dict[str, Call],
    weighed: dict[str, Call],
    rounds: int,
    device: torch.device,
    progress: Callable[[], object],
) -> list[Measurement]:
    """Take time and memory of two calls for each name: an optimiser's memory has nothing to do with the batch."""
    peaks = {name: peak_bytes(call, device) for name, call in weighed.items()}
    seconds = time_interleaved(timed, rounds, device, progress=progress)
    return [Measurement(name, mode, seconds[name], peaks[name]) for name in timed]


def compare_networks(
    network: Network,
    attentions: dict[str, MakeAttention],
    setting: Setting,
    rounds: int,
    batch_size: int,
    progress: Callable[[], object] = lambda: None,
) -> Comparison:
    """A timm model with each attention in it.

    Args:
        network: The model and its places.
        attentions: What makes each; `'none'` is the plain network.
        setting: How to compute.
        rounds: Timings of each.
        batch_size: Images in a batch.
        progress: Called after each timing.

    Raises:
        ValueError: If no attention fits the network, or an output is not finite.
    """
    images = setting.random((batch_size, *network.shape), torch.float32 if setting.autocast else None)
    fitting, skipped = _fitting(attentions, network.stage_shapes)
    if not fitting:
        raise ValueError(f'no attention fits {network.name}: {skipped}')
    subjects = {}
    for name, make in fitting.items():
        model = create_network(network.name, network.shape[1:])
        if name != NO_ATTENTION:
            inject_attention(model, make, network.stages)
        subjects[name] = network_subject(model, images, setting)
    measurements = compare(subjects, rounds, setting.device, progress)
    return Comparison(network.name, network.shape, batch_size, network.unit, measurements, skipped)


def default_batch_size(shape: tuple[int, int, int], device: torch.device) -> int:
    """Images with the pixels of 4 (CPU) or 64 (GPU) person images of 384×128; an even number, at least two pairs."""
    pixels = (64 if device.type == 'cuda' else 4) * 384 * 128
    return max(4, pixels // (shape[1] * shape[2]) // 2 * 2)


def compare_modules(
    shape: tuple[int, int, int],
    attentions: dict[str, MakeAttention],
    setting: Setting,
    rounds: int,
    batch_size: int,
    unit: str = 'images',
    progress: Callable[[], object] = lambda: None,
) -> Comparison:
    """Each attention alone on random (C, H, W); `'none'` is left out."""
    x = setting.random((batch_size, *shape))
    fitting, skipped = _fitting(attentions, [shape])
    subjects = {
        name: module_subject(make(shape[0]), x, setting) for name, make in fitting.items() if name != NO_ATTENTION
    }
    measurements = compare(subjects, rounds, setting.device, progress)
    return Comparison('module', shape, batch_size, unit, measurements, skipped)


def _fitting(
    attentions: dict[str, MakeAttention], shapes: Sequence[tuple[int, int, int]]
) -> tuple[dict[str, MakeAttention], dict[str, str]]:
    """Those that can be put where the shapes are, and why the others cannot."""
    reasons = {name: misfit(name, shapes) for name in attentions}
    fitting = {name: make for name, make in attentions.items() if not reasons[name]}
    return fitting, {name: reason for name, reason in reasons.items() if reason}


def sweep(
    sides: Sequence[int],
    channels: int,
    attentions: dict[str, MakeAttention],
    setting: Setting,
    rounds: int,
    memory: int | None = None,
    max_seconds: float = 5.0,
    progress: Callable[[], object] = lambda: None,
) -> list[Comparison]:
    """Each attention alone on one image of `channels` × side × side, for growing sides.

    What would not fit in memory or take too long is left out. How much it would take is foretold from the two sizes
    before, by the growth between them.

    Args:
        sides: Heights, which are also the widths.
        channels: Channels C.
        attentions: What makes each; `'none'` is left out.
        setting: How to compute.
        rounds: Timings of each.
        memory: Bytes that an attention may take; half of what is free if not given.
        max_seconds: Seconds that a training step may take.
        progress: Called after each timing.
    """
    history: dict[str, list[tuple[int, Measurement]]] = {name: [] for name in attentions}
    skipped: dict[str, str] = {}
    comparisons = []
    for side in sorted(sides):
        limit = free_memory(setting.device) // 2 if memory is None else memory
        for name in attentions.keys() - skipped.keys():
            needed, seconds = _foretell(side * side, history[name])
            if needed > limit:
                skipped[name] = f'would need about {needed / 1e9:.1f} GB'
            elif seconds > max_seconds:
                skipped[name] = f'would take about {seconds:.0f} s a step'
        left = {name: make for name, make in attentions.items() if name not in skipped}
        comparison = compare_modules((channels, side, side), left, setting, rounds, 1, progress=progress)
        comparisons.append(replace(comparison, skipped={**skipped, **comparison.skipped}))
        for measurement in comparison.measurements:
            if measurement.mode == 'training':
                history[measurement.attention].append((side * side, measurement))
    return comparisons


def _foretell(positions: int, history: list[tuple[int, Measurement]]) -> tuple[float, float]:
    """Bytes and seconds that a training step will take at a number of positions, from the two last ones measured."""
    if len(history) < 2:
        return 0.0, 0.0
    (fewer, before), (more, last) = history[-2:]
    exponent = math.log(positions / more) / math.log(more / fewer)
    return (
        last.peak_bytes * (last.peak_bytes / before.peak_bytes) ** exponent,
        min(last.seconds) * (min(last.seconds) / min(before.seconds)) ** exponent,
    )


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == 'cuda' else psutil.virtual_memory().available
