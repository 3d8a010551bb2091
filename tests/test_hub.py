"""The Hub: publish a run and load it by name, as users do, against a server on this machine; and what is refused."""

import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from hub_server import Commit, HubServer, Repository, client_of, make_run
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from safetensors.torch import load, load_file, save_file
from test_train import load_script
from timm.models import PretrainedCfg

from csa_zoo.checkpoints import (
    Checkpoint,
    check_checkpoints,
    check_repository,
    check_weights,
    key_metric,
    read_checkpoints,
    registered_checkpoints,
)
from csa_zoo.hub import publish, render_card

REPO = 'me/l2net_hardnet_csa.test'


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    connect = socket.socket.connect

    def checked(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ('127.0.0.1', '::1'), f'connection to {address}'
        return connect(self, address)

    monkeypatch.setattr(socket.socket, 'connect', checked)


@pytest.fixture
def hub(tmp_path):
    with HubServer() as server, client_of(server, tmp_path / 'cache'):
        yield server


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('hub') / 'run')


@pytest.fixture(scope='module')
def other_run(tmp_path_factory):
    """The same architecture with other weights."""
    return make_run(tmp_path_factory.mktemp('hub') / 'other', seed=1)


@pytest.fixture
def copied_run(run, tmp_path):
    """A run to change or damage."""
    return Path(shutil.copytree(run, tmp_path / 'run', ignore=shutil.ignore_patterns('state')))


@torch.inference_mode()
def embed(name, **arguments):
    model = timm.create_model(name, pretrained=True, **arguments).eval()
    images = torch.rand(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    return model(images)


IN_A_NEW_PROCESS = """
import sys
import numpy as np
import torch
import csa_zoo, timm
name, output = sys.argv[1:]
model = timm.create_model(name, pretrained=True, num_classes=0).eval()
images = torch.rand(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    np.save(output, model(images).numpy())
"""


def embed_in_a_new_process(name, folder, endpoint):
    environment = {
        **os.environ,
        'HF_ENDPOINT': endpoint,
        'HF_HOME': str(folder / 'home'),
        'HF_HUB_OFFLINE': '0',
        'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1',
        'OMP_NUM_THREADS': str(torch.get_num_threads()),
    }
    command = [sys.executable, '-c', IN_A_NEW_PROCESS, name, str(folder / 'embeddings.npy')]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.from_numpy(np.load(folder / 'embeddings.npy'))


def test_train_publish_and_load_in_a_new_process(hub, tmp_path, monkeypatch):
    monkeypatch.setenv('CSA_ZOO_CACHE', str(tmp_path / 'images'))
    run, name = tmp_path / 'run', 'me/resnet18_pcb_csa.pedestrians'
    load_script('reid').main(
        [
            '--data_options={"num_identities": 4, "images_per_camera": 2}',
            '--image_size=[48,24]',
            '--batch_size=8',
            '--epochs=1',
            f'--output={run}',
        ]
    )
    url = publish(run, name)
    assert url == f'{hub.endpoint}/{name}/commit/{hub.repositories[name].commits[-1].oid}'
    loaded = embed_in_a_new_process(f'hf-hub:{name}', tmp_path, hub.endpoint)
    torch.testing.assert_close(loaded, embed(f'local-dir:{run}', num_classes=0), rtol=0, atol=0)


def test_offline_from_the_cache(hub, run, monkeypatch):
    publish(run, REPO)
    trained = embed(f'hf-hub:{REPO}')
    asked = len(hub.log)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    torch.testing.assert_close(embed(f'hf-hub:{REPO}'), trained, rtol=0, atol=0)
    assert check_repository(REPO) == hub.repositories[REPO].commits[-1].oid
    assert len(hub.log) == asked


def test_what_is_published(hub, copied_run):
    run = copied_run
    for figure in ('attention.png', 'ranked_lists.png'):
        (run / figure).write_bytes((run / 'curves.png').read_bytes())
    publish(run, REPO)
    files = hub.files(REPO)
    as_they_are = ['model.safetensors', 'config.json', 'metrics.json', 'curves.png', 'attention.png']
    assert set(files) == {*as_they_are, 'recipe.yaml', 'README.md'}
    assert all(files[name] == (run / name).read_bytes() for name in as_they_are)
    assert b'/home/someone' in (run / 'recipe.yaml').read_bytes()
    assert b'/home' not in b''.join(files.values())
    assert [commit.message.split(' ')[0] for commit in hub.repositories[REPO].commits] == ['initial', 'Publish']


def test_only_what_changed_is_sent_again(hub, copied_run):
    run = copied_run
    first = publish(run, REPO)
    sent = len(hub.log)
    assert publish(run, REPO) == first
    assert len(hub.repositories[REPO].commits) == 2
    metrics = json.loads((run / 'metrics.json').read_text())
    (run / 'metrics.json').write_text(json.dumps({**metrics, 'metrics': {'fpr95_liberty': 0.01}}))
    assert publish(run, REPO) != first
    before, after = (commit.files for commit in hub.repositories[REPO].commits[1:])
    assert {name for name in after if after[name] != before[name]} == {'metrics.json', 'README.md'}
    assert not any(line.startswith('PUT') for line in hub.log[sent:])


def test_dry_run_contacts_nobody(hub, run, capsys):
    assert publish(run, REPO, dry_run=True) == f'{hub.endpoint}/{REPO}'
    printed = capsys.readouterr().out
    size = (run / 'model.safetensors').stat().st_size
    assert f'{size:,} bytes  model.safetensors' in printed
    assert 'bytes  README.md' in printed and '## Limits and misuse' in printed
    assert hub.log == []


@pytest.mark.parametrize(('classes', 'shape'), [(0, 128), (7, 7), (None, 128)])
def test_number_of_classes(hub, run, classes, shape):
    publish(run, REPO)
    arguments = {} if classes is None else {'num_classes': classes}
    loaded = timm.create_model(f'hf-hub:{REPO}', pretrained=True, **arguments)
    assert embed(f'hf-hub:{REPO}', **arguments).shape == (2, shape)
    trained = load_file(run / 'model.safetensors')
    assert {name for name in loaded.state_dict() if name not in trained} == (
        {'fc.weight', 'fc.bias'} if classes else set()
    )
    for name, value in trained.items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)


