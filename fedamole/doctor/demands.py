"""What the jobs of a study ask of SLURM, against what the nodes have and SLURM's own judgement."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedamole import slurm_site
from fedamole.config import Config
from fedamole.doctor.findings import Finding, error, ok, warning
from fedamole.doctor.site import Site
from fedamole.planning.memory import job_memory_mb
from fedamole.planning.model_size import model_size
from fedamole.planning.times import job_minutes
from fedamole.planning.workload import largest_jobs
from fedamole.snakemake_profile import Profile

# Growth with every attempt, as in workflow/rules/cluster.smk.
MEMORY_GROWTH, TIME_GROWTH = 1.5, 2


@dataclass(frozen=True)
class Demand:
    """What a training job asks for at its first attempt.

    Attributes
    ----------
    nodes
        Nodes.
    tasks, cpus
        Tasks on each node, and CPUs of each task.
    gpus
        GPUs on each node.
    mem_mb
        Memory of each node in MB; None leaves it to the partition.
    minutes
        Run time; None leaves it to the partition.
    """

    nodes: int = 1
    tasks: int = 1
    cpus: int = 1
    gpus: int = 0
    mem_mb: int | None = None
    minutes: int | None = None

    @property
    def cpus_of_node(self) -> int:
        """CPUs on each node."""
        return self.tasks * self.cpus


def demand(config: Config | None, profile: Profile) -> Demand:
    """What the training jobs of a study ask for; without a study, next to nothing.

    On one node a job is one task, which starts its processes itself; on several it is a task for
    every process.
    """
    if config is None:
        return Demand(mem_mb=profile.number("mem_mb"), minutes=1)
    execution, training = config.execution, config.training
    processes = execution.processes(training.ranks) // execution.nodes
    wide = execution.nodes > 1
    mem_mb, minutes = needs(config)
    return Demand(
        nodes=execution.nodes,
        tasks=processes if wide else 1,
        cpus=training.cpu_threads if wide else processes * training.cpu_threads,
        gpus=execution.gpus // execution.nodes,
        mem_mb=_capped(mem_mb, profile.number("max_mem_mb")),
        minutes=_capped(minutes, profile.number("max_runtime")),
    )


def _capped(value: int | None, limit: int | None) -> int | None:
    """A value, but not more than the profile allows."""
    return min(value, limit) if value is not None and limit is not None else value


def needs(config: Config) -> tuple[int, int]:
    """Memory in MB and minutes of the largest training job: from the config, or estimated."""
    execution = config.execution
    size = model_size(config.backbone, Path(config.results) / "backbones" / config.backbone.name)
    minutes = (
        job_minutes(point.config, size, point.data, clients, pooled)
        for point in config.points.values()
        for pooled, clients in largest_jobs(point.config, point.data).items()
    )
    return (
        execution.mem_mb or job_memory_mb(config, size),
        execution.runtime or max(minutes),
    )


def check(site: Site, config: Config | None) -> Iterator[Finding]:
    """Compare what training jobs ask for with what the partition has.

    Yields
    ------
    Finding
        One for each kind of resource that does not fit, or one that says what fits.
    """
    if not site.chosen or not site.usable:
        yield warning("training jobs", "not checked: there is no usable partition")
        return
    asked = demand(config, site.profile)
    problems = [
        finding for compare in (_time, _memory, _cpus, _gpus) for finding in compare(site, asked)
    ]
    yield from problems
    if config:
        yield from _caps(site.profile, *needs(config))
    if not any(finding.level == "error" for finding in problems):
        yield _together(site, asked)


def _caps(profile: Profile, mem_mb: int, minutes: int) -> Iterator[Finding]:
    """Compare what the first attempt needs with what the profile cuts it to."""
    for what, name, value, unit in (
        ("run time", "max_runtime", minutes, "min"),
        ("memory", "max_mem_mb", mem_mb, "MB"),
    ):
        limit = profile.number(name)
        if limit is not None and value > limit:
            text = f"jobs need {value} {unit}, but {name} gives them {limit}: they may be stopped"
            yield warning(what, text, f"raise {name} in {profile.path}, or make the jobs smaller")


def _time(site: Site, asked: Demand) -> Iterator[Finding]:
    """Compare run times: SLURM may accept a job that is too long, and never start it."""
    limits = [partition.max_minutes for partition in site.chosen]
    if asked.minutes is None or None in limits:
        return
    limit = max(limit for limit in limits if limit is not None)
    where = f"partition {site.name} allows {limit}"
    advice = f"lower execution: runtime, or write max_runtime: {limit} into {site.profile.path}"
    last = asked.minutes * TIME_GROWTH ** (site.profile.attempts - 1)
    last = _capped(last, site.profile.number("max_runtime")) or 0
    if asked.minutes > limit:
        yield error("run time", f"jobs ask for {asked.minutes} min; {where}", advice)
    elif last > limit:
        value = f"the last retry asks for {last} min; {where}"
        yield warning("run time", value, f"write max_runtime: {limit} into {site.profile.path}")


def _memory(site: Site, asked: Demand) -> Iterator[Finding]:
    """Compare memory with the largest node."""
    if asked.mem_mb is None:
        return
    largest = max(node.mem_mb for node in site.usable)
    where = f"the largest node of {site.name} has {largest}"
    last = int(asked.mem_mb * MEMORY_GROWTH ** (site.profile.attempts - 1))
    last = _capped(last, site.profile.number("max_mem_mb")) or 0
    if asked.mem_mb > largest:
        advice = "lower execution: mem_mb or clients_at_once, or take more nodes"
        yield error("memory", f"jobs ask for {asked.mem_mb} MB on a node; {where}", advice)
    elif last > largest:
        value = f"the last retry asks for {last} MB on a node; {where}"
        yield warning("memory", value, f"write max_mem_mb: {largest} into {site.profile.path}")


def _cpus(site: Site, asked: Demand) -> Iterator[Finding]:
    """Compare CPUs with the largest node."""
    largest = max(node.cpus for node in site.usable)
    if asked.cpus_of_node > largest:
        value = f"jobs ask for {asked.cpus_of_node} on a node; the largest of {site.name} has"
        advice = "lower execution: clients_at_once or training: cpu_threads, or take more nodes"
        yield error("CPUs", f"{value} {largest}", advice)


def _gpus(site: Site, asked: Demand) -> Iterator[Finding]:
    """Compare GPUs with the node that has most of the type."""
    kind = site.profile.text("gpu_type") or ""
    if not asked.gpus:
        return
    kinds = sorted({name for node in site.usable for name in node.gpus if name})
    most = max(_count(node, kind) for node in site.usable)
    name = f"GPUs of type {kind}" if kind else "GPUs"
    if most == 0:
        types = f"types there: {', '.join(kinds)}" if kinds else "choose a partition with GPUs"
        yield error("GPUs", f"partition {site.name} has no {name}", types)
    elif asked.gpus > most:
        value = f"jobs ask for {asked.gpus} {name} on a node; the largest of {site.name} has {most}"
        yield error("GPUs", value, "lower execution: gpus, or take more nodes")


def _count(node: slurm_site.Node, kind: str) -> int:
    """GPUs of a type on a node; no type stands for all."""
    return node.gpus.get(kind, 0) if kind else sum(node.gpus.values())


def _fits(asked: Demand, kind: str) -> Callable[[slurm_site.Node], bool]:
    """Whether a node can hold its part of a job."""

    def of_node(node: slurm_site.Node) -> bool:
        return (
            node.cpus >= asked.cpus_of_node
            and node.mem_mb >= (asked.mem_mb or 0)
            and _count(node, kind) >= asked.gpus
        )

    return of_node


def _together(site: Site, asked: Demand) -> Finding:
    """Check that enough nodes can hold their part of a job."""
    fits = _fits(asked, site.profile.text("gpu_type") or "")
    fitting = sum(1 for node in site.usable if fits(node))
    if asked.nodes > fitting:
        value = f"jobs ask for {asked.nodes}; in {site.name} {fitting} can hold their part"
        return error("nodes", value, "lower execution: nodes")
    return ok("training jobs", f"{describe(asked)}: fit on {fitting} nodes of {site.name}")


def describe(asked: Demand) -> str:
    """What a job asks for, in words."""
    memory = "memory of the partition" if asked.mem_mb is None else f"{asked.mem_mb} MB"
    time = "time of the partition" if asked.minutes is None else f"{asked.minutes} min"
    return f"{asked.nodes} x ({asked.cpus_of_node} CPUs, {asked.gpus} GPUs, {memory}), {time}"


def options(asked: Demand, profile: Profile) -> list[str]:
    """Options of sbatch and srun for a job."""
    given = [f"--nodes={asked.nodes}", f"--ntasks-per-node={asked.tasks}"]
    given += [f"--cpus-per-task={asked.cpus}", *_place(profile), *_gpu_options(asked, profile)]
    if asked.mem_mb:
        given.append(f"--mem={asked.mem_mb}")
    if asked.minutes:
        given.append(f"--time={asked.minutes}")
    return given


def _place(profile: Profile) -> list[str]:
    """Where the profile sends jobs."""
    names = {"slurm_partition": "partition", "slurm_account": "account"}
    names |= {"qos": "qos", "constraint": "constraint"}
    found = {option: profile.text(name) for name, option in names.items()}
    found |= {
        name: str(profile.options[f"slurm-{name}"])
        for name in ("qos", "reservation")
        if profile.options.get(f"slurm-{name}")
    }
    extra = shlex.split(profile.text("slurm_extra") or "")
    return [*(f"--{option}={value}" for option, value in found.items() if value), *extra]


def _gpu_options(asked: Demand, profile: Profile) -> list[str]:
    """GPUs in the words of the site."""
    if not asked.gpus:
        return []
    way, kind = profile.text("gpu_request") or "gpus", profile.text("gpu_type") or ""
    count = ":".join(part for part in (kind, str(asked.gpus)) if part)
    if way == "gres":
        return [f"--gres=gpu:{count}"]
    # On several nodes --gpus might give three to one and one to the other.
    return [f"--gpus={count}" if way == "gpus" and asked.nodes == 1 else f"--gpus-per-node={count}"]


def dry_submission(site: Site, config: Config | None, failed: bool) -> Finding:
    """Ask SLURM whether it would take a training job: the best judge of what was not compared.

    Parameters
    ----------
    site
        The cluster.
    config
        The study.
    failed
        Whether the comparison found an error, from which a refusal follows.
    """
    given = options(demand(config, site.profile), site.profile)
    accepted, words = slurm_site.try_submission(given)
    if accepted:
        return ok("dry submission", words)
    value = f"SLURM refuses {' '.join(given)}: {words}"
    if failed:
        return warning("dry submission", value, "follows from the error above")
    return error("dry submission", value, f"correct {site.profile.path} or execution in the config")
