"""`python -m foretell`: the same as the `foretell` command."""

import sys

from foretell.cli import main

sys.exit(main())
