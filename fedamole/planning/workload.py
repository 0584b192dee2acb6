"""What a study has to do: jobs by rule, and passes of a client through the model (torch-free).

The Snakefile decides which jobs there are; a test compares. Times and memory follow from this in
:mod:`fedamole.planning.times` and :mod:`fedamole.planning.memory`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedamole.config import Config
from fedamole.participation import Participation
from fedamole.planning.contents import contents_of
from fedamole.planning.model_size import ModelSize
from fedamole.registry import RUNS, lookup
from fedamole.results import asks_for_costs
from fedamole.settings import ScenarioSettings
from fedamole.stages import quorum_of, results_stage, run_stage, with_quorum

# Training examples of a client where nothing is known; only local_epochs depends on it.
ASSUMED_TRAIN = 2000
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
    tests_average
        Whether the averaged model is tested on every client.
    """

    run: str
    tests_average: bool

    @property
    def trains(self) -> bool:
        """Whether it has training rounds."""
        return RUNS[self.run].trains

    @property
    def has_experts(self) -> bool:
        """Whether domain experts are handed out to its clients."""
        return RUNS[self.run].assigns

    @property
    def pooled(self) -> bool:
        """Whether client 0 trains on the data of all."""
        return RUNS[self.run].pooled

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
        test=scenario.test_cap,
        tokens=tokens,
        answer_tokens=max(2.0, tokens * ANSWER_SHARE[task]),
        choices=len(scenario.dataset.answers),
    )


def works_of(config: Config) -> list[RunWork]:
    """List the runs of a study, in config order."""
    works = []
    for run in config.runs():
        rows = [row for row in map(lookup, config.methods) if row.run == run]
        works.append(RunWork(run, tests_average=any(row.evaluated == "aggregated" for row in rows)))
    return works


def population_of(config: Config, slug: str, work: RunWork) -> Participation:
    """Who takes part in which round of a run on a scenario slug."""
    stage = run_stage(config, slug, work.run)
    return with_quorum(stage, quorum_of(config.at(slug), work.run)).population


def clients_by_round(config: Config, slug: str, work: RunWork, rule: str) -> list[list[int]]:
    """List the clients that work in each round of a rule; averages are tested on all of them."""
    who, rounds = population_of(config, slug, work), work.model_rounds(config.rounds).get(rule, 0)
    if rule == "evaluate_clients":
        return [list(range(who.clients))] * rounds
    return [who.reporting(round_) for round_ in range(1, rounds + 1)]


def shards(config: Config, clients: Sequence[int]) -> list[Sequence[int]]:
    """Cut the clients of a round into jobs."""
    size = config.execution.clients_per_job
    step = max(1, len(clients)) if size == "all" else size
    return [clients[start : start + step] for start in range(0, len(clients), step)]


def largest_jobs(config: Config, scenario: ScenarioSettings) -> dict[bool, int]:
    """Find the most clients that one job may have, where data are pooled (True) and elsewhere."""
    found: dict[bool, int] = {}
    slug = scenario.seeded_slug(config.seeds[0])
    for work in works_of(config):
        who = population_of(config, slug, work)
        if work.trains:
            # Those that drop out here may report under another seed.
            number = who.clients if who.pooled else len(shards(config, range(who.size))[0])
            found[who.pooled] = max(found.get(who.pooled, 0), number)
        if work.tests_average:
            found[False] = max(found.get(False, 0), len(shards(config, range(who.clients))[0]))
    return found


def job_counts(config: Config) -> Counter[str]:
    """Count the jobs of each rule, in the order in which they run; ``all`` does nothing."""
    slugs, works = config.scenario_seeds(), works_of(config)
    populations = len(config.data_seeds())
    jobs = Counter({"prepare_backbone": 1, "partition": populations, "tokenize": populations})
    jobs["init_server"] = len(slugs) * len(works)
    jobs.update(dict.fromkeys(("train_clients", "aggregate", "assign", "evaluate_clients"), 0))
    for slug in slugs:
        for work in works:
            for rule in work.model_rounds(config.rounds):
                rounds = clients_by_round(config, slug, work, rule)
                jobs[rule] += sum(len(shards(config, clients)) for clients in rounds)
            jobs["aggregate"] += work.aggregations(config.rounds)
            jobs["assign"] += (config.rounds - 1) * work.trains
    jobs["gather"] = len(slugs) * len(config.methods)
    if asks_for_costs(results_stage(config)):
        jobs["gather_costs"] = jobs["gather"]
    jobs.update(
        dict.fromkeys(("write_manifest", "describe_study", "draw_tables", "draw_figures"), 1)
    )
    return +jobs


def examples_of(data: ClientData, work: RunWork) -> float:
    """Examples that a client trains on, of pooled data those of one of the clients."""
    whole = contents_of(work.run).embedding_set == "train"
    return data.train + (data.embedding if whole else 0)


def steps_of(config: Config, slug: str, work: RunWork, data: ClientData) -> list[int]:
    """Optimizer steps of each client in a round; of pooled data those of all, for client 0."""
    stage, examples = run_stage(config, slug, work.run), examples_of(data, work)
    clients = stage.scenario.clients
    if work.pooled:
        return [stage.steps_of(0, clients * examples)]
    return [stage.steps_of(client, examples) for client in range(clients)]


def sequences_per_pass(config: Config) -> int:
    """Sequences of a training pass on one rank; under DP-SGD each example has a pass of its own."""
    return 1 if config.privacy.dp_sgd else config.training.sequences_per_pass


def training_passes(config: Config, data: ClientData, steps: float) -> Passes:
    """Local training of one client in one round."""
    training = config.training
    sequences = steps * training.batch_size / training.ranks
    return Passes(
        number=sequences / sequences_per_pass(config),
        tokens=sequences * data.tokens,
        logits=sequences * data.answer_tokens,
        products=6 if config.backbone.gradient_checkpointing else 4,
    )


def embedding_passes(config: Config, data: ClientData, work: RunWork) -> list[Passes]:
    """The embedding set, where a method does not train on it."""
    use, batch_size = contents_of(work.run).embedding_set, config.evaluation.batch_size
    if work.has_experts:
        # Every rank runs all of it, and asks for as few logits as it can.
        number = math.ceil(data.embedding / batch_size)
        return [Passes(number, data.embedding * data.tokens, logits=number)]
    if use == "train":
        return []
    sequences, times = data.embedding, 1
    if use == "search":
        sequences = min(sequences, config.fdlora.fusion_batches * config.training.batch_size)
        times = config.fdlora.fusion_budget
    return [_batches(config, sequences, data.tokens, data.answer_tokens)] * times


def side_by_side(passes: Passes, models: int) -> Passes:
    """Passes in which several models see every sequence: its batches are so many times as large."""
    return replace(passes, tokens=models * passes.tokens, logits=models * passes.logits)


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
