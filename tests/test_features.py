"""Features of whole images: OpenCV's conventions, photographs turned and reduced, kornia, ONNX, `csa-zoo match`."""

import math

import numpy as np
import pytest
import timm
import torch
from matplotlib.colors import to_rgb
from torch import nn

import csa_zoo  # noqa: F401
from csa_zoo.cli import main
from csa_zoo.evaluation.matching import match_errors
from csa_zoo.features import (
    ImageMatches,
    InChunks,
    PatchDescriptor,
    create_sift,
    fold_batch_norm,
    match_features,
    root_sift,
)
from csa_zoo.visualize import RIGHT, draw_matches

cv2 = pytest.importorskip('cv2')
VARIANTS = ['l2net_hardnet', 'l2net_hardnet_sa', 'l2net_hardnet_csa']


def make(name: str = 'l2net_hardnet_csa', **kwargs) -> nn.Module:
    """Random weights; statistics of batch norm that are not those of its start; attention that counts."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    for key, tensor in model.state_dict().items():
        if key.endswith('running_mean'):
            tensor.normal_(0, 0.1)
        elif key.endswith('running_var'):
            tensor.uniform_(0.2, 0.6)
        elif key.endswith('alpha'):
            tensor.fill_(0.7)
    return model.eval()


@pytest.fixture(scope='module')
def photograph():
    """(512, 512, 3) uint8 BGR."""
    skimage = pytest.importorskip('skimage')
    return skimage.data.astronaut()[..., ::-1].copy()


def patches_of(image: np.ndarray, *keypoints: tuple[float, ...], **kwargs) -> np.ndarray:
    """(N, 32, 32) what a model sees of keypoints (x, y, size, angle): the "descriptor" is the patch."""
    descriptor = PatchDescriptor(nn.Flatten(), **kwargs)
    return descriptor.compute(image, [cv2.KeyPoint(*k) for k in keypoints])[1].reshape(-1, 32, 32)


class TestPatchDescriptor:
    def test_like_opencv(self, photograph):
        """What comes out is what OpenCV's own features give, and its matchers take it."""
        sift = create_sift(200)
        features = PatchDescriptor(make(), sift)
        keypoints, descriptors = features.detectAndCompute(photograph, None)
        expected, others = sift.detectAndCompute(photograph, None)
        assert [k.pt for k in keypoints] == [k.pt for k in expected]
        assert (descriptors.shape, descriptors.dtype) == ((len(expected), 128), others.dtype)
        assert descriptors.flags.c_contiguous
        np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, atol=1e-5)
        assert features.descriptorSize() == sift.descriptorSize()
        assert features.descriptorType() == sift.descriptorType()
        assert features.defaultNorm() == sift.defaultNorm()
        matches = cv2.BFMatcher(features.defaultNorm(), crossCheck=True).match(descriptors, descriptors)
        assert all(match.distance < 1e-3 for match in matches)
        assert len(cv2.FlannBasedMatcher().knnMatch(descriptors, descriptors, k=2)) == len(keypoints)
        some, described = features.compute(photograph, keypoints[50:3:-7])
        assert some == keypoints[50:3:-7]
        np.testing.assert_allclose(described, descriptors[50:3:-7], atol=1e-5)

    def test_mask_and_detector(self, photograph):
        mask = np.zeros(photograph.shape[:2], np.uint8)
        mask[:, 300:] = 255
        for detector in (None, cv2.FastFeatureDetector_create()):  # FAST gives no angle
            features = PatchDescriptor(nn.Flatten(), detector)
            keypoints, patches = features.detectAndCompute(photograph, mask)
            assert len(keypoints) == len(patches) > 20
            assert min(k.pt[0] for k in keypoints) >= 299.5
        assert {k.angle for k in keypoints} == {-1}
        upright = patches_of(photograph, *[(*k.pt, k.size, 0) for k in keypoints])
        np.testing.assert_array_equal(patches.reshape(upright.shape), upright)

    def test_nothing_to_describe(self):
        flat = np.full((80, 100), 128, np.uint8)
        keypoints, descriptors = PatchDescriptor(make()).detectAndCompute(flat)
        assert len(keypoints) == 0
        assert (descriptors.shape, descriptors.dtype) == ((0, 128), np.float32)

    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize('level', [0, 1, 127, 255])
    def test_flat_patches_are_finite(self, dtype, level):
        features = PatchDescriptor(make(dtype=dtype))
        _, descriptors = features.compute(np.full((80, 100), level, np.uint8), [cv2.KeyPoint(50, 40, 5)])
        assert np.isfinite(descriptors).all()

    def test_side_of_the_patch(self):
        """Side 64 about a corner of pixels: means of 2x2 pixels. Magnification counts sizes, 6 of SIFT's diameters."""
        image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (100, 120), np.uint8), (0, 0), 2)
        crop = image[18:82, 28:92].reshape(32, 2, 32, 2)
        expected = (crop.sum((1, 3)) + 2) // 4 / 255
        for size, settings in ((16, {'magnification': 4}), (10.66, {})):
            patch = patches_of(image, (59.5, 49.5, size, 0), **settings)[0]
            np.testing.assert_allclose(patch, expected, atol=1.01 / 255)
        assert np.abs(patches_of(image, (59.5, 49.5, 10.66, 0), magnification=6.5)[0] - expected).max() > 5 / 255

    def test_angle_is_clockwise(self, photograph):
        """Image and keypoint turned together by 90 degrees clockwise show the same patch; so do multiples of 360."""
        x, y = 230.0, 120.0
        turned = np.rot90(photograph, -1)
        moved = (photograph.shape[0] - 1 - y, x)
        for angle in (0, 30, 200.5):
            same = patches_of(photograph, (x, y, 10, angle))[0]
            np.testing.assert_allclose(patches_of(turned, (*moved, 10, angle + 90))[0], same, atol=2 / 255)
            assert np.abs(patches_of(turned, (*moved, 10, angle - 90))[0] - same).mean() > 0.1

    def test_large_patches_do_not_alias(self):
        """A chequerboard of pixels, seen from afar, is grey."""
        board = (np.indices((400, 400)).sum(0) % 2 * 255).astype(np.uint8)
        patch = patches_of(board, (200, 200, 50, 17))
        np.testing.assert_allclose(patch, 0.5, atol=0.03)

    def test_beyond_the_border_its_pixels_go_on(self):
        image = np.tile(np.arange(0, 200, 2, dtype=np.uint8), (100, 1))
        patch = patches_of(image, (0, 50, 16, 0), magnification=2)[0]
        assert (patch[:, :16] <= 1 / 255).all()
        assert (patch == patch[0]).all()
        assert (np.diff(patch[0, 16:]) > 0).all()

    def test_kinds_of_images(self, photograph):
        """Colour is BGR; levels in [0, 1] are those of 0 to 255."""
        keypoint = (230, 120, 10, 30)
        grey = cv2.cvtColor(photograph, cv2.COLOR_BGR2GRAY)
        expected = patches_of(grey, keypoint)
        alpha = np.dstack([photograph, np.zeros_like(grey)])
        for same in (photograph, alpha, grey[..., None], grey / 255, (grey / 255).astype(np.float32)):
            np.testing.assert_array_equal(patches_of(same, keypoint), expected)
        rgb = patches_of(photograph[..., ::-1], keypoint)  # a view that is not contiguous
        assert np.abs(rgb - expected).mean() > 0.01
        np.testing.assert_allclose(patches_of(photograph / 255, keypoint), expected, atol=2 / 255)

    @pytest.mark.parametrize(
        ('image', 'message'),
        [
            (None, 'the image is None, as cv2.imread returns'),
            (np.zeros((0, 5), np.uint8), r'not \(0, 5\)'),
            (np.zeros((9, 9, 2), np.uint8), r'not \(9, 9, 2\)'),
            (np.zeros((9, 9), np.uint16), 'must be uint8, or floating point in .* not uint16'),
            (np.full((9, 9), 2.5), r'must be in \[0, 1\], not \[2.5, 2.5\]'),
            (np.full((9, 9), np.nan), r'must be in \[0, 1\], not \[nan, nan\]'),
        ],
        ids=str,
    )
    def test_not_an_image(self, image, message):
        features = PatchDescriptor(nn.Flatten())
        for use in (features.detect, features.detectAndCompute, lambda image: features.compute(image, [])):
            with pytest.raises(ValueError, match=message):
                use(image)

    @pytest.mark.parametrize('keypoint', [(100, 5, 7), (5, -2, 7), (5, 5, 0), (math.nan, 5, 7), (5, 5, math.inf)])
    def test_not_a_keypoint(self, keypoint):
        with pytest.raises(ValueError, match=r'keypoint 1 at .* must be in the image, which is 100x80'):
            patches_of(np.zeros((80, 100), np.uint8), (5, 5, 7), keypoint)

    def test_not_a_descriptor(self):
        with pytest.raises(ValueError, match='Conv2d does not take grey patches of shape'):
            PatchDescriptor(nn.Conv2d(3, 8, 3))
        with pytest.raises(ValueError, match='magnification is 0'):
            PatchDescriptor(nn.Flatten(), magnification=0)

    def test_the_model_is_in_evaluation_mode(self, photograph):
        """timm creates models for training, where dropout would make every descriptor another."""
        model = timm.create_model('l2net_hardnet', drop_rate=0.5)
        features = PatchDescriptor(model)
        model.train()
        keypoints = features.detect(photograph)[:20]
        first, second = (features.compute(photograph, keypoints)[1] for _ in range(2))
        np.testing.assert_array_equal(first, second)


