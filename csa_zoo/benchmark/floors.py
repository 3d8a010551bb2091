"""What CSA costs at the least: operations and bytes counted, and what a device could do at best."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .measure import seconds_per_call


class Rates(NamedTuple):
    """What a device was seen to do at best."""

    multiplications: float
    """Multiply-adds per second, of one large matrix product."""
    bytes: float
    """Bytes read and written per second, of one large copy."""


@dataclass(frozen=True)
class Cost:
    """Work that no implementation of a function can do without."""

    multiplications: int
    """Multiply-adds of matrix products."""
    exponentials: int
    """Exponentials of the two softmaxes. They are not part of `seconds`: how fast a device is at them depends on how
    they are fused."""
    bytes: int
    """Bytes between memory and chip."""

    def __add__(self, other: 'Cost') -> 'Cost':
        """Cost of one after the other."""
        return Cost(
            self.multiplications + other.multiplications,
            self.exponentials + other.exponentials,
            self.bytes + other.bytes,
        )

    def seconds(self, rates: Rates) -> float:
        """Time that a device of these rates needs at the least, if it computes while it loads."""
        return max(self.multiplications / rates.multiplications, self.bytes / rates.bytes)


def csa_forward_cost(
    batch: int, channels: int, positions: int, num_maps: int = 32, groups: int = 2, itemsize: int = 4
) -> Cost:
    """Least cost of CSA's forward pass, pooling first.

    With c = C/G channels in each of G groups, N positions and D maps, an image takes per group

        scores  = x vᵀ       N·c·D        pooled = A_baseᵀ x    D·N·c
        E       = pooled Wᵀ  D·c·c        y      = x + w E      N·D·c

    multiply-adds, together C·D·(3N + c): G only enters through the small projection of pooled vectors. Both softmaxes
    have N·D values in each group and need different shifts, so 2·N·D·G exponentials.

    The softmax over positions is known only when all positions were seen, so x is read twice, to pool and to add to,
    and y is written once: 3·N·C numbers, as long as the maps stay on chip, plus the weights C·D + C·c once. Where a
    cache holds the whole x between the two, less reaches memory, and more than this floor can be achieved.

    Args:
        batch: Images B.
        channels: Channels C.
        positions: Positions N = H·W of an image.
        num_maps: Base attention maps D of a group.
        groups: Channel groups G.
        itemsize: Bytes of a number.
    """
    c = channels // groups
    return Cost(
        multiplications=batch * channels * num_maps * (3 * positions + c),
        exponentials=2 * batch * positions * num_maps * groups,
        bytes=itemsize * (3 * batch * positions * channels + channels * (num_maps + c)),
    )


def csa_backward_cost(
    batch: int, channels: int, positions: int, num_maps: int = 32, groups: int = 2, itemsize: int = 4
) -> Cost:
    """Least cost of CSA's backward pass, arguments as of `csa_forward_cost`.

    From dy an image takes per group

        dE = wᵀ dy            D·N·c       dw     = dy Eᵀ            N·c·D
        dW = dEᵀ pooled       c·D·c       dpooled = dE W            D·c·c
        dA = x dpooledᵀ       N·c·D       dx     = dy + A_base dpooled + dscores v     2·N·D·c
        dv = dscoresᵀ x       D·N·c

    multiply-adds, C·D·(6N + 2c), twice the forward pass. A floor counts neither the recomputation of the scores, which
    trades N·c·D multiply-adds for not having kept them, nor their exponentials.

    The gradient of the softmax over positions needs Σ_n A_n dA_n, which is pooled · dpooled, so it takes no pass of its
    own. There are two: one reads x and dy for dE, one reads both again and writes dx. That is 5·N·C numbers; the
    weights are read and their gradients written.
    """
    c = channels // groups
    return Cost(
        multiplications=batch * channels * num_maps * (6 * positions + 2 * c),
        exponentials=0,
        bytes=itemsize * (5 * batch * positions * channels + 2 * channels * (num_maps + c)),
    )


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Time one large matrix product in `dtype` and one large copy, the fastest of five each."""
    on_gpu = device.type == 'cuda'
    size = 8192 if on_gpu else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(2**30 if on_gpu else 2**27, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product_seconds = min(seconds_per_call(lambda: torch.mm(a, b, out=product), device) for _ in range(5))
    copy_seconds = min(seconds_per_call(lambda: target.copy_(source), device) for _ in range(5))
    return Rates(size**3 / product_seconds, 2 * source.nbytes / copy_seconds)
