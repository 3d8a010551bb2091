"""The models, registered with timm: importing this package makes `timm.create_model` know them."""

from .l2net import L2Net
from .pcb import PCB

__all__ = ['PCB', 'L2Net']
