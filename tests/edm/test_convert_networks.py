"""All that NVlabs' classes can make converts to the same function; settings that nothing is denoised with are refused by name."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.common.errors import UserError
from pipelines.edm import EDMPipeline, EDMScheduler, EDMUNet
from pipelines.edm.conversion.convert import convert
from pipelines.edm.conversion.pickles import SnapshotError
from scripts import convert_edm

SONG = {"model_type": "SongUNet", "img_resolution": 8, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
SONG |= {"attn_resolutions": [4]}
SIDE = {"encoder_type": "residual", "embedding_type": "fourier"}
ADM = SONG | {"model_type": "DhariwalUNet", "model_channels": 32}
# NVlabs' keyword arguments; all of these were refused once
NETWORKS = {
    "width 5": SONG | {"model_channels": 6, "channel_mult": [1, 1]},
    "width 36": SONG | {"model_channels": 36, "channel_mult": [1]},
    "one level": SONG | {"channel_mult": [2], "attn_resolutions": []},
    "one level with a side path and a filter": SONG | SIDE | {"channel_mult": [1], "resample_filter": [1, 3, 3, 1]},
    "no blocks": SONG | {"num_blocks": 0, "label_dim": 3},
    "no blocks, residual": SONG | SIDE | {"num_blocks": 0, "channel_mult": [3, 1], "augment_dim": 9},
    "first level smaller than cbase": ADM | {"channel_mult": [2, 1], "label_dim": 3},
    "cres of ADM": ADM | {"channel_mult": [2, 3], "attn_resolutions": [8, 4]},
    "one level of ADM": ADM | {"channel_mult": [3], "model_channels": 64, "attn_resolutions": [8]},
    "heads of 80 channels": ADM | {"model_channels": 160, "channel_mult": [1], "num_blocks": 0, "img_resolution": 4},
    "decreasing widths": SONG | {"channel_mult": [4, 2, 1], "attn_resolutions": [8, 2]},
    "embedding as wide as the network": SONG | {"channel_mult_emb": 1, "label_dim": 2},
    "filter of two different taps": SONG | {"resample_filter": [3, 2]},
    "asymmetric filter": SONG | SIDE | {"resample_filter": [0.1, 0.7, 0.3, 0.2]},
    "zero at the ends": SONG | SIDE | {"resample_filter": [0, 1, 1, 0]},
    "negative taps": SONG | {"encoder_type": "skip", "resample_filter": [-1, 3, 3, -1]},
    "filter at another scale": SONG | {"resample_filter": [0.25, 0.75, 0.75, 0.25]},
    "twice the box": SONG | {"resample_filter": [2, 2]},
    "six taps": SONG | SIDE | {"resample_filter": [1, 5, 10, 10, 5, 1]},
    "odd filter": SONG | SIDE | {"resample_filter": [1, 2, 1], "img_resolution": 9, "attn_resolutions": [9]},
    "dropout of everything": SONG | {"dropout": 1.0},
}
OTHERS = {
    "sigma_data": ("EDMPrecond", {"sigma_data": 1.7}),
    "EDM within limits": ("EDMPrecond", {"sigma_min": 0.01, "sigma_max": 50.0}),
    "EDM to 10": ("EDMPrecond", {"sigma_max": 10.0}),
    "VE to 1348": ("VEPrecond", {"sigma_min": 0.01, "sigma_max": 1348}),
    "VE to 50": ("VEPrecond", {"sigma_max": 50}),
    "VE from .001 to 7": ("VEPrecond", {"sigma_min": 0.001, "sigma_max": 7.0}),
    "VP of another slope": ("VPPrecond", {"beta_d": 9.0, "beta_min": 0.05, "M": 500}),
    "VP from .001": ("VPPrecond", {"epsilon_t": 1e-3, "beta_min": 0.0}),
    "iDDPM of 100 levels": ("iDDPMPrecond", {"M": 100, "C_1": 0.01, "C_2": 0.02}),
}


def same_function(ref, folder: Path, sigmas=(0.05, 0.7, 5.0)) -> None:
    """D of the folder is that of the reference, with labels; and it is sampled at its own defaults."""
    pipe = EDMPipeline.from_pretrained(folder, dtype=torch.float64)
    k, generator = ref.k, torch.Generator().manual_seed(5)
    denoiser = pipe.denoiser()
    for sigma in sigmas:
        x = sigma * torch.randn(2, k["img_channels"], *[k["img_resolution"]] * 2, generator=generator).double()
        s = torch.full((2,), sigma, dtype=torch.float64)
        labels = torch.eye(k["label_dim"], dtype=torch.float64)[:2] if k["label_dim"] else None
        augment = torch.randn(2, 9, generator=generator).double() if k["augment_dim"] else None
        named = {"class_labels": labels, "augment_labels": augment}
        condition = {key: value for key, value in named.items() if value is not None}
        with torch.no_grad():
            made, expected = denoiser(x, denoiser.schedule.level(s), condition or None), ref(x, s, labels, augment)
        assert (made - expected).norm() < 2e-6 * expected.norm()  # filters are float32 numbers
    pipe.set_progress_bar_config(disable=True)
    assert pipe(batch_size=1, num_inference_steps=2, output_type="latent").images.shape[1] == k["img_channels"]


def converted(ref, tmp_path, **options):
    (tmp_path / "net.pkl").write_bytes(ref.dump())
    return convert(tmp_path / "net.pkl", tmp_path / "out", **options)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.slow
def test_networks_of_other_shapes(tmp_path, new_reference, name):
    ref = new_reference("EDMPrecond", NETWORKS[name])
    made = converted(ref, tmp_path)
    same_function(ref, tmp_path / "out")
    assert made.parameters == sum(t.numel() for n, t in ref.tensors.items() if not n.endswith(("freqs", "filter")))


@pytest.mark.parametrize("name", ["filter of two different taps", "no blocks, residual", "cres of ADM", "odd filter"])
def test_without_the_objects_too(tmp_path, new_reference, name):
    """The tensors alone say the same."""
    ref = new_reference("EDMPrecond", NETWORKS[name])
    torch.save(ref.state_dict(), tmp_path / "net.pth")
    convert(tmp_path / "net.pth", tmp_path / "out", "edm")
    same_function(ref, tmp_path / "out")


@pytest.mark.parametrize(("taps", "held"), [([2, 2], [1, 1]), ([0.25, 0.75, 0.75, 0.25], [1, 3, 3, 1]), ([3, 2], [3, 2])])
def test_filters_are_small_integers_where_they_can_be(tmp_path, new_reference, taps, held):
    assert converted(new_reference("EDMPrecond", SONG | {"resample_filter": taps}), tmp_path).unet["resample_filter"] == held


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_of_the_preconditioners(tmp_path, new_reference, name):
    precond, settings = OTHERS[name]
    ref = new_reference(precond, SONG | settings)
    made = converted(ref, tmp_path)
    same_function(ref, tmp_path / "out", (0.05, 0.7, 5.0) if precond != "VEPrecond" else (0.02, 0.7, 5.0))
    assert {key: made.scheduler[key] for key in settings if key in made.scheduler and not key.startswith("sigma_m")}.items() <= (
        settings.items()
    )


def test_a_networks_own_limits_are_kept(tmp_path, new_reference):
    """It is sampled within them, and asked for no others."""
    made = converted(new_reference("VEPrecond", SONG | {"sigma_min": 0.01, "sigma_max": 1348}), tmp_path)
    held = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert held == made.scheduler | {"_class_name": "EDMScheduler"}
    assert (held["sigma_min"], held["sigma_max"], held["network_sigma_min"], held["network_sigma_max"]) == (0.01, 80, 0.01, 1348)
    scheduler = EDMScheduler.from_config(held)
    assert scheduler.preconditioner().sigma_range == (0.01, 1348)
    assert scheduler.sigmas(2, sigma_max=1300.0)[0] == pytest.approx(1300)
    for wrong in ({"sigma_max": 1400.0}, {"sigma_min": 0.005}):
        with pytest.raises(UserError, match=r"within what ve knows, 0\.01 to 1348"):
            scheduler.sigmas(2, **wrong)


def test_usual_limits_are_not_written(tmp_path, new_reference):
    for precond in ("EDMPrecond", "VEPrecond", "VPPrecond"):
        made = converted(new_reference(precond, SONG), tmp_path / precond) if (tmp_path / precond).mkdir() is None else None
        assert not [key for key in made.scheduler if key.startswith("network_")]


# Nonsense ------------------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
NONSENSE = [
    *(("EDMPrecond", "sigma_data", v) for v in (0, -0.5, NAN, INF, 1e-300, 1e300, True, "0.5", None, 10**30, [0.5])),
    *(("EDMPrecond", "sigma_min", v) for v in (-1, NAN, INF, "0", 90.0, None)),
    *(("EDMPrecond", "sigma_max", v) for v in (0, -80, NAN, 0.001, "inf")),
    *(("VEPrecond", "sigma_min", v) for v in (200, NAN, -0.1, 100)),
    *(("VEPrecond", "sigma_max", v) for v in (0.01, INF, NAN, 0)),
    *(("VPPrecond", "beta_d", v) for v in (0, -19.9, NAN, INF, 1e9)),
    *(("VPPrecond", "beta_min", v) for v in (-0.1, NAN, 1e9)),
    *(("VPPrecond", "epsilon_t", v) for v in (0, -1e-5, 1, NAN)),
    *(("VPPrecond", "M", v) for v in (0, 1, -1000, 1000.5, 10**9, NAN, True)),
    *(("VPPrecond", "sigma_min", v) for v in (0.5, 200, NAN)),
    *(("VPPrecond", "sigma_max", v) for v in (80, INF)),
    *(("iDDPMPrecond", "C_1", v) for v in (0, -0.001, 1, NAN, 0.002)),
    *(("iDDPMPrecond", "C_2", v) for v in (-0.5, NAN, INF, 0.02)),
    *(("iDDPMPrecond", "M", v) for v in (0, -5, 10**9, 999, 2**100, 1000.5, "1000", NAN)),
    *(("iDDPMPrecond", "sigma_min", v) for v in (0.01, 0)),
    *(("iDDPMPrecond", "sigma_max", v) for v in (80, NAN)),
]


@pytest.fixture(scope="module")
def small(new_reference):
    made = {}

    def get(precond):
        if precond not in made:
            made[precond] = new_reference(precond, SONG | {"model_channels": 4, "channel_mult": [1]})
        return made[precond]

    return get


@pytest.mark.parametrize(("precond", "key", "value"), NONSENSE, ids=str)
def test_settings_that_make_no_sense(tmp_path, small, precond, key, value):
    ref = small(precond)
    tree = ref.tree
    ref.tree = lambda make: changed(tree(make), key, value)
    try:
        with pytest.raises(
            SnapshotError, match=key if not (precond == "iDDPMPrecond" and key in ("C_1", "C_2", "M")) else "C_1|C_2|M"
        ):
            converted(ref, tmp_path)
    finally:
        del ref.tree
    assert [p.name for p in tmp_path.iterdir()] == ["net.pkl"]


def changed(root, key, value):
    root.state[key] = value
    return root


@pytest.mark.parametrize(("precond", "key"), [("EDMPrecond", "sigma_data"), ("VEPrecond", "sigma_max"), ("VPPrecond", "M")])
def test_settings_that_are_missing(tmp_path, small, precond, key):
    """No default stands in for what a network must say."""
    ref = small(precond)
    tree = ref.tree

    def without(make):
        root = tree(make)
        del root.state[key]
        return root

    ref.tree = without
    try:
        with pytest.raises(SnapshotError, match=f"the network has no {key}, which every {precond} has"):
            converted(ref, tmp_path)
    finally:
        del ref.tree


@pytest.mark.parametrize("wrong", [{"sigma_data": 0.0}, {"sigma_data": NAN}, {"preconditioning": "vp", "beta_d": 0.0}])
def test_a_scheduler_refuses_them_too(wrong):
    with pytest.raises(UserError, match=list(wrong)[-1]):
        EDMScheduler(**wrong)


def test_limits_of_a_scheduler():
    with pytest.raises(UserError, match="have no effect for vp; remove them"):
        EDMScheduler(preconditioning="vp", network_sigma_min=0.1)
    with pytest.raises(UserError, match="network_sigma_min 5 is not below network_sigma_max 1"):
        EDMScheduler(network_sigma_min=5.0, network_sigma_max=1.0)


@pytest.mark.parametrize(
    ("index", "factor"), [(0, 1.0002), (1, 0.9999), (500, 1.0001), (900, 0.9999), (990, 1.001), (999, 1.002)]
)
def test_each_level_of_the_table_is_checked(tmp_path, small, index, factor):
    """In float32 the smallest is off by 5e-4 from exact numbers, and is theirs so."""
    ref = small("iDDPMPrecond")
    u = ref.tensors["u"]
    ref.tensors["u"] = u * torch.ones(1001).index_fill(0, torch.tensor(index), factor)
    with pytest.raises(SnapshotError, match="the table of noise levels, u, is not that of C_1, C_2 and M"):
        converted(ref, tmp_path)
    ref.tensors["u"] = u


@pytest.mark.parametrize("levels", [100, 1000, 4000])
def test_tables_in_the_rounding_of_another_machine(tmp_path, new_reference, levels):
    """Sines that are off by a last bit here and there, as another library's are, are no fault."""
    ref = new_reference("iDDPMPrecond", SONG | {"M": levels, "model_channels": 4, "channel_mult": [1]})
    j = np.arange(levels + 1)
    bar = np.sin(j.astype(np.float32) / np.float32(levels) * np.float32(0.5 * math.pi) / np.float32(1.008))
    bar = np.where(j % 7 == 5, np.nextafter(bar, np.where(j % 2, 2, 0).astype(np.float32)), bar) ** 2
    u, one = np.zeros(levels + 1, np.float32), np.float32(1)
    for j in range(levels, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + one) / max(bar[j - 1] / bar[j], np.float32(0.001)) - one)
    ref.tensors["u"] = torch.from_numpy(u)
    converted(ref, tmp_path)


