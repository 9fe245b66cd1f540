"""What the report pages share: one self-contained file each, no script, no outside resource. All markup is in templates/."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined


class Picture(NamedTuple):
    """What a figure shows: the bytes of a file, and a line above it."""

    content: bytes
    media_type: str = "image/png"
    caption: str = ""

    @property
    def uri(self) -> str:
        """A data: URI, which holds the picture itself."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.content).decode()}"


def duration(seconds: float) -> str:
    """A time with the unit that suits it.

    >>> duration(0.00002), duration(0.0213), duration(47.3), duration(600), duration(8000)
    ('20 µs', '21.3 ms', '47.3 s', '10.0 min', '2.2 h')
    """
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    for limit, in_unit, unit in ((1, seconds * 1e3, "ms"), (120, seconds, "s"), (7200, seconds / 60, "min")):
        if seconds < limit:
            return f"{in_unit:.1f} {unit}"
    return f"{seconds / 3600:.1f} h"


# Whatever a template is given is escaped, and a name that it is not given is an error.
TEMPLATES = FileSystemLoader(Path(__file__).parent / "templates")
PAGES = Environment(loader=TEMPLATES, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
PAGES.filters["duration"] = duration


def render(template: str, **data: object) -> str:
    """A page. template: the name of a file in templates/; data: all that it names. jinja2.UndefinedError where one is missing."""
    return PAGES.get_template(template).render(data)
