"""`python -m wdlib` is the `wdlib` command."""

import sys

from wdlib.cli.command import main

sys.exit(main())
