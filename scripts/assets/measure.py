"""Measure the embedded teacher for protocol emoji-2k, so that no evaluation has to: with all its steps, assets/measured.json, and
with one, assets/measured_one_step.json.

    python -m scripts.assets.measure

Takes some minutes (2,000 pictures of 50 steps); none where the file is of these weights already.
"""

from __future__ import annotations

import argparse

from eval.protocols import EMOJI
from eval.studies.emoji.evaluate import evaluate
from eval.studies.emoji.teacher import SHIPPED
from eval.studies.protocols import PROTOCOLS
from pipelines.assets import EMOJI_SD, check_assets
from pipelines.common.launch import user_errors


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    with user_errors():
        check_assets()
        evaluate(PROTOCOLS[EMOJI], str(EMOJI_SD), (), kept_in=SHIPPED)


if __name__ == "__main__":
    main()
