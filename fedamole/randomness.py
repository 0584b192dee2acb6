"""Named random streams: every draw depends on its name only, never on what was drawn before it."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def derive_seed(seed: int, *names: str | int) -> int:
    """Derive a 63-bit seed from a root seed and a path of names.

    Parameters
    ----------
    seed
        Root seed of the scenario.
    names
        What the stream is for, outermost first: ``"training", round, client``.

    Returns
    -------
    int
        In [0, 2**63): fits NumPy's and PyTorch's generators.
    """
    # The type is part of the text: stream(1, "2") and stream(1, 2) must not coincide.
    text = "/".join(f"{type(name).__name__}:{name}" for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *names: str | int) -> "np.random.Generator":
    """Give the random generator that belongs to a root seed and a path of names.

    See :func:`derive_seed` for the parameters. Two calls with equal arguments give generators in
    the same state, wherever and in whatever order they are made.
    """
    # The Snakefile, which every job parses, imports this module and seldom draws.
    import numpy as np

    return np.random.Generator(np.random.PCG64(derive_seed(seed, *names)))
