"""Which clients take part in a round."""

from pydantic import Field, model_validator

from fedamole.settings.section import Section


class ParticipationSettings(Section):
    """Which clients take part in a round, and how many may be lost."""

    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the clients that are drawn for a round, at random and without repetition; rounded
    up. A client's number in the tables is that of the last round it took part in."""
    dropout_rate: float = Field(default=0.0, ge=0, lt=1)
    """Simulated failures: probability with which a drawn client drops out before it reports. Never
    more than the quorum allows."""
    quorum: float = Field(default=1.0, gt=0, le=1)
    """Share of the drawn clients that must report for the round to be averaged; rounded up. Below
    1, a client that fails twice counts as dropped out and the round goes on without it; at 1, the
    study stops until the client is mended. It may be lowered while a study runs, and reruns
    nothing; only with dropout_rate, which stops at it, everything."""

    @model_validator(mode="after")
    def _dropouts_need_slack(self) -> "ParticipationSettings":
        if self.dropout_rate and self.quorum == 1:
            raise ValueError(
                f"dropout_rate {self.dropout_rate} needs a quorum below 1: with quorum 1 no client "
                "may drop out"
            )
        return self
