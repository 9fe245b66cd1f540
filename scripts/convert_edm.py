"""An EDM network of NVlabs' code base (.pkl of EDM or SiD, .pth of FastGen) -> an EDMPipeline folder, safetensors and JSON.

    python -m scripts.convert_edm edm-cifar10-32x32-uncond-vp.pkl outputs/edm_cifar10

Nothing in the file is executed: it is read as data, and refused if it holds anything that such a network does not. A .pth holds
tensors alone: --preconditioning says what its network was trained with, if that is not edm. VarDiU's network of points (.pth) is
read too.
"""

from __future__ import annotations

import argparse
import sys

from pipelines.common.errors import printable
from pipelines.common.launch import user_errors
from pipelines.common.options import path
from pipelines.edm.conversion.convert import convert


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshot", type=path)
    parser.add_argument("output", type=path, help="a folder that does not exist yet")
    parser.add_argument("--preconditioning", choices=["edm", "vp", "ve", "iddpm"], help="of a .pth, which cannot say")
    args = parser.parse_args(argv)
    source = printable(str(args.snapshot), 300).replace("\n", "\\n")
    with user_errors(f"error: {source}"):
        made = convert(args.snapshot, args.output, args.preconditioning)
    if made.assumed:
        print(f"warning: {made.assumed}", file=sys.stderr)
    print(f"{args.output}: {made.parameters:,} parameters")
    for title, settings in (("network", made.unet), ("scheduler", made.scheduler)):
        print(f"{title}: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    for item in made.left_out:
        print(f"left out: {item}")


if __name__ == "__main__":
    main()
