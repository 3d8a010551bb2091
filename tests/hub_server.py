"""A small Hub on the loopback interface, in memory: the HTTP API as far as `huggingface_hub` uses it; and a run for it.

One token may write to one user's and one organization's repositories. Faults can be asked for: a status instead of an
answer, or a download that breaks off. It shows that a client speaks the protocol, not what the real Hub accepts.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import constants

import csa_zoo
from csa_zoo.runs import Run

ROUTES: list[tuple[str, re.Pattern, str]] = []
REPO = r'(?P<repo>[^/]+/[^/]+)'


def route(method: str, pattern: str):
    """Register a method of `Handler` for a path."""

    def register(function):
        ROUTES.append((method, re.compile(pattern), function.__name__))
        return function

    return register


@dataclass
class Commit:
    """A state of a repository; large files are in it as their content, too."""

    message: str
    files: dict[str, bytes]

    @property
    def oid(self) -> str:
        """Hash of message and content, in the form of git's."""
        digest = hashlib.sha1(self.message.encode())
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()


@dataclass
class Repository:
    """The commits of the main branch, oldest first, and those of pull requests."""

    private: bool
    commits: list[Commit] = field(default_factory=lambda: [Commit('initial commit', {})])
    pull_requests: list[Commit] = field(default_factory=list)

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch name or hash means."""
        if revision == 'main':
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)


class HubServer:
    """The server; used as a context manager it listens on a free port of 127.0.0.1.

    Attributes:
        repositories: By `owner/name`.
        log: `METHOD path` of each request, with ` Range` where a part was asked for.
        failures: Statuses to answer with instead, by the method and the start of the path, each once.
        cut_after: If not None, the next answer with a body that is longer breaks off after so many bytes.
    """

    TOKEN, READ_TOKEN, USER, ORGANIZATION = 'hf_loopbackWriteToken', 'hf_loopbackReadToken', 'me', 'our-lab'

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files by SHA-256
        self.log: list[str] = []
        self.failures: dict[str, list[int]] = {}
        self.cut_after: int | None = None

    def __enter__(self) -> 'HubServer':
        handler = type('BoundHandler', (Handler,), {'hub': self})
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f'http://127.0.0.1:{self._server.server_port}'
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo: str) -> dict[str, bytes]:
        """What is on the main branch."""
        return self.repositories[repo].commits[-1].files


@contextmanager
def client_of(hub: HubServer, cache: Path, token: str | None = HubServer.TOKEN) -> Iterator[None]:
    """Let `huggingface_hub` in this process speak to the server, with an empty cache; it reads the environment once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, 'ENDPOINT', hub.endpoint)
        patch.setattr(
            constants, 'HUGGINGFACE_CO_URL_TEMPLATE', hub.endpoint + '/{repo_id}/resolve/{revision}/{filename}'
        )
        patch.setattr(constants, 'HF_HUB_CACHE', str(cache))
        patch.setattr(constants, 'HF_TOKEN_PATH', str(cache / 'no token'))
        patch.setattr(constants, 'HF_HUB_OFFLINE', False)
        patch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        patch.setattr(constants, 'HF_HUB_DISABLE_TELEMETRY', True)
        if token:
            patch.setenv('HF_TOKEN', token)
        else:
            patch.delenv('HF_TOKEN', raising=False)
        yield


def make_run(folder: Path, architecture: str = 'l2net_hardnet_csa', seed: int = 0, **model_args) -> Path:
    """The folder of a run, as training writes it but for the training: weights are random, metrics invented."""
    torch.manual_seed(seed)
    model = timm.create_model(architecture, **model_args)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith('.alpha'):
                parameter.fill_(0.5)  # from 0 the attention would change nothing
    is_reid = 'pcb' in architecture
    if is_reid:
        metrics = {'rank1': 0.75, 'mAP': 0.5, 'mAP_market': 0.4875, 'mINP': 0.25}
        recipe = {'pretrained': False, 'data': 'market1501', 'root': '/home/someone/data/Market-1501'}
    else:
        metrics = {'fpr95_liberty': 0.0125, 'fpr95_photographs': 0.5}
        recipe = {'train': ['/home/someone/yosemite', 'photographs'], 'test': ['/home/someone/liberty', 'photographs']}
    folder.mkdir()
    run = Run(Accelerator(cpu=True), folder, [])
    run.finish_epoch({'loss': 1.5, **metrics, 'seconds': 90.0})
    run.save_model(model, model_args, {'input_size': (3, 96, 48)} if is_reid else {})
    run.save_metrics(
        {
            'model': architecture,
            'task': 'person re-identification' if is_reid else 'patch-verification',
            **({'data': recipe['data']} if is_reid else {}),
            'metrics': metrics,
            'epochs': 1,
            'processes': 1,
            'train_seconds': 90.0,
            'versions': {'csa_zoo': csa_zoo.__version__, 'timm': timm.__version__, 'torch': torch.__version__},
        }
    )
    (folder / 'recipe.yaml').write_text(yaml.safe_dump({'model': architecture, **recipe, 'epochs': 1}))
    return folder