def test_revisions_and_a_file_that_changes_on_the_server(hub, run, other_run):
    old, new = (embed(f'local-dir:{folder}') for folder in (run, other_run))
    assert (old - new).abs().max() > 0.01
    first = publish(run, REPO).split('/')[-1]
    torch.testing.assert_close(embed(f'hf-hub:{REPO}'), old, rtol=0, atol=0)
    publish(other_run, REPO)
    torch.testing.assert_close(embed(f'hf-hub:{REPO}'), new, rtol=0, atol=0)
    torch.testing.assert_close(embed(f'hf-hub:{REPO}@{first}'), old, rtol=0, atol=0)
    assert check_repository(REPO) == hub.repositories[REPO].commits[-1].oid
    assert check_repository(REPO, revision=first) == first


def test_an_upload_that_fails_once_is_repeated(hub, run):
    hub.failures['PUT /lfs'] = [503]
    publish(run, REPO)
    assert hub.files(REPO)['model.safetensors'] == (run / 'model.safetensors').read_bytes()


def test_an_interrupted_publication_leaves_nothing_and_goes_on(hub, run):
    hub.failures[f'POST /api/models/{REPO}/commit'] = [500]
    with pytest.raises(OSError, match='nothing was published: publish again later'):
        publish(run, REPO)
    assert hub.files(REPO) == {}
    sent = len(hub.log)
    publish(run, REPO)
    assert 'model.safetensors' in hub.files(REPO)
    assert not any(line.startswith('PUT') for line in hub.log[sent:])  # they had arrived


def test_a_refused_upload_of_a_large_file(hub, run):
    hub.failures['PUT /lfs'] = [413, 413]
    with pytest.raises(OSError, match='too large for the Hub'):
        publish(run, REPO)
    assert hub.files(REPO) == {}


@pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version('1.24'), reason='older versions begin a broken download again'
)
def test_a_download_that_breaks_off_is_resumed(hub, run, monkeypatch):
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 65536)  # what is kept is whole chunks, of 10 MB otherwise
    publish(run, REPO)
    hub.cut_after = 1_000_000
    torch.testing.assert_close(embed(f'hf-hub:{REPO}'), embed(f'local-dir:{run}'), rtol=0, atol=0)
    assert hub.cut_after is None
    weights = [line for line in hub.log if line.startswith('GET') and 'model.safetensors' in line]
    assert [line.endswith(' Range') for line in weights] == [False, True]


WRONG_TOKEN = 'hf_loopbackWrongToken'


