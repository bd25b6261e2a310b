"""`TextStreamer` and `TextIteratorStreamer` with the protocol and chunks of those in Transformers.

They show text word by word, and decode each line anew: like their models they lose the first space
of a line. Where every character counts use `Tokenizer.detokenizer`.
"""

import re
from queue import Queue
from typing import Any

from codellama_rt.text.tokenizer.tokenizer_base import as_id_list

_CJK = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)


class TextStreamer:
    """Prints a generated text while it comes.

    Args:
        tokenizer: anything with `decode(ids, **decode_options)`.
        skip_prompt: leave out the ids of the first `put`.
        decode_options: passed to `decode`, for example `skip_special_tokens=True`.

    Example:
        >>> streamer = TextStreamer(tok, skip_prompt=True)  # doctest: +SKIP
        >>> _ = model.generate(input_ids, streamer=streamer)  # doctest: +SKIP
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_options: Any) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_options = decode_options
        self._line_ids: list[int] = []  # of the line that is not yet complete
        self._shown = 0  # characters of it that have been handed on
        self._prompt_is_next = True

    def put(self, value: Any) -> None:
        """Takes ids: first the prompt's, then each new one; an int, a list, or an array.

        Raises:
            ValueError: an array with more than one row.
        """
        shape = getattr(value, "shape", ())
        if len(shape) > 1:
            if shape[0] > 1:
                raise ValueError(f"TextStreamer shows one text, got an array of shape {shape}")
            value = value[0]
        skipped = self._prompt_is_next and self.skip_prompt
        self._prompt_is_next = False
        if not skipped:
            self._line_ids += as_id_list(value)
            self._show(at_end=False)

    def end(self) -> None:
        """Hands on what is left of the text; the next `put` begins another one."""
        self._prompt_is_next = True
        self._show(at_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints text that will not change; override it to send the text elsewhere."""
        print(text, flush=True, end="\n" if stream_end else "")

    def _show(self, at_end: bool) -> None:
        text = self.tokenizer.decode(self._line_ids, **self.decode_options)
        is_whole = at_end or text.endswith("\n")
        # A word may still grow, unless the script does not part words by spaces.
        end = len(text) if is_whole or _CJK.match(text[-1:]) else text.rfind(" ") + 1
        chunk = text[self._shown : end]
        self._shown += len(chunk)
        if is_whole:
            self._line_ids, self._shown = [], 0
        self.on_finalized_text(chunk, stream_end=at_end)


class TextIteratorStreamer(TextStreamer):
    """Gives a generated text piece by piece to another thread than the one that generates.

    Args:
        tokenizer, skip_prompt, decode_options: as for `TextStreamer`.
        timeout: seconds to wait for a piece; None: as long as it takes.

    Example:
        >>> streamer = TextIteratorStreamer(tok, skip_prompt=True)  # doctest: +SKIP
        >>> Thread(target=model.generate, args=(ids,), kwargs={"streamer": streamer}).start()
        ... # doctest: +SKIP
        >>> for piece in streamer:  # doctest: +SKIP
        ...     print(piece, end="")
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_options: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_options)
        self.timeout = timeout
        self._pieces: Queue[str | None] = Queue()  # None ends it

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hands a piece to the reader."""
        self._pieces.put(text)
        if stream_end:
            self._pieces.put(None)

    def __iter__(self) -> "TextIteratorStreamer":
        return self

    def __next__(self) -> str:
        """Returns the next piece; waits for it.

        Raises:
            queue.Empty: none came within `timeout` seconds.
        """
        piece = self._pieces.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece
