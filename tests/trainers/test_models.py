"""trainers/families/base.py: what both families of teachers share."""

import typing

import pytest
import torch

from pipelines.common.errors import UserError
from trainers.config.run import DistillConfig, Student, Teacher
from trainers.families import FAMILIES, load_family
from trainers.families.base import build_covariance, refuse
from trainers.objectives.base import Need
from trainers.posteriors.section import Posterior


@pytest.mark.parametrize("covariance", ["learned", "flow"])
def test_a_covariance_starts_by_the_seed_alone(covariance):
    """Same seed, same numbers, whatever the global generator holds, which is left as it was; another seed, other numbers."""
    posterior = Posterior(covariance=covariance, optimizer={"lr": 1e-3})

    def numbers(seed: int, state: int) -> list[torch.Tensor]:
        torch.manual_seed(state)
        before = torch.get_rng_state()
        made = build_covariance(posterior, seed, (3, 4, 4))
        assert torch.equal(torch.get_rng_state(), before)
        return list(made.state_dict().values())

    one, again, other = numbers(5, 1), numbers(5, 2), numbers(6, 1)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_refuse_names_the_first_setting_that_is_given():
    refuse("an EDM teacher", {"a.b": None, "c": None})
    with pytest.raises(ValueError, match=r"^c has no effect for an EDM teacher; remove it$"):
        refuse("an EDM teacher", {"a.b": None, "c": 0, "d": 1})


def test_a_new_network_starts_by_the_seed_and_its_role():
    """A student and a fake score that start alike would have no difference to learn from."""
    from trainers.config.networks import Network
    from trainers.networks import build_unet

    def weights(seed: int, role: str) -> torch.Tensor:
        unet = build_unet(Network(channels=8, num_blocks=1), seed, role, 8, in_channels=1, out_channels=1, num_classes=0)
        return torch.cat([p.detach().flatten() for p in unet.parameters()])

    assert torch.equal(weights(0, "student"), weights(0, "student"))
    assert not torch.equal(weights(0, "student"), weights(0, "aux"))
    assert not torch.equal(weights(0, "student"), weights(1, "student"))


NEEDS = set(typing.get_args(typing.get_type_hints(Need)["what"]))
LEVELS = {"name": "uniform", "low": 1.0, "high": 2.0}


def test_every_setting_belongs_to_a_family():
    """Keys are those of the sections; one that no family had would be refused whatever the teacher."""
    families = [load_family(name) for name in FAMILIES]
    for section, keys in ((Teacher, "teacher_keys"), (Student, "student_keys")):
        had = {key for family in families for key in getattr(family, keys)}
        assert had == section.model_fields.keys() - {"optimizer"}
    assert {need for family in families for need in family.gives} == NEEDS


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_does_not_give_is_refused_by_key(name):
    family = load_family(name)
    for what in NEEDS:
        said = family.refusal(Need("objective.foo", what, True))
        assert what in family.gives or said == f"objective.foo has no effect for {family.called}; remove it"
    assert len({load_family(other).called for other in FAMILIES}) == len(FAMILIES)


def test_a_family_without_text_encodes_nothing():
    raw = {"output_dir": "x", "steps": 1, "batch_size": 2, "teacher": {"path": "x"}, "student": {"optimizer": {"lr": 1e-3}}}
    raw |= {"objective": {"name": "varflow", "levels": LEVELS}, "data": {"name": "teacher_samples", "file": "x.txt"}}
    with pytest.raises(UserError, match="'teacher_samples' is for text-to-image teachers, and this is an EDM teacher"):
        load_family("edm").encoded(DistillConfig(**raw), None)
