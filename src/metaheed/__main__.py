"""`python -m metaheed`."""

import sys

from metaheed.cli.entry import main

sys.exit(main())
