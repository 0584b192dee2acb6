"""The command that says what a study will cost, before anything is submitted."""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fedamole.cli.pool import table
from fedamole.cli.study import Study, read_benchmarks, read_config, read_study
from fedamole.config import Config, Point
from fedamole.participation import Participation
from fedamole.planning.contents import EMBEDDING, contents_of, virtual_tokens
from fedamole.planning.memory import (
    MARGIN,
    Memory,
    ZeRO,
    gpu_memory,
    job_memory_mb,
    packed_clients,
    zero_of,
)
from fedamole.planning.model_size import ModelSize
from fedamole.planning.times import (
    LIGHT_JOB_S,
    SAFETY,
    Clock,
    RunTime,
    Speed,
    assumed_machine,
    job_minutes,
)
from fedamole.planning.volumes import disk_of, volumes_of
from fedamole.planning.workload import (
    ClientData,
    assumed_data,
    job_counts,
    largest_jobs,
    works_of,
)
from fedamole.settings import ParticipationSettings, ScenarioSettings

MIB, GIB, HOUR = 2**20, 2**30, 3600
RETENTIONS = {"disk: all": None, "last 2": 2, "last": 1}
ZEROS = (*(ZeRO(stage) for stage in range(4)), ZeRO(3, offload=True))
# Before the first pool and after the last metrics: backbone, partition, tokens; tables or figures.
AROUND = 4
UNKNOWN = (
    "The size of the model is unknown, and with it times, memory and traffic: add `size` to the "
    "backbone,\nor prepare it: snakemake --configfile {} --cores 1 prepare_backbone"
)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "plan", help="print jobs, hours, memory, traffic and disk of a study before it runs"
    )
    parser.add_argument("--configfile", type=Path, required=True)
    parser.add_argument(
        "--calibrate", action="store_true", help="measure a few steps on this machine first"
    )
    parser.set_defaults(command=run_plan)


def run_plan(args: argparse.Namespace) -> None:
    """Print what a study asks for, and all that was guessed."""
    study = read_study(read_config(args.configfile))
    config, size = study.config, study.size
    if size is None:
        # A calibration would learn the size, but takes as long as preparing the model for good.
        parts = [_jobs(config), *_people(config), [UNKNOWN.format(args.configfile)]]
    else:
        study, clock, sources = _clock(study, size, args.calibrate)
        parts = [_model(config, size), _jobs(config), *_people(config), _times(study, clock)]
        parts += [_asks(config, size), _gpu(config, size), _volumes(config, size)]
        notes = [*sources, *_guesses(study, size)]
        parts += [["Where this comes from", *(f"- {note}" for note in notes)]]
    print("\n\n".join("\n".join(part) for part in parts))


def _model(config: Config, size: ModelSize) -> list[str]:
    """Describe the model."""
    numbers = [len(size.adapted(settings.adapter.target_modules)) for settings in config.variants()]
    adapted = " or ".join(map(str, dict.fromkeys(numbers)))
    exact = "exact" if size.exact else "approximate"
    rows = [
        ("model", config.backbone.name),
        ("parameters", f"{size.num_parameters:,}, {exact}, from {size.source}"),
        ("adapted", f"{adapted} of {len(size.layers)} linear layers"),
        ("results", config.results),
    ]
    return table(rows)


def _jobs(config: Config) -> list[str]:
    """Count the jobs."""
    jobs = job_counts(config)
    return ["Jobs", *table([*jobs.items(), ("together", jobs.total())], ("rule", "jobs"))]


def _people(config: Config) -> list[list[str]]:
    """Say who takes part in a round and how much of it each does, where that is not all."""
    lines = [
        _participation(point.config, point.scenario)
        for point in config.points.values()
        if point.config.participation != ParticipationSettings()
    ]
    lines += _own_steps(config)
    for work in works_of(config):
        if work.pooled and work.trains:
            lines.append(f"{work.run}: one client, which trains on the data of all.")
    return [["Participation", *lines]] if lines else []