# What a .pth cannot say ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precond", "name"), [("VPPrecond", "vp"), ("VEPrecond", "ve"), ("EDMPrecond", "edm")])
def test_the_preconditioning_of_tensors_alone(tmp_path, new_reference, precond, name, capsys):
    """Asked for by an option; without it edm, and a warning."""
    ref = new_reference(precond, SONG)
    torch.save(ref.state_dict(), tmp_path / "net.pth")
    convert_edm.main([str(tmp_path / "net.pth"), str(tmp_path / "out"), "--preconditioning", name])
    assert "warning" not in capsys.readouterr().err
    same_function(ref, tmp_path / "out")
    capsys.readouterr()
    convert_edm.main([str(tmp_path / "net.pth"), str(tmp_path / "guessed")])
    said = capsys.readouterr().err
    assert said.startswith("warning: the file holds tensors alone and cannot say its preconditioning; edm with sigma_data 0.5")
    assert said.count("\n") == 1
    assert json.loads((tmp_path / "guessed/scheduler/scheduler_config.json").read_text())["preconditioning"] == "edm"


def test_a_table_of_levels_says_it(tmp_path, new_reference):
    """u is in the tensors of an iDDPM network alone, and gives M."""
    ref = new_reference("iDDPMPrecond", SONG | {"M": 100})
    torch.save(ref.state_dict(), tmp_path / "net.pth")
    made = convert(tmp_path / "net.pth", tmp_path / "out")
    assert made.assumed is None
    assert (made.scheduler["preconditioning"], made.scheduler["M"]) == ("iddpm", 100)
    same_function(ref, tmp_path / "out")
    with pytest.raises(SnapshotError, match="'edm' was asked for, but the file says 'iddpm'"):
        convert(tmp_path / "net.pth", tmp_path / "other", "edm")


