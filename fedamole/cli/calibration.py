"""Measure on this machine what a study costs: its own commands, with few steps and few examples.

The prepared backbone of the study is used where there is one; everything else is made in a
temporary folder and forgotten.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from fedamole import stages
from fedamole.artifacts import read_record
from fedamole.cli.study import read_data
from fedamole.config import Config
from fedamole.errors import FedamoleError
from fedamole.launching import LAUNCHER
from fedamole.planning.model_size import ModelSize
from fedamole.planning.times import Clock, Speed, assumed_machine, weights_seconds
from fedamole.planning.workload import ClientData, RunWork, population_of, works_of
from fedamole.progress import Work, read_progress
from fedamole.settings import Section

STEPS = 8
# Steps per second below which the two decimals of the log are too few.
SLOW = 0.1
# No client and no step takes less; the difference of two times may say otherwise.
SHORTEST_S = 1e-3


@dataclass(frozen=True)
class _Done:
    """A command that is done: seconds of its clients, seconds in all, and its log."""

    clients: list[float]
    elapsed: float
    log: str


@dataclass(frozen=True)
class Times:
    """What was measured, in seconds.

    Attributes
    ----------
    start
        From the call to the first client, reading the weights included.
    step
        An optimizer step; None if nothing is trained.
    test
        Evaluation and test of a client with so many ``examples`` in all.
    """

    start: float
    step: float | None
    test: float
    examples: int


@dataclass(frozen=True)
class Measurement:
    """What a measurement says.

    Attributes
    ----------
    machine
        As fast as this one.
    data
        Of the clients that it used; their sets but the training set are cut to one batch.
    words
        What was measured, for people.
    """

    machine: Speed
    data: ClientData
    words: str


def measure(config: Config, size: ModelSize) -> Measurement:
    """Measure start, training and tests of clients, as far as the study has them.

    Raises
    ------
    FedamoleError
        If the study asks for GPUs and this machine has none, or if one of the commands fails.
    """
    _check_gpus(config)
    with tempfile.TemporaryDirectory(prefix="fedamole-plan-") as folder:
        trial = _Trial(config, Path(folder))
        trial.prepare()
        times = trial.run()
        data = read_data(trial.tokens, trial.config, trial.slug)
    if data is None:
        raise FedamoleError(f"--calibrate: {trial.slug} was not tokenised")
    clock = Clock(trial.with_steps(1), size, assumed_machine(config))
    machine = _as_fast(clock, trial.work, data, times)
    return Measurement(machine, data, _words(times, trial.slug))


def _as_fast(clock: Clock, work: RunWork, data: ClientData, times: Times) -> Speed:
    """The machine of a clock, made as fast as it was measured."""
    machine = clock.machine
    step = clock.client(clock.passes(data, work, "train_clients", 1)[:1])
    test = clock.client(clock.passes(data, work, "evaluate_clients", 0))
    return replace(
        machine,
        start_s=max(0.0, times.start - weights_seconds(clock.config, clock.size)),
        training=machine.training if times.step is None else times.step / step,
        testing=times.test / test,
    )


def _words(times: Times, slug: str) -> str:
    """Say what was measured."""
    step = "" if times.step is None else f"{times.step:.3g} s per training step, "
    return (
        f"Measured here on clients of {slug}: {times.start:.1f} s to start, {step}"
        f"{times.test / times.examples:.3g} s per evaluation or test example."
    )


def _check_gpus(config: Config) -> None:
    """Refuse to measure a CPU for a study on GPUs."""
    if not config.execution.gpus:
        return
    import torch

    if not torch.cuda.is_available():
        raise FedamoleError(
            f"--calibrate: the config asks for {config.execution.gpus} GPUs (execution: gpus) and "
            "this machine shows none; run it inside a job that has one"
        )


def _is_current(backbone: Path, config: Config) -> bool:
    """Whether a folder holds the prepared backbone of a study."""
    digest = stages.digest(stages.backbone_stage(config))
    try:
        read_record(backbone / "backbone.json", "backbone", digest)
    except FedamoleError:
        return False
    return True


class _Trial:
    """The first point of a study, cut down, in a folder of its own.

    Parameters
    ----------
    config
        The study.
    folder
        For everything that is written.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        # A run with experts costs most.
        self.work = max(
            works_of(config), key=lambda work: (work.has_experts, work.trains, not work.pooled)
        )
        few = dict.fromkeys(("max_embedding", "max_eval", "max_test"), config.evaluation.batch_size)
        point = next(iter(config.points.values()))
        scenario = point.data.model_copy(update=few)
        self.config = point.config.model_copy(update={"scenarios": [scenario]})
        self.slug = scenario.seeded_slug(config.seeds[0])
        self.folder, self.tokens = folder, folder / "tokens"
        prepared = Path(config.results, "backbones", config.backbone.name)
        self.backbone = prepared if _is_current(prepared, config) else folder / "backbone"

    def with_steps(self, steps: int) -> Config:
        """The config with so many training steps."""
        few = {"steps": steps, "min_steps": None, "local_epochs": None}
        training = self.config.training.model_copy(update=few)
        return self.config.model_copy(update={"training": training})

    def prepare(self) -> None:
        """Make what the clients read."""
        scenario = stages.scenario_stage(self.config, self.slug)
        tokens = stages.tokens_stage(self.config, self.slug)
        partition = self.folder / "partition.json"
        if self.backbone.parent == self.folder:
            backbone = stages.backbone_stage(self.config)
            self._call("prepare-backbone", backbone, "--out", self.backbone)
        self._call("partition", scenario, "--out", partition)
        inputs = ("--partition", partition, "--backbone", self.backbone)
        self._call("tokenize", tokens, *inputs, "--out", self.tokens)

    def run(self) -> Times:
        """Train two clients in one process, and test them in another."""
        # Of those that take part: others hold no experts.
        clients = population_of(self.config, self.slug, self.work).drawn(1)[:2]
        tested = self._clients("test", clients)
        test = tested.clients[-1]
        metrics = json.loads((self.folder / "test" / f"metrics_{clients[-1]}.json").read_text())
        return Times(
            # The first client of a process also waits for the weights; what counts is the last.
            start=max(0.0, tested.elapsed - len(clients) * test),
            step=self._step(clients, test) if self.work.trains else None,
            test=test,
            examples=metrics["num_eval"] + metrics["num_test"],
        )

    def _step(self, clients: list[int], test: float) -> float:
        """Seconds of a training step, from the log where that says it well enough."""
        trained = self._clients("train", clients)
        said = re.findall(r" (\d+) steps, ([\d.]+) steps/s", trained.log)
        # Of pooled data a client takes the steps of all.
        steps, rate = (int(said[-1][0]), float(said[-1][1])) if said else (STEPS, 0.0)
        if rate > SLOW:
            return 1 / rate
        return max(SHORTEST_S, (trained.clients[-1] - test) / steps)

    def _clients(self, work: Work, clients: list[int]) -> _Done:
        """Train or test clients from a new pool."""
        folder, names = self.folder / work, (self.slug, self.work.run)
        config = self.with_steps(STEPS)
        pool, assignment = folder / "pool.h5", folder / "assignment.h5"
        made = ("--out-pool", pool, "--out-assignment", assignment)
        run_stage = stages.run_stage(config, *names)
        self._call("init-server", run_stage, "--backbone", self.backbone, *made)
        inputs = ["--round", 1, "--clients", *clients, "--backbone", self.backbone]
        inputs += ["--tokens", self.tokens, "--pool", pool, "--assignment", assignment]
        outputs = ["--out-metrics", *(folder / f"metrics_{client}.json" for client in clients)]
        if work == "train":
            outputs += ["--out-uploads", *(folder / f"client_{client}.h5" for client in clients)]
        command = "train-clients" if work == "train" else "evaluate-clients"
        began = time.monotonic()
        stage = stages.client_stage(config, *names)
        log = self._call(command, stage, "--progress", folder / "progress", *inputs, *outputs)
        elapsed = time.monotonic() - began
        seconds = [record.seconds or SHORTEST_S for record in read_progress(folder / "progress")]
        return _Done(seconds, elapsed, log)

    def _call(self, command: str, settings: Section, *arguments: object) -> str:
        """Run a command of fedamole, and give its log.

        Raises
        ------
        FedamoleError
            With the last line that the command said, if it failed.
        """
        call = [sys.executable, "-m", "fedamole", command, "--settings"]
        call += [stages.canonical_json(settings), *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if name != LAUNCHER}
        threads = str(self.config.training.cpu_threads)
        environment = {"OMP_NUM_THREADS": threads, **environment, "FEDAMOLE_LOG": "INFO"}
        if not self.config.execution.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(call, env=environment, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise FedamoleError(f"--calibrate: {command}: {said[-1] if said else 'failed'}")
        return done.stderr
