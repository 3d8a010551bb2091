"""Compressed self-attention (CSA), the module of `Compressed Self-Attention for Deep Metric Learning` (AAAI 2020).

Bracketed numbers are the paper's equations. The paper projects the values and then pools them; here they are pooled
first, which is the same function, because the projection is linear and each base attention map sums to one.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from timm.layers import register_notrace_module, use_fused_attn
from torch import nn

from .fused import can_fuse, fused_csa


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """View (B, C, H, W) as (B, G, C/G, H·W), in either memory layout."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height * width)


def _attend(x: torch.Tensor, maps: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The module, for compilers and exporters, as a function of maps (G, D, C/G), value (G, C/G, C/G) and α."""
    inputs = _by_group(x, maps.shape[0])
    contexts = []
    for g in range(maps.shape[0]):
        scores = inputs[:, g].mT @ maps[g].mT  # (B, N, D)
        weights = scores.softmax(2)
        elementary = alpha * (value[g] @ (inputs[:, g] @ scores.softmax(1)))  # α scales D vectors, not N positions
        context = elementary @ weights.mT if x.is_contiguous() else (weights @ elementary.mT).mT
        contexts.append(context.unflatten(2, x.shape[2:]))
    return x + torch.cat(contexts, 1)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast would lower the precision of the residual, too; not every device (meta) has it."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _in_cache(x: torch.Tensor) -> list[slice]:
    """Parts of a batch: on CPUs an image a thread, or as many as have 1 MB in float32, to stay in the caches."""
    step = max(1, 2**18 // x.shape[1:].numel()) * torch.get_num_threads() if x.is_cpu else max(1, len(x))
    return [slice(start, start + step) for start in range(0, max(1, len(x)), step)]


def _by_rows(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Terms of `torch.baddbmm` for y + a @ bᵀ or its transpose, whichever has y by rows as it lies: half the time."""
    return (y, a, b.mT) if y.stride(2) == 1 else (y.mT, b, a.mT)


class _Attend(torch.autograd.Function):
    """`_attend`, eager: contexts are added in place, and the backward pass starts from the inputs alone.

    In channels_last the channels of a group are a strided matrix, which the matrix products take as it is, one group at
    a time; as one batch they would have to be copied. The backward pass recomputes the scores: two products more than
    autograd would need, instead of keeping 2·groups·num_maps values per position. It can be differentiated again.
    """

    @staticmethod
    def forward(x: torch.Tensor, maps: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(x)
        with _without_autocast(x.device):
            scaled = alpha * value  # α scales the small matrices, not N positions
            for part in _in_cache(x):
                inputs, outputs = (_by_group(t, len(maps)) for t in (x[part], output[part].copy_(x[part])))
                for g in range(len(maps)):
                    x_g = inputs[:, g]
                    scores = x_g.mT @ maps[g].mT
                    elementary = scaled[g] @ (x_g @ scores.softmax(1))
                    terms = _by_rows(outputs[:, g], elementary, scores.softmax(2))
                    torch.baddbmm(*terms, out=terms[0])  # not `baddbmm_`, which FLOP counters do not know
        return output

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def vmap(info, in_dims: tuple, *inputs) -> tuple[torch.Tensor, int]:
        return torch.vmap(_attend, in_dims)(*inputs), 0

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        x, maps, value, alpha = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
        d_x = torch.empty_like(grad)
        d_maps, d_scaled = [0] * len(maps), [0] * len(maps)  # sums over the batch; scaled = α · value
        sum_dtype = torch.promote_types(x.dtype, torch.float32)
        with _without_autocast(x.device):
            scaled = alpha * value
            for part in _in_cache(x):
                d_x[part] = grad[part]
                inputs, d_outputs, d_inputs = (_by_group(t[part], len(maps)) for t in (x, grad, d_x))
                for g in range(len(maps)):
                    x_g, d_y, d_x_g = inputs[:, g], d_outputs[:, g], d_inputs[:, g]
                    scores = x_g.mT @ maps[g].mT
                    base, weights = scores.softmax(1), scores.softmax(2)
                    pooled = x_g @ base
                    d_elementary = d_y @ weights
                    d_pooled = scaled[g].mT @ d_elementary
                    d_scores = torch._softmax_backward_data(x_g.mT @ d_pooled, base, 1, x.dtype)
                    d_scores += torch._softmax_backward_data(d_y.mT @ (scaled[g] @ pooled), weights, 2, x.dtype)
                    for a, b in ((d_pooled, base), (maps[g].mT.expand(len(x_g), -1, -1), d_scores)):
                        total, *factors = _by_rows(d_x_g, a, b)
                        total.baddbmm_(*factors)
                    d_maps[g] = d_maps[g] + (x_g @ d_scores).sum(0, dtype=sum_dtype).mT
                    d_scaled[g] = d_scaled[g] + torch.einsum('bid,bjd->ij', d_elementary, pooled).to(sum_dtype)
            d_scaled = torch.stack(d_scaled)
            d_maps, d_value, d_alpha = torch.stack(d_maps), alpha * d_scaled, (d_scaled * value).sum()
        return d_x, d_maps.to(x.dtype), d_value.to(x.dtype), d_alpha.to(x.dtype)


@register_notrace_module  # one node for fx, as timm does for its own attention layers
class CompressedSelfAttention(nn.Module):
    """Long-range context from a few base attention maps instead of one map per position.

    Within each of `groups` channel groups, `num_maps` learned base vectors score every position. A softmax of the
    scores over positions gives the base attention maps [3], which pool the input into `num_maps` elementary outputs
    [6]; a softmax over the base vectors gives each position's adaptive weights [4], which mix those outputs back into
    every position [5], [7]. Multiplications per position: 3·C·num_maps, whatever the number of positions.

    At its initial `alpha` of 0 the module is the identity, so it can be put into a pretrained network. The input may be
    contiguous or channels_last; the output has the same layout.

    `maps` and `value` hold weights and are never called, so that hooks on them do not run; parametrisations
    (`torch.nn.utils.parametrize`) do. Gradients can be differentiated again; there is no forward-mode differentiation.

    Shape:
        - input: (B, C, H, W), C = `dim`
        - output: (B, C, H, W)

    Attributes:
        maps: 1×1 convolution without bias, its weight (groups·num_maps, C/groups, 1, 1) holds the base vectors.
        value: 1×1 convolution without bias, its weight (C, C/groups, 1, 1) is the value projection W_g.
        alpha: Scalar that scales the attention's contribution to the output.
        fused_attn: Use the kernels of `csa_zoo.attention.fused` where they run; the rest of this file otherwise.
    """

    def __init__(
        self,
        dim: int,
        num_maps: int = 32,
        groups: int = 2,
        alpha: float = 0.0,
        learnable_alpha: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Create the module.

        Args:
            dim: Channels C of the input.
            num_maps: Base attention maps D per group.
            groups: Channel groups G, each with its own base vectors and value projection.
            alpha: Initial scale of the attention's contribution.
            learnable_alpha: Learn `alpha`; otherwise it stays as given (the paper allows both).
            device: Where to create the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If `dim`, `num_maps` or `groups` is less than one, or `groups` does not divide `dim`.
        """
        super().__init__()
        for name, value in (('dim', dim), ('num_maps', num_maps), ('groups', groups)):
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        if dim % groups:
            raise ValueError(f'groups must divide the {dim} channels, got groups={groups}')
        dd = {'device': device, 'dtype': dtype}
        self.dim = dim
        self.num_maps = num_maps
        self.groups = groups
        self.fused_attn = bool(use_fused_attn())  # timm's switch: TIMM_FUSED_ATTN, set_fused_attn
        self.maps = nn.Conv2d(dim, groups * num_maps, 1, groups=groups, bias=False, **dd)
        self.value = nn.Conv2d(dim, dim, 1, groups=groups, bias=False, **dd)
        scale = torch.tensor(float(alpha), **dd)
        if learnable_alpha:
            self.alpha = nn.Parameter(scale)
        else:
            self.register_buffer('alpha', scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add context to every position: (B, C, H, W) to (B, C, H, W), computed in the input's dtype.

        Raises:
            RuntimeError: If the input is not (B, `dim`, H, W), or its height or width is zero.
        """
        if not x.is_contiguous():
            x = x.contiguous(memory_format=torch.channels_last)
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves out no branch of a longer condition)
            if self.fused_attn and not torch.jit.is_tracing() and can_fuse(x, self.num_maps):
                return fused_csa(x, self.maps.weight, self.value.weight, self.alpha, self.groups)
        channels = self.dim // self.groups
        maps = self.maps.weight.view(self.groups, self.num_maps, channels).to(x.dtype)
        value = self.value.weight.view(self.groups, channels, channels).to(x.dtype)
        alpha = self.alpha.to(x.dtype)
        if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return _attend(x, maps, value, alpha)
        if x.ndim != 4:
            raise RuntimeError(f'expected the input to be (B, {self.dim}, H, W), but its size is {tuple(x.shape)}')
        if x.shape[1] != self.dim:
            raise RuntimeError(f'expected the input to have {self.dim} channels, but got {x.shape[1]} channels')
        if x.shape[2:].numel() == 0:
            raise RuntimeError(f'expected the input to have positions to attend to, but its size is {tuple(x.shape)}')
        return _Attend.apply(x, maps, value, alpha)

    @torch.jit.ignore
    def attention_maps(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Base attention maps and adaptive weights of an input, to look at.

        The full attention map of position i is the sum over d of `weights[..., d, i]` times `base[:, :, d]` [4].

        Args:
            x: Input (B, C, H, W).

        Returns:
            The base maps, which sum to one over (H, W), and the weights, which sum to one over the maps; both
            (B, groups, num_maps, H, W), in [0, 1].
        """
        batch, _, height, width = x.shape
        scores = self.maps(x).reshape(batch, self.groups, self.num_maps, height * width)
        shape = (batch, self.groups, self.num_maps, height, width)
        return scores.softmax(dim=3).view(shape), scores.softmax(dim=2).view(shape)

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        return f'dim={self.dim}, num_maps={self.num_maps}, groups={self.groups}'
