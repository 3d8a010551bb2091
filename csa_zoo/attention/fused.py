"""The CUDA path of compressed self-attention: Triton kernels that keep the attention maps on chip.

Per image and channel group, with N positions x (N×c), base vectors M (D×c), value projection W (c×c):

    S = x Mᵀ    A = softmax of S over positions    R = softmax of S over maps
    P = Aᵀ x    E = α P Wᵀ                         y = x + R E

`_pool` reads x once and leaves P and the softmax's normaliser per map; the projection to E is a product of small
matrices; `_broadcast` reads x again, recomputes S and writes y. No N×D tensor exists in memory, forward or backward:

    dE = Rᵀ dy    dP = α dE W    dR = dy Eᵀ    dA = x dPᵀ
    dS = R (dR − Σ_d R dR) + A (dA − Σ_n A dA),    where Σ_n A dA = Σ_c P dP needs no pass over the positions
    dx = dy + dS M + A dP    dM = dSᵀ x

`_elementary_gradient` reads x and dy for dE, on which every position of dx depends; `_input_gradient` reads both once
more. Bytes moved, in units of the input's size:

    forward     _pool reads 1, _broadcast reads 1 and writes 1: 3, where 2 is the floor (x in, y out)
    backward    _elementary_gradient reads 2, _input_gradient reads 2 and writes 1: 5, where 3 is the floor

The difference is each pass's second look at x and dy, of which the GPU's L2 cache serves what it still holds. A group
of more than BLOCK_C channels is shared by TILES programs that each compute the scores; they run side by side, so those
reads come from L2 too. P, E and their gradients are D/N of the input each, in float32 where sums are: at ResNet-50's
three stages 1, 4 and 17 % of the input's elements at 384×128.
"""

from __future__ import annotations  # those of the kernels name Triton, which may be missing

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheels for macOS and Windows, and PyTorch for CPUs comes without it
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_MAPS = 128


def _jit(kernel):
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _tile(pointer, rows, columns, stride_row, stride_column, num_rows, num_columns):
    """Rows times columns of a matrix, zero outside it."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(pointer + rows[:, None] * stride_row + columns[None, :] * stride_column, mask=inside, other=0.0)


@_jit
def _product(a, b, total):
    """Add a·b, in the type of b, to a float32 total; three TF32 products keep the digits of float32."""
    return tl.dot(a.to(b.dtype), b, total, input_precision='tf32x3')


@_jit
def _scores(
    x, maps, rows, block, stride_c, stride_n, N, C: tl.constexpr, D: tl.constexpr,
    TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Scores (BLOCK_N, BLOCK_D), and the input tile of channel block `block`.

    A score needs all channels but a program accumulates or writes only one block of them. That block comes last, so
    that its tile is still on chip when the scores are complete.
    """
    maps_of_group = tl.arange(0, BLOCK_D)
    scores = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(1, TILES):
        others = (block + i) % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
        tile = _tile(x, rows, others, stride_n, stride_c, N, C)
        scores = _product(tile, tl.trans(_tile(maps, maps_of_group, others, C, 1, D, C)), scores)
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = _tile(x, rows, columns, stride_n, stride_c, N, C)
    scores = _product(tile, tl.trans(_tile(maps, maps_of_group, columns, C, 1, D, C)), scores)
    return scores, tile


