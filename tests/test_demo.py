"""The demo in a real browser, without a window: what a visitor clicks, and what comes back."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hub_server import make_run
from PIL import Image
from safetensors.torch import load_file, save_file

from csa_zoo.data import render_pedestrians

pytest.importorskip('gradio', reason='needs the extra demo')
webdriver = pytest.importorskip('selenium.webdriver', reason='needs selenium, of the extra test')
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

SPACE = Path(__file__).parent.parent / 'hub_cards' / 'space'
SECONDS = 120  # far more than it takes, unless the machine is busy


@pytest.fixture(scope='module')
def app():
    """The Space's app.py as a module."""
    spec = spec_from_file_location('demo_app', SPACE / 'app.py')
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def reid(tmp_path_factory):
    """A person model with random weights, of base vectors so long that attention is not the same everywhere."""
    folder = make_run(tmp_path_factory.mktemp('demo') / 'reid', 'resnet18_pcb_csa', num_classes=4)
    weights = load_file(folder / 'model.safetensors')
    save_file(
        {name: 20 * value if name.endswith('csa.maps.weight') else value for name, value in weights.items()},
        folder / 'model.safetensors',
    )
    return folder


@pytest.fixture(scope='module')
def descriptor(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('demo') / 'descriptor', 'l2net_hardnet')


@pytest.fixture(scope='module')
def people(tmp_path_factory):
    """A folder of rendered people."""
    root = render_pedestrians(tmp_path_factory.mktemp('demo') / 'people', num_identities=4, images_per_camera=2)
    return root / 'bounding_box_test'


@pytest.fixture(scope='module')
def chrome(tmp_path_factory):
    programs = {name: shutil.which(name) for name in ('chromium', 'chromedriver')}
    if not all(programs.values()):
        pytest.skip('needs the programs chromium and chromedriver')
    options = webdriver.ChromeOptions()
    options.binary_location = programs['chromium']
    profile = tmp_path_factory.mktemp('profile')
    for flag in (
        'headless',
        'no-sandbox',
        'disable-gpu',
        'disable-quic',
        'disable-dev-shm-usage',
        'no-first-run',
        'disable-background-networking',
        'disable-component-update',
        'disable-sync',
        'window-size=1280,1000',
        f'user-data-dir={profile}',
    ):
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL', 'browser': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs['chromedriver']))
    yield driver
    driver.quit()


def click(driver, image, down, right):
    """Click on an image, which is shrunk if it does not fit, at these fractions of height and width."""
    box = image.size
    natural = {side: image.get_property(f'natural{side.title()}') for side in box}
    scale = min(1, *(box[side] / natural[side] for side in box))
    x = round((right - 0.5) * natural['width'] * scale)
    y = round((down - 0.5) * natural['height'] * scale)
    ActionChains(driver).move_to_element_with_offset(image, x, y).click().perform()


class Page:
    """What a visitor does on the page."""

    def __init__(self, driver, url):
        self.driver, self.url = driver, url
        self.wait = WebDriverWait(driver, SECONDS, poll_frequency=0.1)
        driver.get(url)
        self.tab('Search people')

    def find(self, selector):
        return self.wait.until(lambda driver: driver.find_element(By.CSS_SELECTOR, selector))

    def tab(self, name):
        xpath = f'//button[@role="tab"][normalize-space()="{name}"]'
        self.wait.until(lambda driver: driver.find_element(By.XPATH, xpath)).click()

    def text(self):
        return ' '.join(self.driver.find_element(By.TAG_NAME, 'body').text.split())

    def wait_for_text(self, text):
        self.wait.until(lambda _: text in self.text(), f'waiting for {text!r}')

    def upload(self, element, path):
        self.find(f'#{element} input[type=file]').send_keys(str(path))
        shown = self.find(f'#{element} img')
        self.wait.until(lambda driver: shown.get_property('naturalWidth'))
        return shown

    def gallery(self, element, count, besides=()):
        """Addresses and captions of its images, once there are so many, and all other ones than `besides`."""

        def images(driver):
            items = driver.find_elements(By.CSS_SELECTOR, f'#{element} .grid-container button')
            found = [(item.find_element(By.TAG_NAME, 'img').get_attribute('src'), item.text) for item in items]
            return found if len(found) == count and not set(found) & set(besides) else None

        return self.wait.until(images)

    def download(self, url):
        """An image of the page, as the browser gets it."""
        script = """
            const done = arguments[1];
            fetch(arguments[0]).then(r => r.blob()).then(b => {
                const reader = new FileReader();
                reader.onload = () => done(reader.result.split(',')[1]);
                reader.readAsDataURL(b);
            });
        """
        content = base64.b64decode(self.driver.execute_async_script(script, url))
        return Image.open(io.BytesIO(content)).convert('RGB')