class Refusal(Exception):
    """An error to answer with."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    hub: HubServer
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        """Say nothing on stderr."""

    def handle_one(self) -> None:
        """Find the route and answer."""
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.hub.log.append(f'{self.command} {path}' + (' Range' if 'Range' in self.headers else ''))
        try:
            for start, statuses in self.hub.failures.items():
                if statuses and f'{self.command} {path}'.startswith(start):
                    raise Refusal(statuses.pop(0), 'asked to fail')
            for method, pattern, name in ROUTES:
                if method == self.command and (match := pattern.fullmatch(path)):
                    return getattr(self, name)(**match.groupdict())
            raise Refusal(404, f'no such route: {self.command} {path}')
        except Refusal as refusal:
            headers = {'X-Error-Message': str(refusal)} | ({'X-Error-Code': refusal.code} if refusal.code else {})
            self.answer(json.dumps({'error': str(refusal)}).encode(), refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def answer(self, content: bytes = b'', status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send an answer, or the beginning of it."""
        self.send_response(status)
        for name, value in {'Content-Length': str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        cut = self.hub.cut_after
        if cut is not None and len(content) > cut:
            self.hub.cut_after = None
            self.close_connection = True
            content = content[:cut]
        self.wfile.write(content)

    def answer_json(self, content: Any, status: int = 200) -> None:
        """Send JSON."""
        self.answer(json.dumps(content).encode(), status, {'Content-Type': 'application/json'})

    @property
    def token(self) -> str | None:
        """The token that the client sent; an unknown one is an error, whatever is asked for."""
        token = self.headers.get('Authorization', '').removeprefix('Bearer ') or None
        if token not in (None, self.hub.TOKEN, self.hub.READ_TOKEN):
            raise Refusal(401, 'Invalid credentials in Authorization header')
        return token

    def may_write(self, owner: str) -> None:
        """Raise unless the token allows it."""
        if self.token is None:
            raise Refusal(401, 'Invalid username or password.')
        if self.token != self.hub.TOKEN or owner not in (self.hub.USER, self.hub.ORGANIZATION):
            raise Refusal(403, f"You don't have the rights to write to the namespace {owner}")

    def repository(self, repo: str) -> Repository:
        """A repository that the token may read."""
        found = self.hub.repositories.get(repo)
        owned = repo.split('/')[0] in (self.hub.USER, self.hub.ORGANIZATION) and self.token
        if found is None or (found.private and not owned):
            raise Refusal(404 if self.token else 401, 'Repository not found', 'RepoNotFound')
        return found

    def commit_at(self, repo: str, revision: str) -> Commit:
        """A commit that the token may read."""
        commit = self.repository(repo).find(revision)
        if commit is None:
            raise Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return commit

    @route('GET', '/api/whoami-v2')
    def whoami(self):
        """The user whom the token belongs to."""
        self.answer_json({'type': 'user', 'name': self.hub.USER, 'orgs': [{'name': self.hub.ORGANIZATION}]})

    @route('POST', '/api/repos/create')
    def create(self):
        """Make a repository with an initial commit."""
        asked = json.loads(self.body)
        owner = asked.get('organization') or self.hub.USER
        self.may_write(owner)
        repo = f'{owner}/{asked["name"]}'
        answer = {'url': f'{self.hub.endpoint}/{repo}', 'name': repo}
        if repo in self.hub.repositories:
            return self.answer_json({**answer, 'error': 'You already created this model repo'}, 409)
        private = asked.get('visibility') == 'private' or bool(asked.get('private'))
        self.hub.repositories[repo] = Repository(private)
        return self.answer_json(answer)

    @route('POST', '/api/validate-yaml')
    def validate_yaml(self):
        """Look at the metadata of a card."""
        content = json.loads(self.body)['content']
        try:
            metadata = yaml.safe_load(content.split('---\n')[1])
            errors = [] if isinstance(metadata, dict) else [{'message': 'metadata are no dictionary'}]
        except (IndexError, yaml.YAMLError) as error:
            errors = [{'message': str(error)}]
        self.answer_json({'errors': errors, 'warnings': []}, 400 if errors else 200)

    @route('POST', f'/api/models/{REPO}/preupload/(?P<revision>.+)')
    def preupload(self, repo: str, revision: str):
        """Say which files go to the large file storage, and the hashes of those that are here."""
        present = self.commit_at(repo, revision).files
        files = []
        for file in json.loads(self.body)['files']:
            large = file['path'].endswith(('.safetensors', '.bin', '.png'))
            entry = {'path': file['path'], 'uploadMode': 'lfs' if large else 'regular', 'shouldIgnore': False}
            if file['path'] in present:
                entry['oid'] = _oid(file['path'], present[file['path']])
            files.append(entry)
        self.answer_json({'files': files})

    @route('POST', f'/{REPO}.git/info/lfs/objects/batch')
    def lfs_batch(self, repo: str):
        """Say where to upload the large files that are not here."""
        self.repository(repo)
        objects = json.loads(self.body)['objects']
        for item in objects:
            if item['oid'] not in self.hub.objects:
                item['actions'] = {'upload': {'href': f'{self.hub.endpoint}/lfs/{item["oid"]}', 'header': {}}}
        self.answer_json({'transfer': 'basic', 'objects': objects})

    @route('PUT', '/lfs/(?P<oid>[0-9a-f]+)')
    def lfs_upload(self, oid: str):
        """Take a large file."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, 'content does not have this hash')
        self.hub.objects[oid] = self.body
        self.answer()

    @route('POST', f'/api/models/{REPO}/commit/(?P<revision>.+)')
    def commit(self, repo: str, revision: str):
        """Put all operations of a commit into effect, or none."""
        repository = self.repository(repo)
        as_pull_request = 'create_pr' in self.query
        if not as_pull_request:
            self.may_write(repo.split('/')[0])
        elif self.token is None:
            raise Refusal(401, 'Invalid username or password.')
        message, files = '', dict(self.commit_at(repo, revision).files)
        for operation in map(json.loads, self.body.splitlines()):
            value = operation['value']
            if operation['key'] == 'header':
                message = value['summary']
            elif operation['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif operation['key'] == 'lfsFile':
                if value['oid'] not in self.hub.objects:
                    raise Refusal(400, f'{value["path"]} was not uploaded')
                files[value['path']] = self.hub.objects[value['oid']]
            else:
                raise Refusal(400, f'unknown operation {operation["key"]}')
        commit = Commit(message, files)
        answer = {'commitUrl': f'{self.hub.endpoint}/{repo}/commit/{commit.oid}', 'commitOid': commit.oid}
        if as_pull_request:
            repository.pull_requests.append(commit)
            answer['pullRequestUrl'] = f'{self.hub.endpoint}/{repo}/discussions/{len(repository.pull_requests)}'
        else:
            repository.commits.append(commit)
        self.answer_json(answer)

    @route('GET', f'/api/models/{REPO}(/revision/(?P<revision>.+))?')
    def info(self, repo: str, revision: str | None):
        """Describe a repository."""
        commit = self.commit_at(repo, revision or 'main')
        siblings = [{'rfilename': name} for name in commit.files]
        private = self.hub.repositories[repo].private
        self.answer_json({'id': repo, 'modelId': repo, 'sha': commit.oid, 'private': private, 'siblings': siblings})

    @route('GET', f'/api/models/{REPO}/tree/(?P<revision>[^/]+)/?')
    def tree(self, repo: str, revision: str):
        """List the files."""
        commit = self.commit_at(repo, revision)
        self.answer_json(
            [
                {'type': 'file', 'path': name, 'size': len(content), 'oid': _oid(name, content)}
                for name, content in commit.files.items()
            ]
        )

    @route('HEAD', f'/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)')
    @route('GET', f'/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)')
    def resolve(self, repo: str, revision: str, name: str):
        """Send a file, or from a byte of it on."""
        commit = self.commit_at(repo, revision)
        if name not in commit.files:
            raise Refusal(404, f'{name} is not in {repo}', 'EntryNotFound')
        content = commit.files[name]
        headers = {'X-Repo-Commit': commit.oid, 'ETag': f'"{_oid(name, content)}"', 'Accept-Ranges': 'bytes'}
        start = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if start is None:
            return self.answer(content, 200, headers)
        first, last = int(start[1]), len(content) - 1
        return self.answer(content[first:], 206, {**headers, 'Content-Range': f'bytes {first}-{last}/{last + 1}'})


def _oid(name: str, content: bytes) -> str:
    """SHA-256 of a large file, git's blob hash of another."""
    if name.endswith(('.safetensors', '.bin', '.png')):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
