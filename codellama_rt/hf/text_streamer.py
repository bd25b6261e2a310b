"""`TextStreamer` and `TextIteratorStreamer`, with the protocol and chunks of Transformers.

They show text word by word and decode each line separately: like the originals they lose the first
space of a line. Where every character counts, use `Tokenizer.detokenizer`.
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
    """Print a generated text as it is produced.

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
        self._line_ids: list[int] = []  # of the line that is not complete yet
        self._shown = 0  # characters of the line already printed
        self._prompt_is_next = True

    def put(self, value: Any) -> None:
        """Take ids: first the prompt's, then each new one; an int, a list, or an array.

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
        """Print what is left of the text; the next `put` begins a new one."""
        self._prompt_is_next = True
        self._show(at_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print text that will not change; override it to send the text elsewhere."""
        print(text, flush=True, end="\n" if stream_end else "")

    def _show(self, at_end: bool) -> None:
        text = self.tokenizer.decode(self._line_ids, **self.decode_options)
        is_whole = at_end or text.endswith("\n")
        # A word may still grow, unless the script does not separate words by spaces.
        end = len(text) if is_whole or _CJK.match(text[-1:]) else text.rfind(" ") + 1
        chunk = text[self._shown : end]
        self._shown += len(chunk)
        if is_whole:
            self._line_ids, self._shown = [], 0
        self.on_finalized_text(chunk, stream_end=at_end)


class TextIteratorStreamer(TextStreamer):
    """Pass a generated text piece by piece to a thread other than the generating one.

    Args:
        tokenizer, skip_prompt, decode_options: as for `TextStreamer`.
        timeout: seconds to wait for a piece; None: no limit.

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
        self._pieces: Queue[str | None] = Queue()  # None marks the end

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass a piece to the reader."""
        self._pieces.put(text)
        if stream_end:
            self._pieces.put(None)

    def __iter__(self) -> "TextIteratorStreamer":
        return self

    def __next__(self) -> str:
        """Return the next piece, waiting for it if necessary.

        Raises:
            queue.Empty: no piece came within `timeout` seconds.
        """
        piece = self._pieces.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece
