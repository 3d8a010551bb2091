"""Data sets: people (Market-1501 and kin, rendered pedestrians) and patches."""

from .images import BrokenImagesError, PersonBatches, cache_images, cache_splits, normalize, train_labels
from .pedestrians import render_pedestrians
from .reid import ReidReport, check_reid, detect_reid, load_reid

__all__ = [
    'BrokenImagesError',
    'PersonBatches',
    'ReidReport',
    'cache_images',
    'cache_splits',
    'check_reid',
    'detect_reid',
    'load_reid',
    'normalize',
    'render_pedestrians',
    'train_labels',
]