def turn(image: np.ndarray, degrees: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The whole image turned clockwise and resized, and the homography that does it."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -degrees, scale)
    corners = np.array([(0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1)])
    corners = corners @ matrix[:, :2].T + matrix[:, 2]
    matrix[:, 2] -= np.floor(corners.min(0))
    size = np.ceil(corners.max(0) - np.floor(corners.min(0))).astype(int) + 1
    soft = cv2.GaussianBlur(image, (0, 0), 0.5 / scale) if scale < 1 else image
    turned = cv2.warpAffine(soft, matrix, tuple(size.tolist()), borderMode=cv2.BORDER_REPLICATE)
    return turned, np.vstack([matrix, [0, 0, 1]])


@pytest.mark.parametrize(('degrees', 'scale'), [(30, 1.0), (90, 1.0), (0, 0.7), (30, 0.7)])
def test_matches_survive(photograph, degrees, scale):
    """Even with random weights there are nearly as many right matches as with RootSIFT, unless angles are ignored."""
    sift = create_sift(250)
    turned, homography = turn(photograph, degrees, scale)
    images = (photograph, turned)
    keypoints = [sift.detect(image, None) for image in images]

    def count_right(descriptors: list[np.ndarray]) -> int:
        found = match_features(keypoints[0], descriptors[0], keypoints[1], descriptors[1])
        same = np.arange(len(found.points0)).repeat(2).reshape(-1, 2)
        right = match_errors(found.points0, found.points1, same, homography) < 3
        assert (found.is_inlier == right).mean() > 0.95
        return int(right.sum())

    features = PatchDescriptor(make())
    ours = count_right([features.compute(*pair)[1] for pair in zip(images, keypoints, strict=True)])
    theirs = count_right([root_sift(*pair) for pair in zip(images, keypoints, strict=True)])
    assert theirs > 100
    assert ours > 0.85 * theirs
    if degrees:
        without = [[cv2.KeyPoint(*k.pt, k.size) for k in image] for image in keypoints]
        upright = [features.compute(*pair)[1] for pair in zip(images, without, strict=True)]
        matches = cv2.BFMatcher(cv2.NORM_L2, crossCheck=True).match(*upright)
        points = [np.array([k.pt for k in image]) for image in keypoints]
        pairs = np.array([(m.queryIdx, m.trainIdx) for m in matches])
        assert (match_errors(*points, pairs, homography) < 3).sum() < 0.5 * ours


class TestMatchFeatures:
    @staticmethod
    def scene(outliers: int):
        """80 points under a homography, some of them moved anywhere, with descriptors that tell all of them apart."""
        rng = np.random.default_rng(4)
        points = rng.uniform(50, 450, (80, 2)).astype(np.float32)
        homography = np.array([[0.9, 0.2, 10], [-0.1, 1.1, 20], [2e-4, 1e-4, 1]])
        moved = cv2.perspectiveTransform(points[None], homography)[0]
        moved[:outliers] += rng.uniform(40, 200, (outliers, 2))
        descriptors = rng.standard_normal((80, 16), np.float32)
        order = rng.permutation(80)
        keypoints = [[cv2.KeyPoint(*xy.tolist(), 5) for xy in side] for side in (points, moved[order])]
        return keypoints[0], descriptors, keypoints[1], descriptors[order], outliers

    @pytest.mark.parametrize('geometry', ['homography', 'fundamental'])
    def test_inliers(self, geometry):
        *features, outliers = self.scene(outliers=25)
        points0, points1, is_inlier = match_features(*features, geometry)
        assert len(points0) == len(points1) == len(is_inlier) == 80
        first = [k.pt for k in features[0]]
        is_outlier = np.array([first.index(tuple(xy)) < outliers for xy in points0.tolist()])
        assert is_inlier[~is_outlier].all()
        # an epipolar line passes near some of any points
        assert is_inlier[is_outlier].sum() <= (0 if geometry == 'homography' else 6)

    def test_mutual_nearest_neighbours(self):
        """Literally: each the nearest of the other."""
        rng = np.random.default_rng(1)
        a, b = rng.standard_normal((70, 8), np.float32), rng.standard_normal((50, 8), np.float32)
        keypoints = [[cv2.KeyPoint(float(n), 0.0, 1) for n in range(len(x))] for x in (a, b)]
        distances = np.linalg.norm(a[:, None] - b[None], axis=2)
        expected = [
            (i, j) for i in range(70) for j in range(50) if distances[i].argmin() == j and distances[:, j].argmin() == i
        ]
        expected.sort(key=lambda pair: distances[pair])
        found = match_features(keypoints[0], a, keypoints[1], b)
        assert [(int(p[0]), int(q[0])) for p, q in zip(found.points0, found.points1, strict=True)] == expected

    def test_too_few(self):
        *features, _ = self.scene(outliers=0)
        assert not match_features(*(side[:3] for side in features[:2]), *features[2:]).is_inlier.any()
        nothing = match_features([], np.empty((0, 16), np.float32), *features[2:])
        assert [len(field) for field in nothing] == [0, 0, 0]

    def test_errors(self):
        first, descriptors, second, others, _ = self.scene(outliers=0)
        with pytest.raises(ValueError, match='80 keypoints and 79 descriptors'):
            match_features(first, descriptors[1:], second, others)
        with pytest.raises(ValueError, match="must be 'homography' or 'fundamental', not 'affine'"):
            match_features(first, descriptors, second, others, 'affine')
        with pytest.raises(ValueError, match='NaN or infinity'):
            match_features(first, np.full_like(descriptors, np.nan), second, others)


class TestInChunks:
    @pytest.mark.filterwarnings('ignore:std')  # of no patches
    def test_any_number_of_patches_in_passes_of_one_size(self):
        model, passes = make(), []
        model.register_forward_hook(lambda _, args, output: passes.append(len(args[0])))
        x = torch.rand(37, 1, 32, 32)
        chunked = InChunks(model, 8)
        torch.testing.assert_close(chunked(x), model(x), rtol=0, atol=1e-6)
        assert passes == [8, 8, 8, 8, 5, 37]
        assert chunked(x[:0]).shape == (0, 128)
        with pytest.raises(ValueError, match='chunk_size is 0'):
            InChunks(model, 0)


class TestFoldBatchNorm:
    @pytest.mark.parametrize('name', VARIANTS)
    def test_same_output_without_batch_norm(self, name):
        model = make(name)
        x = torch.rand(16, 1, 32, 32)
        folded = fold_batch_norm(model.train())
        assert model.training and not folded.training
        with torch.inference_mode():
            torch.testing.assert_close(folded(x), model.eval()(x), rtol=0, atol=1e-5)
        assert not any('running' in key for key in folded.state_dict())
        assert sum('running_mean' in key for key in model.state_dict()) == 7

    def test_batch_norm_elsewhere(self):
        with pytest.raises(ValueError, match='0 of Sequential does not follow a convolution'):
            fold_batch_norm(nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 8, 3)))