@contextmanager
def serving(command, folder, **environment):
    """The address of a page, while the program that serves it runs."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    environment = {
        **os.environ,
        'CSA_ZOO_CACHE': str(folder / 'cache'),
        'GRADIO_TEMP_DIR': str(folder / 'gradio'),
        'GRADIO_SERVER_PORT': port,
        'OMP_NUM_THREADS': '1',
        'PYTHONUNBUFFERED': '1',
        **environment,
    }
    log = folder / 'log'
    with log.open('w') as output:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 2 * SECONDS
        while 'Running on local URL' not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f'http://127.0.0.1:{port}'
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(SECONDS)


@pytest.fixture(scope='module')
def page(chrome, reid, descriptor, people, tmp_path_factory):
    """The page of `csa-zoo demo`."""
    command = [
        sys.executable,
        '-m',
        'csa_zoo.cli',
        'demo',
        '--reid',
        reid,
        '--descriptor',
        descriptor,
        '--gallery',
        people,
    ]
    with serving(command, tmp_path_factory.mktemp('served')) as url:
        yield Page(chrome, url)


def test_a_query_of_the_gallery_finds_itself(page, people):
    page.tab('Search people')
    assert 'surveillance' in page.text()
    query = sorted(people.glob('*.jpg'))[5]
    page.upload('query', query)
    page.find('#search').click()
    ranked = page.gallery('ranked', 10)
    distances = [float(re.fullmatch(r'\d+: distance (\d\.\d{3})', caption)[1]) for _, caption in ranked]
    assert distances == sorted(distances) and distances[0] < 0.002 < distances[1]
    np.testing.assert_array_equal(page.download(ranked[0][0]), Image.open(query))


SUMMARY = re.compile(r'\d+ and \d+ keypoints, (\d+) mutual nearest neighbours, (\d+) of which follow one geometry')


def finished(text, before):
    """The text, if it is a new one and progress is not shown above the old one."""
    return text if text != before and SUMMARY.fullmatch(text) else None


def test_two_views_of_one_scene_match(page, tmp_path):
    rng = np.random.default_rng(0)
    scene, other = (
        Image.fromarray(rng.integers(0, 256, (22, 28, 3), dtype=np.uint8)).resize((280, 220), Image.BICUBIC)
        for _ in range(2)
    )
    scene.save(tmp_path / 'first.png')
    scene.crop((30, 20, 280, 220)).save(tmp_path / 'second.png')
    other.save(tmp_path / 'other.png')
    page.tab('Match photographs')
    page.upload('first', tmp_path / 'first.png')
    shares, before = [], ''
    for name in ('second.png', 'other.png'):
        page.upload('second', tmp_path / name)
        page.find('#match').click()
        before = page.wait.until(lambda _, before=before: finished(page.find('#summary').text, before))
        matches, inliers = map(int, SUMMARY.fullmatch(before).groups())
        shares.append(inliers / matches)
        figure = page.find('#matches img')
        page.wait.until(lambda _, figure=figure: figure.get_property('naturalWidth') > 500)
        page.find('#second button[title="Remove Image"]').click()
    assert matches > 20
    assert shares[0] > 0.8 > 0.5 > shares[1]


def full_attention(module, x):
    """All attention maps by equations [3] and [4] as they are written: (G, D, N) base maps and weights to (G, N, N)."""
    scores = module.maps(x)[0].reshape(module.groups, module.num_maps, -1)
    return torch.einsum('gdi,gdn->gin', scores.softmax(1), scores.softmax(2))


def test_attention_of_the_position_that_was_clicked(page, app, reid, people):
    path = sorted(people.glob('*.jpg'))[0]
    picture, model = Image.open(path), app.load_trained(str(reid), 3)
    inputs = []
    model.layer1.csa.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    image = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(picture)
    with torch.inference_mode():
        model(image[None])
        attention = full_attention(model.layer1.csa, inputs[0]).view(2, 24, 12, 24, 12)

    page.tab('Attention')
    shown = page.upload('picture', path)
    page.wait.until(lambda _: shown.get_property('naturalHeight') == 3 * picture.height)  # to be clicked on
    maps = []
    for y, x in ((5, 4), (16, 9)):
        click(page.driver, shown, (y + 0.5) / 24, (x + 0.5) / 12)
        maps = page.gallery('maps', 6, besides=maps)
        assert [caption for _, caption in maps[:2]] == ['layer1.csa, group 1, 24×12', 'layer1.csa, group 2, 24×12']
        for group in range(2):
            own = app.draw_map(picture, attention[group, y, x], ((y + 0.5) / 24, (x + 0.5) / 12))
            np.testing.assert_allclose(page.download(maps[group][0]), np.asarray(own), atol=1)


def test_attention_of_a_descriptor_in_a_picture(app, tmp_path):
    run = make_run(tmp_path / 'run')
    picture = Image.effect_noise((50, 40), 90)
    ((drawn, caption),) = app.show_attention(app.load_trained(str(run), 1), picture.convert('RGB'), (0.99, 0))
    assert caption == 'layer3.csa, group 1, 16×16' and drawn.size == (480, 384)


def test_nothing_is_asked_of_other_machines(page):
    sent = [json.loads(entry['message'])['message'] for entry in page.driver.get_log('performance')]
    urls = [message['params']['request']['url'] for message in sent if message['method'] == 'Network.requestWillBeSent']
    assert any(url.startswith(page.url) for url in urls)
    assert [url for url in urls if not url.startswith((page.url, 'data:', 'blob:', 'chrome:'))] == []


def test_the_space_without_models_says_so(chrome, tmp_path):
    for name in ('csa_zoo', 'hub_cards'):
        shutil.copytree(SPACE.parent.parent / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(SPACE, tmp_path, dirs_exist_ok=True)
    with serving([sys.executable, 'app.py'], tmp_path) as url:
        page = Page(chrome, url)
        for tab, variable in (('Search people', 'REID'), ('Match photographs', 'DESCRIPTOR')):
            page.tab(tab)
            page.wait_for_text(f'set the variable CSA_ZOO_{variable}')
        page.tab('Attention')
        page.wait_for_text('No model with compressed self-attention')


def test_the_space_installs_what_the_package_needs():
    tomllib = pytest.importorskip('tomllib', reason='Python 3.11 reads TOML')
    project = tomllib.loads((SPACE.parents[1] / 'pyproject.toml').read_text())['project']
    opencv = [line for line in project['optional-dependencies']['photos'] if line.startswith('opencv')]
    assert (SPACE / 'requirements.txt').read_text().split() == project['dependencies'] + opencv


@pytest.mark.parametrize(
    ('name', 'channels', 'message'),
    [
        ('nowhere', 3, 'nowhere is no folder'),
        ('resnet18_pcb_csa', 3, 'no model of the zoo with trained weights'),
        ('{run}', 3, 'images of 1 channels, not of 3'),
        ('{empty}', 1, 'no config.json'),
    ],
)
def test_models_that_are_not_trained_or_not_fit(app, descriptor, tmp_path, name, channels, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        app.load_trained(name.format(run=descriptor, empty=tmp_path), channels)


def test_a_gallery_without_images(app, tmp_path):
    (tmp_path / 'notes.txt').write_text('no image')
    with pytest.raises(FileNotFoundError, match='holds no image'):
        app.gallery_files(str(tmp_path))
