"""The folder of a training run: weights that timm loads, metrics, recipe, curves, and a state to resume from."""

import copy
import ctypes
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from .data.images import num_cores
from .recipes import RECIPE_FILE, Launch, recipe_as_yaml
from .version import __version__

HISTORY, METRICS, CURVES, STATES = 'history.jsonl', 'metrics.json', 'curves.png', 'state'


def use_all_cores(accelerator: Accelerator) -> None:
    """Share the CPU's cores among the processes of a launch that trains on it.

    `accelerate launch` allows each process one thread if it is not told otherwise, which leaves the other cores idle; a
    higher number that was asked for stays, and so does any number in a process that it has not launched.
    """
    launched = 'ACCELERATE_MIXED_PRECISION' in os.environ
    if launched and accelerator.device.type == 'cpu' and os.environ.get('OMP_NUM_THREADS') == '1':
        torch.set_num_threads(max(1, num_cores() // accelerator.num_processes))


def keep_freed_memory(accelerator: Accelerator) -> None:
    """Let a process that works on the CPU reuse the memory of one step in the next.

    glibc hands every large block back to the kernel when it is freed, and the next step pays for each of its pages
    again. On a 32x32-patch network those faults are a third of the time. Other C libraries are left as they are.
    """
    if accelerator.device.type == 'cpu' and platform.libc_ver()[0] == 'glibc':
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def finished_epochs(folder: Path | None) -> int:
    """Number of epochs after which a run's state was saved last; 0 for no run, and for one without a state."""
    state = _latest_state(folder) if folder else None
    return len((state / HISTORY).read_text().splitlines()) if state else 0


class Run:
    """One training run: its folder, and how far it has got.

    Attributes:
        folder: Where everything is written.
        history: One dict per finished epoch, with the epoch's number under `epoch`.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, history: list[dict[str, float]]):
        self.accelerator = accelerator
        self.folder = folder
        self.history = history

    @classmethod
    def open(cls, accelerator: Accelerator, recipe: Any, launch: Launch, optimizer: torch.optim.Optimizer) -> 'Run':
        """Make the folder of a new run, or take up a run at its last saved state.

        Call it after `accelerator.prepare`: all that is prepared, and the state of random numbers, is loaded from the
        saved state. The optimiser's settings are not: a resumed run goes on with those of its recipe, as overridden.

        Args:
            accelerator: Of this process.
            recipe: Recipe to write into the folder.
            launch: Where, and whether to resume.
            optimizer: That is prepared.

        Raises:
            FileExistsError: If the folder of a new run holds a run already.
        """
        if launch.resume:
            return cls._resume(accelerator, recipe, launch.resume, optimizer)
        chosen = [launch.output or _free_folder(Path('runs') / launch.name)]
        folder = broadcast_object_list(chosen)[0]  # every process looks, the first one's answer holds
        if (folder / RECIPE_FILE).exists():
            raise FileExistsError(
                f'{folder} holds a run: continue it with --resume {folder}, or choose another --output'
            )
        accelerator.wait_for_everyone()  # all have looked before one writes
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / RECIPE_FILE, recipe_as_yaml(recipe))
        accelerator.wait_for_everyone()
        return cls(accelerator, folder, [])

    @classmethod
    def _resume(cls, accelerator: Accelerator, recipe: Any, folder: Path, optimizer: torch.optim.Optimizer) -> 'Run':
        state, history = _latest_state(folder), []
        if state:  # none if it was killed in its first epoch
            settings = [{name: group[name] for name in group if name != 'params'} for group in optimizer.param_groups]
            accelerator.load_state(str(state))
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group.update(setting)
            history = [json.loads(line) for line in (state / HISTORY).read_text().splitlines()]
        if accelerator.is_main_process:  # not before: a recipe that the state does not fit is not kept
            _replace(folder / RECIPE_FILE, recipe_as_yaml(recipe))
        return cls(accelerator, folder, history)

    @property
    def epoch(self) -> int:
        """Number of finished epochs, which is the number of the next one from 0."""
        return len(self.history)

    def finish_epoch(self, record: dict[str, float]) -> None:
        """Note an epoch and save the state after it.

        The state is written beside the old one and takes its place only when complete, so that a kill at any time
        leaves a state to resume from.
        """
        self.history.append({'epoch': self.epoch + 1, **record})
        target = self.folder / STATES / f'epoch_{self.epoch:04d}'
        partial = target.with_suffix('.tmp')
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            lines = ''.join(json.dumps(line) + '\n' for line in self.history)
            (partial / HISTORY).write_text(lines)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            _replace(self.folder / HISTORY, lines)
            for old in target.parent.iterdir():
                if old != target:
                    shutil.rmtree(old)
            self._plot()
        self.accelerator.wait_for_everyone()

    def save_model(
        self, model: nn.Module, model_args: dict[str, Any], data_config: dict[str, Any], subfolder: str = ''
    ) -> None:
        """Write `model.safetensors` and `config.json`: `timm.create_model('local-dir:FOLDER', pretrained=True)`.

        Args:
            model: The timm model, unwrapped.
            model_args: Arguments that it was made with, besides the defaults of its name.
            data_config: What its preprocessing differs in from the name's defaults, such as `input_size`.
            subfolder: Where in the run's folder.
        """
        if self.accelerator.is_main_process:
            # safetensors wants contiguous tensors, training may have made them channels_last
            exported = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
            exported.pretrained_cfg = {
                **exported.pretrained_cfg,
                **data_config,
                'num_classes': model.num_classes,
                'description': None,  # the registry's is of the weights that training began with
            }
            partial = self.folder / 'model.tmp'
            timm.models.save_for_hf(exported, str(partial), model_args=model_args, safe_serialization=True)
            (self.folder / subfolder).mkdir(exist_ok=True)
            for file in partial.iterdir():
                os.replace(file, self.folder / subfolder / file.name)
            partial.rmdir()
        self.accelerator.wait_for_everyone()

    def summary(self) -> dict[str, Any]:
        """What `metrics.json` says of any finished run: its length, cost, processes and versions."""
        return {
            'epochs': self.epoch,
            'processes': self.accelerator.num_processes,
            'train_seconds': sum(record['seconds'] for record in self.history),
            'versions': {'csa_zoo': __version__, 'timm': timm.__version__, 'torch': torch.__version__},
        }

    def save_metrics(self, metrics: dict[str, Any], subfolder: str = '') -> None:
        """Write `metrics.json`, in a subfolder that a model was saved in if there is one."""
        if self.accelerator.is_main_process:
            _replace(self.folder / subfolder / METRICS, json.dumps(metrics, indent=2) + '\n')

    def _plot(self) -> None:
        """Draw every figure of the history against epochs, one panel each."""
        from matplotlib.figure import Figure  # without pyplot there is no display and no global state

        names = [name for name in self.history[-1] if name not in ('epoch', 'seconds')]
        figure = Figure(figsize=(3.2 * len(names), 2.6), layout='constrained')
        epochs = [record['epoch'] for record in self.history]
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            axes.plot(epochs, [record.get(name) for record in self.history], marker='.')
            axes.set(title=name.replace('_', ' '), xlabel='epoch')
            axes.grid(alpha=0.3)
        partial = self.folder / 'curves.tmp.png'
        figure.savefig(partial, dpi=120)
        os.replace(partial, self.folder / CURVES)


def _latest_state(folder: Path) -> Path | None:
    states = sorted(path for path in (folder / STATES).glob('epoch_*') if path.suffix != '.tmp')
    return states[-1] if states else None


def _free_folder(folder: Path) -> Path:
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f'{folder.name}-{number}')
    return free


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + '.tmp')
    partial.write_text(text)
    os.replace(partial, path)