def _participation(config: Config, scenario: ScenarioSettings) -> str:
    """Say how many clients of a scenario take part in a round."""
    who = Participation(config.participation, scenario.clients, config.seeds[0])
    fewest = f"at least {who.fewest}" if who.fewest < who.size else "all of them"
    text = f"{scenario.slug}: {who.size} of {who.clients} clients a round, {fewest} must report"
    rate = config.participation.dropout_rate
    return text + (f"; each drops out with probability {rate:g}" if rate else "")


def _own_steps(config: Config) -> list[str]:
    """Say how many steps clients take that have a number of their own, by column if it varies."""
    trainings = {name: point.config.training for name, point in config.points.items()}
    numbers = {
        name: f"its own number of steps, from {training.min_steps} to {training.most_steps(0)}"
        for name, training in trainings.items()
        if training.min_steps
    }
    if len(numbers) == len(trainings) and len(set(numbers.values())) == 1:
        return [f"Every client takes {next(iter(numbers.values()))}."]
    return [f"{name}: every client takes {number}." for name, number in numbers.items()]


class _Cost(NamedTuple):
    """A run on all seeds of a scenario."""

    scenario: str
    run: str
    times: list[RunTime]
    measured: bool


def _costs(study: Study, clock: Clock) -> Iterator[_Cost]:
    """Add up the times of all runs."""
    for name, point in study.config.points.items():
        here = _clock_of(clock, point)
        slugs = [point.data.seeded_slug(seed) for seed in study.config.seeds]
        for work in works_of(study.config):
            times = [here.run(slug, study.data[slug], work) for slug in slugs]
            rules = work.model_rounds(study.config.rounds)
            keys = [(slug, work.run, rule) for slug in slugs for rule in rules]
            yield _Cost(name, work.run, times, all(key in here.measured for key in keys))


def _clock_of(clock: Clock, point: Point) -> Clock:
    """The clock under the settings of a point, which call its population as its data are called."""
    names = {
        point.scenario.seeded_slug(seed): point.data.seeded_slug(seed)
        for seed in clock.config.seeds
    }
    measured = {
        (names[slug], run, rule): seconds
        for (slug, run, rule), seconds in clock.measured.items()
        if slug in names
    }
    return replace(clock, config=point.config, measured=measured)


def _times(study: Study, clock: Clock) -> list[str]:
    """Tabulate the work, what it takes, and the longest chain."""
    unit, width = _unit(study.config)
    costs = list(_costs(study, clock))
    rows = [
        (
            cost.scenario,
            cost.run,
            f"{sum(time.flops for time in cost.times) / 1e12:.1f}",
            f"{_hours(cost.times, width):.2f}",
            f"{max(time.chain_s for time in cost.times) / HOUR:.2f}",
            "measured" if cost.measured else "computed",
        )
        for cost in costs
    ]
    every = [time for cost in costs for time in cost.times]
    longest = max(every, key=lambda time: time.chain_s)
    hours = (longest.chain_s + AROUND * LIGHT_JOB_S) / HOUR
    return [
        f"Time, over seeds {', '.join(map(str, study.config.seeds))}",
        *table(rows, ("scenario", "run", "TFLOP", unit, "longest chain (h)", "times")),
        f"Together {_hours(every, width):.2f} {unit}. The longest chain takes {hours:.2f} h: "
        f"{longest.chain_jobs} jobs that train",
        "or test, one after another. Waiting in a queue, and a download, come on top.",
    ]


def _unit(config: Config) -> tuple[str, int]:
    """What a job occupies: GPUs, or CPU cores."""
    if config.execution.gpus:
        return "GPU-hours", config.execution.gpus
    return "CPU-hours", _cores(config)


def _cores(config: Config) -> int:
    """CPU cores of a job on all its nodes."""
    return config.execution.processes(config.training.ranks) * config.training.cpu_threads


