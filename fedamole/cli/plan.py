"""The command that says what a study will cost, before anything is submitted."""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fedamole.cli.pool import table
from fedamole.cli.study import Study, read_benchmarks, read_config, read_study
from fedamole.config import Config
from fedamole.participation import Participation
from fedamole.planning.contents import EMBEDDING, contents_of, virtual_tokens
from fedamole.planning.memory import (
    MARGIN,
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
    adapted = size.adapted(config.adapter.target_modules)
    exact = "exact" if size.exact else "approximate"
    rows = [
        ("model", config.backbone.name),
        ("parameters", f"{size.num_parameters:,}, {exact}, from {size.source}"),
        ("adapted", f"{len(adapted)} of {len(size.layers)} linear layers"),
        ("results", config.results),
    ]
    return table(rows)


def _jobs(config: Config) -> list[str]:
    """Count the jobs."""
    jobs = job_counts(config)
    return ["Jobs", *table([*jobs.items(), ("together", jobs.total())], ("rule", "jobs"))]


def _people(config: Config) -> list[list[str]]:
    """Say who takes part in a round and how much of it each does, where that is not all."""
    lines = []
    if config.participation != ParticipationSettings():
        lines += [_participation(config, scenario) for scenario in config.scenarios]
    training = config.training
    if training.min_steps:
        steps = f"{training.min_steps} to {training.most_steps(0)}"
        lines.append(f"Every client takes its own number of steps, from {steps}.")
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


class _Cost(NamedTuple):
    """A run on all seeds of a scenario."""

    scenario: str
    run: str
    times: list[RunTime]
    measured: bool


def _costs(study: Study, clock: Clock) -> Iterator[_Cost]:
    """Add up the times of all runs."""
    for scenario in study.config.scenarios:
        slugs = [scenario.seeded_slug(seed) for seed in study.config.seeds]
        for work in works_of(study.config):
            times = [clock.run(slug, study.data[slug], work) for slug in slugs]
            rules = work.model_rounds(study.config.rounds)
            keys = [(slug, work.run, rule) for slug in slugs for rule in rules]
            yield _Cost(scenario.slug, work.run, times, all(key in clock.measured for key in keys))


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
    for scenario in config.scenarios:
        for pooled, clients in sorted(largest_jobs(config, scenario).items()):
            minutes = execution.runtime or job_minutes(config, size, scenario, clients, pooled)
            asked = (execution.nodes, execution.gpus, _cores(config), memory, minutes)
            rows.append((scenario.slug, f"{clients} pooled" if pooled else clients, *asked))
    head = ("scenario", "clients", "nodes", "GPUs", "cores", "MB per node", "minutes")
    return ["What a job that trains or tests asks for", *table(rows, head)]


def _gpu(config: Config, size: ModelSize) -> list[str]:
    """Tabulate the peak memory of a GPU by ZeRO stage."""
    checkpointing = config.backbone.gradient_checkpointing
    rows = []
    for zero in ZEROS:
        plain, checkpointed = (gpu_memory(config, size, zero, again) for again in (False, True))
        chosen = checkpointed if checkpointing else plain
        parts = [plain.weights, plain.adapters, plain.training, checkpointed.training]
        parts += [plain.testing, plain.base, chosen.peak]
        mark = "<- this config" if zero == zero_of(config) else ""
        rows.append((zero, *(f"{part / GIB:.2f}" for part in parts), mark))
    parts_of = ("weights", "adapters", "training", "checkpointed", "testing", "other", "peak")
    if_any = "" if config.execution.gpus else ", if it ran on GPUs"
    packed = packed_clients(config)
    use = f"{config.training.ranks} to a client" if packed == 1 else f"packs of {packed} clients"
    title = f"Peak memory of a GPU in GiB{if_any}: {use}, sequences of max_length"
    return [title, *table(rows, ("ZeRO", *parts_of, ""))]


def _volumes(config: Config, size: ModelSize) -> list[str]:
    """Tabulate traffic and disk."""
    rows, total = [], dict.fromkeys(RETENTIONS, 0.0)
    for scenario in config.scenarios:
        for work in works_of(config):
            volumes = volumes_of(config, size, scenario, work)
            slugs = [scenario.seeded_slug(seed) for seed in config.seeds]
            disks = {
                name: sum(disk_of(config, volumes, slug, work, keep) for slug in slugs) / GIB
                for name, keep in RETENTIONS.items()
            }
            total = {name: total[name] + disks[name] for name in total}
            traffic = (volumes.download / MIB, volumes.upload / MIB, volumes.kept / MIB)
            cells = (f"{cell:.2f}" for cell in (*traffic, *disks.values()))
            rows += [(scenario.slug, work.run, *cells)] if work.trains else []
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
    """Give the first scenario the lengths and the training sets that a calibration has seen."""
    scenario, data = study.config.scenarios[0], dict(study.data)
    for slug in map(scenario.seeded_slug, study.config.seeds):
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
    if not size.adapted(config.adapter.target_modules):
        yield "Guess: nothing is adapted, since no layer has a name of adapter: target_modules."
    for scenario in config.scenarios:
        yield _data_line(study, scenario)
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
            yield (
                f"At most: the prompt of {run} has {virtual_tokens(run, config.prompt)} tokens, "
                "one for each byte of prompt: text. How many it has, only the tokenizer knows."
            )


def _data_line(study: Study, scenario: ScenarioSettings) -> str:
    """Say what is known of the data of a scenario."""
    known = [study.data[scenario.seeded_slug(seed)] for seed in study.config.seeds]
    data = known[0]
    facts = (
        f"{scenario.slug}: {data.tokens:.0f} tokens a sequence, {data.answer_tokens:.0f} of them "
        f"answer; {data.eval:.0f} evaluation and {data.test:.0f} test examples a client"
    )
    if study.config.training.local_epochs:
        facts += f", {data.train:.0f} to train on"
    if all(data.measured for data in known):
        return f"Counted: {facts}."
    guessed = data.tokens == assumed_data(scenario).tokens
    lengths = "a quarter of max_length" if guessed else "lengths counted"
    return f"Guess: {facts} ({lengths}, full sets; counted once tokenised)."
