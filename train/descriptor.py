"""Train and evaluate a local descriptor.

With no argument: `l2net_hardnet_csa` on the photographs that come with scikit-image, tested on others of them.

    accelerate launch train/descriptor.py
    accelerate launch train/descriptor.py --config train/recipes/brown/hardnet_csa.yaml --train '["liberty"]' \\
        --test '["notredame", "yosemite"]'
    accelerate launch train/descriptor.py --train '["my/photographs"]' --test '["other/photographs"]'
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from jsonargparse.typing import PositiveInt
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn import SyncBatchNorm
from tqdm.auto import tqdm

from csa_zoo.data.jitter import Jitter
from csa_zoo.data.pairs import MixedBatches, PairBatches
from csa_zoo.data.patches import PatchSet, concatenate
from csa_zoo.data.photographs import bundled_photographs, cut_photographs
from csa_zoo.data.phototour import load_phototour
from csa_zoo.evaluation.descriptors import BUNDLED, by_name, describe_with, verification_fpr95, with_pairs
from csa_zoo.losses import HardNetLoss, RALLoss
from csa_zoo.mistakes import naming, told_in_a_line
from csa_zoo.recipes import RecipeParser, check_architecture, model_arguments
from csa_zoo.runs import Run, keep_freed_memory, use_all_cores

DEFAULT_RECIPE = Path(__file__).parent / 'recipes' / 'photographs.yaml'


@dataclass
class Recipe:
    """Everything that decides the outcome of a run."""

    model: str = 'l2net_hardnet_csa'
    """Name of a descriptor model in timm's registry."""
    attn_stages: list[int] | None = None
    """Layers that attention follows, from 0; the model's own choice (the third) if not given."""
    attn_kwargs: dict[str, int | float | bool] = field(default_factory=dict)
    """Arguments of the attention module, such as {"num_maps": 32, "groups": 1}."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model."""
    loss: Literal['hardnet', 'ral'] = 'hardnet'
    """Loss, with the hardest negative in the batch."""
    train: list[str] = field(default_factory=lambda: [BUNDLED])
    """Folders to train on, in PhotoTour format or with photographs; `scikit-image` for the photographs it brings."""
    train_shares: list[float] = field(default_factory=list)
    """Share of each of them in every batch, summing to 1; by their numbers of points if not given."""
    test: list[str] = field(default_factory=lambda: [BUNDLED])
    """Folders to test on, each by itself; `scikit-image` for others of its photographs."""
    views: PositiveInt = 6
    """Simulated views of each keypoint of a photograph."""
    points_per_photo: PositiveInt = 800
    """Most keypoints taken from one photograph."""
    min_side: float = 16.0
    """Smallest square cut from a photograph, in pixels; detectors find many smaller ones."""
    test_pairs: PositiveInt = 10_000
    """Pairs drawn from a test set that comes without any, half of them matching."""
    epochs: PositiveInt = 10
    """Epochs of training."""
    pairs_per_epoch: PositiveInt = 5_000_000
    """Pairs drawn in an epoch."""
    batch_size: PositiveInt = 1024
    """Pairs in a batch, over all processes; the negatives are sought among them."""
    learning_rate: float = 10.0
    """Initial learning rate, linear to 0. With a dampening of 0.9 it acts like a tenth of it without."""
    momentum: float = 0.9
    """Of SGD."""
    dampening: float = 0.9
    """Of SGD's momentum, 0.9 in the released code of HardNet and RAL-Net."""
    weight_decay: float = 1e-4
    """Of all parameters."""
    attn_learning_rate_scale: float = 1.0
    """Factor on the learning rate of the attention, which no batch norm keeps in scale."""
    augmentation: Literal['hardnet', 'dihedral'] | None = 'hardnet'
    """Flips, the same for both patches of a pair: half of the eight symmetries, or all."""
    jitter: bool = False
    """Disturb each patch on its own too, in geometry and light, as `csa_zoo.data.jitter.Jitter` says."""
    mixed_precision: Literal['no', 'bf16', 'fp16'] | None = None
    """Precision of the network; the launcher's choice if not given."""
    channels_last: bool = False
    """Keep channels last in memory."""
    compile: bool = False
    """Compile the network."""
    seed: int = 0
    """Seed of initialisation, sampling and augmentation."""


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train as the command line says; returns the metrics that it writes."""
    recipe, launch = RecipeParser(Recipe, __doc__, DEFAULT_RECIPE).parse_recipe(argv)
    check_architecture(recipe.model, 'l2net')
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    use_all_cores(accelerator)
    keep_freed_memory(accelerator)
    set_seed(recipe.seed)

    batches = training_batches(recipe, accelerator)
    tests = test_sets(recipe)
    model_args = model_arguments(recipe)
    with naming('--attn_kwargs or --model_args'):
        model = timm.create_model(recipe.model, **model_args)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if accelerator.num_processes > 1 and accelerator.device.type == 'cuda':
        model = SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(
        parameter_groups(model, recipe),
        momentum=recipe.momentum,
        dampening=recipe.dampening,
        weight_decay=recipe.weight_decay,
    )
    schedule, _ = create_scheduler_v2(
        optimizer,
        'poly',  # of this power linear to 0
        decay_rate=1.0,
        num_epochs=recipe.epochs,
        step_on_epochs=False,
        updates_per_epoch=len(batches),
    )
    net, optimizer = accelerator.prepare(torch.compile(model) if recipe.compile else model, optimizer)
    loss_function = HardNetLoss() if recipe.loss == 'hardnet' else RALLoss()

    set_seed(recipe.seed, device_specific=True)  # dropout differs between processes, initial weights did not
    run = Run.open(accelerator, recipe, launch, optimizer)
    accelerator.print(
        f'Training {recipe.model} with the {recipe.loss} loss: {recipe.epochs} epochs of {len(batches)} batches of '
        f'{recipe.batch_size} pairs on {accelerator.num_processes} x {accelerator.device.type}.\n'
        f'Writing to {run.folder}; if this is interrupted, continue with --resume {run.folder}'
    )
    while run.epoch < recipe.epochs:
        started = time.perf_counter()
        loss = train_epoch(accelerator, net, loss_function, optimizer, schedule, batches, run.epoch)
        seconds = time.perf_counter() - started
        run.save_model(model, model_args, {})  # before the state: a kill between the two repeats the epoch
        run.finish_epoch({'loss': loss, **evaluate(accelerator, model, tests), 'seconds': seconds})
    return report(accelerator, run, recipe)


def training_batches(recipe: Recipe, accelerator: Accelerator) -> PairBatches | MixedBatches:
    """The patches to train on, on the device, and how batches are drawn from them.

    Raises:
        ValueError: If shares do not sum to 1 or are not one for each source, or an epoch has no batch.
    """
    shares = recipe.train_shares
    if shares and (len(shares) != len(recipe.train) or abs(sum(shares) - 1) > 1e-6):
        raise ValueError(f'train_shares {shares} must sum to 1 and be one for each of {recipe.train}')
    if recipe.pairs_per_epoch < recipe.batch_size:
        raise ValueError(f'pairs_per_epoch is {recipe.pairs_per_epoch}, less than one batch of {recipe.batch_size}')
    with accelerator.main_process_first():  # the others find the cache
        sets = [load_patches(source, 'train', recipe) for source in recipe.train]
    if not shares:
        sets, shares = [concatenate(sets)], [1.0]
    world = accelerator.num_processes
    first = [world * round(recipe.batch_size * share / world) for share in shares[:-1]]
    batches = [
        PairBatches(
            patches.to(accelerator.device),
            pairs,
            pairs_per_epoch=recipe.pairs_per_epoch // recipe.batch_size * pairs,
            aug=recipe.augmentation,
            jitter=Jitter() if recipe.jitter else None,
            seed=recipe.seed,
            rank=accelerator.process_index,
            world=world,
        )
        for patches, pairs in zip(sets, [*first, recipe.batch_size - sum(first)], strict=True)
    ]
    return batches[0] if len(batches) == 1 else MixedBatches(batches)


def test_sets(recipe: Recipe) -> dict[str, PatchSet]:
    """Patch sets with verification pairs, by name.

    Raises:
        ValueError: If one is trained on, or has too few patches for the pairs.
    """
    trained_on = {Path(source).resolve() for source in recipe.train if source != BUNDLED}  # which has both
    sets = {}
    for name, source in by_name(recipe.test).items():
        if Path(source).resolve() in trained_on:
            raise ValueError(f'{source} is in --train and in --test: test on patches that are not trained on')
        try:
            sets[name] = with_pairs(load_patches(source, 'test', recipe), recipe.test_pairs)
        except ValueError as error:
            raise ValueError(f'--test {source} with --test_pairs {recipe.test_pairs}: {error}') from error
    return sets


def load_patches(source: str, split: str, recipe: Recipe) -> PatchSet:
    """Patches of a PhotoTour folder, which has an `info.txt`, or of photographs."""
    if (Path(source) / 'info.txt').is_file():
        return load_phototour(source)
    photographs = bundled_photographs()[split] if source == BUNDLED else source
    return cut_photographs(
        photographs, views=recipe.views, points_per_photo=recipe.points_per_photo, min_side=recipe.min_side
    )


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The attention's parameters apart, with their own learning rate."""
    attention = {id(p) for name, p in model.named_parameters() if {'csa', 'sa'} & set(name.split('.'))}
    rate = recipe.learning_rate
    groups = [
        {'params': [p for p in model.parameters() if id(p) not in attention], 'lr': rate},
        {
            'params': [p for p in model.parameters() if id(p) in attention],
            'lr': rate * recipe.attn_learning_rate_scale,
        },
    ]
    return [group for group in groups if group['params']]


