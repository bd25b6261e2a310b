"""Write a tokenizer as files that `load_tokenizer` and Transformers read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from codellama_rt.text.tokenizer.bpe_tokenizer import BpeTokenizer
from codellama_rt.text.tokenizer.sentencepiece_tokenizer import (
    INFILL_PIECES,
    SentencePieceTokenizer,
)
from codellama_rt.text.tokenizer.tokenizer_base import Tokenizer
from codellama_rt.text.tokenizer.tokenizer_config import ROLES


def save_tokenizer(tokenizer: Tokenizer, directory: Path, chat_template: str | None = None) -> None:
    """Write tokenizer.model or tokenizer.json, and tokenizer_config.json.

    Args:
        tokenizer: as returned by `load_tokenizer`.
        directory: an existing directory.
        chat_template: Jinja, stored with the options.
    """
    config: dict[str, Any] = {}
    for role in ROLES:
        token_id = getattr(tokenizer, f"{role}_id")
        config[f"{role}_token"] = None if token_id is None else tokenizer.piece(token_id)
    config["add_bos_token"], config["add_eos_token"] = tokenizer.adds_bos, tokenizer.adds_eos
    config["added_tokens_decoder"] = added_tokens_decoder(tokenizer)
    if chat_template is not None:
        config["chat_template"] = chat_template
    if isinstance(tokenizer, SentencePieceTokenizer):
        (directory / "tokenizer.model").write_bytes(tokenizer.model_proto)
        config |= spacing_options(tokenizer)
        for role in INFILL_PIECES if tokenizer.can_infill else ():
            token_id = getattr(tokenizer, f"{role}_id")
            config[f"{role}_token"] = None if token_id is None else tokenizer.piece(token_id)
    else:
        assert isinstance(tokenizer, BpeTokenizer)
        _write_json(directory / "tokenizer.json", tokenizer.as_json())
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(directory / "tokenizer_config.json", config)


def added_tokens_decoder(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Return the added tokens as tokenizer_config.json lists them."""
    tokens = sorted(tokenizer.config.added, key=lambda token: token.id)
    entries = {str(token.id): asdict(token) for token in tokens}
    for entry in entries.values():
        del entry["id"]
    return entries


def spacing_options(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Return the class and the options that tell where SentencePiece's extra space goes."""
    kind = "CodeLlamaTokenizer" if tokenizer.can_infill else "LlamaTokenizer"
    return {
        # Transformers has no option for the second; without it an extended one would be "each".
        "start": {"tokenizer_class": "CodeLlamaTokenizer", "spacing": "start"},
        "each": {"tokenizer_class": kind, "legacy": True},
        "first": {"tokenizer_class": "LlamaTokenizer", "legacy": False},
        "none": {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_prefix_space": False},
        "never": {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False},
    }[tokenizer.spacing]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
