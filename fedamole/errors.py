"""Exceptions for everything a user can fix."""


class FedamoleError(Exception):
    """A mistake the user can correct: bad config, data, file or resources.

    The message names the thing, its value and what would be allowed, in one line. The command line
    turns it into exactly that line and exit code 2; every other exception is a defect and keeps
    its traceback.
    """


class ClientError(FedamoleError):
    """Why one client cannot be trained, found by all its ranks alike: the job can do the others."""
