"""The renderer of pedestrians: every image a function of (seed, what it shows) alone, from nothing but random numbers.

`plan` says which images a set consists of; `people` what somebody looks like, `figures` how that is painted, `cameras`
what stands around and how light and sensor are; `shots` puts them together.

The files import one another, NumPy and Pillow and nothing else of csa_zoo, so that a process which only renders need
not import PyTorch.
"""

from .plan import RENDERER_VERSION, Settings, Shot, plan_shots
from .shots import render_shot

__all__ = ['RENDERER_VERSION', 'Settings', 'Shot', 'plan_shots', 'render_shot']
