"""Names that a configuration may give, as a type, are those of the table that they choose from."""

from typing import get_args

import pytest

from pipelines.noise import WEIGHTINGS, Weight
from trainers.posteriors import COVARIANCES, CovarianceName
from trainers.posteriors.flow import TRANSFORMS, Transform


@pytest.mark.parametrize(
    ("names", "table"), [(Weight, WEIGHTINGS), (CovarianceName, COVARIANCES), (Transform, TRANSFORMS)], ids=str
)
def test_every_name_is_one_of_the_table(names, table):
    assert get_args(names) == tuple(table)
