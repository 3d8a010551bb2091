"""Speed and memory of CSA, side by side with every attention that a user could pick instead."""

from .attentions import DEFAULT_ATTENTIONS, attention_named
from .cases import Comparison, Measurement, Setting
from .floors import Cost, Rates, csa_backward_cost, csa_forward_cost
from .run import DEFAULT_MODELS, DEFAULT_SIDES, Benchmark, benchmark

__all__ = [
    'DEFAULT_ATTENTIONS',
    'DEFAULT_MODELS',
    'DEFAULT_SIDES',
    'Benchmark',
    'Comparison',
    'Cost',
    'Measurement',
    'Rates',
    'Setting',
    'attention_named',
    'benchmark',
    'csa_backward_cost',
    'csa_forward_cost',
]
