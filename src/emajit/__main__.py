"""`python -m emajit`, also for torchrun."""

import sys

from emajit.cli import main

sys.exit(main())
