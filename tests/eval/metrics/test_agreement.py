"""From the command to the number: what clean-fid, torch-fidelity and torchmetrics say of the same files and network."""

from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from cleanfid import fid as cleanfid
from torch import nn
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import register_feature_extractor
from torchmetrics.image import FrechetInceptionDistance, InceptionScore, KernelInceptionDistance

from eval.metrics import distances
from eval.networks.extractors import Inception
from eval.networks.weights import Found

ALL = ("fid", "kid", "inception_score", "precision_recall")


class SameNetwork(nn.Module):
    """The TorchScript file as a feature extractor of torchmetrics: uint8 images -> features, or logits without bias."""

    def __init__(self, file: Path, logits: bool = False) -> None:
        super().__init__()
        self.net, self.logits, self.num_features = torch.jit.load(str(file)), logits, 11 if logits else 37

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.net(images, return_features=True)
            return features @ self.net.output.weight.T if self.logits else features


# Against the libraries, from the command to the number --------------------------------------------------------------------


def test_clean_fid(command, networks, sets, tmp_path, measured, values):
    assert command("--metrics", "fid", "kid", mode="clean") == 0
    layers = torch.jit.load(str(networks.inception)).layers

    def extractor(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return layers((images - 128) / 128)

    options = {"num_workers": 0, "device": torch.device("cpu"), "verbose": False, "mode": "clean"}
    a, b = (cleanfid.get_folder_features(str(folder), extractor, **options) for folder in (sets.a, sets.b))
    moments = [m for f in (a, b) for m in (f.astype(np.float64).mean(0), np.cov(f, rowvar=False))]
    found = values(tmp_path / "out")
    if tuple(map(int, scipy.__version__.split(".")[:2])) < (1, 18):  # later ones lack what clean-fid's own distance calls
        with pytest.warns(DeprecationWarning, match="disp"):
            theirs = cleanfid.frechet_distance(moments[0], moments[1], moments[2], moments[3])
        assert found["fid"] == pytest.approx(float(np.real(theirs)), rel=1e-5)
    np.random.seed(0)  # noqa: NPY002 clean-fid draws from it
    all_pairs = cleanfid.kernel_distance(b[:61], a, num_subsets=1, max_subset_size=61)
    size = measured(tmp_path / "out")["metrics"]["kid"]["subset_size"]
    assert size == [61]
    spread = measured(tmp_path / "out")["metrics"]["kid"]["std_over_subsets"][0]
    assert found["kid"] == pytest.approx(all_pairs, abs=4 * spread)  # its subsets are other ones; exactly: test_distances


@pytest.mark.slow
def test_torch_fidelity(command, networks, sets, tmp_path, measured):
    """All four numbers, its own subsets and shuffles included."""
    assert command("--metrics", *ALL) == 0
    file = networks.inception

    class Same(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.nets = nn.ModuleDict({"37": SameNetwork(file), "logits": SameNetwork(file, logits=True)})

        def forward(self, images):
            return tuple(self.nets[name](images) for name in self.features_list)

        @staticmethod
        def get_provided_features_list():
            return "37", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return {"isc": "logits"}.get(metric, "37")

    register_feature_extractor("same", Same)
    theirs = calculate_metrics(
        input1=str(sets.a),
        input2=str(sets.b),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=61,
        feature_extractor="same",
        cuda=False,
        verbose=False,
        cache=False,
    )
    found = measured(tmp_path / "out")["metrics"]
    assert found["fid"]["value"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    # float32 there: sums of 1 that cancel to .003 (in float64 the two agree to 1e-12: test_distances)
    assert found["kid"]["value"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert found["kid"]["std_over_subsets"][0] == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-6)
    assert found["inception_score"]["value"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert found["precision"]["value"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert found["recall"]["value"] == pytest.approx(theirs["recall"], abs=1e-6)


@pytest.mark.slow
def test_torchmetrics(command, networks, sets, tmp_path, values):
    assert command("--metrics", "fid", "inception_score") == 0
    features = SameNetwork(networks.inception)
    fid = FrechetInceptionDistance(feature=features, antialias=False)
    fid.update(sets.b_pixels, real=True)
    fid.update(sets.a_pixels, real=False)
    assert values(tmp_path / "out")["fid"] == pytest.approx(fid.compute().item(), rel=1e-5)
    kid = KernelInceptionDistance(feature=features, subsets=1, subset_size=61)
    kid.update(sets.b_pixels[:61], real=True)
    kid.update(sets.a_pixels, real=False)
    extractor = Inception(Found(networks.inception, "", False), "legacy_tensorflow")
    ours = distances.kernel_distance(
        *(extractor(p)["features"] for p in (sets.a_pixels, sets.b_pixels[:61])), subsets=1, size=61
    )[0]
    assert ours == pytest.approx(kid.compute()[0].item(), abs=1e-6)  # float32 there, too
    score = InceptionScore(feature=SameNetwork(networks.inception, logits=True), splits=1)
    score.update(sets.a_pixels)
    mine = distances.InceptionScore(61, 11, splits=1)
    mine.update(Inception(Found(networks.inception, "", False), "legacy_tensorflow", logits=True)(sets.a_pixels)["logits"])
    assert mine.value()[0] == pytest.approx(score.compute()[0].item(), rel=1e-5)
