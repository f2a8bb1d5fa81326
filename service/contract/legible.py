"""Names as they may be shown: whoever names a file must not write on somebody's terminal, or into a report, with it.

A terminal obeys control characters, a line break forges a line, marks of direction turn a sentence round, and bytes
that are no text in the coding of the file system can't be written at all.
"""

import re

# Controls of both sets, separators of lines and paragraphs, marks of direction, and what stands for undecodable bytes.
_ILLEGIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def is_legible(name: str) -> bool:
    """Tell whether a name may be shown as it is."""
    return _ILLEGIBLE.search(name) is None


def legible(text: str) -> str:
    r"""Return a text with every such character as Python writes it: an escape character is `\x1b`."""
    return _ILLEGIBLE.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)
