"""Networks and state dicts that are whole but for something that was made to hurt."""

import io
import math

import pytest
import torch

# A network but for one attribute -------------------------------------------------------------------------------------------

MARK = "replace this by a deep tuple"
ATTRIBUTES = {
    "": ("sigma_data", "sigma_min", "sigma_max", "_init_kwargs", "_init_args", "_parameters"),
    "model": ("label_dropout", "_buffers"),
    "model.enc.4x4_block0": ("dropout", "num_heads", "skip_scale", "adaptive_scale"),
    "model.enc.4x4_block0.norm0": ("eps", "num_groups"),
    "model.map_noise": ("endpoint", "max_positions"),
}


def shared(levels: int = 60):
    value = ()
    for _ in range(levels):
        value = (value, value)
    return value


@pytest.mark.parametrize(("module", "key"), [(m, k) for m, keys in ATTRIBUTES.items() for k in keys])
@pytest.mark.slow
def test_attributes_of_a_network(refused, small, with_attribute, module, key):
    refused(with_attribute(small, module, key, shared()), "")
    refused(with_attribute(small, module, key, [shared()]), "")
    data = with_attribute(small, module, key, MARK)
    held = b"\x8c" + bytes([len(MARK)]) + MARK.encode()
    assert data.count(held) == 1
    refused(data.replace(held, b")" + b"\x85" * 150_000), "")
    refused(with_attribute(small, module, key, "\x1b[31m\n" * 999), "")


@pytest.mark.parametrize(
    "key", ["img_resolution", "channel_mult", "resample_filter", "encoder_type", "num_blocks", "augment_dim"]
)
def test_arguments_of_a_network(refused, small, with_attribute, key):
    given = {"img_channels": 3} | small.kwargs
    for value in (shared(), [shared()], "\x1b\n" * 999, list(range(50_000)), 2**100, math.nan, {}):
        refused(with_attribute(small, "", "_init_kwargs", given | {key: value}), f"init_kwargs.{key} is")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("_init_kwargs", [1], "init_kwargs is a list"),
        ("_init_args", (32,), "positional arguments"),
        ("sigma_data", 10**30, "sigma_data is 10000"),
    ],
)
def test_attributes_by_name(refused, small, with_attribute, key, value, match):
    refused(with_attribute(small, "", key, value), match)


# State dicts ---------------------------------------------------------------------------------------------------------------


def saved(value) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def test_one_storage_for_all_tensors(refused):
    """4,000 views of four megabytes would be 16 GB of weights."""
    base = torch.zeros(1_000_000)
    refused(saved({f"enc.{i}": base for i in range(4_000)}), "some are the same numbers; expected each once", "bad.pth")
    layers = {f"net.{2 * i}.weight": base.view(1000, 1000) for i in range(900)}
    refused(saved(layers | {f"net.{2 * i}.bias": base[:1000] for i in range(900)}), "expected each once", "bad.pth")


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"enc.99999x99999_conv.weight": torch.zeros(4, 3, 3, 3)}, "a network of 99999x99999 pixels"),
        ({"enc.0x0_conv.weight": torch.zeros(4, 3, 3, 3)}, "resolutions 0"),
        (
            {"enc.8x8_conv.weight": torch.zeros(4, 3, 3, 3), "dec.7x7_up.conv0.weight": torch.zeros(4, 4, 3, 3)},
            "resolutions 8, 7",
        ),
        ({f"enc.{i}x{i}_conv.weight": torch.zeros(1, 1, 1, 1) for i in range(1, 3_000)}, "each is half of the one before"),
        (
            {f"dec.4096x4096_block{i}.conv0.weight": torch.zeros(1, 1, 1, 1) for i in range(3_000)},
            "no tensor 'enc.4096x4096_conv",
        ),
        (dict.fromkeys((f"enc.{i}" for i in range(20_001)), torch.zeros(1)), "the file holds 20,001 tensors"),
        ({"enc.8x8_conv.weight": torch.zeros(0, 3, 3, 3)}, "it holds nothing"),
        ({"enc.8x8_conv.weight": torch.zeros(4)}, "expected 4 dimensions"),
        ({"a\x1b[31m": torch.zeros(1)}, r"with the name 'a\x1b[31m'"),
        ({3: torch.zeros(1)}, "with the name 3"),
        ({"x" * 300: torch.zeros(1)}, "with the name 'xxx"),
        ({"u": torch.zeros(1), "model.u": torch.zeros(1)}, "the file holds both 'u' and 'model.u'"),
        # networks of points
        ({"net.0.weight": torch.zeros(1), "net.0.bias": torch.zeros(1)}, "expected a weight and a bias of net.0"),
        ({f"net.{'9' * 180}.weight": torch.zeros(1)}, "expected a weight and a bias"),
        ({f"net.{i}.weight": torch.zeros(1) for i in range(9_999)}, "and 9991 more; expected a weight and a bias"),
    ],
)
def test_state_dicts(refused, tensors, match):
    refused(saved(tensors), match, "bad.pth")


def test_levels_and_blocks_that_are_not_there(refused):
    """Names for thirteen levels of 3,000 blocks, of which few have a tensor."""
    sizes = [4096 >> level for level in range(13)]
    held = {f"dec.4096x4096_block{i}.conv0.weight": torch.zeros(1, 1, 1, 1) for i in range(3_001)}
    held |= {f"dec.{s}x{s}_block3000.conv0.weight": torch.zeros(1, 1, 1, 1) for s in sizes}
    held |= {"enc.4096x4096_conv.weight": torch.zeros(1, 1, 1, 1), "map_layer0.weight": torch.zeros(1, 1)}
    refused(saved(held), "3,015 tensors are too few for 13 levels of 3,000 blocks", "bad.pth")


def points(**changes) -> dict:
    """Two coordinates, five wide, with changes by names in which _ stands for a dot."""
    shapes = [(5, 4), (5, 5), (5, 5), (2, 5)]
    made = {f"net.{2 * i}.weight": torch.ones(shape) for i, shape in enumerate(shapes)}
    made |= {f"net.{2 * i}.bias": torch.ones(shape[0]) for i, shape in enumerate(shapes)}
    return made | {key.replace("_", "."): value for key, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"net_0_weight": torch.tensor(1.0)}, "'net.0.weight' is (); expected that of a linear layer"),
        ({"net_6_weight": torch.ones(2)}, "expected that of a linear layer"),
        ({"net_2_bias": torch.ones(5, dtype=torch.long)}, "holds int64; expected floating point"),
        ({"net_2_bias": torch.full((5,), 1e300, dtype=torch.float64)}, "numbers beyond float32"),
        ({"net_2_bias": torch.full((5,), -math.inf)}, "NaN or infinite"),
        ({"net_2_bias": torch.ones(1).expand(5)}, "reaches outside its storage"),
    ],
)
def test_networks_of_points(refused, changes, match):
    refused(saved(points(**changes)), match, "bad.pth")


def test_points_have_no_preconditioning(refused):
    refused(saved(points()), "a network of points, which has no preconditioning 'vp'", "p.pth", ("--preconditioning", "vp"))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, -1e300])
def test_numbers_that_overflow(refused, small, value):
    """Said in one line, without numpy's warnings."""
    name = "enc.2x2_down.conv0.resample_filter"
    wide = {key: tensor.double() for key, tensor in small.state_dict().items()}
    refused(saved(wide | {f"model.{name}": torch.full((1, 1, 2, 2), value, dtype=torch.float64)}), f"{name} is not", "bad.pth")
    refused(saved(wide | {"model.u": torch.full((1001,), value, dtype=torch.float64)}), "channels in", "bad.pth")
