"""Many paths as a short text for bash: a script may have 128 KiB, and every path is long."""

import itertools
import os
import shlex
from collections.abc import Iterable


def braced(paths: Iterable[str]) -> str:
    """Write paths as words with braces, which bash expands to the same paths in the same order.

    Neighbours in one folder share a word: ``run/round_001/metrics_{000,001}.json``.
    """
    return " ".join(
        _word(folder, [os.path.basename(path) for path in group])
        for folder, group in itertools.groupby(paths, os.path.dirname)
    )


def _word(folder: str, names: list[str]) -> str:
    """One word for the files of a folder."""
    if len(names) == 1:
        # Bash leaves braces around a single word as they are.
        return shlex.quote(os.path.join(folder, names[0]))
    head = os.path.commonprefix(names)
    # Behind the head, since the two must not overlap.
    rests = [name[len(head) :] for name in names]
    tail = os.path.commonprefix([rest[::-1] for rest in rests])[::-1]
    middles = [shlex.quote(rest[: len(rest) - len(tail)]) for rest in rests]
    start, end = shlex.quote(os.path.join(folder, head)), shlex.quote(tail)
    return f"{start}{{{','.join(middles)}}}{end}"
