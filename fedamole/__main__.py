"""``python -m fedamole``: what torchrun starts on each rank."""

import sys

from fedamole.cli import main

sys.exit(main())
