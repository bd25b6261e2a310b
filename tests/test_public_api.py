"""The public surface is what it was: names, signatures, first lines of docstrings, commands."""

import runpy
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def test_the_public_surface_is_the_recorded_one():
    tool = runpy.run_path(str(REPOSITORY / "tools" / "public_api.py"))
    recorded = tool["SNAPSHOT"].read_text(encoding="utf-8")
    assert tool["surface"]() == recorded, "if intended: python tools/public_api.py --write"
