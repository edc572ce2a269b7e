"""Imported by mistake only: `python examples/NAME.py` looks for modules in this folder, not in the project's."""

import sys
from pathlib import Path

sys.exit(f"error: start an example from the project's folder: python -m examples.{Path(sys.argv[0]).stem}")
