"""`python -m jmp_train`: the command line."""

import sys

from jmp_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
