"""The table of methods: every row a config may ask for, and the run whose outputs it reads.

Torch-free, because the Snakefile reads it. Adding a method is a module in ``fedamole/methods``, a
run and a row here.
"""

from dataclasses import dataclass
from typing import Literal

from fedamole.errors import FedamoleError, did_you_mean

Evaluated = Literal["local", "aggregated"]
# Sections of the config, or single settings of them, that only some runs depend on; all others keep
# their defaults there.
Use = Literal["prompt.text", "prompt.virtual_tokens", "prompt.encoder_width", "fdlora", "fedapen"]


@dataclass(frozen=True)
class Run:
    """One federated run: what is trained, and which files it has.

    Attributes
    ----------
    module
        Module in ``fedamole/methods``; variants share one.
    trains
        False for a run without any training round.
    assigns
        Whether there are domain experts that are handed out, so that the capacities of the
        assignment must be feasible.
    keeps
        Whether clients keep state for themselves from one round to the next: ``kept_KKK.h5``.
    pooled
        Whether all data lie in one place: client 0 trains on those of all clients, and takes as
        many steps as they would together.
    adapts
        Whether linear layers get LoRA adapters.
    packs
        Whether clients can be trained at once through one backbone (`training: pack_clients`).
    uses
        Sections or single settings that this run depends on beyond the sections of all runs.
    averages
        Whether the mean of the uploads is anything but an upload: weights of clients count.
    version
        Raised when a change of the method's own code changes its numbers: no other run reruns.
    """

    module: str
    trains: bool = True
    assigns: bool = False
    keeps: bool = False
    pooled: bool = False
    adapts: bool = True
    packs: bool = False
    uses: tuple[Use, ...] = ()
    averages: bool = True
    version: int = 0

    def depends_on(self, section: str) -> bool:
        """Whether a section that only some runs have matters, or a setting of it."""
        return any(use.split(".")[0] == section for use in self.uses)


@dataclass(frozen=True)
class Row:
    """One row of the result tables.

    Attributes
    ----------
    run
        Name of the federated run; several rows may share one.
    evaluated
        ``"local"``: each client's model right after its local training, the personalised number.
        ``"aggregated"``: the averaged model, tested on every client.
    """

    run: str
    evaluated: Evaluated

    @property
    def trains(self) -> bool:
        """Whether the run has training rounds."""
        return RUNS[self.run].trains

    @property
    def assigns(self) -> bool:
        """Whether the run hands out domain experts."""
        return RUNS[self.run].assigns


RUNS: dict[str, Run] = {
    "fedamole": Run("fedamole", assigns=True, packs=True),
    "fedit": Run("fedit", packs=True),
    "zero-shot": Run("zero_shot", trains=False, adapts=False),
    "fedamole-static": Run("fedamole", assigns=True, packs=True),
    "fedamole-random": Run("fedamole", assigns=True, packs=True),
    "fedamole-homo": Run("fedamole", assigns=True, packs=True),
    "fedamole-noshared": Run("fedamole", assigns=True, packs=True),
    "fedamole-linear-router": Run("fedamole", assigns=True, packs=True),
    "fedamole-greedy": Run("fedamole", assigns=True, packs=True),
    "fedamole-client-chooses": Run("fedamole", assigns=True, packs=True),
    "fedprompt": Run("soft_prompts", adapts=False, uses=("prompt.text",)),
    "fedptuning": Run(
        "soft_prompts", adapts=False, uses=("prompt.virtual_tokens", "prompt.encoder_width")
    ),
    "fdlora": Run("fdlora", keeps=True, packs=True, uses=("fdlora",), version=1),
    "fedapen": Run("mutual", keeps=True, uses=("fedapen",)),
    "fml": Run("mutual", keeps=True),
    "fedsa-lora": Run("fedsa_lora", keeps=True, packs=True),
    "fedalt": Run("fedalt", keeps=True),
    "local": Run("local", keeps=True, packs=True, averages=False),
    "centralised": Run("centralised", pooled=True, averages=False),
}

# Colours in figures follow this order, so new rows go to the end.
METHODS: dict[str, Row] = {
    "fedamole": Row("fedamole", "local"),
    "fedit": Row("fedit", "aggregated"),
    "fedit-ft": Row("fedit", "local"),
    "zero-shot": Row("zero-shot", "aggregated"),
    "fedprompt": Row("fedprompt", "aggregated"),
    "fedprompt-ft": Row("fedprompt", "local"),
    "fedptuning": Row("fedptuning", "aggregated"),
    "fedptuning-ft": Row("fedptuning", "local"),
    "fdlora": Row("fdlora", "local"),
    "fedapen": Row("fedapen", "local"),
    "fml": Row("fml", "local"),
    "fedsa-lora": Row("fedsa-lora", "local"),
    "fedalt": Row("fedalt", "local"),
    "local": Row("local", "local"),
    "centralised": Row("centralised", "aggregated"),
    "fedamole-static": Row("fedamole-static", "local"),
    "fedamole-random": Row("fedamole-random", "local"),
    "fedamole-homo": Row("fedamole-homo", "local"),
    "fedamole-noshared": Row("fedamole-noshared", "local"),
    "fedamole-linear-router": Row("fedamole-linear-router", "local"),
    "fedamole-greedy": Row("fedamole-greedy", "local"),
    "fedamole-client-chooses": Row("fedamole-client-chooses", "local"),
}


def lookup(method: str) -> Row:
    """Find the row of a method.

    Raises
    ------
    FedamoleError
        If no method has that name; the message lists those that exist.
    """
    if method not in METHODS:
        raise FedamoleError(
            f"method {method!r} is unknown; {did_you_mean(method, METHODS)}"
            f"allowed: {', '.join(sorted(METHODS))}"
        )
    return METHODS[method]
