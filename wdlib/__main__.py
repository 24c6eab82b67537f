"""`python -m wdlib` is the `wdlib` command."""

import sys

from wdlib.cli import main

sys.exit(main())
