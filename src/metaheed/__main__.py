"""`python -m metaheed`."""

import sys

from metaheed.cli import main

sys.exit(main())
