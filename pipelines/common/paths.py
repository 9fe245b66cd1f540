"""Paths as users write them in configurations and options."""

from __future__ import annotations

import os
import re


def user_path(text: str) -> str:
    """`text` with a leading ~ or ~user replaced, as a shell does it where it sees one. ValueError for a user whom this machine
    does not know, for a $VARIABLE that no shell has replaced (a folder of that name would be made in silence), and for nothing
    at all: it would be the working folder, or as if not given.
    """
    if not text:
        raise ValueError("expected a path; an empty one is what a shell makes of a variable that is not set")
    if os.path.exists(text):
        return text
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"{text!r}: this machine has no such home folder; write the path out (./{text} for a name with ~)")
    if variable := re.search(r"\$(\w+|\{\w+\})", path):
        raise ValueError(f"{text!r}: {variable[0]} is not replaced here; write the path out, or let the shell do it")
    return path
