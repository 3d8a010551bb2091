"""CSA and SA against the literal equations of the paper, with the full N×N attention in float64."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from csa_zoo import CompressedSelfAttention, SelfAttention

SIZES = [(6, 4), (5, 7), (1, 9), (3, 1), (1, 1)]


def literal_csa(
    x: torch.Tensor, maps: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor, groups: int
) -> torch.Tensor:
    """Equations [1], [3] and [4], group by group and image by image."""
    batch, dim, height, width = x.shape
    c, d = dim // groups, maps.shape[0] // groups
    images = []
    for image in x.reshape(batch, dim, height * width):
        outputs = []
        for g in range(groups):
            features = image[g * c : (g + 1) * c]  # I, (c, N)
            v = maps[g * d : (g + 1) * d, :, 0, 0]
            w_g = value[g * c : (g + 1) * c, :, 0, 0]
            exponentials = (v @ features).exp()  # (D, N)
            f_b = exponentials / exponentials.sum(1, keepdim=True)  # over the positions
            w = exponentials / exponentials.sum(0, keepdim=True)  # over the base vectors
            attention = sum(w[k][:, None] * f_b[k][None, :] for k in range(d))  # A[i, j]
            outputs.append(alpha * (w_g @ features) @ attention.T + features)
        images.append(torch.cat(outputs))
    return torch.stack(images).reshape(x.shape)


def literal_sa(
    x: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """Equations [1] and [2], image by image."""
    images = []
    for image in x.flatten(2):
        q, k, v = (weight[:, :, 0, 0] @ image for weight in (query, key, value))
        exponentials = (q.T @ k).exp()  # (N, N), i by j
        attention = exponentials / exponentials.sum(1, keepdim=True)
        images.append(alpha * v @ attention.T + image)
    return torch.stack(images).reshape(x.shape)


def literal(module: nn.Module, x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(module, CompressedSelfAttention):
        return literal_csa(x, parameters['maps.weight'], parameters['value.weight'], parameters['alpha'], module.groups)
    names = ('query.weight', 'key.weight', 'value.weight', 'alpha')
    return literal_sa(x, *(parameters[name] for name in names))


def make(kind: str | int, dim: int = 16) -> nn.Module:
    """`'sa'`, or CSA with a number of groups; scores spread enough for maps that are far from uniform."""
    torch.manual_seed(0)
    if kind == 'sa':
        module = SelfAttention(dim, alpha=0.7)
        scores = [module.query, module.key]
    else:
        module = CompressedSelfAttention(dim, num_maps=5, groups=kind, alpha=0.7)
        scores = [module.maps]
    for layer in scores:
        nn.init.normal_(layer.weight, std=1 / layer.weight.shape[1] ** 0.5)
    nn.init.normal_(module.value.weight, std=1 / module.value.weight.shape[1] ** 0.5)
    return module


def make_input(layout: str, size: tuple[int, int], dim: int = 16) -> torch.Tensor:
    height, width = size
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return 1.5 * torch.randn(*shape, generator=generator)

    if layout == 'channels_last':
        return random(2, dim, height, width).to(memory_format=torch.channels_last)
    if layout == 'slice':
        return random(2, dim + 3, 2 * height, width + 2)[:, 2 : dim + 2, 1::2, 1 : width + 1]
    if layout == 'transposed':
        return random(2, dim, width, height).transpose(2, 3)
    return random(2, dim, height, width)


def output_and_gradients(function, x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output, and gradients of a random projection of it with respect to the input and every parameter."""
    output = function(x, parameters)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    names = ['input', *parameters]
    gradients = torch.autograd.grad((output * direction).sum(), [x, *parameters.values()])
    return {'output': output.detach(), **dict(zip(names, gradients, strict=True))}


