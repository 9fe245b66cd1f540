"""Snapshots in: the same function out, by all containers. What is refused: test_convert_refused.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pipelines.edm import EDMPipeline, EDMUNet
from pipelines.edm.conversion.convert import convert
from pipelines.edm.layout import state_shapes
from scripts import convert_edm

ROOT = Path(__file__).resolve().parents[2]
SIGMAS = (0.002, 0.03, 0.3, 2.5, 17.0, 80.0)


def relative(actual, expected) -> float:
    return float((actual - expected).norm() / expected.norm())


def inputs(reference, sigma):
    """x, sigma, labels (one of them null) and augment labels, or None, in float64."""
    k = reference.k
    x = torch.randn(3, k["img_channels"], *[k["img_resolution"]] * 2, generator=torch.Generator().manual_seed(5)).double()
    labels = None
    if k["label_dim"]:
        labels = torch.eye(k["label_dim"], dtype=torch.float64)[[0, 1, k["label_dim"] - 1]]
        labels[1] = 0
    augment = torch.randn(3, 9, generator=torch.Generator().manual_seed(6)).double() if k["augment_dim"] else None
    return x * max(1, sigma), torch.full((3,), sigma, dtype=torch.float64), labels, augment


# The same function --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.slow
def test_denoiser_is_the_snapshots(case, reference, converted, dtype, tolerance):
    """Every family, every sigma, with class labels, null labels and augment labels."""
    ref, pipe = reference(case), EDMPipeline.from_pretrained(converted(case), dtype=dtype)
    denoiser = pipe.denoiser()
    for sigma in SIGMAS:
        x, s, labels, augment = inputs(ref, sigma)
        named = {"class_labels": labels, "augment_labels": augment}
        condition = {key: value.to(dtype) for key, value in named.items() if value is not None}
        with torch.no_grad():
            made = denoiser(x.to(dtype), denoiser.schedule.level(s.to(dtype)), condition or None)
        assert made.dtype == dtype
        assert relative(made.double(), ref(x, s, labels, augment)) < tolerance


@pytest.mark.parametrize("case", ["edm_ncsnpp", "vp_ddpmpp", "edm_adm"], scope="session")
def test_labels_by_number_and_by_vector(case, reference, converted):
    """Integers, one-hot vectors and no label at all mean what they say; every label means something."""
    unet = EDMPipeline.from_pretrained(converted(case), dtype=torch.float64).unet
    n = unet.config.num_classes
    x, s, *_ = inputs(reference(case), 0.7)
    with torch.no_grad():
        outs = [unet(x, s, torch.full((3,), label)).sample for label in range(n + 1)]
        for label in range(n):
            vector = torch.eye(n, dtype=torch.float64)[label].expand(3, n)
            assert torch.equal(unet(x, s, vector).sample, outs[label])
        assert torch.equal(unet(x, s).sample, outs[n])
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(outs) for b in outs[:i])


def test_state_dict_of_fastgen(tmp_path, reference, converted):
    """A .pth of the tensors alone: the same file, but for the dropout, which it does not say; the uncertainty is left out."""
    held = reference("edm_ncsnpp").state_dict()
    held |= {"model.logvar_linear.weight": torch.randn(1, 32), "model.logvar_linear.bias": torch.randn(1)}
    torch.save(held, tmp_path / "net.pth")
    made = convert(tmp_path / "net.pth", tmp_path / "flat")
    assert made.left_out == ("logvar_linear (FastGen's uncertainty, of training only)",)
    torch.save({"model": {"net": {}, "ema": reference("edm_ncsnpp").state_dict()}, "iteration": 7}, tmp_path / "trained.pth")
    convert(tmp_path / "trained.pth", tmp_path / "nested")
    weights = Path("unet/diffusion_pytorch_model.safetensors")
    for folder in ("flat", "nested"):
        assert (tmp_path / folder / weights).read_bytes() == (converted("edm_ncsnpp") / weights).read_bytes()
        config = json.loads((tmp_path / folder / "unet" / "config.json").read_text())
        assert config == json.loads((converted("edm_ncsnpp") / "unet" / "config.json").read_text()) | {"dropout": 0.0}


def test_snapshot_of_sid(tmp_path, reference, converted):
    """SiD keeps the network alone."""
    file = tmp_path / "network-snapshot-1.200000-500000.pkl"
    file.write_bytes(reference("edm_ddpmpp").dump(loss_fn=None, dataset_kwargs=None))
    convert(file, tmp_path / "out")
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (converted("edm_ddpmpp") / weights).read_bytes()


def test_folder_is_safetensors_and_strict_json(case, converted):
    folder = converted(case)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert files == {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json", weights}
    for name in files - {weights}:
        json.loads((folder / name).read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no strict JSON"))
    config = json.loads((folder / "unet" / "config.json").read_text())
    with safe_open(folder / weights, "np") as file:
        assert {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()} == state_shapes(config)


def test_layout_is_the_networks(case, converted):
    """What a snapshot is checked against is what the network has."""
    unet = EDMUNet.from_pretrained(converted(case) / "unet")
    assert {n: tuple(t.shape) for n, t in unet.state_dict().items()} == state_shapes(unet.config)


def test_sampling_range_is_within_what_the_network_knows(converted):
    """The paper's .002 to 80, cut to the network's own range; EDM's infinity is no JSON."""
    names = ("edm_ddpmpp", "vp_ddpmpp", "ve_ncsnpp", "iddpm_adm")
    held = {n: json.loads((converted(n) / "scheduler" / "scheduler_config.json").read_text()) for n in names}
    assert {n: (round(c["sigma_min"], 5), c["sigma_max"]) for n, c in held.items()} == {
        "edm_ddpmpp": (0.002, 80.0),
        "vp_ddpmpp": (0.002, 80.0),
        "ve_ncsnpp": (0.02, 80.0),
        "iddpm_adm": (0.00642, 80.0),
    }
    assert [c["preconditioning"] for c in held.values()] == ["edm", "vp", "ve", "iddpm"]


