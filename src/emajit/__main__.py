"""`python -m emajit`, and what torchrun starts."""

import sys

from emajit.cli import main

sys.exit(main())
