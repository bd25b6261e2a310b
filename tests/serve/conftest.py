"""One server for most tests; those that change or break one make their own."""

import numpy as np
import pytest
from helpers.checkpoint_files import mini_tensors, write_mini
from helpers.tiny_llm import make_folder
from helpers.tokenizer_files import model_file

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
def mini_folder(tmp_path_factory):
    """A model of one layer and eight numbers a token, for prompts of a hundred thousand."""
    tensors = mini_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name], (421, 8))
    sizes = {"vocab_size": 421, "max_position_embeddings": 2**17}
    folder = write_mini(tmp_path_factory.mktemp("served") / "mini", tensors, **sizes)
    model_file(folder)
    return folder


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