@_jit
def _weights(scores, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Softmax over the maps, without the columns that pad them."""
    scores = tl.where((tl.arange(0, BLOCK_D) < D)[None, :], scores, float('-inf'))
    exponentials = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return exponentials / tl.sum(exponentials, axis=1)[:, None]


@_jit
def _place(batch, G: tl.constexpr, TILES: tl.constexpr):
    """Image, group and channel block of a program. The blocks of an image are neighbours: they share its reads."""
    program = tl.program_id(0)
    return (program // (G * TILES)).to(tl.int64), program // TILES % G, program % TILES


@_jit
def _pool(
    x, maps, pooled, lse, batch, N, stride_b, stride_c, stride_n, steps,
    G: tl.constexpr, C: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """P = softmax over positions(x Mᵀ)ᵀ x and the logsumexp per map, of one split of the positions.

    The maximum, the sum and P are rescaled as larger scores come by, so that x is read once.
    """
    image, group, block = _place(batch, G, TILES)
    split = tl.program_id(1)
    x += image * stride_b + group * C * stride_c
    maps += group * D * C
    maps_of_group = tl.arange(0, BLOCK_D)
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    maximum = tl.full([BLOCK_D], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    accumulator = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    first = split * steps * BLOCK_N
    for start in range(first, tl.minimum(first + steps * BLOCK_N, N), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        scores, tile = _scores(x, maps, rows, block, stride_c, stride_n, N, C, D, TILES, BLOCK_N, BLOCK_D, BLOCK_C)
        scores = tl.where((rows < N)[:, None], scores, float('-inf'))
        larger = tl.maximum(maximum, tl.max(scores, axis=0))
        exponentials = tl.exp(scores - larger[None, :])
        decay = tl.exp(maximum - larger)
        total = total * decay + tl.sum(exponentials, axis=0)
        tile = tile.to(maps.dtype.element_ty)
        accumulator = _product(tl.trans(exponentials), tile, accumulator * decay[:, None])
        maximum = larger
    place = (split * G + group) * batch + image
    inside = maps_of_group < D
    tl.store(lse + place * D + maps_of_group, maximum + tl.log(total), mask=inside)
    offsets = place * D * C + maps_of_group[:, None] * C + columns[None, :]
    tl.store(pooled + offsets, accumulator / total[:, None], mask=inside[:, None] & (columns < C)[None, :])


@_jit
def _combine(
    partial, partial_lse, pooled, lse, splits, rows,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """P and logsumexp of all positions from those of the splits; a row is one map of one image."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = row < rows
    maximum = tl.full([BLOCK_R], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    accumulator = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for _ in range(splits):
        score = tl.load(partial_lse + row, mask=inside, other=0.0)
        larger = tl.maximum(maximum, score)
        decay, weight = tl.exp(maximum - larger), tl.exp(score - larger)
        total = total * decay + weight
        vectors = _tile(partial, row, columns, C, 1, rows, C)
        accumulator = accumulator * decay[:, None] + vectors * weight[:, None]
        maximum = larger
        partial += rows * C
        partial_lse += rows
    tl.store(lse + row, maximum + tl.log(total), mask=inside)
    offsets = row[:, None] * C + columns[None, :]
    tl.store(pooled + offsets, accumulator / total[:, None], mask=inside[:, None] & (columns < C)[None, :])


@_jit
def _broadcast(
    x, maps, elementary, y, batch, N, stride_b, stride_c, stride_n,
    G: tl.constexpr, C: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = x + softmax over maps(x Mᵀ) E, for one block of positions and one of channels."""
    image, group, block = _place(batch, G, TILES)
    here = image * stride_b + group * C * stride_c
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    scores, tile = _scores(
        x + here, maps + group * D * C, rows, block, stride_c, stride_n, N, C, D, TILES, BLOCK_N, BLOCK_D, BLOCK_C
    )
    elementary += (group * batch + image) * D * C
    vectors = _tile(elementary, tl.arange(0, BLOCK_D), columns, C, 1, D, C)
    output = _product(_weights(scores, D, BLOCK_D), vectors, tile.to(tl.float32))
    inside = (rows < N)[:, None] & (columns < C)[None, :]
    tl.store(y + here + rows[:, None] * stride_n + columns[None, :] * stride_c, output, mask=inside)


@_jit
def _elementary_gradient(
    x, maps, grad, grad_elementary, batch, N, stride_b, stride_c, stride_n, grad_b, grad_c, grad_n, steps,
    G: tl.constexpr, C: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dE = softmax over maps(x Mᵀ)ᵀ dy, of one split of the positions."""
    image, group, block = _place(batch, G, TILES)
    split = tl.program_id(1)
    x += image * stride_b + group * C * stride_c
    grad += image * grad_b + group * C * grad_c
    maps += group * D * C
    maps_of_group = tl.arange(0, BLOCK_D)
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    accumulator = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    first = split * steps * BLOCK_N
    for start in range(first, tl.minimum(first + steps * BLOCK_N, N), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        scores, _ = _scores(x, maps, rows, block, stride_c, stride_n, N, C, D, TILES, BLOCK_N, BLOCK_D, BLOCK_C)
        grad_tile = _tile(grad, rows, columns, grad_n, grad_c, N, C).to(maps.dtype.element_ty)
        accumulator = _product(tl.trans(_weights(scores, D, BLOCK_D)), grad_tile, accumulator)
    offsets = ((split * G + group) * batch + image) * D * C + maps_of_group[:, None] * C + columns[None, :]
    tl.store(grad_elementary + offsets, accumulator, mask=(maps_of_group < D)[:, None] & (columns < C)[None, :])


@_jit
def _input_gradient(
    x, maps, elementary, grad_pooled, lse, column_sums, grad, grad_x, grad_maps,
    batch, N, stride_b, stride_c, stride_n, grad_b, grad_c, grad_n, steps,
    G: tl.constexpr, C: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = dy + dS M + A dP of one split of the positions and one block of channels, and its part of dM = dSᵀ x."""
    image, group, block = _place(batch, G, TILES)
    split = tl.program_id(1)
    here = image * stride_b + group * C * stride_c
    x += here
    grad_x += here
    grad += image * grad_b + group * C * grad_c
    maps += group * D * C
    place = group * batch + image
    elementary += place * D * C
    grad_pooled += place * D * C
    maps_of_group = tl.arange(0, BLOCK_D)
    existing = maps_of_group < D
    normaliser = tl.load(lse + place * D + maps_of_group, mask=existing, other=0.0)
    column_sum = tl.load(column_sums + place * D + maps_of_group, mask=existing, other=0.0)
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    accumulator = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    first = split * steps * BLOCK_N
    for start in range(first, tl.minimum(first + steps * BLOCK_N, N), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        scores = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        grad_weights = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        grad_base = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for i in range(1, TILES):  # the program's own block last, as in _scores
            others = (block + i) % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
            tile = _tile(x, rows, others, stride_n, stride_c, N, C)
            grad_tile = _tile(grad, rows, others, grad_n, grad_c, N, C)
            scores = _product(tile, tl.trans(_tile(maps, maps_of_group, others, C, 1, D, C)), scores)
            vectors = _tile(elementary, maps_of_group, others, C, 1, D, C)
            grad_weights = _product(grad_tile, tl.trans(vectors), grad_weights)
            grad_vectors = _tile(grad_pooled, maps_of_group, others, C, 1, D, C)
            grad_base = _product(tile, tl.trans(grad_vectors), grad_base)
        tile = _tile(x, rows, columns, stride_n, stride_c, N, C)
        grad_tile = _tile(grad, rows, columns, grad_n, grad_c, N, C)
        base_vectors = _tile(maps, maps_of_group, columns, C, 1, D, C)
        vectors = _tile(elementary, maps_of_group, columns, C, 1, D, C)
        grad_vectors = _tile(grad_pooled, maps_of_group, columns, C, 1, D, C)
        scores = _product(tile, tl.trans(base_vectors), scores)
        grad_weights = _product(grad_tile, tl.trans(vectors), grad_weights)
        grad_base = _product(tile, tl.trans(grad_vectors), grad_base)
        weights = _weights(scores, D, BLOCK_D)
        # a position past the end has a score of 0, whose exponential may be infinite
        base = tl.exp(tl.where((rows < N)[:, None], scores - normaliser[None, :], float('-inf')))
        grad_scores = weights * (grad_weights - tl.sum(weights * grad_weights, axis=1)[:, None])
        grad_scores += base * (grad_base - column_sum[None, :])
        output = _product(grad_scores, base_vectors, grad_tile.to(tl.float32))
        output = _product(base, grad_vectors, output)
        inside = (rows < N)[:, None] & (columns < C)[None, :]
        tl.store(grad_x + rows[:, None] * stride_n + columns[None, :] * stride_c, output, mask=inside)
        accumulator = _product(tl.trans(grad_scores), tile.to(maps.dtype.element_ty), accumulator)
    offsets = ((split * batch + image) * G + group) * D * C + maps_of_group[:, None] * C + columns[None, :]
    tl.store(grad_maps + offsets, accumulator, mask=existing[:, None] & (columns < C)[None, :])


class _Launch(NamedTuple):
    """Sizes that a kernel is compiled for; TILES blocks of BLOCK_C channels make up a group."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int
    num_stages: int
    BLOCK_D: int
    TILES: int
    G: int
    C: int
    D: int


# Positions and channels of a tile, warps and pipeline stages, by bytes per element and kernel: the largest that compile
# with few or no spilled registers in less than the 99 KB of shared memory of a consumer GPU. The gradients hold more
# tiles at once, so theirs are shorter; float32 needs twice the memory and three times the operands. They were chosen by
# what the compiler reports and not by a clock. For sm_90, bfloat16, channels_last, D = 32, at the three stages of
# ResNet-50 with two groups (c = 128, 256, 512), ptxas reports these registers per thread and KB of shared memory:
#
#     _pool                   130, 28    146, 68    172, 56
#     _broadcast              102, 24    114, 24    112, 48
#     _elementary_gradient     94, 26     96, 42    126, 24
#     _input_gradient         168, 42    168, 82    255, 40 and a spill of 48 bytes
#
# and for float32 164 to 253 registers in at most 72 KB, _input_gradient 255 and a spill of 128 to 272 bytes.
_TILE_SIZES = {
    (2, _pool): (64, 128, 4, 2),
    (2, _broadcast): (64, 128, 4, 2),
    (2, _elementary_gradient): (32, 128, 4, 2),
    (2, _input_gradient): (32, 128, 4, 2),
    (4, _pool): (32, 64, 4, 2),
    (4, _broadcast): (32, 64, 4, 2),
    (4, _elementary_gradient): (32, 64, 4, 2),
    (4, _input_gradient): (16, 64, 4, 1),
}


def _launch(kernel: Callable, x: torch.Tensor, maps: torch.Tensor, groups: int) -> _Launch:
    """The table's sizes, fitted to the channels and maps of a group."""
    block_n, block_c, num_warps, num_stages = _TILE_SIZES[max(x.element_size(), maps.element_size()), kernel]
    _, _, channels, num_maps = _sizes(x, maps, groups)
    block_d = max(16, triton.next_power_of_2(num_maps))  # tensor cores multiply no fewer than 16
    excess = max(1, block_d // 32)  # scores and accumulator are as large as the table meant them to be
    block_n = max(16, block_n // excess)
    block_c = max(16, min(block_c // excess, triton.next_power_of_2(channels)))
    tiles = triton.cdiv(channels, block_c)
    return _Launch(block_n, block_c, num_warps, num_stages, block_d, tiles, groups, channels, num_maps)


def can_fuse(x: torch.Tensor, num_maps: int) -> bool:
    """Whether `fused_csa` runs on this input: with Triton, on an NVIDIA GPU of the Ampere generation or later.

    In ONNX export it is false, since ONNX has no such operator.

    Args:
        x: Input (B, C, H, W), float32, bfloat16 or float16 and not empty.
        num_maps: Maps per group, at most 128: the scores of a position have to fit on chip.
    """
    return (
        triton is not None
        and x.device.type == 'cuda'
        and torch.version.hip is None
        and x.dtype in DTYPES
        and x.numel() > 0
        and num_maps <= MAX_MAPS
        and _has_async_copies(x.device)
        and not torch.onnx.is_in_onnx_export()
    )


@torch.compiler.assume_constant_result  # a compiler cannot look into device properties
def _has_async_copies(device: torch.device) -> bool:
    """Which the pipelines need, as bfloat16 and TF32 products do: from the Ampere generation on."""
    return torch.cuda.get_device_properties(device).major >= 8


def fused_csa(
    x: torch.Tensor, maps_weight: torch.Tensor, value_weight: torch.Tensor, alpha: torch.Tensor, groups: int
) -> torch.Tensor:
    """Compressed self-attention in two kernels forward and two backward; see `CompressedSelfAttention`.

    Products are in the input's type, all sums in float32. Under autocast products are in its type, the residual still
    in the input's, which is not cast: the kernels cast what they read, which costs no pass over it. The gradient has no
    derivative of its own.

    Args:
        x: Input (B, C, H, W), float32, bfloat16 or float16. Contiguous and channels_last are read in place, any other
            layout is copied.
        maps_weight: Base vectors (groups·num_maps, C/groups, 1, 1), `num_maps` at most 128.
        value_weight: Value projection (C, C/groups, 1, 1).
        alpha: Scalar tensor.
        groups: Channel groups G.

    Returns:
        The output (B, C, H, W) in the input's type and memory layout.

    Raises:
        RuntimeError: If the input does not have C channels, as from a convolution.
        ValueError: If any other shape or type does not fit, or the tensors are not on a GPU.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    maps, value = (weight.to(dtype).contiguous() for weight in (maps_weight, value_weight))
    return compressed_attention(x, maps, value, alpha, groups)[0]


@torch.library.custom_op('csa_zoo::compressed_attention', mutates_args=())
def compressed_attention(
    x: torch.Tensor, maps: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output y, and what the backward needs besides the inputs: P (G, B, D, c) and the logsumexp (G, B, D) per map."""
    _check(x, maps, value, alpha, groups)
    x = _dense(x)
    batch, positions, _, _ = _sizes(x, maps, groups)
    with torch.cuda.device_of(x):
        pooled, lse = _pooled(x, maps, groups)
        elementary = alpha * _project(pooled, value)
        y = torch.empty_like(x)
        launch = _launch(_broadcast, x, maps, groups)
        grid = (batch * groups * launch.TILES, triton.cdiv(positions, launch.BLOCK_N))
        _broadcast[grid](x, maps, elementary, y, batch, positions, *_strides(x), **launch._asdict())
    return y, pooled, lse


@compressed_attention.register_fake
def _(x, maps, value, alpha, groups):
    batch, _, channels, num_maps = _sizes(x, maps, groups)
    pooled = x.new_empty(groups, batch, num_maps, channels, dtype=torch.float32)
    return torch.empty_like(_dense(x)), pooled, pooled.new_empty(groups, batch, num_maps)


def _pooled(x: torch.Tensor, maps: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """P and the logsumexp of the scores per map."""
    batch, positions, channels, num_maps = _sizes(x, maps, groups)
    launch = _launch(_pool, x, maps, groups)
    splits, steps = _split(x, launch)
    lse = x.new_empty(splits, groups, batch, num_maps, dtype=torch.float32)
    pooled = lse.new_empty(*lse.shape, channels)
    grid = (batch * groups * launch.TILES, splits)
    _pool[grid](x, maps, pooled, lse, batch, positions, *_strides(x), steps, **launch._asdict())
    if splits == 1:
        return pooled.squeeze(0), lse.squeeze(0)
    partial, partial_lse = pooled, lse
    pooled, lse = torch.empty_like(pooled[0]), torch.empty_like(lse[0])
    rows, block_r = lse.numel(), 16
    grid = (triton.cdiv(rows, block_r), launch.TILES)
    _combine[grid](partial, partial_lse, pooled, lse, splits, rows, channels, block_r, launch.BLOCK_C)
    return pooled, lse


@torch.library.custom_op('csa_zoo::compressed_attention_backward', mutates_args=())
def compressed_attention_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    maps: torch.Tensor,
    value: torch.Tensor,
    alpha: torch.Tensor,
    pooled: torch.Tensor,
    lse: torch.Tensor,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the input, the base vectors, the value projection and α."""
    x, grad = _dense(x), _dense(grad)
    batch, positions, channels, num_maps = _sizes(x, maps, groups)
    sizes = (batch, positions, *_strides(x), *_strides(grad))
    with torch.cuda.device_of(x):
        launch = _launch(_elementary_gradient, x, maps, groups)
        splits, steps = _split(x, launch)
        grad_elementary = pooled.new_empty(splits, *pooled.shape)
        grid = (batch * groups * launch.TILES, splits)
        _elementary_gradient[grid](x, maps, grad, grad_elementary, *sizes, steps, **launch._asdict())
        grad_elementary = grad_elementary.sum(0)

        projected = _project(pooled, value)
        grad_alpha = (grad_elementary * projected).sum().to(alpha.dtype)
        # A averages 1/N where dP sums N terms: half of N goes from one to the other to keep both in float16's range
        spread = positions**0.5
        grad_projected = (grad_elementary * (alpha / spread)).to(value.dtype)
        grad_pooled = _project(grad_projected, value, transposed=True)
        rows = (groups, batch * num_maps, channels)
        grad_value = _bmm(grad_projected.view(rows).mT, pooled.to(value.dtype).view(rows)).mul_(spread)

        launch = _launch(_input_gradient, x, maps, groups)
        splits, steps = _split(x, launch)
        small = (maps, alpha * projected, grad_pooled, lse - math.log(spread), (pooled * grad_pooled).sum(-1))
        grad_x = torch.empty_like(x)
        grad_maps = pooled.new_empty(splits * batch, *maps.shape)
        grid = (batch * groups * launch.TILES, splits)
        _input_gradient[grid](x, *small, grad, grad_x, grad_maps, *sizes, steps, **launch._asdict())
    return grad_x, grad_maps.sum(0).to(maps.dtype), grad_value.view(value.shape), grad_alpha


@compressed_attention_backward.register_fake
def _(grad, x, maps, value, alpha, pooled, lse, groups):
    return torch.empty_like(_dense(x)), torch.empty_like(maps), torch.empty_like(value), torch.empty_like(alpha)


def _keep(ctx, inputs, output):
    *tensors, ctx.groups = inputs
    _, pooled, lse = output
    ctx.save_for_backward(*tensors, pooled, lse)
    ctx.mark_non_differentiable(pooled, lse)


def _backward(ctx, grad, *_):
    return *compressed_attention_backward(grad, *ctx.saved_tensors, ctx.groups), None


compressed_attention.register_autograd(_backward, setup_context=_keep)


def _check(x: torch.Tensor, maps: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor, groups: int) -> None:
    """Raise unless the kernels may run: they would read past the end of tensors that do not fit together."""
    if x.device.type != 'cuda' and not (triton and triton.knobs.runtime.interpret):
        raise ValueError(f'the fused kernels need a CUDA device, got an input on {x.device}: use the eager module')
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f'input must be (B, C, H, W) and not empty, got {tuple(x.shape)}')
    dim = value.shape[0]
    if x.shape[1] != dim:
        raise RuntimeError(f'expected the input to have {dim} channels, but got {x.shape[1]} channels')
    if dim % groups or maps.shape[0] % groups:
        raise ValueError(f'groups must divide the {dim} channels and the {maps.shape[0]} maps, got groups={groups}')
    if maps.shape[0] > groups * MAX_MAPS:
        raise ValueError(f'at most {MAX_MAPS} maps per group fit on chip, got {maps.shape[0] // groups}')
    shapes = {'maps': (maps.shape[0], dim // groups, 1, 1), 'value': (dim, dim // groups, 1, 1), 'alpha': ()}
    for (name, shape), tensor in zip(shapes.items(), (maps, value, alpha), strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f'{name} must be {shape} for {dim} channels in {groups} groups, got {tuple(tensor.shape)}')
        if tensor.device != x.device:
            raise ValueError(f'{name} is on {tensor.device}, but the input on {x.device}')
    if x.dtype not in DTYPES or maps.dtype not in DTYPES or maps.dtype != value.dtype:
        raise ValueError(
            'input and weights must be float32, bfloat16 or float16, both weights of one type; '
            f'got input {x.dtype}, maps {maps.dtype}, value {value.dtype}'
        )


def _dense(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its positions have one stride, as in both memory layouts; else a contiguous copy."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of image, channel and position of a dense tensor."""
    return x.stride(0), x.stride(1), 1 if x.is_contiguous() else x.shape[1]


def _sizes(x: torch.Tensor, maps: torch.Tensor, groups: int) -> tuple[int, int, int, int]:
    """Images, positions, channels per group and maps per group."""
    batch, dim, height, width = x.shape
    return batch, height * width, dim // groups, maps.shape[0] // groups


def _split(x: torch.Tensor, launch: _Launch) -> tuple[int, int]:
    """In how many parts to split the positions so that a small batch fills the GPU, and the steps of each."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    programs = x.shape[0] * launch.G * launch.TILES
    steps = triton.cdiv(x.shape[2] * x.shape[3], launch.BLOCK_N)
    per_split = triton.cdiv(steps, max(1, 2 * processors // programs))
    return triton.cdiv(steps, per_split), per_split


def _project(vectors: torch.Tensor, value: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """Multiply vectors (G, B, D, c) by the groups' Wᵀ, or by W."""
    groups, batch, num_maps, channels = vectors.shape
    weight = value.view(groups, channels, channels)
    rows = vectors.to(value.dtype).view(groups, batch * num_maps, channels)
    return _bmm(rows, weight if transposed else weight.mT).view(vectors.shape)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.autocast(a.device.type, enabled=False):  # which would reach into the operator
        return torch.bmm(a, b)
