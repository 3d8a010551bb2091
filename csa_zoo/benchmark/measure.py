"""Time of calls taken turn by turn, and the most memory that a call holds at once."""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

# read when PyTorch's profiler first starts, which otherwise prints a line at every start and stop
os.environ.setdefault('KINETO_LOG_LEVEL', '99')

Call = Callable[[], object]


def time_interleaved(
    calls: Mapping[str, Call],
    rounds: int,
    device: torch.device,
    min_seconds: float = 0.1,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time each call once in every round, so that a drift of the machine's speed hits all alike.

    A round begins with another call each time. Calls that are short are repeated until `min_seconds` have passed, and
    their mean counts as one timing.

    Args:
        calls: What to time, by name.
        rounds: Timings of each.
        device: Where they run; its queue is emptied before the clock is read.
        min_seconds: Shortest time to take.
        progress: Called after each timing.

    Returns:
        Wall-clock seconds of a call in each round, by name. The n-th of all belong to the same round.
    """
    repeats = {}
    for name, call in calls.items():
        call()  # what is done once: compilation, choice of algorithm
        repeats[name] = max(1, math.ceil(min_seconds / max(seconds_per_call(call, device), 1e-9)))
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_per_call(calls[name], device, repeats[name]))
            progress()
    return seconds


def seconds_per_call(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Mean wall-clock time of a call, the device's queue included."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most bytes that a call holds at once, over what was allocated before it.

    The first of two calls is not counted, so that what stays (gradients, for one) is there before. On CUDA it is the
    allocator's own maximum, workspaces of libraries included. On a CPU it is the running sum of all that PyTorch's
    allocator hands out and takes back, as its profiler records it: exact and the same in every run, but without what
    libraries such as oneDNN allocate for themselves.
    """
    call()
    if device.type == 'cuda':
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / 'trace.json'
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())['traceEvents'] if event['name'] == '[memory]']
    held = peak = 0
    for event in sorted(events, key=lambda event: event['ts']):
        held += event['args']['Bytes']  # negative when memory is freed
        peak = max(peak, held)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
