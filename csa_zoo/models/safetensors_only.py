"""timm's model builder, kept from reading pickles.

Where a repository or folder has no `model.safetensors`, timm goes on to `pytorch_model.bin` and other pickles, with
`weights_only=True`. That cannot run their code, but nothing from outside should be unpickled at all.
"""

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg
from torch import nn

WEIGHTS = 'model.safetensors'


def build_model_from_safetensors(
    model_class: type[nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_cfg: dict[str, Any] | str | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs,
) -> nn.Module:
    """`timm.models.build_model_with_cfg` that loads `model.safetensors` from the Hub or a local folder, or nothing.

    Raises:
        FileNotFoundError: If a local folder has no such file. huggingface_hub raises its own error for a repository.
    """
    source = pretrained_cfg if isinstance(pretrained_cfg, dict) else {}
    if pretrained and source.get('source') == 'local-dir' and not (Path(source['file']) / WEIGHTS).is_file():
        raise FileNotFoundError(f'{source["file"]} has no {WEIGHTS}, and weights in any other format are not read')
    return build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        # a name in the overlay is the only one that timm asks the Hub for; the repository's config may name another
        pretrained_cfg_overlay={'hf_hub_filename': WEIGHTS, 'custom_load': False, **(pretrained_cfg_overlay or {})},
        **kwargs,
    )
