"""Train and evaluate a person re-identification model.

With no argument: `resnet18_pcb_csa` on rendered pedestrians, from random weights, on any machine.

    accelerate launch train/reid.py
    accelerate launch train/reid.py --config train/recipes/market1501/pcb_csa.yaml --root data/Market-1501
    accelerate launch train/reid.py --config train/recipes/market1501/pcb_csa.yaml --data csv --root people.csv
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from jsonargparse.typing import PositiveInt
from timm.data.random_erasing import RandomErasing
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from csa_zoo.data import load_reid
from csa_zoo.data.images import PersonBatches, cache_splits, normalize, train_labels
from csa_zoo.evaluation.people import embed_people, people_labels
from csa_zoo.losses import PartLoss
from csa_zoo.mistakes import naming, told_in_a_line
from csa_zoo.models import PCB
from csa_zoo.recipes import RecipeParser, check_architecture, model_arguments
from csa_zoo.runs import Run, finished_epochs, keep_freed_memory, use_all_cores

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
    epochs: PositiveInt = 100
    """Epochs of training."""
    induce_epochs: int = 0
    """Of PCB-RPP: epochs in which only the part classifier is trained. The stripes are trained in those before."""
    finetune_epochs: int = 0
    """Of PCB-RPP: last epochs, in which the refined parts and all else are trained. Without both, in all epochs."""
    batch_size: PositiveInt = 64
    """Images in a batch, over all processes."""
    accumulate: PositiveInt = 1
    """Shares that a batch goes through the network in, one after another, to need less memory."""
    images_per_person: int = 0
    """Fill batches with so many images each of fewer people, as triplets need; 0 for images at random."""
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
    """Weight of the auxiliary losses; 0 for no deep supervision."""
    aux_stages: list[int] | None = None
    """Stages that an auxiliary loss follows, from 0; those with attention if not given."""
    label_smoothing: float = 0.0
    """Of every cross-entropy."""
    triplet_weight: float = 0.0
    """Weight of the batch-hard triplet loss of descriptors; 0 for none."""
    flip: bool = True
    """Mirror half of the images."""
    padding: int = 0
    """Shift images by up to so many pixels."""
    random_erasing: float = 0.0
    """Probability that a rectangle of an image is erased."""
    ema_decay: float = 0.0
    """Evaluate and save a moving average of the weights with this decay; 0 for the weights themselves."""
    sync_batch_norm: bool = True
    """Share batch statistics among GPUs."""
    mixed_precision: Literal['no', 'bf16', 'fp16'] | None = None
    """Precision of the network; the launcher's choice if not given."""
    channels_last: bool = True
    """Keep channels last in memory."""
    compile: bool = False
    """Compile the network."""
    evaluate_every: PositiveInt = 10
    """Epochs between evaluations; the last epoch is always evaluated."""
    tracker: str | None = None
    """Experiment tracker that Accelerate knows, such as tensorboard; has to be installed."""
    seed: int = 0
    """Seed of initialisation, order, augmentation and dropout."""


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train as the command line says; returns the metrics that it writes."""
    recipe, launch = RecipeParser(Recipe, __doc__, DEFAULT_RECIPE).parse_recipe(argv)
    check_architecture(recipe.model, 'pcb')
    accelerator = make_accelerator(recipe)
    use_all_cores(accelerator)
    keep_freed_memory(accelerator)
    set_seed(recipe.seed)

    with accelerator.main_process_first():  # the others find the cache
        with naming('--data_options'):
            data = load_reid(recipe.data, recipe.root, **recipe.data_options)
        labels = train_labels(data['train'])
        people_labels(data)  # what cannot be evaluated is not trained on
        images = cache_splits(data, recipe.image_size)
    batches = training_batches(images['train'], labels, recipe, accelerator)
    model_args = model_arguments(recipe)
    with naming('--attn_kwargs or --model_args'):
        model = timm.create_model(
            recipe.model, pretrained=recipe.pretrained, num_classes=int(labels.max()) + 1, **model_args
        )
    trainer = Trainer(accelerator, model, batches, recipe)
    trainer.begin(stage_of(recipe, max(0, finished_epochs(launch.resume) - 1)))  # the one that the state is from

    set_seed(recipe.seed, device_specific=True)  # dropout differs between processes, initial weights did not
    run = Run.open(accelerator, recipe, launch, trainer.optimizer)
    accelerator.print(
        f'Training {recipe.model} on {recipe.data}: {len(labels)} images of {model.num_classes} people at '
        f'{recipe.image_size[0]}x{recipe.image_size[1]}, '
        f'{recipe.epochs} epochs of {trainer.updates} batches of {recipe.batch_size} on '
        f'{accelerator.num_processes} x {accelerator.device.type}.\n'
        f'Writing to {run.folder}; if this is interrupted, continue with --resume {run.folder}'
    )
    start_tracker(accelerator, recipe, run)
    while run.epoch < recipe.epochs:
        stage = stage_of(recipe, run.epoch)
        if stage != trainer.stage:
            accelerator.print(f'Stage {stage} begins.')
            trainer.begin(stage)
        started = time.perf_counter()
        record = trainer.train_epoch(run.epoch)
        record['seconds'] = time.perf_counter() - started
        if (run.epoch + 1) % recipe.evaluate_every == 0 or run.epoch + 1 == recipe.epochs:
            record.update(embed_people(trainer.averaged(), data, images, accelerator).results().metrics())
        save(run, trainer.averaged(), model_args, recipe, record)
        run.finish_epoch(record)
        accelerator.log(record, step=run.epoch)
    return report(accelerator, run, recipe)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """The launch's devices, precision and tracker."""
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=recipe.accumulate,
        log_with=recipe.tracker,
        project_dir='runs' if recipe.tracker else None,
    )
    if recipe.tracker and not accelerator.log_with:
        raise ImportError(f'the tracker {recipe.tracker} is not installed: pip install {recipe.tracker}')
    return accelerator


