"""Which suffix of a text of tokens has occurred before, and what followed it (csrc/suffix).

`SuffixAutomaton()` is a growing text: `extend(tokens)` appends contiguous int32, -1 ends a text and
begins another one; `len` and `num_bytes` tell its tokens and its memory.

`SuffixDrafter(prompt, others)` reads an output: `push(token_id)` appends a token and returns
(length of the suffix by which a token had been expected, whether it is this one); `propose(most)`
returns (length of the longest suffix that occurs before, at most so many tokens that followed it).
It looks in the prompt, in the output and in the others, which may grow.
"""

from codellama_rt.ops.native import _core

SuffixAutomaton = _core.SuffixAutomaton
SuffixDrafter = _core.SuffixDrafter
