"""`python -m qformer` is the command line."""

import sys

from qformer.cli import main

sys.exit(main())
