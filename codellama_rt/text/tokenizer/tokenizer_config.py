"""What belongs to a tokenizer beside its vocabulary, whatever file says it.

A directory says it in several files (`directory_config`), a GGUF file in its metadata
(`gguf_tokenizer`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from codellama_rt.text.tokenizer.added_tokens import AddedToken

# Where SentencePiece's extra space goes in a text that is cut at control tokens:
# before the text, as in slow CodeLlamaTokenizer; before each stretch of text, as in "legacy"
# tokenizers and llama.cpp; before the text unless it begins with a space, as in other fast ones; or
# nowhere, where normalised text has ▁ for spaces ("none") or not ("never").
Spacing = Literal["start", "each", "first", "none", "never"]

ROLES = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What belongs to a tokenizer beside its vocabulary.

    Attributes:
        added: tokens that are matched whole; their ids may lie in the vocabulary or after it.
        role_ids: of "bos", "eos", "unk" and "pad": the id, or None for no such token; a role that
            is left out is the vocabulary's own.
        adds_bos, adds_eos: whether a text begins with bos, and ends with eos.
        spacing: where SentencePiece's extra space goes.
        infill_ids: of "prefix", "middle", "suffix" and "eot"; None: found by their names.
        end_ids: further tokens that end an answer.
    """

    added: tuple[AddedToken, ...] = ()
    role_ids: Mapping[str, int | None] = field(default_factory=dict)
    adds_bos: bool = True
    adds_eos: bool = False
    spacing: Spacing = "each"
    infill_ids: Mapping[str, int] | None = None
    end_ids: tuple[int, ...] = ()

    def pieces(self, own: Sequence[str]) -> list[str]:
        """Return the vocabulary with the added tokens; an id between them has the piece ""."""
        size = max([len(own), *(token.id + 1 for token in self.added)])
        pieces = [*own, *[""] * (size - len(own))]
        for token in self.added:
            pieces[token.id] = token.content
        return pieces
