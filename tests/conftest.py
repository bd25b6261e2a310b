"""Where the tests find their data, and that they find the same examples in every run."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run, whatever an earlier one kept; a busy machine fails none of them.
settings.register_profile("reproducible", derandomize=True, database=None, deadline=None)
settings.load_profile("reproducible")

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
