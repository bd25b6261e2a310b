"""One server for most tests; those that change or break one make their own."""

import pytest
from helpers.tiny_llm import make_folder

from codellama_rt import LLM


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def open_llm(folder):
    """Open a model of its own, which its server closes."""

    def open_it(**options):
        return LLM(folder, **{"kv_memory": "4MB", "max_model_len": 2048, **options})

    return open_it


@pytest.fixture(scope="session")
def served(open_llm):
    from helpers.served import serving  # which skips without the server's packages

    with open_llm() as llm, serving(llm, names=("codellama", "codellama:7b")) as server:
        yield server


@pytest.fixture(scope="session")
def llm(open_llm):
    """The same model, to be called directly."""
    with open_llm() as llm:
        yield llm