def train_epoch(
    accelerator: Accelerator,
    net: nn.Module,
    loss_function: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Scheduler,
    batches: PairBatches | MixedBatches,
    epoch: int,
) -> float:
    """One epoch; returns its mean loss."""
    net.train()
    total = torch.zeros((), device=accelerator.device)
    bar = tqdm(batches.epoch(epoch), f'epoch {epoch + 1}', len(batches), disable=not accelerator.is_main_process)
    for step, (anchors, positives) in enumerate(bar, 1):
        schedule.step_update(epoch * len(batches) + step - 1)
        # one forward pass for both: fewer kernels, and one set of batch statistics
        descriptors = net(torch.cat([anchors, positives]))
        loss = loss_function(*descriptors.chunk(2))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach() / accelerator.num_processes
        if step % 20 == 0 or step == len(batches):  # now and then, since reading the loss waits for the device
            bar.set_postfix(loss=f'{total.item() / step:.4f}')
            if not torch.isfinite(total):
                raise FloatingPointError(
                    f'the loss is {total.item()} in epoch {epoch + 1}: lower --learning_rate or '
                    '--attn_learning_rate_scale'
                    + ('; the state after the epoch before is kept for --resume' if epoch else '')
                )
    return total.item() / len(batches)


def evaluate(accelerator: Accelerator, model: nn.Module, tests: dict[str, PatchSet]) -> dict[str, float]:
    """False positive rate at 95 % recall on each test set, in [0, 1]."""
    metrics = {}
    for name, patches in tests.items():
        descriptors = describe_with(model, accelerator, f'testing on {name}')(patches.patches)
        metrics[f'fpr95_{name}'] = verification_fpr95(descriptors, patches)
    return metrics


def report(accelerator: Accelerator, run: Run, recipe: Recipe) -> dict[str, float]:
    """Write `metrics.json` and print the table."""
    last = run.history[-1]
    metrics = {name: value for name, value in last.items() if name.startswith('fpr95')}
    run.save_metrics(
        {
            'model': recipe.model,
            'task': 'patch-verification',
            'metrics': metrics,
            **run.summary(),
        }
    )
    accelerator.print(f'\n{"test set":30} FPR95 (%)')
    for name, value in metrics.items():
        accelerator.print(f'{name.removeprefix("fpr95_"):30} {100 * value:9.2f}')
    accelerator.print(
        f'\nMore tests, beside SIFT: csa-zoo evaluate {run.folder} --patches {" ".join(recipe.test)}\n'
        f'The trained model: timm.create_model("local-dir:{run.folder}", pretrained=True)'
    )
    accelerator.end_training()
    return metrics


if __name__ == '__main__':
    with told_in_a_line('train/descriptor.py'):
        main()
