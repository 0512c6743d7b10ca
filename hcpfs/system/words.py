"""Lists in sentences."""

from collections.abc import Iterable

_MOST_LISTED = 8


def listed(words: Iterable[str]) -> str:
    """The words with commas between them; those after the eighth are only counted."""
    words = list(words)
    rest = len(words) - _MOST_LISTED
    return ", ".join(words[:_MOST_LISTED]) + (f" and {rest} more" if rest > 0 else "")
