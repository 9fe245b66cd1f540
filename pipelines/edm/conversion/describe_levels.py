"""The preconditioning of a snapshot and the noise levels that it knows -> EDMScheduler's configuration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...common.errors import UserError
from ..layout import PRECONDITIONING, check_preconditioning
from .bounds import SnapshotError, is_number, shown
from .snapshots import PRECONDITIONERS, Snapshot

SAMPLED = (0.002, 80.0)  # where the EDM paper samples, within what a network knows
OWN_LIMITS = {"edm": (0.0, math.inf), "ve": (0.02, 100.0)}  # NVlabs' defaults; vp and iddpm have theirs by their settings
EPS = 2.0**-23  # of float32, in which the networks' own limits and tables were computed


def choose_preconditioning(snapshot: Snapshot, asked: str | None) -> tuple[str, str | None]:
    """(edm, vp, ve or iddpm; what the user should know). asked: by the user, for a file that cannot say."""
    known = tuple(PRECONDITIONERS.values())
    if asked is not None and asked not in known:
        raise SnapshotError(f"preconditioning {shown(asked)}; expected one of {', '.join(known)}")
    named = snapshot.preconditioning or ("iddpm" if "u" in snapshot.tensors else None)
    if named and asked not in (None, named):
        raise SnapshotError(f"preconditioning {asked!r} was asked for, but the file says {named!r}; leave --preconditioning out")
    if "u" in snapshot.tensors and named != "iddpm":
        raise SnapshotError(f"a network of {named} preconditioning with a table of noise levels, u, which only iddpm has")
    if named or asked or any(key.startswith("logvar_linear.") for key in snapshot.tensors):  # FastGen has edm alone
        return named or asked or "edm", None
    return "edm", (
        "the file holds tensors alone and cannot say its preconditioning; edm with sigma_data 0.5 is assumed, which all networks "
        "of FastGen have. A network of NVlabs' baseline-*-vp or baseline-*-ve needs --preconditioning vp or ve: with a wrong one "
        "it denoises wrongly"
    )


def describe_scheduler(snapshot: Snapshot, unet: dict[str, Any], name: str) -> dict[str, Any]:
    """EDMScheduler's configuration: strict JSON, so that the infinite sigma_max of EDM becomes the paper's."""
    settings = {key: setting_of(snapshot, key, default) for key, default in PRECONDITIONING[name].items()}
    if name == "iddpm" and not snapshot.network:
        settings["M"] = len(table(snapshot)) - 1
    for key, value in settings.items():
        if not is_number(value):
            raise SnapshotError(f"{key} is {shown(value)}; expected a number")
    try:
        check_preconditioning(name, settings)
    except UserError as error:
        raise SnapshotError(str(error)) from error
    if "M" in settings:
        settings["M"] = int(settings["M"])
    if (unet["out_channels"] == 2 * unet["in_channels"]) != (name == "iddpm") or (
        name != "iddpm" and unet["out_channels"] != unet["in_channels"]
    ):
        raise SnapshotError(f"{unet['in_channels']} channels in, {unet['out_channels']} out, with {name} preconditioning")
    limits, own = known_levels(snapshot, name, settings), {}
    if name in OWN_LIMITS:
        given = zip(("network_sigma_min", "network_sigma_max"), limits, OWN_LIMITS[name], strict=True)
        own = {key: value for key, value, usual in given if value != usual}
    low, high = max(SAMPLED[0], limits[0]), min(SAMPLED[1], limits[1])
    if not low <= high:
        raise SnapshotError(f"sigma_min {limits[0]:g} and sigma_max {limits[1]:g}: none of .002 to 80, where images are sampled")
    sampling = {"sigma_min": low, "sigma_max": high, "sampler": "heun", "num_inference_steps": 18}
    return settings | {"preconditioning": name} | own | sampling


def setting_of(snapshot: Snapshot, key: str, default: float) -> Any:
    """What the network says of itself; the default stands in for it where the file holds tensors alone."""
    if snapshot.network is None:
        return default
    if key not in snapshot.network.state:
        raise SnapshotError(f"the network has no {key}, which every {snapshot.network.class_name} has")
    return snapshot.network.state[key]


def known_levels(snapshot: Snapshot, name: str, settings: dict[str, Any]) -> tuple[float, float]:
    """sigma_min and sigma_max of the network. SnapshotError where they are none, or others than its settings give."""
    if name == "vp":
        usual = tuple(vp_sigma(t, settings) for t in (settings["epsilon_t"], 1.0))
        if usual[1] > 1e17:
            raise SnapshotError(f"beta_d {settings['beta_d']}, beta_min {settings['beta_min']}: sigma_max is {usual[1]:g}")
    elif name == "iddpm":
        u = check_levels(snapshot, settings)
        usual = float(u[-2]), float(u[0])
    else:
        usual = OWN_LIMITS[name]
    low, high = setting_of(snapshot, "sigma_min", usual[0]), setting_of(snapshot, "sigma_max", usual[1])
    for key, value in (("sigma_min", low), ("sigma_max", high)):
        infinite = is_number(value) and math.isinf(value) and (key, name) != ("sigma_max", "edm")
        if not is_number(value) or math.isnan(value) or value < 0 or infinite:
            raise SnapshotError(f"{key} is {shown(value)}; expected a noise level, 0 or more")
    if low >= high and (low, high) != usual:
        raise SnapshotError(f"sigma_min {low:g} is not below sigma_max {high:g}")
    # squares: at epsilon_t VP's is so small that float32 moves it by a multiple of EPS
    if name in ("vp", "iddpm") and not all(
        abs(found**2 - value**2) <= 4 * EPS + 1e-5 * value**2 for found, value in zip((low, high), usual, strict=True)
    ):
        given = ", ".join(settings)
        raise SnapshotError(f"sigma_min {low:g} and sigma_max {high:g}, where {given} give {usual[0]:g} and {usual[1]:g}")
    return low, high


def vp_sigma(t: float, settings: dict[str, Any]) -> float:
    return math.sqrt(math.expm1(0.5 * settings["beta_d"] * t**2 + settings["beta_min"] * t))


def table(snapshot: Snapshot) -> np.ndarray:
    """The stored noise levels u (M + 1,)."""
    stored = snapshot.tensors.get("u")
    if stored is None or len(stored.shape) != 1 or stored.storage.dtype.kind != "f" or stored.shape[0] < 3:
        raise SnapshotError("the table of noise levels, u, is not that of C_1, C_2 and M: it is missing, or no list of numbers")
    return stored.numpy()


def check_levels(snapshot: Snapshot, settings: dict[str, Any]) -> np.ndarray:
    """The stored table u, which must be the one that its settings give (preconditioning.IDDPM).

    In float32, as theirs: with M = 1000 the smallest level is off by 5e-4 from exact numbers. Since u_j^2 + 1 is a product that
    telescopes, sin^2 at M over sin^2 at j, a last bit of a sine counts once, and roundings add up like a random walk.
    """
    stored, m, f = table(snapshot), settings["M"], np.float32
    wrong = SnapshotError("the table of noise levels, u, is not that of C_1, C_2 and M")
    if stored.shape != (m + 1,):
        raise wrong
    alpha_bar = np.sin(f(0.5 * math.pi) * np.arange(m + 1, dtype=f) / f(m) / f(settings["C_2"] + 1)) ** 2
    ratios = np.maximum(alpha_bar[:-1] / alpha_bar[1:], f(settings["C_1"])).tolist()
    u, squared, one = np.zeros(m + 1, f), f(0), f(1)
    for j in range(m, 0, -1):
        squared = max((squared + one) / f(ratios[j - 1]) - one, f(0))
        u[j - 1] = np.sqrt(squared)
        squared = u[j - 1] ** 2
    exact, walk = u.astype(np.float64) ** 2, np.sqrt(np.arange(m - 1, -1, -1))
    tolerance = np.append(EPS * (1 + exact[:-1]) * (1.25 + 1.5 * walk), 0)
    if not (np.diff(u) < 0).all() or not (np.abs(stored.astype(np.float64) ** 2 - exact) <= tolerance).all():  # NaN too
        raise wrong
    return stored