def test_an_option_that_contradicts_the_file(tmp_path, new_reference, persistent):
    (tmp_path / "net.pkl").write_bytes(new_reference("VPPrecond", SONG).dump())
    with pytest.raises(SnapshotError, match="'ve' was asked for, but the file says 'vp'"):
        convert(tmp_path / "net.pkl", tmp_path / "out", "ve")
    convert(tmp_path / "net.pkl", tmp_path / "out", "vp")
    with pytest.raises(SnapshotError, match="preconditioning 'edm2'; expected one of edm, vp, ve, iddpm"):
        convert(tmp_path / "net.pkl", tmp_path / "other", "edm2")
    torch.save(new_reference("EDMPrecond", SONG).state_dict(), tmp_path / "net.pth")
    with pytest.raises(SnapshotError, match="the table of noise levels, u, is not that of"):
        convert(tmp_path / "net.pth", tmp_path / "other", "iddpm")


def test_fastgens_own_mark(tmp_path, new_reference):
    """logvar_linear is in FastGen's networks alone, which are EDM's: nothing to warn of."""
    held = new_reference("EDMPrecond", SONG).state_dict() | {"model.logvar_linear.weight": torch.randn(1, 32)}
    torch.save(held, tmp_path / "net.pth")
    assert convert(tmp_path / "net.pth", tmp_path / "out").assumed is None


# Networks that no class makes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_channels": 132}, "model_channels 132: .* has 132 channels, which cannot be in 32 groups"),
        ({"model_channels": 2}, "model_channels 2 must be a multiple of 4: .* groups of 4 or more"),
        ({"model_channels": 5, "channel_mult": [2]}, "model_channels 5 times channel_mult_noise 1 must be even"),
        ({"architecture": "adm", "model_channels": 224, "channel_mult": [1]}, "224 channels of .*in0 cannot be in 3 heads"),
        ({"resample_filter": [1, -1]}, "must be numbers whose sum is not 0"),
        ({"resample_filter": []}, "must be numbers whose sum is not 0"),
        ({"resample_filter": [1, 2, 1], "sample_size": 7}, r"must have an even number of taps.*sample_size is 7"),
    ],
)
def test_configurations_of_no_network(config, match):
    with pytest.raises(UserError, match=match):
        EDMUNet(**config)
