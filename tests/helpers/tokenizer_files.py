"""Tokenizers made here, in every file format: a small vocabulary trained on a few lines of code."""

import io
import json
from functools import cache
from pathlib import Path

import gguf
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as pb

TRAINING_TEXT = """def add(first, second):
    \"\"\"Add two numbers.\"\"\"
    return first + second

class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

for number in range(10):
    if number % 2 == 0:
        print(number, "is even")
"""
INFILL_PIECES = ("▁<PRE", "▁<PRE>", "▁<SUF", "▁<SUF>", "▁<MID", "▁<MID>", "▁<EOT", "▁<EOT>")
BYTE_LETTERS = [chr(b) for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))]
BYTE_LETTERS += [chr(0x100 + i) for i in range(256 - len(BYTE_LETTERS))]
BPE_PIECES = ["<|begin|>", "<|end|>", *BYTE_LETTERS, "Ġd", "Ġde", "Ġdef", "re", "<tab>"]
BPE_MERGES = ["Ġ d", "Ġd e", "Ġde f", "r e"]


@cache
def sentencepiece_model(infilling: bool = True) -> bytes:
    """A model like Llama's: BPE, byte fallback, dummy prefix; perhaps with Code Llama's pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    proto = pb.ModelProto.FromString(model.getvalue())
    added = set("<>PRESUFMIDOT") - {entry.piece for entry in proto.pieces}
    for piece in (*sorted(added), "▁<", *INFILL_PIECES) if infilling else ():
        proto.pieces.add(piece=piece, score=-len(proto.pieces))
    return proto.SerializeToString()


def model_file(folder: Path, infilling: bool = True) -> Path:
    """The model as tokenizer.model."""
    path = folder / "tokenizer.model"
    path.write_bytes(sentencepiece_model(infilling))
    return path


def sentencepiece_fields(model: bytes | None = None) -> dict[str, object]:
    """A SentencePiece model, this one by default, as the fields of a GGUF file."""
    pieces = pb.ModelProto.FromString(model or sentencepiece_model()).pieces
    return {
        "model": "llama",
        "tokens": [entry.piece for entry in pieces],
        "scores": [entry.score for entry in pieces],
        "token_type": [entry.type for entry in pieces],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def bpe_fields() -> dict[str, object]:
    """A byte-level BPE of a few merges as the fields of a GGUF file."""
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": BPE_PIECES,
        "token_type": [3, 3, *[1] * (len(BPE_PIECES) - 3), 4],
        "merges": BPE_MERGES,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def gguf_file(folder: Path, fields: dict[str, object]) -> Path:
    """A GGUF file with these fields under `tokenizer.ggml.` and no tensors."""
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def json_file(folder: Path, contents: dict, config: dict | None = None) -> Path:
    """A tokenizer.json, and perhaps a tokenizer_config.json beside it."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(contents))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def sentencepiece_json() -> dict:
    """The SentencePiece model as Transformers converts it: the merges of each piece, best first."""
    entries = pb.ModelProto.FromString(sentencepiece_model()).pieces
    vocabulary = {entry.piece: token_id for token_id, entry in enumerate(entries)}
    merges = [
        [entry.piece[:cut], entry.piece[cut:]]
        for entry in sorted(entries, key=lambda entry: -entry.score)
        if entry.type == 1
        for cut in range(1, len(entry.piece))
        if entry.piece[:cut] in vocabulary and entry.piece[cut:] in vocabulary
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "version": "1.0",
        "added_tokens": [added_token(name, vocabulary) for name in ("<unk>", "<s>", "</s>")],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, space],
        },
        "post_processor": bos_template("<s>", 1),
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def bpe_json() -> dict:
    """The byte-level BPE as a tokenizer.json that begins a text with <|begin|>."""
    vocabulary = {piece: token_id for token_id, piece in enumerate(BPE_PIECES)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": [added_token(name, vocabulary) for name in ("<|begin|>", "<|end|>")],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "post_processor": bos_template("<|begin|>", 0),
        "model": {"type": "BPE", "vocab": vocabulary, "merges": BPE_MERGES},
    }


def added_token(name: str, vocabulary: dict[str, int]) -> dict:
    """An entry of `added_tokens`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": vocabulary[name], "content": name, "special": True} | flags


def bos_template(name: str, token_id: int) -> dict:
    """The post-processor that puts a begin token in front."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [token_id], "tokens": [name]}},
    }
