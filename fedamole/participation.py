"""Which clients take part in a round: a pure function of settings, seed and round (torch-free).

The Snakefile asks here, so that the graph of a study holds the work that is done and no other.
"""

import functools
import math
from dataclasses import dataclass

from fedamole.randomness import stream
from fedamole.settings import ParticipationSettings


@dataclass(frozen=True)
class Participation:
    """Who takes part in the rounds of one run.

    Attributes
    ----------
    settings
        Fraction, dropouts, quorum.
    clients
        Number of clients K.
    seed
        Root seed.
    pooled
        Whether client 0 works on the data of all.
    """

    settings: ParticipationSettings
    clients: int
    seed: int
    pooled: bool = False

    @property
    def size(self) -> int:
        """Clients that are drawn for each round."""
        share = math.ceil(self.settings.fraction * self.clients - 1e-9)
        return 1 if self.pooled else max(1, share)

    @property
    def fewest(self) -> int:
        """Drawn clients that must report for a round to be averaged."""
        return max(1, math.ceil(self.settings.quorum * self.size - 1e-9))

    @property
    def everyone(self) -> bool:
        """Whether all clients take part in all rounds, as far as is known beforehand."""
        return self.size == self.clients and not self.settings.dropout_rate

    def drawn(self, round_: int) -> list[int]:
        """Clients that are drawn for a round, sorted; experts are handed out to these."""
        if self.size == self.clients or self.pooled:
            return list(range(self.size))
        rng = stream(self.seed, "participation", round_)
        return sorted(rng.choice(self.clients, self.size, replace=False).tolist())

    def reporting(self, round_: int) -> list[int]:
        """Clients that work in a round: those drawn, without the simulated dropouts."""
        return list(_reporting(self, round_))

    def last_before(self, client: int, round_: int) -> int | None:
        """Last round before a given one in which a client worked; None if there is none."""
        before = range(round_ - 1, 0, -1)
        return next((t for t in before if client in self.reporting(t)), None)


@functools.cache
def _reporting(population: Participation, round_: int) -> tuple[int, ...]:
    """See :meth:`Participation.reporting`; asked again and again while a graph is built."""
    drawn = population.drawn(round_)
    rate = population.settings.dropout_rate
    if not rate or population.pooled:
        return tuple(drawn)
    rng = stream(population.seed, "dropouts", round_)
    # The order decides who stays where the quorum allows no further dropout.
    order = rng.permutation(drawn).tolist()
    lost = [client for client in order if rng.random() < rate]
    return tuple(sorted(set(drawn) - set(lost[: population.size - population.fewest])))
