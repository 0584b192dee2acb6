"""Time of jobs and of a whole study, and what a job should ask a cluster for (torch-free).

Pure functions of the settings and of how large the model is. The Snakefile asks at parse time, in
every job, so nothing here imports NumPy. Speeds are guesses on the safe side, unless measured.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedamole.config import Config
from fedamole.planning.contents import contents_of, virtual_tokens
from fedamole.planning.memory import BYTES, zero_of
from fedamole.planning.model_size import ModelSize
from fedamole.planning.workload import (
    ClientData,
    Passes,
    RunWork,
    assumed_data,
    clients_by_round,
    embedding_passes,
    examples_of,
    shards,
    side_by_side,
    steps_of,
    testing_passes,
    training_passes,
    works_of,
)
from fedamole.settings import ScenarioSettings

SAFETY, SHORTEST_MIN, UNKNOWN_MIN = 3.0, 30, 240
# A job that needs no model: start, files, end.
LIGHT_JOB_S = 10.0
# Bytes per second at which a job reads the weights from a shared disk.
READ = 0.5e9


@dataclass(frozen=True)
class Speed:
    """How fast one process is.

    Attributes
    ----------
    flops
        Floating point operations per second.
    bandwidth
        Bytes of weights per second that a pass reads.
    exchange
        Bytes of weights per second that ZeRO-3 gathers from other ranks or the host.
    layer_s
        Seconds per decoder layer and forward pass, however small it is: the start of its kernels.
    start_s
        Seconds until the first client begins, without reading the weights.
    training, testing
        Measured over computed seconds of a client.
    """

    flops: float
    bandwidth: float
    exchange: float
    layer_s: float
    start_s: float
    training: float = 1.0
    testing: float = 1.0

    def seconds(self, passes: Passes, config: Config, size: ModelSize) -> float:
        """Time of passes through the model on one rank."""
        weights = size.num_parameters * BYTES[config.backbone.dtype]
        each = size.num_decoder_layers * self.layer_s + weights / self.bandwidth
        zero, ranks = zero_of(config), config.training.ranks
        if zero.stage == 3 and (zero.offload or ranks > 1):
            each += weights / self.exchange
        return passes.flops(size) / self.flops + passes.number * each * passes.products / 2


GPU = Speed(flops=30e12, bandwidth=1e12, exchange=10e9, layer_s=1.5e-3, start_s=40)
CPU_THREAD = Speed(flops=20e9, bandwidth=10e9, exchange=1e9, layer_s=0.5e-3, start_s=20)


def weights_seconds(config: Config, size: ModelSize) -> float:
    """Time in which a process reads the weights."""
    return size.num_parameters * BYTES[config.backbone.dtype] / READ


def assumed_machine(config: Config) -> Speed:
    """Guess how fast one process of a job is."""
    if config.execution.gpus:
        return GPU
    threads = config.training.cpu_threads
    return replace(CPU_THREAD, flops=threads * CPU_THREAD.flops)


@dataclass(frozen=True)
class RunTime:
    """Time of one run on one scenario and seed.

    Attributes
    ----------
    flops
        Floating point operations of all training and tests, on all ranks.
    seconds
        All jobs that train or test, one after another.
    chain_s
        From the first pool to the metrics, if every job starts as soon as it can.
    chain_jobs
        Jobs of that chain that train or test.
    """

    flops: float
    seconds: float
    chain_s: float
    chain_jobs: int


@dataclass(frozen=True)
class Clock:
    """Times of the jobs of a study.

    Attributes
    ----------
    config, size
        The study and its model.
    machine
        How fast a process is.
    measured
        (scenario slug, run, rule) -> seconds of a job per turn, that is, per
        ``clients_at_once`` of its clients; counts before anything that is computed.
    """

    config: Config
    size: ModelSize
    machine: Speed
    measured: Mapping[tuple[str, str, str], float] = field(default_factory=dict)

    def passes(self, data: ClientData, work: RunWork, rule: str, steps: float) -> list[Passes]:
        """All passes of one client in one round.

        Parameters
        ----------
        data, work
            What the client has, and the run.
        rule
            ``train_clients`` or ``evaluate_clients``.
        steps
            Its optimizer steps; of no meaning where it is only tested.
        """
        prompt = virtual_tokens(work.run, self.config.prompt)
        data = replace(data, tokens=data.tokens + prompt)
        tests = testing_passes(self.config, data)
        if rule == "evaluate_clients":
            return tests
        training = training_passes(self.config, data, steps)
        every = [training, *embedding_passes(self.config, data, work), *tests]
        return [side_by_side(part, contents_of(work.run).models) for part in every]

    def client(self, passes: Iterable[Passes]) -> float:
        """Seconds of one client in one round."""
        machine = self.machine
        return sum(
            (machine.training if part.products > 2 else machine.testing)
            * machine.seconds(part, self.config, self.size)
            for part in passes
        )

    def job(self, data: ClientData, work: RunWork, rule: str, steps: Sequence[float]) -> float:
        """Seconds of a job whose clients take so many optimizer steps each; see :meth:`passes`."""
        return self._job([self.client(self.passes(data, work, rule, each)) for each in steps])

    def _job(self, clients: Sequence[float]) -> float:
        """Seconds of a job whose clients take so many seconds each."""
        lanes = self.config.execution.clients_at_once
        load = weights_seconds(self.config, self.size)
        # ZeRO-3 cuts the model into slices and needs a new one for the next client.
        loads = math.ceil(len(clients) / lanes) if zero_of(self.config).stage == 3 else 1
        busiest = max(sum(clients[lane::lanes]) for lane in range(lanes))
        return self.machine.start_s + loads * load + busiest

    def rounds(self, slug: str, data: ClientData, work: RunWork, rule: str) -> list[list[float]]:
        """Seconds of each job of each round."""
        known = self.measured.get((slug, work.run, rule))
        at_once = self.config.execution.clients_at_once
        steps = self._steps(slug, data, work, rule)
        seconds = {each: self.client(self.passes(data, work, rule, each)) for each in set(steps)}

        def of_job(clients: Sequence[int]) -> float:
            if known is not None:
                return known * math.ceil(len(clients) / at_once)
            return self._job([seconds[steps[client]] for client in clients])

        return [
            [of_job(clients) for clients in shards(self.config, everyone)]
            for everyone in clients_by_round(self.config, slug, work, rule)
        ]

    def _steps(self, slug: str, data: ClientData, work: RunWork, rule: str) -> list[int]:
        """Optimizer steps of each client; none where it is only tested."""
        if rule == "train_clients":
            return steps_of(self.config, slug, work, data)
        return [0] * self.config.scenario_seeds()[slug][0].clients

    def flops(self, slug: str, data: ClientData, work: RunWork, rule: str) -> float:
        """Floating point operations of all clients in all rounds, on one rank."""
        steps = self._steps(slug, data, work, rule)
        rounds = clients_by_round(self.config, slug, work, rule)
        counts = Counter(steps[client] for clients in rounds for client in clients)
        return sum(
            count * part.flops(self.size)
            for each, count in counts.items()
            for part in self.passes(data, work, rule, each)
        )

    def run(self, slug: str, data: ClientData, work: RunWork) -> RunTime:
        """Add up a run."""
        rules = work.model_rounds(self.config.rounds)
        jobs = {rule: self.rounds(slug, data, work, rule) for rule in rules}
        flops = sum(self.flops(slug, data, work, rule) for rule in rules)
        return RunTime(
            flops=flops * self.config.training.ranks,
            seconds=sum(sum(map(sum, rounds)) for rounds in jobs.values()),
            chain_s=self._chain(work, jobs),
            chain_jobs=rules.get("train_clients", 0) + work.tests_average,
        )

    def _chain(self, work: RunWork, jobs: Mapping[str, list[list[float]]]) -> float:
        """Longest chain of a run: tests of all rounds but the last run beside the training."""
        trained = self.config.rounds if work.trains else 0
        seconds = sum(max(round_) for round_ in jobs.get("train_clients", []))
        seconds += sum(max(round_) for round_ in jobs.get("evaluate_clients", [])[-1:])
        # Before and after; aggregate and assign between rounds, and aggregate before the last test.
        light = 2 + 2 * max(0, trained - 1) + (work.trains and work.tests_average)
        return seconds + light * LIGHT_JOB_S


def job_minutes(
    config: Config,
    size: ModelSize | None,
    scenario: ScenarioSettings,
    clients: int,
    pooled: bool = False,
) -> int:
    """Run time that a job which trains or tests clients should ask for, in minutes.

    Three times what is expected of the slowest run, on the fastest devices; 240 if the size of the
    model is unknown.

    Parameters
    ----------
    config, size, scenario
        The study, its model, and the population.
    clients
        Number of clients of the job, or of those whose data it trains on together.
    pooled
        Whether it does that.
    """
    if size is None:
        return UNKNOWN_MIN
    clock, data = Clock(config, size, assumed_machine(config)), assumed_data(scenario)
    seconds = []
    for work in works_of(config):
        steps = config.training.most_steps(examples_of(data, work))
        if work.trains and work.pooled == pooled:
            each = [clients * steps] if pooled else [steps] * clients
            seconds.append(clock.job(data, work, "train_clients", each))
        if work.tests_average and not pooled:
            seconds.append(clock.job(data, work, "evaluate_clients", [0] * clients))
    return max(SHORTEST_MIN, math.ceil(SAFETY * max(seconds, default=0.0) / 60))