def test_command(tmp_path, reference, capsys):
    """Prints architecture, parameters and preconditioning; needs neither torch nor diffusers."""
    file = tmp_path / "net.pkl"
    file.write_bytes(reference("iddpm_adm").dump())
    convert_edm.main([str(file), str(tmp_path / "out")])
    said = capsys.readouterr().out
    count = sum(t.numel() for n, t in reference("iddpm_adm").tensors.items() if n != "u" and "resample" not in n)
    for expected in (f"{count:,} parameters", "architecture adm", "preconditioning iddpm", "out_channels 6"):
        assert expected in said
    with pytest.raises(SystemExit):
        convert_edm.main([str(file), str(tmp_path / "out")])
    assert "exists already; name another folder, or remove it" in capsys.readouterr().err
    loads = "import sys, scripts.convert_edm; sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", loads], cwd=ROOT).returncode == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the largest resident memory from /proc")
def test_memory(tmp_path, new_reference):
    """Of the whole process, python with numpy included: docs/edm.md has 1.2 times the file at 223 MB."""
    kwargs = {"model_type": "SongUNet", "model_channels": 64, "channel_mult": [1, 2, 2], "num_blocks": 2, "attn_resolutions": [8]}
    ref = new_reference("EDMPrecond", kwargs | {"img_resolution": 16})
    file = tmp_path / "net.pkl"
    file.write_bytes(ref.dump())
    code = "import sys; from scripts.convert_edm import main; main(sys.argv[1:]); "
    code += "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run([sys.executable, "-c", code, file, tmp_path / "out"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert file.stat().st_size > 20e6
    assert int(done.stdout.split()[-2]) * 1024 < 60e6 + 2 * file.stat().st_size
