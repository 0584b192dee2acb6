"""What the files of each run hold, and how its clients use the model (torch-free).

A run that is not listed trains what it is sent and sends all of it: one LoRA per module, or a
mixture of domain experts where it assigns these. A test compares with the real files of every run.
"""

from dataclasses import dataclass
from typing import Literal

from fedamole.registry import RUNS
from fedamole.settings import PromptSettings

LORA = ("lora_A", "lora_B")
EMBEDDING = ("embedding.weight",)
# What a tokenizer may set before a text: a token for the start, and one for a space.
MOST_PREFIX = 2
ENCODER = tuple(f"mlp_head.{n}.{part}" for n in (0, 2, 4) for part in ("weight", "bias"))


@dataclass(frozen=True)
class Contents:
    """Names of the tensors in the files of a run, by the names that they have there.

    Attributes
    ----------
    shared
        In the pool, for every client.
    expert
        In the pool, for each domain expert.
    sent
        Shared ones that a client sends back; None: all.
    kept
        What a client keeps for itself.
    server
        What the server keeps beside the pool, once two rounds are averaged.
    one_each
        Whether there is one expert for each client, who alone holds it.
    models
        Models that run side by side on every sequence of a client.
    embedding_set
        What the embedding set serves: ``train`` as any other example; else it is held back, and is
        run through ``once`` or to ``search`` the weights of a fusion.
    """

    shared: tuple[str, ...] = LORA
    expert: tuple[str, ...] = ()
    sent: tuple[str, ...] | None = None
    kept: tuple[str, ...] = ()
    server: tuple[str, ...] = ()
    one_each: bool = False
    models: int = 1
    embedding_set: Literal["train", "once", "search"] = "train"

    @property
    def upload(self) -> tuple[str, ...]:
        """Shared tensors that a client sends."""
        return self.shared if self.sent is None else self.sent


MIXTURE = Contents(shared=(*LORA, "token_proj"), expert=LORA, embedding_set="once")
CONTENTS = {
    "fedamole-noshared": Contents(shared=("token_proj",), expert=LORA, embedding_set="once"),
    "fedamole-linear-router": Contents(
        shared=MIXTURE.shared, expert=(*LORA, "gate"), embedding_set="once"
    ),
    "fedprompt": Contents(shared=EMBEDDING),
    "fedptuning": Contents(shared=(*EMBEDDING, *ENCODER)),
    "local": Contents(sent=(), kept=LORA),
    "fedsa-lora": Contents(shared=("lora_A",), kept=("lora_B",)),
    "fdlora": Contents(kept=LORA, server=LORA, embedding_set="search"),
    "fml": Contents(kept=LORA, models=2),
    "fedapen": Contents(kept=LORA, models=2, embedding_set="once"),
    "fedalt": Contents(shared=(), expert=LORA, kept=(*LORA, "mixer"), one_each=True),
}


def contents_of(run: str) -> Contents:
    """What the files of a run hold; nothing if it is not trained."""
    if not RUNS[run].trains:
        return Contents(shared=())
    return CONTENTS.get(run, MIXTURE if RUNS[run].assigns else Contents())


def virtual_tokens(run: str, settings: PromptSettings) -> int:
    """Tokens of the soft prompt of a run; of a task text the most that it can have, one per byte.

    How many it has, only a tokenizer knows.
    """
    shared = contents_of(run).shared
    if shared == EMBEDDING:
        return len(settings.text.encode()) + MOST_PREFIX
    return settings.virtual_tokens if ENCODER[0] in shared else 0
