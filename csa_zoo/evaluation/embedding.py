"""Embeddings of many images: in chunks, in any timm model, shared out over the processes of a launch."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm


@torch.inference_mode()
def embed(
    model: nn.Module,
    images: torch.Tensor | np.ndarray,
    preprocess: Callable[[torch.Tensor], torch.Tensor],
    accelerator: Accelerator,
    batch_size: int = 256,
    description: str = 'embedding',
) -> torch.Tensor:
    """Embed every image with a timm model: the output that it has before its classifier.

    Memory stays flat, whatever the number of images: a batch at a time is on the device, and the rows that are done are
    on the CPU.

    Args:
        model: A timm model, on the accelerator's device; its mode is restored afterwards.
        images: All images, first dimension N, indexable by a slice; a memory map will do.
        preprocess: Turns a batch of them, on the device, into what the model takes.
        accelerator: Of this process. Each process embeds its share, and all get the result.
        batch_size: Images in one forward pass.
        description: Label of the progress bar.

    Returns:
        (N, D) float32 on the CPU, in the order of `images`.

    Raises:
        ValueError: If there is no image.
    """
    if len(images) == 0:
        raise ValueError(f'{description}: no image to embed')
    share = -(-len(images) // accelerator.num_processes)
    first = min(accelerator.process_index * share, len(images))
    last = min(first + share, len(images))
    training = model.training
    model.eval()
    rows = []
    starts = range(first, last, batch_size)
    for start in tqdm(starts, desc=description, leave=False, disable=None if accelerator.is_main_process else True):
        batch = images[start : min(start + batch_size, last)]
        if isinstance(batch, np.ndarray):
            batch = torch.from_numpy(batch.copy())  # torch does not take a read-only map
        with accelerator.autocast():
            features = model.forward_features(preprocess(batch.to(accelerator.device, non_blocking=True)))
            rows.append(model.forward_head(features, pre_logits=True).float().cpu())
    model.train(training)
    return torch.cat(gather_object(rows))