def start_tracker(accelerator: Accelerator, recipe: Recipe, run: Run) -> None:
    """Track the run, in its folder where the tracker writes files."""
    if recipe.tracker:
        accelerator.project_configuration.logging_dir = str(run.folder)
        accelerator.init_trackers('tracker', {name: str(value) for name, value in vars(recipe).items()})


def training_batches(images: np.ndarray, labels: np.ndarray, recipe: Recipe, accelerator: Accelerator) -> PersonBatches:
    """The training images in shares of a batch.

    Raises:
        ValueError: If a batch has no whole shares, or a share no triplets that a loss is wanted of.
    """
    share, rest = divmod(recipe.batch_size, recipe.accumulate)
    if rest:
        raise ValueError(f'batch_size is {recipe.batch_size}, but must be a multiple of accumulate={recipe.accumulate}')
    if recipe.triplet_weight and not 2 <= recipe.images_per_person <= share // 2:
        raise ValueError(
            f'triplets need 2 images of 2 people in each of the shares of {share} images, but images_per_person is '
            f'{recipe.images_per_person}: set it from 2 to {share // 2}'
        )
    return PersonBatches(
        images,
        labels,
        share,
        flip=recipe.flip,
        padding=recipe.padding,
        images_per_person=recipe.images_per_person,
        seed=recipe.seed,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )


def stage_of(recipe: Recipe, epoch: int) -> str:
    """Stage of PCB-RPP's training that an epoch, counted from 0, is in.

    `pcb`: the stripes are trained. `induce`: the part classifier takes over, all else is frozen. `finetune`: everything
    is trained; so it is at any time without stages.
    """
    if epoch >= recipe.epochs - recipe.finetune_epochs or not recipe.induce_epochs + recipe.finetune_epochs:
        return 'finetune'
    return 'pcb' if epoch < recipe.epochs - recipe.finetune_epochs - recipe.induce_epochs else 'induce'