class TestKornia:
    """kornia's pipelines take the models as they are."""

    @pytest.fixture
    def feature(self):
        return pytest.importorskip('kornia.feature')

    @pytest.fixture
    def image(self, photograph):
        return torch.from_numpy(photograph[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255

    @pytest.mark.parametrize('wrap', [lambda model: model, InChunks, fold_batch_norm])
    def test_local_feature(self, feature, image, wrap):
        model = wrap(make())
        detector = feature.ScaleSpaceDetector(50)
        local = feature.LocalFeature(detector, feature.LAFDescriptor(model))
        with torch.inference_mode():
            lafs, _, descriptors = local(image.mean(1, keepdim=True))
            patches = feature.extract_patches_from_pyramid(image.mean(1, keepdim=True), lafs, 32)
            torch.testing.assert_close(descriptors[0], model(patches[0]), rtol=0, atol=1e-5)
        assert descriptors.shape == (1, 50, 128)

    def test_half_colour_empty_and_unfilled(self, feature, image):
        describe = feature.LAFDescriptor(make())
        lafs = torch.zeros(1, 3, 2, 3)  # kornia's slots without a keypoint
        lafs[0, 0] = torch.tensor([[30.0, 0, 200], [0, 30, 200]])
        with torch.inference_mode():
            expected = describe(image, lafs)
            for dtype in (torch.bfloat16, torch.float16):
                half = describe(image.to(dtype), lafs)
                assert half.dtype == dtype and torch.isfinite(half).all()
                assert (half[0, 0].float() @ expected[0, 0]) > 0.98
            with pytest.warns(UserWarning, match='no keypoints'):
                assert describe(image, lafs[:, :0]).shape == (1, 0, 128)

    def test_frames_of_opencv_keypoints(self, feature, image, photograph):
        """A frame's scale is half the side of its patch, and its angle is counted the other way round."""
        keypoints = [k for k in create_sift(60).detect(photograph, None) if 6 * k.size > 32]
        x = torch.tensor([(*k.pt, k.size, k.angle) for k in keypoints])
        lafs = feature.laf_from_center_scale_ori(x[None, :, :2], 3 * x[None, :, 2, None, None], -x[None, :, 3, None])
        theirs = feature.extract_patches_from_pyramid(image.mean(1, keepdim=True), lafs, 32)[0, :, 0].numpy()
        ours = patches_of(image[0].mean(0).numpy(), *x.tolist())
        correlations = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(ours, theirs, strict=True)]
        assert len(correlations) > 10 and np.median(correlations) > 0.99


@pytest.mark.parametrize('name', VARIANTS)
def test_onnx_of_any_batch(name, tmp_path):
    runtime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = make(name)
    batch = {0: torch.export.Dim('batch')}
    x = torch.rand(17, 1, 32, 32)
    torch.onnx.export(
        model, (x,), tmp_path / 'model.onnx', dynamo=True, dynamic_shapes=(batch,), external_data=False, verbose=False
    )
    session = runtime.InferenceSession(tmp_path / 'model.onnx')
    for count in (1, 3, 17):
        (output,) = session.run(None, {session.get_inputs()[0].name: x[:count].numpy()})
        with torch.inference_mode():
            np.testing.assert_allclose(output, model(x[:count]).numpy(), rtol=0, atol=1e-5)


def test_draw_matches(photograph):
    """A row per descriptor; lines end at the points, the second image's being to the right of the first."""
    matches = ImageMatches(np.array([[1.0, 2], [3, 4]]), np.array([[5.0, 6], [7, 8]]), np.array([True, False]))
    figure = draw_matches(photograph, photograph[:300, :200, 0], {'ours': matches, 'theirs': matches})
    assert [axis.get_title() for axis in figure.axes] == [
        'ours: 1 inliers of 2 matches',
        'theirs: 1 inliers of 2 matches',
    ]
    faint, inliers = figure.axes[0].collections
    assert faint.get_segments()[0].tolist() == [[3, 4], [512 + 7, 8]]
    assert inliers.get_segments()[0].tolist() == [[1, 2], [512 + 5, 6]]
    assert tuple(inliers.get_colors()[0][:3]) == to_rgb(RIGHT) != tuple(faint.get_colors()[0][:3])
    with pytest.raises(ValueError, match='no matches to draw'):
        draw_matches(photograph, photograph, {})


class TestCommand:
    @pytest.fixture(scope='class')
    def run(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp('run') / 'untrained'
        timm.models.save_for_hf(make('l2net_hardnet'), str(folder), safe_serialization=True)
        return str(folder)

    @pytest.fixture
    def files(self, photograph, tmp_path):
        turned, _ = turn(photograph, 30, 1.0)
        for name, image in (('a.png', photograph), ('b.jpg', turned), ('flat.png', np.zeros((90, 90), np.uint8))):
            cv2.imwrite(str(tmp_path / name), image)
        return tmp_path

    @pytest.mark.parametrize('geometry', ['homography', 'fundamental'])
    def test_match(self, run, files, capsys, geometry):
        picture = files / 'matches.png'
        options = ['--keypoints', '120', '--geometry', geometry, '--output', str(picture)]
        assert main(['match', str(files / 'a.png'), str(files / 'b.jpg'), '--model', run, *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f'{files / "a.png"}: 120 keypoints in 512x512 pixels'
        counts = {name: (int(matches), int(inliers)) for name, matches, inliers in map(str.split, lines[3:5])}
        assert list(counts) == ['untrained', 'RootSIFT']
        assert all(120 >= matches >= inliers > 40 for matches, inliers in counts.values())
        assert lines[5] == str(picture)
        assert cv2.imread(str(picture)).shape[1] == 1300

    @pytest.mark.parametrize(
        ('second', 'options', 'message'),
        [
            ('flat.png', [], 'flat.png: SIFT finds no keypoint in it'),
            ('none.png', [], 'no photograph {files}/none.png'),
            ('text.png', [], 'text.png cannot be decoded'),
            ('b.jpg', ['--keypoints', '0'], 'argument --keypoints: must be at least 1, got 0'),
        ],
    )
    def test_errors(self, run, files, capsys, second, options, message):
        (files / 'text.png').write_text('not an image')
        with pytest.raises(SystemExit) as exit_:
            main(['match', str(files / 'a.png'), str(files / second), '--model', run, *options])
        assert exit_.value.code == (2 if options else 1)  # argparse's own
        assert message.format(files=files) in capsys.readouterr().err

    def test_help_shows_an_example(self, capsys):
        with pytest.raises(SystemExit):
            main(['match', '--help'])
        assert 'example: csa-zoo match A.jpg B.jpg' in ' '.join(capsys.readouterr().out.split())
