"""Where the tests find their data."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Third-party test data (Llama tokenizers, goldens) that this repository may not carry."""
    path = Path(os.environ.get("CODELLAMA_RT_SHARED", REPOSITORY.parent / "shared"))
    if not (path / "data" / "golden").is_dir():
        reason = f"no third-party test data at {path}; set CODELLAMA_RT_SHARED to a folder with it"
        if os.environ.get("CODELLAMA_RT_REQUIRE_SHARED"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path
