"""The benchmark: what it compares is what it says, floors and memory are exact, and the command writes it all down."""

import json
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from csa_zoo import CompressedSelfAttention, SelfAttention
from csa_zoo.benchmark import Setting, attention_named, csa_backward_cost, csa_forward_cost
from csa_zoo.benchmark.attentions import EfficientAttention, NystromAttention, misfit
from csa_zoo.benchmark.cases import compare_networks, create_network, find_places, network_subject, sweep
from csa_zoo.benchmark.measure import peak_bytes, time_interleaved
from csa_zoo.cli import main

CPU = torch.device('cpu')


def outputs_and_gradients(module, x):
    """What a module gives for x, and the gradients of x and of its parameters."""
    x = x.clone().requires_grad_()
    y = module(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * weight).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize(
    ('name', 'reference'),
    [
        ('sa-naive', lambda: SelfAttention(16)),
        ('sa-padded', lambda: SelfAttention(16)),
        ('csa-literal-g1', lambda: CompressedSelfAttention(16, num_maps=5, groups=1)),
        ('csa-literal-g4', lambda: CompressedSelfAttention(16, num_maps=5, groups=4)),
        ('csa-g4', lambda: CompressedSelfAttention(16, num_maps=5, groups=4)),
    ],
)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_another_way_to_compute_is_the_same_function(name, reference, memory_format):
    torch.manual_seed(0)
    module = attention_named(name, num_maps=5)(16).double()
    twin = reference().double()
    twin.load_state_dict(module.state_dict())
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
    for ours, theirs in zip(outputs_and_gradients(module, x), outputs_and_gradients(twin, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_efficient_attention_is_its_explicit_form():
    torch.manual_seed(0)
    module = EfficientAttention(16, alpha=0.7).double()
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    query, key, value = (layer(x).flatten(2) for layer in (module.query, module.key, module.value))
    # every position's attention to every other, (B, N, N)
    attention = query.softmax(1).transpose(1, 2) @ key.softmax(2)
    expected = x + 0.7 * torch.einsum('bij,bcj->bci', attention, value).reshape(x.shape)
    torch.testing.assert_close(module(x), expected)


def test_nystrom_with_every_position_as_a_landmark_is_self_attention():
    torch.manual_seed(0)
    module = NystromAttention(16, embed_dim=16, landmarks=12, iterations=40, alpha=1.0).double()
    sa = SelfAttention(16, embed_dim=16, alpha=1.0).double()
    sa.load_state_dict(module.state_dict())
    x = 3 * torch.randn(2, 16, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(module(x), sa(x), rtol=1e-4, atol=1e-4)
    few = NystromAttention(16, embed_dim=16, landmarks=2, alpha=1.0).double()
    few.load_state_dict(module.state_dict())
    assert (few(x) - sa(x)).abs().max() > 1e-3


@pytest.mark.parametrize(
    'name',
    ['efficient', 'nystrom', 'se', 'eca', 'cbam', 'coord', 'gc', 'nl', 'bat', 'halo', 'lambda', 'timm.layers:SEModule'],
)
def test_attentions_keep_the_shape(name):
    module = attention_named(name)(32)
    x = torch.randn(2, 32, 16, 8)
    y = module(x)
    assert y.shape == x.shape
    assert misfit(name, [(32, 16, 8)]) is None


def test_misfits_say_why():
    assert 'multiples of 8, not 12×8' in misfit('halo', [(32, 16, 8), (32, 12, 8)])
    assert '12 channels into 8' in misfit('csa-g8', [(12, 8, 8)])


@pytest.mark.parametrize('name', ['csa', 'nothing', 'no.such.module:Attention', 'timm.layers:NoSuchLayer'])
def test_unknown_attention(name):
    with pytest.raises(ValueError, match=name):
        attention_named(name)


def multiplications(function):
    """Multiply-adds of matrix products that PyTorch counts."""
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops() // 2


@pytest.mark.parametrize(('batch', 'channels', 'positions', 'maps', 'groups'), [(2, 24, 35, 5, 1), (3, 32, 18, 4, 4)])
def test_floors_count_every_multiplication(batch, channels, positions, maps, groups):
    c = channels // groups
    x = torch.randn(batch, groups, positions, c, requires_grad=True)
    base_vectors = torch.randn(groups, c, maps, requires_grad=True)
    value = torch.randn(groups, c, c, requires_grad=True)

    def forward():
        scores = x @ base_vectors
        elementary = (scores.softmax(2).transpose(2, 3) @ x) @ value
        return x + scores.softmax(3) @ elementary

    sizes = (batch, channels, positions, maps, groups)
    y, counted = multiplications(forward)
    assert csa_forward_cost(*sizes).multiplications == counted
    _, counted = multiplications(lambda: y.backward(torch.ones_like(y)))
    assert csa_backward_cost(*sizes).multiplications == counted


def test_floors_of_bytes_are_passes_over_the_feature_map():
    x = torch.empty(4, 256, 96, 32, dtype=torch.bfloat16)
    sizes = (4, 256, 96 * 32, 32, 2, 2)
    module = CompressedSelfAttention(256, num_maps=32, groups=2, learnable_alpha=False).bfloat16()
    weights = sum(parameter.nbytes for parameter in module.parameters())
    assert csa_forward_cost(*sizes).bytes == 3 * x.nbytes + weights
    assert csa_backward_cost(*sizes).bytes == 5 * x.nbytes + 2 * weights


def test_peak_memory_is_exact():
    kept = []

    def allocate():
        a = torch.empty(10_000, dtype=torch.uint8)
        b = torch.empty(5_000, dtype=torch.uint8)
        del a
        c = torch.empty(2_000, dtype=torch.uint8)
        if not kept:
            kept.append(torch.empty(1_000_000, dtype=torch.uint8))
        return b, c

    assert peak_bytes(allocate, CPU) == 15_000


def test_peak_memory_of_naive_attention_is_its_map():
    module = attention_named('sa-naive')(8)
    x = torch.randn(1, 8, 24, 24)

    def infer():
        with torch.inference_mode():
            module(x)

    peak = peak_bytes(infer, CPU)
    map_bytes = 4 * (24 * 24) ** 2
    assert 2 * map_bytes <= peak < 2.2 * map_bytes  # scores, and their softmax
    assert peak == peak_bytes(infer, CPU)


def test_rounds_take_turns():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in 'abc'}
    seconds = time_interleaved(calls, rounds=4, device=CPU, min_seconds=0.0)
    assert ''.join(called[-12:]) == 'abc' + 'bca' + 'cab' + 'abc'
    assert {name: len(values) for name, values in seconds.items()} == {'a': 4, 'b': 4, 'c': 4}


def test_short_calls_are_repeated():
    called = []
    [seconds] = time_interleaved({'a': lambda: called.append(0)}, rounds=1, device=CPU, min_seconds=0.01)['a']
    assert len(called) > 100
    assert seconds < 0.001


def test_every_attention_is_compiled(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=counter))
    setting = Setting(CPU, compile=True)
    for maps in range(1, 12):  # more than PyTorch compiles of one piece of code by itself
        module = setting.compiled(attention_named('csa-literal-g1', maps)(8))
        with torch.inference_mode():
            module(torch.randn(1, 8, 2, 3))
    assert counter.frame_count == 11


def test_sweep_leaves_out_what_would_not_fit():
    names = ('none', 'sa-naive', 'csa-g1')
    attentions = {name: attention_named(name, num_maps=2) for name in names}
    limit = 8_000_000  # at 32×32 the three maps that SA trains with are 12.6 MB, and CSA needs less than 1
    comparisons = sweep((32, 8, 16), 8, attentions, Setting(CPU), rounds=1, memory=limit)
    assert [comparison.shape for comparison in comparisons] == [(8, 8, 8), (8, 16, 16), (8, 32, 32)]
    measured = [{m.attention for m in comparison.measurements} for comparison in comparisons]
    assert measured == [{'sa-naive', 'csa-g1'}, {'sa-naive', 'csa-g1'}, {'csa-g1'}]
    assert comparisons[1].skipped == {}
    assert 'GB' in comparisons[2].skipped['sa-naive']
    for comparison in comparisons:
        for measurement in comparison.measurements:
            assert 0 < measurement.peak_bytes < limit


@pytest.mark.parametrize(('name', 'size'), [('resnet18_pcb', (48, 24)), ('l2net_hardnet', (32, 32))])
def test_training_steps_train_everything_and_repeat(name, size):
    model = create_network(name, size)
    images = Setting(CPU).random((4, *find_places(name, size).shape))
    subject = network_subject(model, images, Setting(CPU))
    subject.module.train()
    before = {key: value.clone() for key, value in model.named_parameters()}
    subject.step()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.equal(parameter, before[key]), key


def test_attention_uses_memory_on_top_of_the_network():
    network = find_places('l2net_hardnet')
    assert (network.shape, network.stages, network.stage_shapes) == ((1, 32, 32), (2,), ((64, 16, 16),))
    names = ('none', 'sa-naive', 'csa-literal-g2', 'csa-g2')
    makes = {name: attention_named(name) for name in names}
    comparison = compare_networks(network, makes, Setting(CPU), rounds=1, batch_size=4)
    for mode in ('inference', 'training'):
        peaks = {m.attention: m.peak_bytes for m in comparison.measurements if m.mode == mode}
        assert list(peaks) == list(names)
        assert peaks['none'] <= min(peaks.values())
        assert max(peaks.values()) == peaks['sa-naive']
    with pytest.raises(ValueError, match='stage 9'):
        find_places('l2net_hardnet', stages=(9,))


def test_the_stages_of_the_paper():
    network = find_places('resnet50_pcb')
    assert network.stage_shapes == ((256, 96, 32), (512, 48, 16), (1024, 24, 8))
    assert (network.shape, network.stages) == ((3, 384, 128), (0, 1, 2))


def test_command(tmp_path, capsys):
    attentions = ['none', 'csa-literal-g2', 'csa-g2', 'sa', 'halo']
    arguments = ['--model', 'test_resnet', '--image-size', '64', '48', '--batch-size', '2', '--stages', '0', '1']
    growth = ['--sides', '8', '16', '--channels', '8', '--num-maps', '4']
    output = tmp_path / 'out'
    run = ['--rounds', '2', '--device', 'cpu', '--output', str(output)]
    main(['benchmark', *arguments, *growth, '--attention', *attentions, *run])
    printed = capsys.readouterr().out
    record = json.loads((output / 'benchmark.json').read_text())
    assert record['environment']['torch'] == torch.__version__
    assert record['environment']['layout'] == 'channels_last'
    assert all(rate > 0 for rate in record['rates'].values())

    [network] = record['networks']
    assert (network['subject'], network['shape'], network['batch_size']) == ('test_resnet', [3, 64, 48], 2)
    assert 'multiples of 8' in network['skipped']['halo']  # 8×6 at the second stage
    assert {m['attention'] for m in network['measurements']} == set(attentions) - {'halo'}
    assert [module['shape'] for module in record['modules']] == [[32, 16, 12], [48, 8, 6]]
    assert [module['shape'] for module in record['growth']] == [[8, 8, 8], [8, 16, 16]]
    for comparison in [network, *record['modules']]:
        assert all(len(m['seconds']) == 2 and min(m['seconds']) > 0 for m in comparison['measurements'])
    floors = {(tuple(floor['shape']), floor['groups']): floor for floor in record['floors']}
    assert floors[(32, 16, 12), 2]['forward'] == vars(csa_forward_cost(1, 32, 192, 4, 2))

    assert (output / 'benchmark.md').read_text() in printed
    [plain] = [line.split('|')[1:-1] for line in printed.splitlines() if line.startswith('| none')]
    assert [plain[column].split()[0] for column in (0, 2, 4, 6, 8)] == ['none', *['1.00'] * 4]
    assert '| 8×16×16 | 2 |' in printed  # floors
    assert (output / 'growth.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.skipif(torch.cuda.is_available(), reason='is about machines without a GPU')
def test_no_gpu_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(['benchmark', '--device', 'cuda', '--output', str(tmp_path)])
    assert 'no CUDA device' in capsys.readouterr().err


def test_command_errors_and_example(tmp_path, capsys):
    for arguments, message in (
        (['--model', 'no_such_model'], 'no_such_model'),
        (['--attention', 'csa'], "unknown attention 'csa'"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(['benchmark', *arguments, '--output', str(tmp_path)])
        assert exit_.value.code == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(['benchmark', '--help'])
    assert 'example: csa-zoo benchmark --device cuda' in ' '.join(capsys.readouterr().out.split())
