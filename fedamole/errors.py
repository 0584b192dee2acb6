"""Exceptions for everything a user can fix."""

import difflib
from collections.abc import Iterable


class FedamoleError(Exception):
    """A mistake the user can correct: bad config, data, file or resources.

    The message names the thing, its value and what would be allowed, in one line. The command line
    turns it into exactly that line and exit code 2; every other exception is a defect and keeps
    its traceback.
    """


class ClientError(FedamoleError):
    """Why one client cannot be trained, found by all its ranks alike: the job can do the others."""


def did_you_mean(name: object, allowed: Iterable[str]) -> str:
    """Say ``did you mean NAME? `` of the nearest name that is allowed; nothing if none is near."""
    names = {each.lower(): each for each in allowed}
    close = difflib.get_close_matches(str(name).lower(), names, n=1)
    return f"did you mean {names[close[0]]}? " if close else ""
