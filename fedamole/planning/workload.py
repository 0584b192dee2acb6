"""What a study has to do: jobs by rule, and passes of a client through the model (torch-free).

The Snakefile decides which jobs there are; a test compares. Times and memory follow from this in
:mod:`fedamole.planning.times` and :mod:`fedamole.planning.memory`.
"""

import math
from collections import Counter
from dataclasses import dataclass

from fedamole.config import Config
from fedamole.planning.model_size import ModelSize
from fedamole.registry import lookup
from fedamole.settings import ScenarioSettings

# Training examples of a client where nothing is known; only local_epochs depends on it.
ASSUMED_TRAIN = 2000
# Caps of a test set by task, as fedamole.datasets.splits has them.
MAX_TEST = {"classification": 200, "generation": 50}
# Mean length of a sequence over the longest allowed, and of an answer over a sequence.
LENGTH_SHARE = 1 / 4
ANSWER_SHARE = {"classification": 1 / 32, "generation": 1 / 4}


@dataclass(frozen=True)
class ClientData:
    """What a client of a scenario has, on average over the clients.

    Attributes
    ----------
    train, embedding, eval, test
        Examples of the four sets.
    tokens, answer_tokens
        Mean length of a sequence, and of the answer at its end.
    choices
        Answers to choose from; 0 if answers are generated.
    measured
        Counted in the tokenised scenario, not assumed.
    """

    train: float
    embedding: float
    eval: float
    test: float
    tokens: float
    answer_tokens: float
    choices: int
    measured: bool = False


@dataclass(frozen=True)
class RunWork:
    """What a run needs, given the rows of the tables that a config asks for.

    Attributes
    ----------
    run
        Name of the run.
    trains
        Whether it has training rounds.
    has_experts
        Whether its clients hold domain experts and a token projection.
    tests_average
        Whether the averaged model is tested on every client.
    """

    run: str
    trains: bool
    has_experts: bool
    tests_average: bool

    def aggregations(self, rounds: int) -> int:
        """Trained pools: the last round has one only if a row tests it."""
        return (rounds if self.tests_average else rounds - 1) if self.trains else 0

    def model_rounds(self, rounds: int) -> dict[str, int]:
        """Rounds of each rule whose jobs need the model; only round 0 if the run does not train."""
        trained = {"train_clients": rounds} if self.trains else {}
        tested = {"evaluate_clients": rounds if self.trains else 1} if self.tests_average else {}
        return trained | tested


@dataclass(frozen=True)
class Passes:
    """Equal passes of one rank through the model, for one client and round.

    Attributes
    ----------
    number
        How many.
    tokens
        Tokens of all passes together.
    logits
        Positions of all passes together at which the output layer works.
    products
        Operations per parameter and token: 2 forward; 4 with the backward pass of a frozen model,
        which has no gradients of weights; 6 if the backward pass computes the forward pass again.
    """

    number: float
    tokens: float
    logits: float
    products: int = 2

    def flops(self, size: ModelSize) -> float:
        """Floating point operations; attention scores and adapters, a few percent, are left out."""
        return self.products * (self.tokens * size.num_linear + self.logits * size.num_head)


def assumed_data(scenario: ScenarioSettings) -> ClientData:
    """Guess the data of a client before a scenario is tokenised: full sets of mean length."""
    task, tokens = scenario.dataset.task, scenario.max_length * LENGTH_SHARE
    return ClientData(
        train=ASSUMED_TRAIN,
        embedding=scenario.max_embedding,
        eval=scenario.max_eval,
        test=scenario.max_test or MAX_TEST[task],
        tokens=tokens,
        answer_tokens=max(2.0, tokens * ANSWER_SHARE[task]),
        choices=len(scenario.dataset.answers),
    )


def works_of(config: Config) -> list[RunWork]:
    """List the runs of a study, in config order."""
    works = []
    for run in config.runs():
        rows = [row for row in map(lookup, config.methods) if row.run == run]
        works.append(
            RunWork(
                run=run,
                trains=any(row.trains for row in rows),
                has_experts=any(row.assigns for row in rows),
                tests_average=any(row.evaluated == "aggregated" for row in rows),
            )
        )
    return works


def shards(config: Config, clients: int) -> list[int]:
    """Cut the clients of a round into jobs: the number of clients of each."""
    size = config.execution.clients_per_job
    step = clients if size == "all" else size
    return [min(step, clients - start) for start in range(0, clients, step)]


def job_counts(config: Config) -> Counter[str]:
    """Count the jobs of each rule, in the order in which they run; ``all`` does nothing."""
    slugs, works = config.scenario_seeds(), works_of(config)
    jobs = Counter({"prepare_backbone": 1, "partition": len(slugs), "tokenize": len(slugs)})
    jobs["init_server"] = len(slugs) * len(works)
    jobs.update(dict.fromkeys(("train_clients", "aggregate", "assign", "evaluate_clients"), 0))
    for scenario, _ in slugs.values():
        per_round = len(shards(config, scenario.clients))
        for work in works:
            for rule, rounds in work.model_rounds(config.rounds).items():
                jobs[rule] += per_round * rounds
            jobs["aggregate"] += work.aggregations(config.rounds)
            jobs["assign"] += (config.rounds - 1) * work.trains
    jobs.update({"gather": len(slugs) * len(config.methods), "tables": 1, "figures": 1})
    return +jobs


def steps_of(config: Config, data: ClientData) -> int:
    """Optimizer steps of a client in one round."""
    training = config.training
    if training.local_epochs:
        return math.ceil(training.local_epochs * data.train / training.batch_size)
    return training.steps or 200


def training_passes(config: Config, data: ClientData) -> Passes:
    """Local training of one client in one round."""
    training = config.training
    sequences = steps_of(config, data) * training.batch_size / training.ranks
    return Passes(
        number=sequences / training.sequences_per_pass,
        tokens=sequences * data.tokens,
        logits=sequences * data.answer_tokens,
        products=6 if config.backbone.gradient_checkpointing else 4,
    )


def embedding_passes(config: Config, data: ClientData) -> Passes:
    """The embedding set; every rank runs all of it."""
    number = math.ceil(data.embedding / config.evaluation.batch_size)
    return Passes(number, data.embedding * data.tokens, logits=number)


def testing_passes(config: Config, data: ClientData) -> list[Passes]:
    """Evaluation loss, then choices or generated answers on the test set, of one client."""
    losses = _batches(config, data.eval, data.tokens, data.answer_tokens)
    if data.choices:
        sequences = data.test * data.choices
        return [losses, _batches(config, sequences, data.tokens, data.answer_tokens)]
    prompts = _batches(config, data.test, data.tokens - data.answer_tokens, 1)
    # A batch goes on until its longest answer ends, which is seldom before the limit.
    new = prompts.logits * config.evaluation.max_new_tokens
    answers = Passes(prompts.number * config.evaluation.max_new_tokens, new, new)
    return [losses, prompts, answers]


def _batches(config: Config, sequences: float, tokens: float, logits: float) -> Passes:
    """Forward passes over sequences of so many tokens and logits each; ranks share the batches."""
    batches = math.ceil(sequences / config.evaluation.batch_size)
    mine = math.ceil(batches / config.training.ranks)
    share = sequences * mine / batches if batches else 0.0
    return Passes(mine, share * tokens, share * logits)
