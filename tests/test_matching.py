"""Matching accuracy and homography error on made keypoints, against counts and areas by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csa_zoo.evaluation.matching import error_auc, homography_error, match_errors, mean_matching_accuracy

TILTED = np.array([[1.1, 0.1, 5.0], [-0.2, 0.9, 30.0], [2e-4, 1e-4, 1.0]])


def warp(points: np.ndarray, homography: np.ndarray) -> np.ndarray:
    return np.array([(h := homography @ [x, y, 1.0])[:2] / h[2] for x, y in points])


@pytest.fixture
def pair():
    """Keypoints that correspond in reverse order, the second set moved by 0, 1, 2, ... pixels."""
    points = np.random.default_rng(0).uniform(0, [320, 240], (60, 2))
    moved = warp(points, TILTED)
    moved[:, 1] -= np.arange(60)
    return points, moved[::-1], np.stack([np.arange(60), np.arange(60)[::-1]], 1)


class TestMatchErrors:
    @pytest.mark.parametrize('scale', [1.0, -3.0])  # a homography is known up to a factor
    def test_errors_and_accuracy(self, pair, scale):
        errors = match_errors(*pair, scale * TILTED)
        assert errors == pytest.approx(np.arange(60), abs=1e-9)
        empty = match_errors(*pair[:2], np.empty((0, 2), int), TILTED)
        accuracy = mean_matching_accuracy([np.arange(60), empty])
        assert list(accuracy) == [f'MMA@{t}' for t in range(1, 11)]
        assert accuracy['MMA@3'] == pytest.approx(4 / 60 / 2)
        assert mean_matching_accuracy([[0.4, 2.0]], [0.5]) == {'MMA@0.5': 0.5}

    def test_tensors_and_points_behind_the_camera(self):
        flip = np.array([[1.0, 0, 0], [0, 1, 0], [-0.01, 0, 1]])
        points = torch.tensor([[50.0, 0], [100, 0], [200, 0]])
        errors = match_errors(points, points, torch.arange(3).repeat(2, 1).T, flip)
        assert errors.tolist() == [50, np.inf, np.inf]

    @pytest.mark.parametrize(
        ('change', 'message'),
        [
            ({0: np.zeros((3, 3))}, r'keypoints0 must be of shape \(number, 2\), not \(3, 3\)'),
            ({1: np.full((60, 2), np.nan)}, '120 of 120 numbers are NaN or infinite'),
            ({2: np.array([[0, 60]])}, r'there are \[60, 60\] keypoints'),
            ({2: np.array([[0, -1]])}, r'there are \[60, 60\] keypoints'),
            ({2: np.array([[0.0, 1.0]])}, 'matches must be indices, not float64'),
            ({3: np.eye(4)}, r'homography must be of shape \(3, 3\), not \(4, 4\)'),
        ],
    )
    def test_invalid(self, pair, change, message):
        arguments = [*pair, TILTED]
        for index, value in change.items():
            arguments[index] = value
        with pytest.raises(ValueError, match=message):
            match_errors(*arguments)
        with pytest.raises(ValueError, match='at least one pair'):
            mean_matching_accuracy([])
        with pytest.raises(ValueError, match='1 of 3 numbers are NaN'):
            mean_matching_accuracy([[1.0], [2.0, np.nan]])


class TestHomography:
    @pytest.fixture(autouse=True)
    def opencv(self):
        pytest.importorskip('cv2')

    def test_error_of_the_estimate(self, pair):
        points, _, _ = pair
        identity = np.stack([np.arange(60)] * 2, 1)
        right = warp(points, TILTED)
        assert homography_error(points, right, identity, TILTED, (320, 240)) < 1e-3
        wrong = right.copy()
        wrong[:25] = np.random.default_rng(1).uniform(0, [320, 240], (25, 2))  # outliers are left out
        assert homography_error(points, wrong, identity, TILTED, (320, 240)) < 1e-2
        moved = homography_error(points, right + np.array([3, 4]), identity, TILTED, (320, 240))
        assert moved == pytest.approx(5, abs=1e-3)
        assert homography_error(points, right, identity[:3], TILTED, (320, 240)) == np.inf
        assert homography_error(np.zeros((9, 2)), np.zeros((9, 2)), identity[:9], TILTED, (320, 240)) == np.inf

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.one_of(st.floats(0, 20), st.just(np.inf)), min_size=1, max_size=12), st.floats(0.5, 15))
    def test_area(self, errors, limit):
        """Segment by segment of the curve through (error, share of pairs up to it)."""
        x = y = area = 0.0
        for number, error in enumerate(sorted(errors), 1):
            if error >= limit:
                break
            share = number / len(errors)
            area += (error - x) * (y + share) / 2
            x, y = error, share
        area += (limit - x) * y
        assert error_auc(errors, [limit])[f'AUC@{limit:g}'] == pytest.approx(area / limit, abs=1e-9)

    def test_area_of_extremes(self):
        assert error_auc([0.0, 0.0]) == {'AUC@1': 1, 'AUC@3': 1, 'AUC@5': 1, 'AUC@10': 1}
        assert error_auc([np.inf, 11.0], [10]) == {'AUC@10': 0}
        for bad in ([], [-1.0], [np.nan]):
            with pytest.raises(ValueError, match=r'needs errors of 0 or more|NaN'):
                error_auc(bad)
