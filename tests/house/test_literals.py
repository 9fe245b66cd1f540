"""Names that a configuration may give, as a type, are those of the table that they choose from."""

from typing import get_args

import pytest

from pipelines.noise import WEIGHTINGS, Weight
from trainers.posteriors import COVARIANCES, CovarianceName
from trainers.posteriors.flow import TRANSFORMS, Transform


# ids by hand: of a function in a table the text has an address, another one in each of pytest's processes
@pytest.mark.parametrize(
    ("names", "table"),
    [(Weight, WEIGHTINGS), (CovarianceName, COVARIANCES), (Transform, TRANSFORMS)],
    ids=["weightings", "covariances", "transforms"],
)
def test_every_name_is_one_of_the_table(names, table):
    assert get_args(names) == tuple(table)
