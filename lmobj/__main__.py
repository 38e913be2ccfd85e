"""`python -m lmobj` is `lmobj`."""

import sys

from lmobj.cli import main

if __name__ == "__main__":
    sys.exit(main())
