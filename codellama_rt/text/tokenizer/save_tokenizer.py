"""Write a tokenizer as files that `load_tokenizer` and Transformers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from codellama_rt.text.tokenizer.bpe_tokenizer import BpeTokenizer
from codellama_rt.text.tokenizer.sentencepiece_tokenizer import (
    INFILL_PIECES,
    SentencePieceTokenizer,
)
from codellama_rt.text.tokenizer.tokenizer_base import Tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, chat_template: str | None = None) -> None:
    """Write tokenizer.model or tokenizer.json, and tokenizer_config.json.

    Args:
        tokenizer: as returned by `load_tokenizer`.
        directory: an existing directory.
        chat_template: Jinja, stored with the options.
    """
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    config: dict[str, Any] = {
        name: None if token_id is None else tokenizer.piece(token_id)
        for name, token_id in ids.items()
    }
    config["add_bos_token"] = tokenizer.adds_bos
    if chat_template is not None:
        config["chat_template"] = chat_template
    if isinstance(tokenizer, SentencePieceTokenizer):
        (directory / "tokenizer.model").write_bytes(tokenizer.model_proto)
        config["tokenizer_class"] = "CodeLlamaTokenizer"
        for role in INFILL_PIECES:
            token_id = getattr(tokenizer, f"{role}_id")
            config[f"{role}_token"] = None if token_id is None else tokenizer.piece(token_id)
    else:
        assert isinstance(tokenizer, BpeTokenizer)
        _write_json(directory / "tokenizer.json", tokenizer.as_json())
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(directory / "tokenizer_config.json", config)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
