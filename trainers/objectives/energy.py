"""The energy distance between two sets of samples as a per-sample loss, and what it can be taken of besides whole images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def pairwise_power(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """|x_i - y_j|^beta, (n, ...) x (m, ...) -> (n, m), in float64 from inner products: no (n, m, d) tensor.

    Where two samples coincide (within float64 cancellation) distance and gradient are exactly 0, for every beta.

    >>> pairwise_power(torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0], [3.0]]), beta=1.0).tolist()
    [[0.0, 3.0], [3.0, 0.0]]
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    centre = y.mean(0)  # distances do not move with the origin; rounding does
    x, y = x - centre, y - centre
    x2, y2 = x.square().sum(1), y.square().sum(1)
    square = x2[:, None] + y2[None, :] - 2 * x @ y.T
    coincide = square <= 1e-12 * (x2[:, None] + y2[None, :])  # False for NaN, which must come through
    return torch.where(coincide, 0.0, torch.where(coincide, 1.0, square).pow(beta / 2))


def energy_loss(
    x_student: Tensor, x_data: Tensor, beta: float, cross: Literal["full", "paired"], same_condition: bool = False
) -> Tensor:
    """Each student sample's share of the bracket above; the mean over samples is Eq. 9 ("full") or Eq. 10 ("paired").

    x_student (K, ...), x_data (N, ...) noised to one level, K >= 2, N = K or, "full", more -> (K,) float64. same_condition:
    rows i of both depend on one another, so that the cross term leaves the pairs i, i out. ValueError for fewer than two samples,
    fewer data than that, or more in pairs.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> energy_loss(x, x + 10, beta=1.0, cross="full").tolist()  # mean distance to the data, less half of that to the other
    [10.0, 8.0]
    """
    k, n = len(x_student), len(x_data)
    if k < 2 or n < k or (n > k and cross == "paired"):
        raise ValueError(f"the energy loss needs as many data as student samples and at least 2; got {n}, {k}")
    within = pairwise_power(x_student, x_student, beta)
    within = (within - torch.diag(within.diagonal())).sum(1) / (k - 1)
    if same_condition and cross == "paired":
        x_data = x_data.roll(-1, 0)
    between = pairwise_power(x_student, x_data, beta)
    if cross == "paired":
        return between.diagonal() - within / 2
    if same_condition:
        own = torch.eye(k, n, dtype=torch.bool, device=between.device)
        between = between.masked_fill(own, 0.0).sum(1) / (n - 1)
    else:
        between = between.mean(1)
    return between - within / 2


def energy_score(x_student: Tensor, x_data: Tensor, beta: float) -> Tensor:
    """Of m student samples for each condition and one data sample of it, the energy score (Gneiting & Raftery 2007, Eq. 22),

        1/m sum_k |xS_k - xT|^beta - 1/2 1/(m (m - 1)) sum_{k != l} |xS_k - xS_l|^beta,

    whose mean over data is least where the student's law *of each condition* is the data's. x_student (b m, ...), the m of a
    condition in a row, x_data (b, ...) -> (b,) float64. ValueError for fewer than two samples a condition.

    >>> energy_score(torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0]]), beta=1.0).tolist()  # (5 + 3) / 2 - 2 / 2
    [3.0]
    """
    b = len(x_data)
    m = len(x_student) // b
    if m < 2 or len(x_student) != b * m:
        raise ValueError(
            f"the energy score needs the same number of samples, at least 2, a data sample; got {len(x_student)}, {b}"
        )
    x, y = (v.reshape(b, -1, *v.shape[1:]) for v in (x_student, x_data))
    between = distance_power(x, y, beta).mean(1)
    first, second = torch.triu_indices(m, m, 1)
    return between - distance_power(x[:, first], x[:, second], beta).mean(1) / 2


def distance_power(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """|x - y|^beta of x, y (b, m or 1, ...) -> (b, m) float64; value and gradient are 0 where they coincide."""
    square = (x.double() - y.double()).square().flatten(2).sum(2)
    return torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).pow(beta / 2))


def condition_vector(condition: dict[str, Tensor], num_classes: int) -> Tensor:
    """What a condition says, (b, n) of length 1 a row: SDXL's pooled text, else the mean over tokens; a class as one-hot."""
    if "class_labels" in condition:
        labels = condition["class_labels"]
        return labels.float() if labels.is_floating_point() else torch.nn.functional.one_hot(labels, num_classes).float()
    text = condition["text_embeds"] if "text_embeds" in condition else condition["encoder_hidden_states"].mean(1)
    return torch.nn.functional.normalize(text.float(), dim=1)


def spread(rows: Tensor) -> Tensor:
    """rows (K, n) -> the same, moved and scaled to mean 0 and mean square length 1 over the rows; zeros where all are equal."""
    centred = rows - rows.mean(0)
    length = centred.square().sum(1).mean().sqrt()
    return centred / length if length > 1e-6 else torch.zeros_like(centred)


def grid_blocks(x: Tensor, n: int) -> Tensor:
    """(K, c, h, w) -> (n^2, K, c (h/n) (w/n)): the blocks of an n x n grid; n must divide both sides.

    >>> grid_blocks(torch.arange(4.0).view(1, 1, 2, 2), 2).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    k, c, h, w = x.shape
    return x.reshape(k, c, n, h // n, n, w // n).permute(2, 4, 0, 1, 3, 5).reshape(n * n, k, -1)


def unit_channels(features: Tensor, reference: Tensor) -> Tensor:
    """Feature maps (K, c, h, w), each channel in units of its spread in the reference (K, c, h, w): the root mean square, over
    samples and positions, about the samples' mean. Channels that are all but constant there become 0.
    """
    spread = (reference - reference.mean(0)).square().mean((0, 2, 3), keepdim=True).sqrt()
    alive = spread > 1e-6 * reference.square().mean().sqrt()
    return torch.where(alive, features / torch.where(alive, spread, 1.0), 0.0)
