"""Frechet distance between two Gaussians, from feature statistics that stream and merge.

    FD = |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))                       (Dowson & Landau 1982; FID)

With S_a = A A^T and S_b = B B^T the last trace is the sum of the singular values of A^T B (its squares are the
eigenvalues of S_a S_b). Singular values carry an absolute error of one rounding, whereas taking roots of eigenvalues
turns a rounding error e of a zero eigenvalue into sqrt(e): with fewer images than features that is what makes
`scipy.linalg.sqrtm` and eigenvalue implementations wrong by 1e-5, and what no clean-up afterwards can mend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.common.errors import UserError

# A Cholesky pivot is known to about eps * max; below this share of the largest too few of its digits are left.
MIN_PIVOT_RATIO = 1e-10
# Eigenvalues below this share of the largest are rounding noise of a symmetric float64 eigendecomposition.
MIN_EIGENVALUE_RATIO = 1e-15


class GaussianStats:
    """Mean and covariance of features seen in batches: n, mean (d,) and scatter sum (x - mean)(x - mean)^T (d, d).

    Everything is float64 and centred on the running mean (Chan, Golub & LeVeque 1979), so a large common offset of the features
    costs no digits, as it would with a plain sum of outer products. ValueError for dim below 1.

    >>> stats = GaussianStats(1).update(torch.tensor([[1.0], [2.0]])).update(torch.tensor([[6.0]]))
    >>> stats.n, stats.mean.tolist(), stats.cov.tolist()
    (3, [3.0], [[7.0]])
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        if dim < 1:
            raise ValueError(f"features need at least one dimension, got dim={dim}")
        self.n = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features: Tensor) -> GaussianStats:
        """Statistics of one set, features (n, d). ValueError for another shape; UserError: see update."""
        if features.ndim != 2:
            raise ValueError(f"features must have shape (n, d), got {tuple(features.shape)}")
        return cls(features.shape[1], features.device).update(features)

    @property
    def dim(self) -> int:
        """d, the number of features."""
        return len(self._mean)

    def update(self, features: Tensor) -> GaussianStats:
        """Take in a batch (n, d) of any float type and return self. An empty batch changes nothing.

        ValueError: wrong shape. UserError: a value that is not finite (one such row would silently void the whole statistic).
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must have shape (n, {self.dim}), got {tuple(features.shape)}")
        bad = ~torch.isfinite(features).all(dim=1)
        if bool(bad.any()):
            raise UserError(
                f"features of {int(bad.sum())} of {len(bad)} images are NaN or infinite (first: row "
                f"{int(bad.nonzero()[0])}); the images or the extractor are broken, no distance can be computed"
            )
        if len(features):
            features = features.to(self._mean)
            mean = features.mean(dim=0)
            centred = features - mean
            self._absorb(len(features), mean, centred.T @ centred)
        return self

    def merge(self, other: GaussianStats) -> GaussianStats:
        """Statistics of both sets together, as a new object. ValueError: dimensions differ."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge features of dimension {self.dim} and {other.dim}")
        merged = GaussianStats(self.dim, self._mean.device)
        for part in (self, other):
            if part.n:
                merged._absorb(part.n, part._mean.to(merged._mean), part._scatter.to(merged._scatter))
        return merged

    def _absorb(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.n + n
        delta = mean - self._mean
        self._scatter += scatter
        self._scatter.addr_(delta, delta, alpha=self.n * n / total)
        self._mean = self._mean + delta * (n / total)
        self.n = total

    @property
    def mean(self) -> Tensor:
        """(d,) float64. UserError before two images were seen."""
        self._require_two()
        return self._mean.clone()

    @property
    def cov(self) -> Tensor:
        """(d, d) float64, unbiased (n - 1). UserError before two images were seen."""
        self._require_two()
        return self._scatter / (self.n - 1)

    def _require_two(self) -> None:
        if self.n < 2:
            raise UserError(f"mean and covariance need at least 2 images, got {self.n}; evaluate more images")


def frechet_distance(a: GaussianStats, b: GaussianStats) -> float:
    """Frechet distance between two sets of features (the formula above), at least 0.

    It is biased upwards by roughly 1/n_a + 1/n_b: compare values only at equal n (Chong & Forsyth 2020). ValueError: dimensions
    differ. UserError: fewer than two images on a side.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> round(frechet_distance(GaussianStats.of(x), GaussianStats.of(x + 3)), 6)  # the squared distance of the means
    9.0
    """
    if a.dim != b.dim:
        raise ValueError(f"features of dimension {a.dim} and {b.dim} cannot be compared: use one extractor for both")
    return frechet_from_moments(a.mean, a.cov, b.mean, b.cov)


def frechet_from_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The same from means (d,) and symmetric positive semi-definite covariances (d, d), as reference files hold.

    ValueError: shapes that do not fit. UserError: values that are not finite.

    >>> zero, one = torch.zeros(2), torch.eye(2)
    >>> round(frechet_from_moments(zero, one, zero, 9 * one), 6)  # d (3 - 1)^2
    8.0
    """
    d = len(mean_a)
    for name, value, shape in (("mean_b", mean_b, (d,)), ("cov_a", cov_a, (d, d)), ("cov_b", cov_b, (d, d))):
        if value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape} beside mean_a ({d},)")
    mean_a, cov_a, mean_b, cov_b = (v.to(mean_a.device, torch.float64) for v in (mean_a, cov_a, mean_b, cov_b))
    for name, value in (("mean_a", mean_a), ("cov_a", cov_a), ("mean_b", mean_b), ("cov_b", cov_b)):
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{name} holds NaN or infinite values; recompute these statistics")
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * _trace_sqrt(cov_a, cov_b)
    return max(distance.item(), 0.0)  # never negative in exact arithmetic; equal sets may round to -1e-13


def _trace_sqrt(cov_a: Tensor, cov_b: Tensor) -> Tensor:
    """tr((S_a S_b)^(1/2)) >= 0, a scalar."""
    factors = [_cholesky(cov) for cov in (cov_a, cov_b)]
    a, b = factors
    if a is None or b is None:
        a, b = (_truncated_root(cov) for cov in (cov_a, cov_b))
    return torch.linalg.svdvals(a.T @ b).sum()


def _cholesky(cov: Tensor) -> Tensor | None:
    """L (d, d) with cov = L L^T, or None where cov is so nearly singular that L would be mostly rounding."""
    factor, failed = torch.linalg.cholesky_ex(cov)
    if int(failed):
        return None
    pivots = factor.diagonal().square()
    return factor if bool(pivots.min() > MIN_PIVOT_RATIO * pivots.max()) else None


def _truncated_root(cov: Tensor) -> Tensor:
    """R (d, k) with cov = R R^T from the k eigenvalues above rounding: fewer images than features, dead features."""
    values, vectors = torch.linalg.eigh(cov)
    keep = values > MIN_EIGENVALUE_RATIO * values[-1].clamp(min=0)
    return vectors[:, keep] * values[keep].sqrt()
