"""Attention modules, and how to put them between the stages of a timm backbone."""

from .compressed import CompressedSelfAttention
from .full import SelfAttention
from .injection import inject_attention

__all__ = ['CompressedSelfAttention', 'SelfAttention', 'inject_attention']
