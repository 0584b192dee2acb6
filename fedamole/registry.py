"""The table of methods: every row a config may ask for, and the run whose outputs it reads.

Torch-free, because the Snakefile reads it. Adding a method is a module in ``fedamole/methods`` and
a line here.
"""

from dataclasses import dataclass
from typing import Literal

from fedamole.errors import FedamoleError

Evaluated = Literal["local", "aggregated"]


@dataclass(frozen=True)
class Row:
    """One row of the result tables.

    Attributes
    ----------
    run
        Name of the federated run; several rows may share one.
    module
        Module in ``fedamole/methods`` with the run's method; variants share a module.
    evaluated
        ``"local"``: each client's model right after its local training, the personalised number.
        ``"aggregated"``: the averaged model, tested on every client.
    trains
        False for a row without any training round.
    assigns
        True if experts choose clients, so that the capacities of the assignment must be feasible.
    """

    run: str
    module: str
    evaluated: Evaluated
    trains: bool = True
    assigns: bool = False


METHODS: dict[str, Row] = {
    "fedamole": Row("fedamole", "fedamole", "local", assigns=True),
    "fedit": Row("fedit", "fedit", "aggregated"),
    "fedit-ft": Row("fedit", "fedit", "local"),
    "zero-shot": Row("zero-shot", "zero_shot", "aggregated", trains=False),
}


def lookup(method: str) -> Row:
    """Find the row of a method.

    Raises
    ------
    FedamoleError
        If no method has that name; the message lists those that exist.
    """
    if method not in METHODS:
        raise FedamoleError(f"method {method!r} is unknown; allowed: {', '.join(sorted(METHODS))}")
    return METHODS[method]
