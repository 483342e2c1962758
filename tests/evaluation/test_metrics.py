"""The metrics agree with direct implementations of their definitions, and with closed forms."""

import importlib
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from prunekit.evaluation import metrics
from prunekit.runtime.randomness import generator


@pytest.fixture
def features():
    draws = generator(0, "features")
    real = torch.randn(60, 7, generator=draws)
    return real, 1.3 * torch.randn(45, 7, generator=draws) + 0.4


def plain_frechet(x, y):
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    eigenvalues = np.linalg.eigvals(first @ second)  # eigenvalues of the non-symmetric product
    root = np.sqrt(np.clip(eigenvalues.real, 0, None)).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root


def plain_kid(x, y):
    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    between = sum(kernel(a, b) for a in x for b in y) / (n * m)
    return within_x + within_y - 2 * between


def plain_cmmd(x, y):
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))

    def mean(a, b):
        return np.mean([math.exp(-((i - j) ** 2).sum() / 200) for i in a for j in b])

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize(
    ("metric", "plain"),
    [(metrics.frechet_distance, plain_frechet), (metrics.kid, plain_kid), (metrics.cmmd, plain_cmmd)],
)
def test_distance_equals_its_transcription(metric, plain, features):
    real, generated = features
    expected = plain(real.double().numpy(), generated.double().numpy())
    assert metric(real, generated) == pytest.approx(expected, rel=1e-6)
    assert metric(generated, real) == pytest.approx(expected, rel=1e-6)
    assert metric(real, real) == pytest.approx(0, abs=1e-9 if metric is not metrics.kid else 1.0)


def test_frechet_distance_equals_scipy(features):
    real, generated = (values.double().numpy() for values in features)
    first, second = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    cross = np.trace(scipy.linalg.sqrtm(first @ second)).real  # as in FID's published code
    apart = ((real.mean(0) - generated.mean(0)) ** 2).sum()
    expected = apart + np.trace(first) + np.trace(second) - 2 * cross
    assert metrics.frechet_distance(*features) == pytest.approx(expected, rel=1e-6)


def published(name):
    """Import a module of the extra `metrics`, or skip the test with the reason why it is missing."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        pytest.skip(f"needs pip install 'prunekit[metrics]' ({error})")


def test_kid_equals_torch_fidelity(features):
    theirs = published("torch_fidelity.metric_kid").kernel_mmd
    real, generated = (values[:40].double() for values in features)  # it needs sets of equal size
    found = theirs(real.numpy(), generated.numpy(), kid_kernel="poly", kid_kernel_poly_degree=3)
    assert metrics.kid(real, generated) == pytest.approx(float(found), rel=1e-6)


def test_frechet_distance_equals_torch_fidelity(features):
    theirs = published("torch_fidelity.metric_fid").fid_statistics_to_metric
    stats = [{"mu": v.mean(0), "sigma": np.cov(v, rowvar=False)} for v in (f.double().numpy() for f in features)]
    found = theirs(*stats, verbose=False)["frechet_inception_distance"]
    assert metrics.frechet_distance(*features) == pytest.approx(found, rel=1e-6)


def test_kernels_in_blocks_are_the_whole(features, monkeypatch):
    real, generated = features
    whole = metrics.kid(real, generated), metrics.cmmd(real, generated)
    monkeypatch.setattr(metrics, "BLOCK", 7)
    assert (metrics.kid(real, generated), metrics.cmmd(real, generated)) == pytest.approx(whole, rel=1e-9)


def test_too_few_pictures_for_a_frechet_distance():
    metrics.refuse_few(3840, 384)
    with pytest.raises(ValueError, match=r"2,048 features needs at least 20,480 pictures .* there are 20,479 real"):
        metrics.refuse_few(20_479, 2048, "real pictures")


def test_pick_scores():
    scores = metrics.pick_scores(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-3.0, 0.0]]), 50.0)
    assert scores.tolist() == pytest.approx([50, -50])


def test_gaussians_in_closed_form():
    mean_1, mean_2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 3.5])
    first, second = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 0.25, 2.0])
    expected = 4 + 0.25 + float(((first.sqrt() - second.sqrt()) ** 2).sum())  # commuting covariances
    result = metrics.gaussian_distance(mean_1, first.diag(), mean_2, second.diag())
    assert result == pytest.approx(expected, rel=1e-6)
    shifted = metrics.frechet_distance(x := torch.randn(50, 5, generator=generator(0, "x")), x + 0.5)
    assert shifted == pytest.approx(5 * 0.25, rel=1e-5)
    assert metrics.frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]])) == pytest.approx(9)


def test_kid_subsets_average_and_are_repeatable(features):
    real, generated = features
    whole = metrics.kid(real[:30], generated[:30], subset=30, subsets=3)
    assert whole == pytest.approx(metrics.kid(real[:30], generated[:30]), rel=1e-9)
    assert metrics.kid(real, generated, subset=20) == metrics.kid(real, generated, subset=20)
    with pytest.raises(ValueError, match="subset of 46"):
        metrics.kid(real, generated, subset=46)


def test_kid_is_unbiased():
    draws = generator(0, "unbiased")
    values = [metrics.kid(*torch.randn(2, 8, 4, generator=draws)) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))


def test_clip_score():
    images = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    texts = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    assert metrics.clip_score(images, texts) == pytest.approx(100 * (1 + math.sqrt(0.5) + 0) / 3)
    with pytest.raises(ValueError, match="one text per picture"):
        metrics.clip_score(images, texts[:2])


def test_retrieval_equals_sorting():
    draws = generator(0, "retrieval")
    images, texts = torch.randn(40, 8, generator=draws), torch.randn(25, 8, generator=draws)
    targets = torch.randint(0, 25, (40,), generator=draws)
    for k in (1, 5, 25):
        nearest = np.argsort(-(images.double() @ texts.double().T).numpy(), axis=1)[:, :k]
        expected = np.mean([t in row for t, row in zip(targets.numpy(), nearest, strict=True)])
        assert metrics.retrieval(images, texts, targets, k) == pytest.approx(expected)
    assert metrics.retrieval(torch.zeros(40, 8), texts, targets, 5) == 0  # equal scores recognize nothing


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(n, F\)"):
        metrics.cmmd(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="2 samples"):
        metrics.frechet_distance(torch.zeros(1, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="one target per picture"):
        metrics.retrieval(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
