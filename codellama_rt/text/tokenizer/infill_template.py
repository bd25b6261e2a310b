"""Code Llama's infilling template written out as text, as editors' plugins send it.

Continue, Tabby and Zed send `<PRE> {prefix} <SUF>{suffix} <MID>`, twinny the same with other
spaces. Encoded as text it loses <SUF> where the suffix begins with a character that merges with
">": it has to be taken apart.
"""

from typing import NamedTuple

_PREFIX, _SUFFIX, _MIDDLE = "<PRE>", " <SUF>", " <MID>"


class InfillTemplate(NamedTuple):
    """The texts around a hole, and their order in the prompt."""

    prefix: str
    suffix: str
    suffix_first: bool


def parse_infill_template(prompt: str) -> InfillTemplate | None:
    """Take a prompt apart that is the whole template, once, and nothing else.

    Args:
        prompt: any text.

    Returns:
        The texts around the hole, or None for every other prompt, which stays text: one that has
        something around the template, or where the place of a mark is in doubt.

    Example:
        >>> parse_infill_template("<PRE> f( <SUF>) <MID>")
        InfillTemplate(prefix='f(', suffix=')', suffix_first=False)
    """
    if not prompt.startswith(_PREFIX) or prompt.count(_SUFFIX) != 1:
        return None
    before, _, after = prompt.removeprefix(_PREFIX).partition(_SUFFIX)
    if not before and after.count(_MIDDLE) == 1:  # <PRE> <SUF>{suffix} <MID> {prefix}
        suffix, _, prefix = after.partition(_MIDDLE)
        return InfillTemplate(prefix.removeprefix(" "), suffix, True)
    if not after.endswith(_MIDDLE):
        return None
    after = after.removesuffix(_MIDDLE)
    if not before.startswith(" "):  # twinny: <PRE>{prefix} <SUF> {suffix} <MID>
        return InfillTemplate(before, after.removeprefix(" "), False)
    return InfillTemplate(before[1:], after, False)