@pytest.mark.parametrize(
    ('token', 'repo', 'message'),
    [
        (WRONG_TOKEN, REPO, 'does not accept the token.*hf auth login'),
        (HubServer.READ_TOKEN, REPO, f'may not write to {REPO}'),
        (HubServer.TOKEN, 'someone/model', 'someone must be you or an organization of yours'),
        (HubServer.TOKEN, 'someone/public', 'someone must be you or an organization of yours'),
    ],
)
def test_no_right_to_publish(hub, run, token, repo, message, capfd, caplog):
    hub.repositories['someone/public'] = Repository(private=False)
    with pytest.raises(PermissionError, match=message) as raised:
        publish(run, repo, token=token)
    assert hub.repositories.keys() == {'someone/public'}
    assert hub.files('someone/public') == {}
    told = ''.join(map(str, (raised.getrepr(chain=True), capfd.readouterr(), caplog.text)))
    assert token not in told


def test_no_token(tmp_path, run):
    with (
        HubServer() as hub,
        client_of(hub, tmp_path, token=None),
        pytest.raises(PermissionError, match=r'hf auth login.*HF_TOKEN'),
    ):
        publish(run, REPO)
    assert hub.log == []


def test_organizations_and_private_repositories(hub, run, tmp_path):
    publish(run, 'our-lab/model', private=True)
    assert hub.repositories['our-lab/model'].private
    torch.testing.assert_close(embed('hf-hub:our-lab/model'), embed(f'local-dir:{run}'), rtol=0, atol=0)
    with client_of(hub, tmp_path / 'stranger', token=None), pytest.raises(RepositoryNotFoundError):
        embed('hf-hub:our-lab/model')
    publish(run, REPO)
    with pytest.raises(PermissionError, match='exists and is public'):
        publish(run, REPO, private=True)


def test_pull_requests(hub, run, other_run):
    with pytest.raises(FileNotFoundError, match='no repository'):
        publish(run, REPO, create_pr=True)
    hub.repositories['someone/model'] = Repository(private=False)
    assert publish(run, 'someone/model', create_pr=True) == f'{hub.endpoint}/someone/model/discussions/1'
    assert hub.files('someone/model') == {}
    proposed = hub.repositories['someone/model'].pull_requests[0].files
    assert proposed['model.safetensors'] == (run / 'model.safetensors').read_bytes()


def test_no_connection(run, tmp_path, monkeypatch):
    with HubServer() as hub:
        pass
    with client_of(hub, tmp_path):
        with pytest.raises(ConnectionError, match=r'cannot be reached.*publish again'):
            publish(run, REPO)
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        with pytest.raises(ConnectionError, match='HF_HUB_OFFLINE'):
            publish(run, REPO)


def test_a_missing_repository(hub):
    with pytest.raises(RepositoryNotFoundError):
        embed('hf-hub:me/nothing')
    with pytest.raises(RepositoryNotFoundError):
        check_repository('me/nothing')


@pytest.mark.parametrize('repo', ['name', 'a/b/c', 'me/two words', '../run', ''])
def test_repository_names(hub, run, repo):
    with pytest.raises(ValueError, match=r'owner/name|Repo id'):
        publish(run, repo)
    assert hub.log == []


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def pickles(run, tmp_path):
    """A checkpoint as torch saves it, and a pickle that runs code."""
    torch.save(load_file(run / 'model.safetensors'), tmp_path / 'honest.bin')
    return [(tmp_path / 'honest.bin').read_bytes(), pickle.dumps(Malicious(tmp_path / 'unpickled'))]


@pytest.mark.parametrize('hidden', [False, True], ids=['default name', 'named by config.json'])
def test_a_repository_of_pickles_is_not_read(hub, run, tmp_path, hidden):
    for content in pickles(run, tmp_path):
        config = json.loads((run / 'config.json').read_text())
        if hidden:
            config['pretrained_cfg'] |= {'hf_hub_filename': 'pytorch_model.bin', 'custom_load': 'hf'}
        files = {'config.json': json.dumps(config).encode(), 'pytorch_model.bin': content}
        hub.repositories[REPO] = Repository(False, [Commit('pickles', files)])
        with pytest.raises(Exception, match=r'model\.safetensors'):
            embed(f'hf-hub:{REPO}')
        with pytest.raises(ValueError, match='any other format are not read'):
            check_repository(REPO)
    assert not (tmp_path / 'unpickled').exists()
    assert not any('pytorch_model.bin' in line for line in hub.log)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'weights.pth'])
def test_a_folder_of_pickles_is_not_read(run, tmp_path, name):
    for content in pickles(run, tmp_path):
        (tmp_path / 'config.json').write_bytes((run / 'config.json').read_bytes())
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileNotFoundError, match=r'no model\.safetensors'):
            embed(f'local-dir:{tmp_path}')
    assert not (tmp_path / 'unpickled').exists()


