"""Results of `LlamaForCausalLM` other than plain token ids."""

from __future__ import annotations

from typing import Any


class _Output(dict):
    """A dictionary whose entries are also attributes; entries that were not requested are None."""

    _fields: tuple[str, ...] = ()

    def __init__(self, **entries: Any) -> None:
        super().__init__({name: value for name, value in entries.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        if name not in self._fields:
            raise AttributeError(f"{type(self).__name__} has {', '.join(self._fields)}, not {name}")
        return self.get(name)

    def __getitem__(self, key: str | int) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class GenerateOutput(_Output):
    """The result of `generate(return_dict_in_generate=True)`.

    Attributes:
        sequences: (rows, length) token ids, prompts included.
        scores: one (rows, vocab_size) float32 per step, after all processors.
        logits: one (rows, vocab_size) float32 per step, as the model returned them.
        sequences_scores: (rows,) float32 of a beam search: length-normalised log-probabilities.
        beam_indices: (rows, steps) int32 of a beam search: the beam each token came from, then -1.
    """

    _fields = ("sequences", "scores", "logits", "sequences_scores", "beam_indices")


class CausalLMOutput(_Output):
    """The result of calling the model.

    Attributes:
        loss: mean negative log-probability of the labels, if given.
        logits: (batch, positions, vocab_size) float32.
        hidden_states: n_layers + 1 times (batch, length, dim) float32, if requested.
    """

    _fields = ("loss", "logits", "hidden_states")
