"""The pages that a reader can run: every python block in order, what they print, and what they say of it."""

from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")

# What the words after the last block say, of the values that the blocks left behind.
SAID = {}
