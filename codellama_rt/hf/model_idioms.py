"""What programs written for Transformers or MindSpore ask a model besides its results."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from codellama_rt.checkpoint.tensor_names import EMBEDDING, expected_shapes
from codellama_rt.hf.processors import renormalize
from codellama_rt.hf.tensors import dtype_name, to_array, to_tensor
from codellama_rt.llm.llm import LLM


class ModelIdioms:
    """Properties and small methods of a model that computes but does not learn.

    Attributes:
        llm: the model itself.
        main_input_name: the argument of `generate` that holds the prompts.
    """

    llm: LLM
    main_input_name = "input_ids"
    is_encoder_decoder = False
    training = False

    @property
    def dtype(self) -> Any:
        """The MindSpore dtype of the projections; with quantised ones, that of their results."""
        import mindspore

        return getattr(mindspore, self.llm.config.dtype)

    @property
    def device(self) -> str:
        """Where the model runs: "cpu", "cuda" or "ascend"."""
        return self.llm.device

    @property
    def name_or_path(self) -> str:
        """What the model was opened from."""
        return self.llm.name_or_path

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return how many numbers the model has learned; a head tied to the embedding counts once.

        Args:
            only_trainable: none of them can be trained here: 0.
            exclude_embeddings: leave the embedding out.
        """
        if only_trainable:
            return 0
        shapes = expected_shapes(self.llm.config)
        if exclude_embeddings:
            del shapes[EMBEDDING]
        return sum(map(math.prod, shapes.values()))

    def can_generate(self) -> bool:
        """Return True."""
        return True

    def eval(self) -> ModelIdioms:
        """Return the model itself: it is never in training mode and has no dropout."""
        return self

    def train(self, mode: bool = True) -> ModelIdioms:
        """Return the model itself for False.

        Raises:
            ValueError: training is not supported.
        """
        if mode:
            raise ValueError("training is not supported: this runtime has no gradients")
        return self

    set_train = train  # MindSpore's name

    def to(self, where: Any) -> ModelIdioms:
        """Return the model itself if it is there, or of that dtype, already.

        Raises:
            ValueError: another device or dtype; both are chosen when the model is opened.
        """
        name = dtype_name(where).split(":")[0]
        if name not in (self.device, self.llm.config.dtype):
            raise ValueError(
                f"the model is on {self.device!r} in {self.llm.config.dtype}, and cannot be moved "
                f"to {name!r}; open it with device= and dtype="
            )
        return self

    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> None:
        """Accept the size that the model has.

        Raises:
            ValueError: another size; weights are not changed.
        """
        if new_num_tokens not in (None, self.llm.config.vocab_size):
            raise ValueError(
                f"the model has rows for {self.llm.config.vocab_size} tokens and takes no others; "
                "resize the checkpoint"
            )

    def compute_transition_scores(
        self,
        sequences: Any,
        scores: tuple[Any, ...],
        beam_indices: Any = None,
        normalize_logits: bool = False,
    ) -> Any:
        """Return the score of each token that `generate` chose.

        Args:
            sequences: (rows, length), with the prompts.
            scores: one (rows or beams, vocab_size) per step, of output_scores.
            beam_indices: (rows, steps) of a beam search; its later columns are -1.
            normalize_logits: turn each step's scores into log-probabilities first.

        Returns:
            Tensor (rows, steps) float32, zeros after the end of a beam.

        Raises:
            ValueError: the shapes do not fit together.
        """
        ids = to_array(sequences)
        steps = [to_array(step).astype(np.float64) for step in scores]
        if not steps or len(steps) > ids.shape[1]:
            raise ValueError(f"{ids.shape[1]} tokens per row cannot have {len(steps)} scores")
        if normalize_logits:
            steps = [renormalize(ids, step) for step in steps]
        if beam_indices is None:
            beams = np.repeat(np.arange(len(ids))[:, None], len(steps), axis=1)
        else:
            beams = to_array(beam_indices)
        chosen = ids[:, ids.shape[1] - beams.shape[1] :]
        if not len(ids) == len(beams) or not beams.max() < len(steps[0]):
            raise ValueError("sequences, scores and beam_indices belong to different results")
        found = np.zeros(beams.shape, np.float32)
        for step in range(beams.shape[1]):
            live = beams[:, step] >= 0
            found[live, step] = steps[step][beams[live, step], chosen[live, step]]
        return to_tensor(found)
