"""Train and evaluate a person re-identification model.

With no argument: `resnet18_pcb_csa` on rendered pedestrians, from random weights, on any machine.

    accelerate launch train/reid.py
    accelerate launch train/reid.py --config train/recipes/market1501/pcb_csa.yaml --root data/Market-1501
    accelerate launch train/reid.py --config train/recipes/market1501/pcb_csa.yaml --data csv --root people.csv
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn import SyncBatchNorm
from tqdm.auto import tqdm

import csa_zoo
from csa_zoo.data import load_reid
from csa_zoo.data.images import PersonBatches, cache_splits, normalize, train_labels
from csa_zoo.evaluation.people import embed_people
from csa_zoo.losses import PartLoss
from csa_zoo.recipes import RecipeParser
from csa_zoo.runs import Run, use_all_cores

DEFAULT_RECIPE = Path(__file__).parent / 'recipes' / 'pedestrians.yaml'


@dataclass
class Recipe:
    """Everything that decides the outcome of a run. The defaults are the paper's for Market-1501."""

    model: str = 'resnet50_pcb_csa'
    """Name of a PCB model in timm's registry."""
    pretrained: bool = True
    """Start from the backbone's ImageNet weights."""
    attn_stages: list[int] | None = None
    """Stages that attention follows, from 0; the model's own choice (the first three) if not given."""
    attn_kwargs: dict[str, int | float | bool] = field(default_factory=dict)
    """Arguments of the attention module, such as {"num_maps": 32, "groups": 2}."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model."""
    data: str = 'market1501'
    """Data set: market1501, dukemtmcreid, cuhk03np, msmt17, pedestrians, folder or csv."""
    root: str | None = None
    """Where the data set is; rendered pedestrians go to the cache if not given."""
    data_options: dict[str, Any] = field(default_factory=dict)
    """Options of the data set, such as {"num_identities": 300} of pedestrians."""
    image_size: tuple[int, int] = (384, 128)
    """Height and width that images are resized to."""
    epochs: int = 100
    """Epochs of training."""
    batch_size: int = 64
    """Images in a batch, over all processes."""
    optimizer: Literal['sgd', 'adamw'] = 'sgd'
    """SGD with Nesterov momentum 0.9, or AdamW."""
    learning_rate: float = 0.1
    """Of what is new on top of the backbone."""
    backbone_learning_rate_scale: float = 0.1
    """Factor on the learning rate of the ResNet."""
    weight_decay: float = 1e-4
    """Of all parameters. The paper's value; the released code of PCB has 5e-4."""
    schedule: Literal['step', 'cosine'] = 'step'
    """Learning rate over time: times 0.1 every `decay_epochs`, or a half cosine to 0."""
    decay_epochs: int = 40
    """Length of the steps."""
    warmup_epochs: int = 0
    """Linear warm-up."""
    aux_weight: float = 1.0
    """Weight of the auxiliary losses, one after each stage with attention; 0 for no deep supervision."""
    label_smoothing: float = 0.0
    """Of every cross-entropy."""
    flip: bool = True
    """Mirror half of the images."""
    mixed_precision: Literal['no', 'bf16', 'fp16'] | None = None
    """Precision of the network; the launcher's choice if not given."""
    channels_last: bool = True
    """Keep channels last in memory."""
    compile: bool = False
    """Compile the network."""
    evaluate_every: int = 10
    """Epochs between evaluations; the last epoch is always evaluated."""
    seed: int = 0
    """Seed of initialisation, order, augmentation and dropout."""


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train as the command line says; returns the metrics that it writes."""
    recipe, launch = RecipeParser(Recipe, __doc__, DEFAULT_RECIPE).parse_recipe(argv)
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    use_all_cores(accelerator)
    set_seed(recipe.seed)

    with accelerator.main_process_first():  # the others find the cache
        data = load_reid(recipe.data, recipe.root, **recipe.data_options)
        images = cache_splits(data, recipe.image_size)
    labels = train_labels(data['train'])
    batches = PersonBatches(
        images['train'],
        labels,
        recipe.batch_size,
        flip=recipe.flip,
        seed=recipe.seed,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    model_args = model_arguments(recipe)
    model = timm.create_model(
        recipe.model, pretrained=recipe.pretrained, num_classes=int(labels.max()) + 1, **model_args
    )
    stages = (model.attn_stages if model.attention else ()) if recipe.aux_weight else ()
    objective = PartLoss(model, stages, recipe.aux_weight, recipe.label_smoothing)
    if recipe.channels_last:
        objective = objective.to(memory_format=torch.channels_last)
    if accelerator.num_processes > 1 and accelerator.device.type == 'cuda':
        objective = SyncBatchNorm.convert_sync_batchnorm(objective)
    optimizer = make_optimizer(objective, recipe)
    schedule, _ = create_scheduler_v2(
        optimizer,
        recipe.schedule,
        num_epochs=recipe.epochs,
        decay_epochs=recipe.decay_epochs,
        decay_rate=0.1,
        warmup_epochs=recipe.warmup_epochs,
        warmup_prefix=True,
        step_on_epochs=False,
        updates_per_epoch=len(batches),
    )
    net, optimizer = accelerator.prepare(torch.compile(objective) if recipe.compile else objective, optimizer)

    set_seed(recipe.seed, device_specific=True)  # dropout differs between processes, initial weights did not
    run = Run.open(accelerator, recipe, launch)
    accelerator.print(
        f'Training {recipe.model} on {recipe.data}: {len(labels)} images of {model.num_classes} people, '
        f'{recipe.epochs} epochs of {len(batches)} batches of {recipe.batch_size} on '
        f'{accelerator.num_processes} x {accelerator.device.type}.\n'
        f'Writing to {run.folder}; if this is interrupted, continue with --resume {run.folder}'
    )
    while run.epoch < recipe.epochs:
        started = time.perf_counter()
        record = train_epoch(accelerator, net, optimizer, schedule, batches, run.epoch)
        record['seconds'] = time.perf_counter() - started
        if (run.epoch + 1) % recipe.evaluate_every == 0 or run.epoch + 1 == recipe.epochs:
            record.update(embed_people(model, data, images, accelerator).results().metrics())
        run.finish_epoch(record)
        run.save_model(model, model_args, {'input_size': (3, *recipe.image_size)})
    return report(accelerator, run, recipe)


def model_arguments(recipe: Recipe) -> dict[str, Any]:
    """Arguments of the model that differ from the defaults of its name."""
    given = {'attn_stages': recipe.attn_stages, 'attn_kwargs': recipe.attn_kwargs}
    return {**recipe.model_args, **{name: value for name, value in given.items() if value}}


def make_optimizer(objective: PartLoss, recipe: Recipe) -> torch.optim.Optimizer:
    """The ResNet's parameters at a fraction of the learning rate, all others at the whole."""
    backbone = {f'model.{name}' for name in objective.model.backbone_parameters()}
    groups = {True: [], False: []}
    for name, parameter in objective.named_parameters():
        groups[name in backbone].append(parameter)
    parameters = [
        {'params': groups[False], 'lr': recipe.learning_rate},
        {'params': groups[True], 'lr': recipe.learning_rate * recipe.backbone_learning_rate_scale},
    ]
    if recipe.optimizer == 'adamw':
        return torch.optim.AdamW(parameters, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)


