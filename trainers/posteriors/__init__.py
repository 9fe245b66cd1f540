"""Tractable posteriors q_phi(z | x_t, t, c): normalised densities of the student's latent."""

from .gaussian import Diagonal, Full, LearnedLinear
from .unet import PosteriorOutput, UNetPosterior

__all__ = ["Diagonal", "Full", "LearnedLinear", "PosteriorOutput", "UNetPosterior"]
