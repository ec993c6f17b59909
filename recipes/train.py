"""The same as `lilt train`, as a file for `accelerate launch` and `torchrun`."""

import sys

from lilt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