def train_epoch(
    accelerator: Accelerator,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Scheduler,
    batches: PersonBatches,
    epoch: int,
) -> dict[str, float]:
    """One epoch; returns the means of what `PartLoss` reports."""
    net.train()
    totals: dict[str, torch.Tensor] = {}
    config = accelerator.unwrap_model(net).model.pretrained_cfg
    bar = tqdm(batches.epoch(epoch), f'epoch {epoch + 1}', len(batches), disable=not accelerator.is_main_process)
    for step, (images, labels) in enumerate(bar, 1):
        schedule.step_update(epoch * len(batches) + step - 1)
        values = net(normalize(images, config['mean'], config['std']), labels)
        accelerator.backward(values['loss'])
        optimizer.step()
        optimizer.zero_grad()
        for name, value in values.items():
            totals[name] = totals.get(name, 0) + value.detach()
        if step % 20 == 0 or step == len(batches):  # now and then, since reading the loss waits for the device
            bar.set_postfix(loss=f'{totals["loss"].item() / step:.3f}', acc=f'{totals["accuracy"].item() / step:.3f}')
            if not torch.isfinite(totals['loss']):
                raise FloatingPointError(
                    f'the loss is {totals["loss"].item()} in epoch {epoch + 1}: lower --learning_rate or warm up; '
                    'the state after the last epoch is kept for --resume'
                )
    means = accelerator.reduce(torch.stack(list(totals.values())), reduction='mean') / len(batches)
    return dict(zip(totals, means.tolist(), strict=True))


def report(accelerator: Accelerator, run: Run, recipe: Recipe) -> dict[str, float]:
    """Write `metrics.json` and print the table."""
    last = run.history[-1]
    names = {'rank1': 'rank-1', 'rank5': 'rank-5', 'rank10': 'rank-10', 'mAP': 'mAP', 'mINP': 'mINP'}
    metrics = {name: value for name, value in last.items() if name.startswith('rank') or name.startswith('m')}
    run.save_metrics(
        {
            'model': recipe.model,
            'task': 'person re-identification',
            'data': recipe.data,
            'metrics': metrics,
            'epochs': run.epoch,
            'processes': accelerator.num_processes,
            'train_seconds': sum(record['seconds'] for record in run.history),
            'versions': {'csa_zoo': csa_zoo.__version__, 'timm': timm.__version__, 'torch': torch.__version__},
        }
    )
    accelerator.print('\n' + ''.join(f'{name:>9}' for name in names.values()))
    accelerator.print(''.join(f'{100 * metrics[name]:8.1f}%' for name in names))
    accelerator.print(f'\nThe trained model: timm.create_model("local-dir:{run.folder}", pretrained=True)')
    accelerator.end_training()
    return metrics


if __name__ == '__main__':
    main()
