"""One file an objective: its mathematics, its configuration, what it needs and how it is built.

The registry is OBJECTIVES: each file has a class `Config`, an ObjectiveConfig (base.py) whose `name` is the file's.
"""

from functools import reduce
from importlib import import_module
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from .base import ObjectiveConfig

OBJECTIVES = (
    "diff_instruct",
    "sid",
    "varflow",
    "vardiu",
)
CONFIGS: dict[str, type[ObjectiveConfig]] = {name: import_module(f".{name}", __name__).Config for name in OBJECTIVES}
if TYPE_CHECKING:
    AnyObjective = ObjectiveConfig
else:
    AnyObjective = Annotated[reduce(or_, CONFIGS.values()), Field(discriminator="name")]