def _hours(times: Iterable[RunTime], width: int) -> float:
    """Hours of all that jobs occupy."""
    return width * sum(time.seconds for time in times) / HOUR


def _asks(config: Config, size: ModelSize) -> list[str]:
    """Tabulate what a job that trains asks for."""
    execution = config.execution
    memory = execution.mem_mb or job_memory_mb(config, size)
    rows = []
    for name, point in config.points.items():
        for pooled, clients in sorted(largest_jobs(point.config, point.data).items()):
            minutes = execution.runtime or job_minutes(
                point.config, size, point.data, clients, pooled
            )
            asked = (execution.nodes, execution.gpus, _cores(config), memory, minutes)
            rows.append((name, f"{clients} pooled" if pooled else clients, *asked))
    head = ("scenario", "clients", "nodes", "GPUs", "cores", "MB per node", "minutes")
    return ["What a job that trains or tests asks for", *table(rows, head)]


def _gpu(config: Config, size: ModelSize) -> list[str]:
    """Tabulate the peak memory of a GPU by ZeRO stage."""
    checkpointing = config.backbone.gradient_checkpointing
    rows = []
    for zero in ZEROS:
        plain, checkpointed = _most_memory(config, size, zero)
        chosen = checkpointed if checkpointing else plain
        parts = [plain.weights, plain.adapters, plain.training, checkpointed.training]
        parts += [plain.testing, plain.base, chosen.peak]
        mark = "<- this config" if zero == zero_of(config) else ""
        rows.append((zero, *(f"{part / GIB:.2f}" for part in parts), mark))
    parts_of = ("weights", "adapters", "training", "checkpointed", "testing", "other", "peak")
    if_any = "" if config.execution.gpus else ", if it ran on GPUs"
    packed = max(map(packed_clients, config.variants()))
    use = f"{config.training.ranks} to a client" if packed == 1 else f"packs of {packed} clients"
    title = f"Peak memory of a GPU in GiB{if_any}: {use}, sequences of max_length"
    return [title, *table(rows, ("ZeRO", *parts_of, ""))]


def _most_memory(config: Config, size: ModelSize, zero: ZeRO) -> tuple[Memory, Memory]:
    """Memory without and with checkpointing, at the point of a sweep that needs most."""
    found = [
        (
            gpu_memory(settings, size, zero, checkpointing=False),
            gpu_memory(settings, size, zero, checkpointing=True),
        )
        for settings in config.variants()
    ]
    return max(found, key=lambda pair: pair[config.backbone.gradient_checkpointing].peak)


def _volumes(config: Config, size: ModelSize) -> list[str]:
    """Tabulate traffic and disk."""
    rows, total = [], dict.fromkeys(RETENTIONS, 0.0)
    for column, point in config.points.items():
        here = point.config
        slugs = [point.data.seeded_slug(seed) for seed in config.seeds]
        for work in works_of(config):
            volumes = volumes_of(here, size, point.data, work)
            disks = {
                name: sum(disk_of(here, volumes, slug, work, keep) for slug in slugs) / GIB
                for name, keep in RETENTIONS.items()
            }
            total = {name: total[name] + disks[name] for name in total}
            traffic = (volumes.download / MIB, volumes.upload / MIB, volumes.kept / MIB)
            cells = (f"{cell:.2f}" for cell in (*traffic, *disks.values()))
            rows += [(column, work.run, *cells)] if work.trains else []
    files = ("download MiB", "upload MiB", "own MiB")
    head = ("scenario", "run", *files, *(f"{name} GiB" for name in total))
    title = (
        "Traffic of a client per round, and what it keeps for itself; disk, by the rounds that are "
        "kept"
    )
    together = ", ".join(f"{disk:.2f}" for disk in total.values())
    if not rows:
        return ["Nothing is trained, so nothing is sent and hardly anything stored."]
    return [title, *table(rows, head), f"Together on disk, in the same order: {together} GiB."]


