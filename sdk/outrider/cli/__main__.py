"""``python -m outrider.cli``: the same as ``python -m outrider``."""

import sys

from outrider.cli import main

sys.exit(main())