def test_the_list_of_checkpoints_and_the_registry_agree():
    assert check_checkpoints(read_checkpoints(), registered_checkpoints()) == []


def test_what_differs_between_list_and_registry(tmp_path):
    (tmp_path / 'weights.safetensors').write_bytes(b'weights')
    right, commit = hashlib.sha256(b'weights').hexdigest(), 40 * 'a'
    here = PretrainedCfg(file=str(tmp_path / 'weights.safetensors'))
    there = PretrainedCfg(hf_hub_id=f'me/name@{commit}')
    listed = {
        'l2net_hardnet.good': Checkpoint('weights.safetensors', right),
        'resnet50_pcb.good': Checkpoint(f'me/name@{commit}', right),
    }
    registered = {'l2net_hardnet.good': here, 'resnet50_pcb.good': there}
    assert check_checkpoints(listed, registered) == []

    def problems(name, checkpoint, config):
        return check_checkpoints({**listed, name: checkpoint}, {**registered, name: config})

    (message,) = problems('l2net_hardnet.x', Checkpoint('weights.safetensors', 64 * '0'), here)
    assert f'is {right}, in checkpoints.json {64 * "0"}' in message
    gone = PretrainedCfg(file=str(tmp_path / 'gone.safetensors'))
    (message,) = problems('l2net_hardnet.x', Checkpoint('gone.safetensors', right), gone)
    assert 'No such file' in message and 'gone.safetensors' in message
    (message,) = problems('resnet50_pcb.x', Checkpoint(f'me/name@{40 * "b"}', right), there)
    assert message == (
        f'resnet50_pcb.x comes from me/name@{commit} in the registry and from me/name@{40 * "b"} in the list'
    )
    (message,) = problems('resnet50_pcb.x', Checkpoint('me/name', right), PretrainedCfg(hf_hub_id='me/name'))
    assert 'must come from a file or from owner/name@commit, not from me/name' in message
    assert check_checkpoints(listed, {'l2net_hardnet.new': here}) == [
        'l2net_hardnet.good is listed and not registered',
        'l2net_hardnet.new is registered and not listed',
        'resnet50_pcb.good is listed and not registered',
    ]


def test_a_damaged_list(tmp_path):
    path = tmp_path / 'checkpoints.json'
    path.write_text('{"a.b": {"source": "me/name@main"}}')
    with pytest.raises(ValueError, match=r'has a source and a sha256.*sha256'):
        read_checkpoints(path)


def test_a_listed_checkpoint_is_compared_with_its_hash(hub, run, monkeypatch):
    publish(run, REPO)
    commit = check_repository(REPO)
    right = hashlib.sha256((run / 'model.safetensors').read_bytes()).hexdigest()
    for sha256, revision in ((right, commit), (64 * '0', 40 * '0')):  # another commit of it is not in the list
        listed = {'l2net_hardnet_csa.test': Checkpoint(f'{REPO}@{revision}', sha256)}
        monkeypatch.setattr('csa_zoo.checkpoints.read_checkpoints', lambda listed=listed: listed)
        assert check_repository(REPO) == commit
    listed = {'l2net_hardnet_csa.test': Checkpoint(f'{REPO}@{commit}', 64 * '0')}
    monkeypatch.setattr('csa_zoo.checkpoints.read_checkpoints', lambda: listed)
    with pytest.raises(ValueError, match=f'is not the checkpoint l2net_hardnet_csa.test: its SHA-256 is {right}'):
        check_repository(REPO)


def test_key_metric_is_the_card_s(run, tmp_path, monkeypatch):
    monkeypatch.setattr('csa_zoo.checkpoints.CARDS', tmp_path)
    assert key_metric('l2net_hardnet_csa.test') is None
    render_card(run, REPO).save(tmp_path / 'l2net_hardnet_csa.test.md')
    assert key_metric('l2net_hardnet_csa.test') == 'fpr95 1.2 % (liberty)'


def test_a_truncated_file_on_the_server(hub, run):
    files = {name: (run / name).read_bytes() for name in ('config.json', 'model.safetensors')}
    files['model.safetensors'] = files['model.safetensors'][:-100]
    hub.repositories[REPO] = Repository(False, [Commit('damaged', files)])
    with pytest.raises(ValueError, match='damaged or no safetensors'):
        check_repository(REPO)