def _clock(study: Study, size: ModelSize, calibrate: bool) -> tuple[Study, Clock, list[str]]:
    """Times of jobs, and where they come from; with the study as a calibration has seen it."""
    config = study.config
    if calibrate:
        from fedamole.cli.calibration import measure

        found = measure(config, size)
        machine, sources = found.machine, [found.words]
        study = _with_lengths(study, found.data)
    else:
        machine = assumed_machine(config)
        sources = [_speed(machine)]
    measured = read_benchmarks(config)
    if measured:
        sources.append(f"Times marked measured: finished jobs in {config.results}/benchmarks.")
    return study, Clock(config, size, machine, measured), sources


def _with_lengths(study: Study, seen: ClientData) -> Study:
    """Give the first population the lengths and the training sets that a calibration has seen."""
    point, data = next(iter(study.config.points.values())), dict(study.data)
    for slug in map(point.data.seeded_slug, study.config.seeds):
        if not data[slug].measured:
            data[slug] = replace(
                data[slug],
                tokens=seen.tokens,
                answer_tokens=seen.answer_tokens,
                train=seen.train,
            )
    return replace(study, data=data)


def _speed(machine: Speed) -> str:
    """Say how fast a process is assumed to be."""
    return (
        f"Guess: a process computes {machine.flops / 1e9:,.0f} GFLOP/s, reads weights at "
        f"{machine.bandwidth / 1e9:,.0f} GB/s, takes {machine.layer_s * 1e3:g} ms more per layer "
        f"and pass, and {machine.start_s:g} s to start. `--calibrate` measures."
    )


def _guesses(study: Study, size: ModelSize) -> Iterator[str]:
    """Say all that was assumed, one line each."""
    config = study.config
    if not size.exact:
        yield "Guess: the model is a decoder with gated MLPs and no biases, as Llama is."
    if not all(size.adapted(here.adapter.target_modules) for here in config.variants()):
        yield "Guess: nothing is adapted, since no layer has a name of adapter: target_modules."
    populations = {point.data.slug: point.data for point in config.points.values()}
    for population in populations.values():
        yield _data_line(study, population)
    yield "Guess: every generated answer has max_new_tokens, since a batch waits for its longest."
    yield (
        "Guess: peaks come from sequences of max_length; of a generated one half, of a class 1/16 "
        "is the answer."
    )
    yield (
        f"Jobs ask for {MARGIN:g} times the memory and {SAFETY:g} times the time that is expected, "
        "unless execution: mem_mb, runtime are set."
    )
    if any(work.has_experts for work in works_of(config)):
        yield (
            "Traffic is a mean: a client holds num_experts * choices / clients experts per module, "
            "of the clients that take part."
        )
    for run in config.runs():
        if contents_of(run).shared == EMBEDDING:
            tokens = max(virtual_tokens(run, here.prompt) for here in config.variants())
            yield (
                f"At most: the prompt of {run} has {tokens} tokens, "
                "one for each byte of prompt: text. How many it has, only the tokenizer knows."
            )


def _data_line(study: Study, scenario: ScenarioSettings) -> str:
    """Say what is known of the data of a population."""
    known = [study.data[scenario.seeded_slug(seed)] for seed in study.config.seeds]
    data = known[0]
    facts = (
        f"{scenario.slug}: {data.tokens:.0f} tokens a sequence, {data.answer_tokens:.0f} of them "
        f"answer; {data.eval:.0f} evaluation and {data.test:.0f} test examples a client"
    )
    if any(settings.training.local_epochs for settings in study.config.variants()):
        facts += f", {data.train:.0f} to train on"
    if all(data.measured for data in known):
        return f"Counted: {facts}."
    guessed = data.tokens == assumed_data(scenario).tokens
    lengths = "a quarter of max_length" if guessed else "lengths counted"
    return f"Guess: {facts} ({lengths}, full sets; counted once tokenised)."
