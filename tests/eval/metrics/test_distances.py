"""KID, CMMD, precision and recall, inception score: against closed forms and the libraries that define them."""

import numpy as np
import pytest
import torch
from cleanfid.fid import kernel_distance as clean_kid
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from eval.metrics import distances
from eval.metrics.distances import InceptionScore, cmmd, kernel_distance, precision_recall

N, M, D = 61, 97, 13


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1)) + 0.3


@pytest.fixture
def y() -> Tensor:
    return 1.2 * torch.randn(M, D, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 17)


def test_kid_is_torch_fidelitys(x, y):
    kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    theirs = kid_features_to_metric(
        x.double(), y.double(), kid_subsets=7, kid_subset_size=29, rng_seed=2020, verbose=False, **kernel
    )
    mean, std = kernel_distance(x, y, subsets=7, size=29)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-12)
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_kid_of_whole_sets_is_clean_fids(x, y):
    theirs = clean_kid(y[:N].double().numpy(), x.double().numpy(), num_subsets=1)
    assert kernel_distance(x, y[:N], subsets=1, size=N)[0] == pytest.approx(theirs, rel=1e-11)


def test_kid_is_unbiased():
    """Equal distributions: the mean over many draws of sets is zero within its error, and single values are negative as often."""
    values = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 31, 5, generator=generator)
        values.append(kernel_distance(a, b, subsets=1, size=31)[0])
    values = np.array(values)
    assert abs(values.mean()) < 3 * values.std() / 60**0.5
    assert 10 < (values < 0).sum() < 50


def test_kid_needs_whole_subsets(x, y):
    with pytest.raises(ValueError, match="subsets of 1,000 images, but there are 61 and 97"):
        kernel_distance(x, y)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_torch_fidelitys(x, y, k):
    theirs = prc_features_to_metric(
        x.double(), y.double(), prc_neighborhood=k, prc_batch_size=10, save_cpu_ram=False, verbose=False
    )
    assert precision_recall(x, y, k) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_precision_and_recall_of_lost_modes():
    """Half of the real modes: nothing wrong is generated, half is missing."""
    generator = torch.Generator().manual_seed(0)
    modes = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    real = (modes[:, None] + torch.rand(2, 53, 2, generator=generator)).flatten(0, 1)
    generated = torch.rand(59, 2, generator=generator) * 0.9 + 0.05
    precision, recall = precision_recall(generated, real)
    assert precision > 0.95
    assert 0.4 < recall <= 0.5
    assert precision_recall(real, real) == (1.0, 1.0)


def test_precision_survives_a_common_offset(x, y):
    """|a - b|^2 as |a|^2 + |b|^2 - 2ab would lose all digits at an offset of 1e9."""
    near = precision_recall(x.double(), y.double())
    assert precision_recall(x.double() + 1e7, y.double() + 1e7) == near


def test_copies_do_not_hide_the_radius():
    x = torch.tensor([[0.0], [0.0], [0.0], [0.0], [5.0]])
    y = torch.tensor([[0.1], [4.9], [9.0], [9.5], [9.9]])
    theirs = prc_features_to_metric(x, y, prc_neighborhood=3, prc_batch_size=10, save_cpu_ram=False, verbose=False)
    assert precision_recall(x, y) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_precision_needs_neighbours(x):
    with pytest.raises(ValueError, match="more than 3 images a side, got 3 and 61"):
        precision_recall(x[:3], x)


def test_cmmd_is_the_biased_gaussian_mmd(x, y):
    a, b = (torch.nn.functional.normalize(v.double(), dim=1) for v in (x, y))

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        return torch.exp(-(torch.cdist(p, q, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / 200).mean()

    assert cmmd(a, b) == pytest.approx(1000 * float(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)), rel=1e-9)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-12)


def test_cmmd_takes_unit_rows(x, y):
    with pytest.raises(ValueError, match=r"takes unit rows; norms range over"):
        cmmd(x, y)


def test_inception_score_is_torch_fidelitys(x):
    score = InceptionScore(N, D)
    for part in (3 * x).split(11):
        score.update(part)
    theirs = isc_features_to_metric(3 * x)
    assert score.value() == pytest.approx((theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-12)


def test_inception_score_of_known_classes():
    """Sure of a class each, evenly: the number of classes. Always the same class: 1, although p log p is 0 log 0."""
    sure = torch.eye(5).repeat(20, 1) * 1e4
    score = InceptionScore(100, 5, splits=1)
    score.update(sure)
    assert score.value()[0] == pytest.approx(5, rel=1e-12)
    score = InceptionScore(100, 5, splits=3)
    score.update(sure[:1].expand(100, -1))
    assert score.value() == pytest.approx((1, 0), abs=1e-12)


def test_inception_score_waits_for_all_images(x):
    score = InceptionScore(N, D)
    score.update(x[:50])
    with pytest.raises(ValueError, match="seen 50 of 61 images"):
        score.value()
    with pytest.raises(ValueError, match="10 parts, but there are 9 images"):
        InceptionScore(9, D)