def run(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = dict(module.named_parameters())
    return output_and_gradients(lambda x, p: functional_call(module, p, x), x.detach().requires_grad_(), parameters)


def run_literal(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = {name: value.detach().double().requires_grad_() for name, value in module.named_parameters()}
    x = x.detach().double().contiguous().requires_grad_()
    return output_and_gradients(lambda x, p: literal(module, x, p), x, parameters)


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Relative error of each tensor in the Euclidean norm; small ones (0 at N = 1) count as 10 % of the largest."""
    assert actual.keys() == expected.keys()
    floor = 0.1 * max(reference.norm() for reference in expected.values())
    for name, reference in expected.items():
        error = (actual[name].double() - reference).norm() / reference.norm().clamp(min=floor)
        assert error <= tolerance, f'{name}: relative error {error:.2e}'


@pytest.mark.parametrize('kind', [1, 2, 8, 'sa'])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'slice', 'transposed'])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_equals_the_literal_equations(kind, layout, size):
    module, x = make(kind), make_input(layout, size)
    expected = run_literal(module, x)
    assert_close(run(module, x), expected, 1e-5)
    assert_close(run(copy.deepcopy(module).double(), x.double()), expected, 1e-12)


@pytest.mark.parametrize('kind', [2, 'sa'])
def test_context_is_not_lost_in_the_residual(kind):
    """The literal test would pass on any module if α times the context were too small to count."""
    module, x = make(kind), make_input('contiguous', (6, 4))
    context = module(x) - x
    assert context.norm() > 0.2 * x.norm()
    assert context.var((2, 3)).mean() > 0.05  # differs from position to position


@pytest.mark.parametrize('kind', [1, 2, 8, 'sa'])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_autocast(kind, layout):
    module, x = make(kind), make_input(layout, (5, 7))
    with torch.autocast('cpu', torch.bfloat16):
        actual = run(module, x)
    assert actual['output'].dtype == actual['input'].dtype == torch.float32
    assert_close(actual, run_literal(module, x), 0.02)


@pytest.mark.parametrize('kind', [1, 2, 8, 'sa'])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str)
def test_half_precision(kind, layout, dtype, tolerance):
    module, x = make(kind).to(dtype), make_input(layout, (5, 7)).to(dtype)
    actual = run(module, x)
    assert {tensor.dtype for tensor in actual.values()} == {dtype}
    expected = run_literal(module, x)
    # the gradient of α is one sum whose terms cancel: over 60 seeds bfloat16's rounding reached 3 %
    assert_close(actual, expected, 1.5 * tolerance)
    del actual['alpha'], expected['alpha']
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize('kind', [2, 'sa'])
def test_large_scores_do_not_overflow(kind):
    module, x = make(kind), make_input('contiguous', (5, 7))
    with torch.no_grad():
        (module.query if kind == 'sa' else module.maps).weight.mul_(25 if kind == 'sa' else 50)
    scores = module.query(x).flatten(2).mT @ module.key(x).flatten(2) if kind == 'sa' else module.maps(x)
    assert 150 < scores.abs().max() < 700  # beyond exp of float32, within that of float64
    assert_close(run(module, x), run_literal(module, x), 1e-4)


@pytest.mark.parametrize('kind', [1, 2, 'sa'])
def test_gradcheck(kind):
    module = make(kind, dim=4).double()
    names, parameters = zip(*module.named_parameters(), strict=True)
    x = make_input('contiguous', (2, 3), dim=4).double().requires_grad_()

    def function(x, *parameters):
        return functional_call(module, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))


@pytest.mark.parametrize('groups', [1, 2, 8])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_keeps_only_its_input_for_the_backward_pass(groups, layout):
    """Not the scores, whose size is up to the input's; `.data_ptr()` also finds copies of the input."""
    module, x = make(groups), make_input(layout, (5, 7)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(x)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in (x, *module.parameters())}


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.filterwarnings(
    'ignore:There is a performance drop'
)  # PyTorch has no batching rule for one of the products
def test_gradients_per_image(groups):
    module, x = make(groups).double(), make_input('contiguous', (5, 7)).double()
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(parameters, image):
        return functional_call(module, parameters, image[None]).pow(3).sum()

    actual = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for image, *gradients in zip(x, *actual.values(), strict=True):
        expected = torch.autograd.grad(loss(dict(module.named_parameters()), image), list(module.parameters()))
        torch.testing.assert_close(gradients, list(expected))


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_without_data(device, layout):
    """An empty batch, and a device that has shapes only (and no autocast)."""
    module = make(2).to(device)
    x = make_input(layout, (5, 7))[: 0 if device == 'cpu' else 2].to(device).requires_grad_()
    output = module(x)
    output.sum().backward()
    assert output.shape == x.shape == x.grad.shape
    if device == 'cpu':
        assert all(not parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize('cls', [CompressedSelfAttention, SelfAttention])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_identity_until_trained(cls, layout):
    module, x = cls(16), make_input(layout, (5, 7)).requires_grad_()
    output = module(x)
    assert torch.equal(output, x)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(module(x), x)
    # only α learns at first; were its gradient zero too, nothing ever would
    output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert gradients.pop('alpha').abs() > 1e-2
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize('kind', [1, 2, 'sa'])
@pytest.mark.parametrize('size', [(6, 4), (5, 7)], ids=str)
def test_keeps_the_memory_layout(kind, size):
    module = make(kind)
    assert module(make_input('contiguous', size)).is_contiguous()
    assert module(make_input('channels_last', size)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('groups', [1, 2, 8])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_attention_maps(groups, layout):
    module, x = make(groups), make_input(layout, (5, 7))
    base, weights = module.attention_maps(x)
    for maps in (base, weights):
        assert maps.shape == (2, groups, 5, 5, 7)
        assert (maps >= 0).all() and (maps <= 1).all()
    torch.testing.assert_close(base.sum((3, 4)), torch.ones(2, groups, 5))
    torch.testing.assert_close(weights.sum(2), torch.ones(2, groups, 5, 7))
    attention = torch.einsum('bgdi,bgdj->bgij', weights.flatten(3), base.flatten(3))  # [4]
    values = module.value(x).reshape(2, groups, 16 // groups, 35)
    context = torch.einsum('bgij,bgcj->bgci', attention, values).reshape(2, 16, 5, 7)
    torch.testing.assert_close(module(x), module.alpha * context + x)


@pytest.mark.parametrize('groups', [1, 2, 8])
def test_values_are_projected_after_pooling(groups):
    """Multiplications: three products over the positions, and the projection of D vectors, not of N positions."""
    dim, num_maps, positions = 64, 32, 16 * 16
    module = CompressedSelfAttention(dim, num_maps, groups)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.randn(1, dim, 16, 16))
    assert counter.get_total_flops() == 2 * num_maps * (3 * dim * positions + dim * dim // groups)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_parameters():
    grouped = CompressedSelfAttention(64, num_maps=16, groups=4)
    assert shapes(grouped) == {'maps.weight': (64, 16, 1, 1), 'value.weight': (64, 16, 1, 1), 'alpha': ()}
    default = CompressedSelfAttention(64)  # 32 maps, 2 groups
    assert shapes(default) == {'maps.weight': (64, 32, 1, 1), 'value.weight': (64, 32, 1, 1), 'alpha': ()}
    in_l2net = CompressedSelfAttention(64, num_maps=32, groups=1)
    assert sum(parameter.numel() for parameter in in_l2net.parameters()) == 6145
    projections = {'query.weight': (8, 64, 1, 1), 'key.weight': (8, 64, 1, 1), 'value.weight': (64, 64, 1, 1)}
    assert shapes(SelfAttention(64)) == {**projections, 'alpha': ()}
    assert SelfAttention(64, embed_dim=5).key.weight.shape == (5, 64, 1, 1)


@pytest.mark.parametrize('cls', [CompressedSelfAttention, SelfAttention])
def test_fixed_alpha(cls):
    fixed = cls(16, alpha=0.25, learnable_alpha=False)
    assert 'alpha' not in dict(fixed.named_parameters())
    assert fixed.state_dict()['alpha'] == 0.25
    learnable = cls(16, alpha=0.25)
    assert dict(learnable.named_parameters())['alpha'] == 0.25
    learnable.load_state_dict(fixed.state_dict())
    x = make_input('contiguous', (5, 7))
    assert torch.equal(fixed(x), learnable(x))
    assert fixed.bfloat16().alpha.dtype == torch.bfloat16


@pytest.mark.parametrize('cls', [CompressedSelfAttention, SelfAttention])
def test_device_and_dtype(cls):
    module = cls(16, device='meta', dtype=torch.float64, learnable_alpha=False)
    assert {(t.device.type, t.dtype) for t in module.state_dict().values()} == {('meta', torch.float64)}


@pytest.mark.parametrize(
    ('cls', 'arguments', 'message'),
    [
        (CompressedSelfAttention, {'dim': 0}, 'dim must be at least 1, got 0'),
        (CompressedSelfAttention, {'dim': 16, 'num_maps': 0}, 'num_maps must be at least 1, got 0'),
        (CompressedSelfAttention, {'dim': 16, 'groups': -2}, 'groups must be at least 1, got -2'),
        (CompressedSelfAttention, {'dim': 16, 'groups': 3}, 'divide the 16 channels, got groups=3'),
        (SelfAttention, {'dim': 0}, 'dim must be at least 1, got 0'),
        (SelfAttention, {'dim': 16, 'embed_dim': 0}, 'embed_dim must be at least 1, got 0'),
    ],
)
def test_invalid_arguments(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize('kind', [2, 'sa'])
def test_wrong_number_of_channels(kind):
    with pytest.raises(RuntimeError, match='to have 16 channels, but got 8 channels'):
        make(kind)(torch.randn(2, 8, 5, 7))


def test_no_positions():
    with pytest.raises(RuntimeError, match=r'positions to attend to, but its size is \(2, 16, 0, 7\)'):
        make(2)(torch.randn(2, 16, 0, 7))


@pytest.mark.parametrize('kind', [2, 'sa'])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_compile(kind, layout):
    """In one graph, forward and backward. The backend that needs no C++ compiler."""
    torch._dynamo.reset()
    module, x = make(kind), make_input(layout, (5, 7))
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    parameters = dict(module.named_parameters())
    actual = output_and_gradients(lambda x, _: compiled(x), x.requires_grad_(), parameters)
    assert_close(actual, run_literal(module, x), 1e-5)


@pytest.mark.parametrize('kind', [2, 'sa'])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_export(kind, layout):
    """With any batch, height and width."""
    module = make(kind)
    dynamic = {0: torch.export.Dim('batch'), 2: torch.export.Dim('height'), 3: torch.export.Dim('width')}
    program = torch.export.export(module, (make_input(layout, (5, 7)),), dynamic_shapes=(dynamic,))
    x = make_input(layout, (3, 4)).repeat(3, 1, 1, 1)
    x = x.to(memory_format=torch.channels_last) if layout == 'channels_last' else x
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize('kind', [2, 'sa'])
def test_script(kind):
    module = make(kind)
    scripted = torch.jit.script(module)
    for layout in ('contiguous', 'channels_last', 'slice'):
        x = make_input(layout, (5, 7))
        torch.testing.assert_close(scripted(x), module(x))
        actual, expected = (
            output_and_gradients(lambda x, _, f=f: f(x), x.clone().requires_grad_(), dict(f.named_parameters()))
            for f in (scripted, module)
        )
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_trace(layout):
    module, x = make(2), make_input(layout, (5, 7))
    traced = torch.jit.trace(module, x)
    torch.jit.save(traced, file := io.BytesIO())
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), module(x))
