"""One run of the benchmark: what is compared with what, and on what machine."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from tqdm.auto import tqdm

from ..version import __version__
from .attentions import DEFAULT_ATTENTIONS, NO_ATTENTION, attention_named, csa_groups
from .cases import (
    Comparison,
    Setting,
    compare_modules,
    compare_networks,
    default_batch_size,
    find_places,
    sweep,
)
from .floors import Cost, Rates, csa_backward_cost, csa_forward_cost, measure_rates
from .report import draw_growth, floor_table, module_table, network_table

DEFAULT_MODELS = ('resnet50_pcb', 'l2net_hardnet')
DEFAULT_SIDES = (16, 32, 64, 128, 256)
SWEEP_ROUNDS = 3  # the largest sizes take seconds, and growth shows on logarithmic axes


@dataclass(frozen=True)
class Benchmark:
    """All that one run measured."""

    environment: dict[str, str | int | bool]
    """Device, precision, layout and versions."""
    num_maps: int
    itemsize: int
    """Bytes of a number of an activation."""
    rates: Rates
    networks: list[Comparison]
    modules: list[Comparison]
    """Each attention alone at the shapes of the networks' stages."""
    growth: list[Comparison]
    """Each attention alone at growing sizes."""

    def cost(self, shape: tuple[int, int, int], batch_size: int, groups: int) -> tuple[Cost, Cost]:
        """Least cost of CSA's forward and backward pass on inputs (C, H, W)."""
        channels, height, width = shape
        sizes = (batch_size, channels, height * width, self.num_maps, groups, self.itemsize)
        return csa_forward_cost(*sizes), csa_backward_cost(*sizes)

    def groups(self) -> list[int]:
        """Numbers of groups that CSA was measured with."""
        names = {m.attention for comparison in self.modules + self.growth for m in comparison.measurements}
        return sorted({csa_groups(name) for name in names} - {None})

    def floors(self) -> list[dict]:
        """Least cost of CSA on one input of each shape that it was measured at alone."""
        return [
            {'shape': comparison.shape, 'groups': groups, 'forward': asdict(forward), 'backward': asdict(backward)}
            for comparison in self.modules + self.growth
            for groups in self.groups()
            for forward, backward in [self.cost(comparison.shape, 1, groups)]
        ]

    def markdown(self) -> str:
        """The tables, with what they were measured on."""
        note = (
            'Median (first to third quartile) over rounds in which all take turns. Memory is the most that one batch '
            'holds at once, divided by its size, without weights, their gradients, optimiser state and input.'
        )
        tables = [network_table(comparison) for comparison in self.networks]
        comparisons = self.modules + self.growth
        tables += [module_table(comparison, self.cost, self.rates) for comparison in comparisons]
        groups = self.groups()
        if groups:
            tables.append(floor_table([comparison.shape for comparison in comparisons], groups, self.cost, self.rates))
        environment = ', '.join(f'{key} {value}' for key, value in self.environment.items())
        return '\n\n'.join([f'{environment}.', note, *tables]) + '\n'

    def save(self, folder: str | Path) -> None:
        """Write `benchmark.json` (every timing), `benchmark.md` and, with `growth`, `growth.png`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = asdict(self) | {'rates': self.rates._asdict(), 'floors': self.floors()}
        (folder / 'benchmark.json').write_text(json.dumps(record, indent=1) + '\n')
        (folder / 'benchmark.md').write_text(self.markdown())
        if self.growth:
            draw_growth(self.growth).savefig(folder / 'growth.png', dpi=130)


def benchmark(
    setting: Setting,
    models: Sequence[str] = DEFAULT_MODELS,
    attentions: Sequence[str] = DEFAULT_ATTENTIONS,
    image_size: tuple[int, int] | None = None,
    batch_size: int | None = None,
    stages: Sequence[int] | None = None,
    num_maps: int = 32,
    sides: Sequence[int] = DEFAULT_SIDES,
    channels: int = 256,
    rounds: int = 5,
) -> Benchmark:
    """Measure networks with each attention between their stages, each attention alone at those stages, and its growth.

    Args:
        setting: Device, precision, layout, compiled or not.
        models: Names of timm models.
        attentions: Names that `attention_named` knows, and `'none'` for the plain network, which ratios refer to.
        image_size: Height and width of the networks' input; each model's own if not given.
        batch_size: Of networks and modules; chosen by the number of pixels if not given.
        stages: Stages that attention follows, from 0; the paper's if not given.
        num_maps: Base attention maps D of CSA.
        sides: Heights, which are also widths, at which growth is measured with one input.
        channels: Channels there.
        rounds: Timings of each.

    Raises:
        ValueError: If a model or an attention is unknown, does not fit where it is put, or memory does not suffice.
    """
    makes = {name: attention_named(name, num_maps) for name in dict.fromkeys(attentions)}
    networks = [find_places(name, image_size, stages) for name in models]
    alone = len(makes.keys() - {NO_ATTENTION})
    timings = sum(rounds * (len(makes) + alone * len(network.stages)) for network in networks)
    compared, modules = [], []
    with tqdm(desc='benchmark', unit='timing', total=2 * (timings + SWEEP_ROUNDS * alone * len(sides))) as bar:
        try:
            for network in networks:
                size = batch_size or default_batch_size(network.shape, setting.device)
                compared.append(compare_networks(network, makes, setting, rounds, size, bar.update))
                for shape in network.stage_shapes:
                    modules.append(compare_modules(shape, makes, setting, rounds, size, network.unit, bar.update))
            growth = sweep(sides, channels, makes, setting, SWEEP_ROUNDS, progress=bar.update)
        except torch.OutOfMemoryError as error:
            raise ValueError(f'out of memory, choose a smaller batch size or fewer attentions: {error}') from error
        rates = measure_rates(setting.device, setting.dtype)
    return Benchmark(describe(setting), num_maps, setting.dtype.itemsize, rates, compared, modules, growth)


def describe(setting: Setting) -> dict[str, str | int | bool]:
    """What the figures depend on besides the code."""
    on_gpu = setting.device.type == 'cuda'
    return {
        'device': torch.cuda.get_device_name(setting.device) if on_gpu else _cpu_name(),
        'threads': torch.get_num_threads(),
        'dtype': f'{str(setting.dtype).removeprefix("torch.")}{" by autocast" if setting.autocast else ""}',
        'layout': 'channels_last' if setting.channels_last else 'contiguous',
        'compiled': setting.compile,
        'float32 products': torch.get_float32_matmul_precision(),
        'malloc': ' '.join(f'{key}={value}' for key, value in os.environ.items() if key.startswith('MALLOC_'))
        or 'default',
        'csa_zoo': __version__,
        'torch': torch.__version__,
        'cuda': torch.version.cuda if on_gpu else 'no',
        'timm': timm.__version__,
        'python': platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), platform.machine())
