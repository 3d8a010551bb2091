"""The Triton kernels against the literal equations in float64: on a GPU, and without one under Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so `test_under_the_interpreter` runs this file once more in
a process of its own.
"""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from test_attention import assert_close, make_input, output_and_gradients, run, run_literal
from torch import nn
from torch.func import functional_call

from csa_zoo import CompressedSelfAttention
from csa_zoo.attention import fused
from csa_zoo.attention.fused import can_fuse, fused_csa

triton = pytest.importorskip('triton')
tl = triton.language

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason='needs a GPU; test_under_the_interpreter runs it without one',
)
on_a_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason='needs a GPU')

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
TOLERANCES = {SINGLE: 1e-5, HALF: 0.003, BRAIN: 0.02}


@pytest.mark.skipif(INTERPRETED, reason='is being run by it')
def test_under_the_interpreter():
    variables = {'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTEST_ADDOPTS': ''}
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-k', 'kernels', __file__]
    result = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r'(\d+) passed', result.stdout).group(1)) >= 35, result.stdout


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` is full of NaN, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 as its bits, and would multiply those as integers."""
    if INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder

        create_dot = InterpreterBuilder.create_dot

        def upcast_and_dot(self, a, b, *others):
            a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
            return create_dot(self, a, b, *others)

        monkeypatch.setattr(InterpreterBuilder, 'create_dot', upcast_and_dot)


def make(dim: int, groups: int, num_maps: int, dtype: torch.dtype = SINGLE, alpha: float = 0.7) -> nn.Module:
    torch.manual_seed(dim + groups + num_maps)
    module = CompressedSelfAttention(dim, num_maps, groups, alpha=alpha)
    for layer in (module.maps, module.value):
        nn.init.normal_(layer.weight, std=1 / layer.weight.shape[1] ** 0.5)
    return module.to(DEVICE, dtype)


def fused_function(x: torch.Tensor, parameters: dict[str, torch.Tensor], groups: int) -> torch.Tensor:
    return fused_csa(x, parameters['maps.weight'], parameters['value.weight'], parameters['alpha'], groups)


def run_fused(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = dict(module.named_parameters())
    return output_and_gradients(
        lambda x, p: fused_function(x, p, module.groups), x.detach().requires_grad_(), parameters
    )


# channels, groups, maps, height and width, layout: channels and maps that fill no block, several blocks of channels,
# several splits of the positions (whose number falls with batch and groups), one position
CASES = [
    (72, 1, 8, (5, 7), 'contiguous'),
    (16, 2, 32, (5, 13), 'channels_last'),
    (16, 8, 5, (3, 7), 'contiguous'),
    (20, 1, 40, (5, 7), 'channels_last'),
    (8, 1, 1, (1, 1), 'contiguous'),
]


@runs_kernels
@pytest.mark.parametrize(('dim', 'groups', 'num_maps', 'size', 'layout'), CASES, ids=str)
@pytest.mark.parametrize('dtype', [SINGLE, HALF, BRAIN], ids=str)
def test_kernels_equal_the_literal_equations(dim, groups, num_maps, size, layout, dtype):
    module, x = make(dim, groups, num_maps, dtype), make_input(layout, size, dim).to(DEVICE, dtype)
    actual = run_fused(module, x)
    assert {tensor.dtype for tensor in actual.values()} == {dtype}
    assert actual['output'].stride() == actual['input'].stride() == x.stride()
    assert_close(actual, run_literal(module, x), TOLERANCES[dtype])


@runs_kernels
def test_kernels_with_several_channel_blocks_in_half_precision():
    module, x = make(136, 1, 8, BRAIN), make_input('contiguous', (5, 7), 136).to(DEVICE, BRAIN)
    assert_close(run_fused(module, x), run_literal(module, x), TOLERANCES[BRAIN])


@runs_kernels
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'slice', 'transposed'])
def test_kernels_take_any_layout(layout):
    module, x = make(8, 1, 8), make_input(layout, (5, 7), 8).to(DEVICE)
    assert_close(run_fused(module, x), run_literal(module, x), 1e-5)


@runs_kernels
def test_kernels_take_an_expanded_gradient():
    module, x = make(16, 2, 8), make_input('channels_last', (5, 7)).to(DEVICE).requires_grad_()
    parameters = dict(module.named_parameters())
    gradient, expected = (
        torch.autograd.grad(output.sum(), x)[0] for output in (fused_function(x, parameters, 2), module(x))
    )
    torch.testing.assert_close(gradient, expected)


@runs_kernels
def test_kernels_under_autocast():
    module, x = make(8, 1, 8), make_input('contiguous', (5, 7), 8).to(DEVICE)
    with torch.autocast(DEVICE, BRAIN):
        actual = run_fused(module, x)
    assert {tensor.dtype for tensor in actual.values()} == {SINGLE}
    assert_close(actual, run_literal(module, x), TOLERANCES[BRAIN])
    assert (actual['output'] - run_fused(module, x)['output']).norm() > 1e-4  # the products were in bfloat16


@runs_kernels
@pytest.mark.parametrize('sign', ['both', 'negative'])
def test_kernels_with_large_scores(sign):
    module, x = make(16, 1, 8), make_input('contiguous', (5, 13)).to(DEVICE)
    with torch.no_grad():
        module.maps.weight.mul_(50)
        if sign == 'negative':  # all of them, as behind a ReLU: exp(-logsumexp) is infinite
            x, module.maps.weight[:] = x.abs(), -module.maps.weight.abs()
    assert 150 < module.maps(x).abs().max() < 700  # beyond exp of float32, within that of float64
    assert_close(run_fused(module, x), run_literal(module, x), 1e-4)


@runs_kernels
def test_kernels_survive_a_scaled_loss():
    """The gradients of a float16 model are those of a loss times a large number, and sums over all positions."""
    module, x = make(16, 1, 8, HALF), make_input('contiguous', (30, 30)).to(DEVICE, HALF).requires_grad_()
    parameters = dict(module.named_parameters())
    scale = 1000
    actual = torch.autograd.grad(fused_function(x, parameters, 1), [x], torch.full_like(x, scale))
    x = x.detach().double().requires_grad_()
    expected = torch.autograd.grad(copy.deepcopy(module).double()(x), [x], torch.full_like(x, scale))
    assert_close(dict(enumerate(actual)), dict(enumerate(expected)), TOLERANCES[HALF])


@runs_kernels
def test_kernels_are_the_identity_at_alpha_zero():
    module, x = make(16, 2, 8, alpha=0.0), make_input('channels_last', (5, 7)).to(DEVICE)
    assert torch.equal(fused_function(x, dict(module.named_parameters()), 2), x)


@runs_kernels
def test_kernels_show_a_missing_value():
    module, x = make(16, 2, 8), make_input('contiguous', (9, 15)).to(DEVICE)
    x[1, 3, 4, 5] = float('nan')
    output = fused_function(x, dict(module.named_parameters()), 2)
    assert torch.equal(output.isnan(), module(x).isnan())
    assert output[1, :8].isnan().all() and not output[0].isnan().any()


@runs_kernels
def test_kernels_are_a_proper_operator():
    """Schema, fake tensors, autograd registration, and AOT dispatch with symbolic sizes."""
    module, x = make(16, 2, 8), make_input('channels_last', (3, 5)).to(DEVICE).requires_grad_()
    torch.library.opcheck(
        fused.compressed_attention, (x, module.maps.weight, module.value.weight, module.alpha, module.groups)
    )


class Fused(CompressedSelfAttention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused_csa(x, self.maps.weight, self.value.weight, self.alpha, self.groups)


def make_fused() -> nn.Module:
    module = Fused(16, 8, 2, alpha=0.7)
    module.load_state_dict(make(16, 2, 8).state_dict())
    return module.to(DEVICE)


@runs_kernels
def test_kernels_compile_to_one_node():
    torch._dynamo.reset()
    module, x = make_fused(), make_input('channels_last', (3, 5)).to(DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager', dynamic=True)
    actual = output_and_gradients(lambda x, _: compiled(x), x.requires_grad_(), dict(module.named_parameters()))
    assert_close(actual, run_literal(module, x), 1e-5)


@runs_kernels
def test_kernels_export_as_one_node():
    module, x = make_fused(), make_input('contiguous', (3, 5)).to(DEVICE)
    dynamic = {0: torch.export.Dim('batch'), 2: torch.export.Dim('height'), 3: torch.export.Dim('width')}
    program = torch.export.export(module, (x,), dynamic_shapes=(dynamic,))
    calls = [node.target for node in program.graph.nodes if node.op == 'call_function']
    assert calls.count(torch.ops.csa_zoo.compressed_attention.default) == 1
    assert not any('softmax' in str(call) for call in calls)
    x = make_input('contiguous', (2, 7)).repeat(2, 1, 1, 1).to(DEVICE)
    torch.testing.assert_close(program.module()(x), module(x))


@runs_kernels
@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'x': (2, 8, 3, 5)}, 'expected the input to have 16 channels, but got 8 channels'),
        ({'maps': (16, 4, 1, 1)}, r'maps must be \(16, 8, 1, 1\) for 16 channels in 2 groups'),
        ({'x': (2, 16, 0, 5)}, 'not empty'),
        ({'value': (16, 16, 1, 1)}, r'value must be \(16, 8, 1, 1\)'),
        ({'maps': (1024, 8, 1, 1)}, 'at most 128 maps'),
        ({'groups': 3}, 'groups must divide the 16 channels'),
        ({'dtype': torch.float64}, 'float32, bfloat16 or float16'),
    ],
)
def test_kernels_refuse_what_does_not_fit(changes, message):
    arguments = {'x': (2, 16, 3, 5), 'maps': (16, 8, 1, 1), 'value': (16, 8, 1, 1), 'alpha': ()} | changes
    groups, dtype = arguments.pop('groups', 2), arguments.pop('dtype', SINGLE)
    with pytest.raises((ValueError, RuntimeError), match=message):
        fused_csa(*(torch.zeros(shape, device=DEVICE, dtype=dtype) for shape in arguments.values()), groups)


@on_a_gpu
@pytest.mark.parametrize(('dim', 'size'), [(256, (96, 32)), (512, (48, 16)), (1024, (24, 8)), (64, (15, 17))], ids=str)
@pytest.mark.parametrize('groups', [1, 2, 8])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('dtype', [SINGLE, HALF, BRAIN], ids=str)
def test_real_sizes(dim, size, groups, layout, dtype):
    """Against the eager module in float64, which equals the literal equations where those fit in memory."""
    module = make(dim, groups, 32, dtype)
    x = make_input(layout, size, dim).repeat(4, 1, 1, 1).to(DEVICE, dtype)
    x = x.to(memory_format=torch.channels_last) if layout == 'channels_last' else x
    assert can_fuse(x, 32)
    expected = run(copy.deepcopy(module).double(), x.double())
    assert_close(run_fused(module, x), expected, TOLERANCES[dtype])


@on_a_gpu
def test_module_agrees():
    module, x = make(64, 2, 32), make_input('channels_last', (15, 17), 64).to(DEVICE)
    parameters = {name: parameter.detach().clone().requires_grad_() for name, parameter in module.named_parameters()}
    eager = output_and_gradients(lambda x, p: functional_call(module, p, x), x.requires_grad_(), parameters)
    assert_close(run_fused(module, x), {name: tensor.double() for name, tensor in eager.items()}, 1e-5)


@pytest.mark.skipif(INTERPRETED, reason='the interpreter compiles nothing')
@pytest.mark.parametrize('name', ['_pool', '_broadcast', '_elementary_gradient', '_input_gradient'])
def test_compiles_for_hopper(name):
    """To a cubin, for bfloat16 at ResNet-50's first stage; needs Triton's own assembler and no GPU."""
    compiler = pytest.importorskip('triton.backends.nvidia.compiler')
    kernel = getattr(fused, name)
    x = torch.empty(1, 256, 96, 32, dtype=BRAIN, device='meta')
    maps = torch.empty(64, 128, 1, 1, dtype=BRAIN, device='meta')
    launch = fused._launch(kernel, x, maps, 2)
    constants = {key: value for key, value in launch._asdict().items() if not key.startswith('num_')}
    in_float32 = ('pooled', 'lse', 'column_sums', 'grad_elementary', 'grad_maps')
    numbers = ('batch', 'N', 'steps', 'stride_b', 'stride_n', 'grad_b', 'grad_n')
    constants |= {name: 1 for name in ('stride_c', 'grad_c') if name in kernel.arg_names}  # channels_last

    def type_of(name: str) -> str:
        if name in constants:
            return 'constexpr'
        return 'i32' if name in numbers else '*fp32' if name in in_float32 else '*bf16'

    source = triton.compiler.ASTSource(kernel, {name: type_of(name) for name in kernel.arg_names}, constants)
    options = {'num_warps': launch.num_warps, 'num_stages': launch.num_stages}
    target = triton.backends.compiler.GPUTarget('cuda', 90, 32)
    assert compiler.CUDABackend.supports_target(target)
    binary = triton.compile(source, target=target, options=options)
    assert binary.asm['cubin'].startswith(b'\x7fELF')
    assert binary.metadata.shared <= 99 * 1024  # of a consumer GPU


@pytest.mark.skipif(INTERPRETED, reason='the interpreter takes any device')
def test_needs_a_gpu():
    module = CompressedSelfAttention(16)
    x = torch.randn(2, 16, 5, 7)
    assert not can_fuse(x, 32)
    with pytest.raises(ValueError, match='need a CUDA device, got an input on cpu'):
        fused_csa(x, module.maps.weight, module.value.weight, module.alpha, module.groups)


def test_imports_without_triton():
    code = (
        'import sys; sys.modules["triton"] = None\n'
        'import torch; from csa_zoo.attention.fused import can_fuse\n'
        'assert not can_fuse(torch.randn(2, 16, 5, 7), 32)'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
