"""Tables and a figure of what was measured."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from .attentions import NO_ATTENTION, csa_groups
from .cases import Comparison, Measurement
from .floors import Cost, Rates

CostOf = Callable[[tuple[int, int, int], int, int], tuple[Cost, Cost]]
"""Least cost of CSA's forward and backward pass at a shape, a batch size and a number of groups."""


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
    return low, middle, high


def network_table(comparison: Comparison) -> str:
    """Markdown of a network with each attention: speed and memory, and their ratio to the plain network.

    Ratios of speed are taken within a round, and then their quartiles.
    """
    unit = comparison.unit
    lines = [
        _heading(comparison),
        f'| attention | inference {unit}/s | × none | MB each | × none '
        f'| training {unit}/s | × none | MB each | × none |',
        '|---|' + '---:|' * 8,
    ]
    by_mode = _by_mode(comparison)
    for name in by_mode['inference']:
        cells = [name]
        for measurements in by_mode.values():
            plain = measurements.get(NO_ATTENTION)
            measurement = measurements[name]
            cells += [
                _spread([comparison.batch_size / seconds for seconds in measurement.seconds], 3),
                _spread(_ratios(plain.seconds, measurement.seconds), 2, fixed=True) if plain else '',
                f'{measurement.peak_bytes / comparison.batch_size / 1e6:.3g}',
                f'{measurement.peak_bytes / plain.peak_bytes:.2f}' if plain else '',
            ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def module_table(comparison: Comparison, cost_of: CostOf, rates: Rates) -> str:
    """Markdown of each attention alone; of CSA, also the share of the best possible speed that it reaches."""
    lines = [
        _heading(comparison),
        '| attention | forward, ms each | of floor | MB each | forward + backward, ms each | of floor | MB each |',
        '|---|' + '---:|' * 6,
    ]
    batch = comparison.batch_size
    by_mode = _by_mode(comparison)
    for name in by_mode['inference']:
        groups = csa_groups(name)
        floors = ['', '']
        if groups:
            forward, backward = cost_of(comparison.shape, batch, groups)
            least = (forward.seconds(rates), (forward + backward).seconds(rates))
            floors = [
                f'{100 * seconds / quartiles(measurements[name].seconds)[1]:.0f} %'
                for seconds, measurements in zip(least, by_mode.values(), strict=True)
            ]
        cells = [name]
        for floor, measurements in zip(floors, by_mode.values(), strict=True):
            measurement = measurements[name]
            cells += [
                _spread([1e3 * seconds / batch for seconds in measurement.seconds], 3),
                floor,
                f'{measurement.peak_bytes / batch / 1e6:.3g}',
            ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def floor_table(shapes: Sequence[tuple[int, int, int]], groups: Sequence[int], cost_of: CostOf, rates: Rates) -> str:
    """Markdown of CSA's least cost for one input of each shape: forward / backward."""
    lines = [
        '### Floors of CSA, one input, forward / backward',
        '',
        f'Best seen on this device: {rates.multiplications / 1e9:.4g} G multiply-adds/s, {rates.bytes / 1e9:.4g} GB/s.',
        '',
        '| C×H×W | G | M multiply-adds | MB to and from memory | M exponentials | ms |',
        '|---|' + '---:|' * 5,
    ]
    for shape in shapes:
        for count in groups:
            costs = cost_of(shape, 1, count)
            cells = [
                '×'.join(map(str, shape)),
                str(count),
                ' / '.join(f'{cost.multiplications / 1e6:.4g}' for cost in costs),
                ' / '.join(f'{cost.bytes / 1e6:.3g}' for cost in costs),
                f'{costs[0].exponentials / 1e6:.3g}',
                ' / '.join(f'{1e3 * cost.seconds(rates):.3g}' for cost in costs),
            ]
            lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def draw_growth(comparisons: Sequence[Comparison]) -> Figure:
    """Time and memory of each attention against the number of positions, on logarithmic axes.

    Args:
        comparisons: Of `sweep`. An attention's line ends where it was left out.
    """
    figure = Figure(figsize=(12, 8), layout='constrained')
    axes = figure.subplots(2, 2, sharex=True)
    names = list(dict.fromkeys(m.attention for comparison in comparisons for m in comparison.measurements))
    skipped = {name for comparison in comparisons for name in comparison.skipped}
    for row, mode in zip(axes, ('inference', 'training'), strict=True):
        for index, name in enumerate(names):
            positions, milliseconds, megabytes = [], [], []
            for comparison in comparisons:
                measurement = _by_mode(comparison)[mode].get(name)
                if measurement:
                    positions.append(comparison.shape[1] * comparison.shape[2])
                    milliseconds.append(1e3 * quartiles(measurement.seconds)[1])
                    megabytes.append(measurement.peak_bytes / 1e6)
            is_csa = csa_groups(name) is not None
            style = {
                'color': colormaps['tab20'](index % 20),
                'marker': 'o',
                'markersize': 3,
                'linewidth': 2 if is_csa else 1.2,
                'linestyle': '-' if is_csa else '--',
                'label': f'{name} (larger: left out)' if name in skipped else name,
            }
            row[0].plot(positions, milliseconds, **style)
            row[1].plot(positions, megabytes, **style)
        row[0].set(ylabel=f'{mode}, ms per input')
        row[1].set(ylabel=f'{mode}, MB per input')
    for axis in axes.flat:
        axis.set(xscale='log', yscale='log')
        axis.grid(alpha=0.3)
    sides = [comparison.shape[1:] for comparison in comparisons]
    for axis in axes[1]:
        axis.set_xticks([h * w for h, w in sides], [f'{h}×{w}' for h, w in sides], fontsize=8)
        axis.minorticks_off()
        axis.set(xlabel='H×W')
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside right upper', fontsize=8)
    figure.suptitle(f'One attention module, {comparisons[0].shape[0]} channels')
    return figure


def _heading(comparison: Comparison) -> str:
    shape = '×'.join(map(str, comparison.shape))
    lines = [f'### {comparison.subject}, {shape}, batch of {comparison.batch_size}', '']
    if comparison.skipped:
        left_out = '; '.join(f'{name} {reason}' for name, reason in comparison.skipped.items())
        lines += [f'Left out: {left_out}.', '']
    return '\n'.join(lines)


def _by_mode(comparison: Comparison) -> dict[str, dict[str, Measurement]]:
    """Measurements by mode and attention."""
    modes: dict[str, dict[str, Measurement]] = {'inference': {}, 'training': {}}
    for measurement in comparison.measurements:
        modes[measurement.mode][measurement.attention] = measurement
    return modes


def _ratios(plain: list[float], seconds: list[float]) -> list[float]:
    """Speed as a fraction of the plain network's, round by round."""
    return [one / other for one, other in zip(plain, seconds, strict=True)]


def _spread(values: Sequence[float], digits: int, fixed: bool = False) -> str:
    """Median and, in brackets, quartiles."""
    low, middle, high = (f'{value:.{digits}{"f" if fixed else "g"}}' for value in quartiles(values))
    return f'{middle} ({low}–{high})'