def header(**changes):
    """The bytes of a file with this header and no data."""
    text = json.dumps(changes).encode()
    return struct.pack('<Q', len(text)) + text


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'\x80\x04.',
        b'PK\x03\x04' + bytes(100),
        struct.pack('<Q', 2**62) + b'{}',
        header(a={'dtype': 'F32', 'shape': [2**40], 'data_offsets': [0, 2**42]}),
        header(a={'dtype': 'F32', 'shape': [-1], 'data_offsets': [0, 0]}),
        struct.pack('<Q', 40) + b'[' * 40,
    ],
    ids=['empty', 'pickle', 'zip', 'endless header', 'terabytes', 'negative', 'nested'],
)
def test_no_safetensors(copied_run, content):
    (copied_run / 'model.safetensors').write_bytes(content)
    with pytest.raises(ValueError, match='damaged or no safetensors'):
        check_weights(copied_run)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_damaged_header_or_cut_file_is_noticed_or_harmless(run, tmp_path_factory, data):
    content = bytearray((run / 'model.safetensors').read_bytes())
    size = 8 + struct.unpack('<Q', content[:8])[0]
    folder = tmp_path_factory.mktemp('fuzz')
    (folder / 'config.json').write_bytes((run / 'config.json').read_bytes())
    if data.draw(st.booleans(), 'cut'):
        del content[data.draw(st.integers(0, len(content) - 1), 'length') :]
        harmless = False
    else:
        content[data.draw(st.integers(0, size - 1), 'place')] = data.draw(st.integers(0, 255), 'byte')
        harmless = True  # it may be: the byte may be the same, or in a name of a dtype
    (folder / 'model.safetensors').write_bytes(content)
    try:
        check_weights(folder)
    except ValueError as error:
        assert str(folder) in str(error)
    else:
        assert harmless


def test_weights_of_another_architecture(copied_run):
    path = copied_run / 'model.safetensors'
    weights = load(path.read_bytes())  # not `load_file`, whose tensors are pages of the file
    check_weights(copied_run)
    name = 'layer3.csa.maps.weight'
    save_file({key: value for key, value in weights.items() if key != name}, path)
    with pytest.raises(ValueError, match=f'{re.escape(name)} is missing'):
        check_weights(copied_run)
    save_file({**weights, 'extra': torch.zeros(1)}, path)
    with pytest.raises(ValueError, match='extra is not of this architecture'):
        check_weights(copied_run)
    save_file({**weights, name: weights[name][:16].clone()}, path)
    with pytest.raises(ValueError, match=re.escape(f'{name} is (16, 64, 1, 1) in the file and (32, 64, 1, 1)')):
        check_weights(copied_run)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'architecture': 'resnet_unknown'}, "architecture 'resnet_unknown', which timm does not know"),
        ({'architecture': ['l2net_hardnet_csa']}, 'which timm does not know'),
        ({'model_args': {'embed_dim': 10**9}}, 'does not fit'),
        ({'model_args': {'attn_kwargs': {'num_maps': 10**9}}}, 'does not fit'),
        ({'model_args': {'no_such': 1}}, 'cannot be built from it'),
        ({'model_args': {'img_size': 33}}, 'cannot be built from it.*multiple of 4'),
        ({'pretrained_cfg': 3}, 'cannot be built from it'),
    ],
)
def test_configs_that_do_not_fit(copied_run, changes, message):
    path = copied_run / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        check_weights(copied_run)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_diverged_weights_are_not_published(hub, copied_run, value):
    weights = load_file(copied_run / 'model.safetensors')
    weights['layer5.0.weight'][3, 2, 1, 0] = value
    save_file(weights, copied_run / 'model.safetensors')
    with pytest.raises(ValueError, match=r'layer5\.0\.weight holds NaN or infinity'):
        publish(copied_run, REPO)
    assert hub.log == []


def test_a_published_classifier_and_changed_weights_of_a_person_model(hub, tmp_path):
    run = make_run(tmp_path / 'run', 'resnet18_pcb_csa', num_classes=5, num_parts=4, reduction_dim=32)
    publish(run, 'me/people')
    assert embed('hf-hub:me/people').shape == (2, 5)
    assert embed('hf-hub:me/people', num_classes=9).shape == (2, 9)
    embedding = embed('hf-hub:me/people', num_classes=0)
    assert embedding.shape == (2, 4 * 512)
    torch.testing.assert_close(embedding, embed(f'local-dir:{run}', num_classes=0), rtol=0, atol=0)
    assert tuple(timm.create_model('hf-hub:me/people').pretrained_cfg['input_size']) == (3, 96, 48)


def test_the_template_is_where_an_installed_package_looks_for_it():
    from csa_zoo import hub as module

    assert Path(module.TEMPLATE).is_file()
