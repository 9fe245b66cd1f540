"""Tractable posteriors q_phi(z | x_t, t, c): normalised densities of the student's latent."""

from typing import Literal

from .bases import Frequencies, Haar, Learned
from .density import Covariance, Density
from .flow import Flow
from .gaussian import DenseLinear, Diagonal, Full, LowRank
from .unet import PosteriorOutput, UNetPosterior
from .vectors import NeuralSplines, Planar

# objective.posterior.covariance -> how a posterior of that name is built: COVARIANCES[name]((c, h, w), **options).
CovarianceName = Literal["diag", "haar", "dct", "learned", "lowrank", "flow", "linear", "full", "nsf", "planar"]
COVARIANCES: dict[CovarianceName, type[Covariance]] = {
    "diag": Diagonal,
    "haar": Haar,
    "dct": Frequencies,
    "learned": Learned,
    "lowrank": LowRank,
    "flow": Flow,
    "linear": DenseLinear,
    "full": Full,
    "nsf": NeuralSplines,
    "planar": Planar,
}

__all__ = ["COVARIANCES", "Covariance", "CovarianceName", "Density", "PosteriorOutput", "UNetPosterior"]