def auxiliary_stages(model: PCB, recipe: Recipe) -> Sequence[int]:
    """Stages under deep supervision."""
    if not recipe.aux_weight:
        return ()
    if recipe.aux_stages is not None:
        return recipe.aux_stages
    return model.attn_stages if model.attention else ()


def make_optimizer(objective: PartLoss, recipe: Recipe) -> torch.optim.Optimizer:
    """The ResNet's parameters at a fraction of the learning rate, all others at the whole, frozen ones left out."""
    backbone = {f'model.{name}' for name in objective.model.backbone_parameters()}
    groups = {True: [], False: []}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            groups[name in backbone].append(parameter)
    parameters = [
        {'params': groups[False], 'lr': recipe.learning_rate},
        {'params': groups[True], 'lr': recipe.learning_rate * recipe.backbone_learning_rate_scale},
    ]
    parameters = [group for group in parameters if group['params']]
    if recipe.optimizer == 'adamw':
        return torch.optim.AdamW(parameters, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)


class Trainer:
    """A model in training: its losses, its moving average, and what the present stage has of its own.

    Each stage has an optimiser of its own, for the parameters that it trains; the learning rate goes on over all.
    """

    def __init__(self, accelerator: Accelerator, model: PCB, batches: PersonBatches, recipe: Recipe):
        """Add the losses to a model; `begin` a stage before training.

        Raises:
            ValueError: If there are stages, but no epochs for them or no parts to refine.
        """
        if not 0 <= recipe.induce_epochs + recipe.finetune_epochs <= recipe.epochs:
            raise ValueError(
                f'induce_epochs {recipe.induce_epochs} and finetune_epochs {recipe.finetune_epochs} must be within the '
                f'{recipe.epochs} epochs'
            )
        if recipe.induce_epochs + recipe.finetune_epochs and not model.rpp:
            raise ValueError(f'{recipe.model} has no parts to refine: set induce_epochs and finetune_epochs to 0')
        self.accelerator, self.batches, self.recipe = accelerator, batches, recipe
        self.updates = len(batches) // recipe.accumulate
        objective = PartLoss(
            model, auxiliary_stages(model, recipe), recipe.aux_weight, recipe.label_smoothing, recipe.triplet_weight
        )
        if recipe.channels_last:
            objective = objective.to(memory_format=torch.channels_last)
        if recipe.sync_batch_norm and accelerator.num_processes > 1 and accelerator.device.type == 'cuda':
            objective = SyncBatchNorm.convert_sync_batchnorm(objective)
        self.objective = objective
        self.ema = ModelEmaV3(model, recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.erase = RandomErasing(recipe.random_erasing, max_area=0.4, device=accelerator.device)
        self.stage = ''

    def begin(self, stage: str) -> None:
        """Prepare for a stage: what is trained and pooled, optimiser, schedule, data parallelism."""
        self.stage = stage
        self.net = self.optimizer = None  # data parallelism has its hooks on the parameters until it is gone
        self.accelerator.free_memory()
        for name, parameter in self.objective.named_parameters():
            refines = name.startswith('model.global_pool.')
            parameter.requires_grad_(stage == 'finetune' or refines == (stage == 'induce'))
        if self.objective.model.rpp:
            for model in {self.objective.model, self.averaged()}:
                model.set_refined(stage != 'pcb')
        optimizer = make_optimizer(self.objective, self.recipe)
        self.schedule, _ = create_scheduler_v2(
            optimizer,
            self.recipe.schedule,
            num_epochs=max(1, self.recipe.epochs - self.recipe.warmup_epochs),  # the warm-up comes before these
            decay_epochs=self.recipe.decay_epochs,
            decay_rate=0.1,
            warmup_epochs=self.recipe.warmup_epochs,
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=self.updates,
        )
        net = torch.compile(self.objective) if self.recipe.compile else self.objective
        self.net, self.optimizer = self.accelerator.prepare(net, optimizer)
        if self.ema:
            self.accelerator.prepare_model(self.ema.module, evaluation_mode=True)  # is saved with the state

    def averaged(self) -> PCB:
        """The model to evaluate and to save: the moving average if there is one."""
        return self.ema.module if self.ema else self.objective.model

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One epoch, counted from 0; returns the means of what `PartLoss` reports."""
        self._set_training_mode()
        totals: dict[str, torch.Tensor] = {}
        config, accumulate = self.objective.model.pretrained_cfg, self.recipe.accumulate
        steps = self.updates * accumulate
        batches = islice(self.batches.epoch(epoch), steps)
        bar = tqdm(batches, f'epoch {epoch + 1}', steps, disable=not self.accelerator.is_main_process)
        for step, (images, labels) in enumerate(bar, 1):
            update = epoch * self.updates + (step - 1) // accumulate
            self.schedule.step_update(update)
            images = normalize(images, config['mean'], config['std'])
            if self.recipe.random_erasing:
                images = self.erase(images)
            with self.accelerator.accumulate(self.net):
                values = self.net(images, labels)
                self.accelerator.backward(values['loss'])
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.ema and self.accelerator.sync_gradients:
                self.ema.update(self.objective.model, step=update + 1)
            for name, value in values.items():
                totals[name] = totals.get(name, 0) + value.detach()
            if step % 20 == 0 or step == steps:  # now and then, since reading the loss waits for the device
                loss, accuracy = totals['loss'].item() / step, totals['accuracy'].item() / step
                bar.set_postfix(loss=f'{loss:.3f}', acc=f'{accuracy:.3f}')
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f'the loss is {loss} in epoch {epoch + 1}: lower --learning_rate or warm up'
                        + ('; the state after the epoch before is kept for --resume' if epoch else '')
                    )
        for buffer in self.averaged().buffers():
            broadcast(buffer)  # batch statistics are each process's own; those of the first are kept
        means = self.accelerator.reduce(torch.stack(list(totals.values())), reduction='mean') / steps
        return dict(zip(totals, means.tolist(), strict=True))

    def _set_training_mode(self) -> None:
        self.net.train()
        if self.stage == 'induce':  # what is frozen keeps its statistics
            for module in self.objective.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()


def save(run: Run, model: PCB, model_args: dict[str, Any], recipe: Recipe, record: dict[str, float]) -> None:
    """Save an epoch's model, and under `best` too if none before had a higher mAP.

    The best of several epochs is chosen on the test set and flatters; what is reported is the last epoch's.
    """
    arguments = {**model_args, **({} if model.refined else {'refined': False})}
    config = {'input_size': (3, *recipe.image_size)}
    run.save_model(model, arguments, config)
    if record.get('mAP', -1) > max((earlier.get('mAP', -1) for earlier in run.history), default=-1):
        run.save_model(model, arguments, config, 'best')
        run.save_metrics({'model': recipe.model, 'epoch': run.epoch + 1, 'metrics': retrieval_metrics(record)}, 'best')


def retrieval_metrics(record: dict[str, float]) -> dict[str, float]:
    """The part of an epoch's record that is from evaluation."""
    return {name: value for name, value in record.items() if name.startswith('rank') or name.startswith('m')}


def report(accelerator: Accelerator, run: Run, recipe: Recipe) -> dict[str, float]:
    """Write `metrics.json` and print the table."""
    last = run.history[-1]
    names = {'rank1': 'rank-1', 'rank5': 'rank-5', 'rank10': 'rank-10', 'mAP': 'mAP', 'mINP': 'mINP'}
    metrics = retrieval_metrics(last)
    run.save_metrics(
        {
            'model': recipe.model,
            'task': 'person re-identification',
            'data': recipe.data,
            'metrics': metrics,
            **run.summary(),
        }
    )
    accelerator.print('\n' + ''.join(f'{name:>9}' for name in names.values()))
    accelerator.print(''.join(f'{100 * metrics[name]:8.1f}%' for name in names))
    accelerator.print(f'\nThe trained model: timm.create_model("local-dir:{run.folder}", pretrained=True)')
    accelerator.end_training()
    return metrics


if __name__ == '__main__':
    with told_in_a_line('train/reid.py'):
        main()
