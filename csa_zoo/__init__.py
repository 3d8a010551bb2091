"""csa_zoo: compressed self-attention for deep metric learning, in timm's factory.

Importing the package registers its models: `timm.create_model('resnet50_pcb_csa')` works from then on.
"""

from . import models
from .attention import CompressedSelfAttention, SelfAttention, inject_attention
from .version import __version__

__all__ = ['CompressedSelfAttention', 'SelfAttention', '__version__', 'inject_attention', 'models']
