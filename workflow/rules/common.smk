# Names, constraints and input functions. No rules; nothing here imports torch.
import functools
import itertools
import re
from typing import NamedTuple

from fedamole import path_lists, stages
from fedamole.cache import check_cache
from fedamole.config import load_config
from fedamole.config_files import check_config_files
from fedamole.errors import FedamoleError
from fedamole.planning import workload
from fedamole.registry import METHODS, RUNS
from fedamole.results import asks_for_costs, figure_names, table_names
from fedamole.sharing import check_shared
from snakemake.exceptions import WorkflowError

LIBRARY = Path(workflow.basedir) / "configs"


def load():
    """Validate the config; a mistake ends the parse with its own line."""
    try:
        check_config_files(workflow.configfiles)
        return load_config(
            config,
            LIBRARY,
            " ".join(map(str, workflow.configfiles)) or "config",
            [Path(file).parent for file in reversed(workflow.configfiles)],
        )
    except FedamoleError as error:
        raise WorkflowError(str(error)) from None


CONFIG = load()
RESULTS = CONFIG.results
# Tables and figures: in the results folder, or in that of the study, if it has a name.
OUTPUT = CONFIG.output
SCENARIOS = CONFIG.scenario_seeds()
# Points of a sweep share the split and the tokens of their population.
POPULATIONS = CONFIG.data_seeds()
CACHED = CONFIG.mode == "cached"
CACHE = CONFIG.cache or f"{RESULTS}/metrics"
BACKBONE = f"{RESULTS}/backbones/{CONFIG.backbone.name}"
RUN = f"{RESULTS}/runs/{{scenario}}/{{run}}"
ROUND = f"{RUN}/round_{{round}}"
TRAINED = "(?!000)[0-9]+"
PROGRESS = f"{RESULTS}/progress/{{scenario}}/{{run}}/round_{{round}}"
STUDY = [f"{OUTPUT}/study/{name}" for name in ("config.html", "config.yaml")]
# Every round adds a few levels to the graph, which Snakemake walks by recursion.
sys.setrecursionlimit(max(sys.getrecursionlimit(), 1000 + 50 * CONFIG.rounds))


def one_of(names):
    """Regular expression that matches just these names; dots in them are no wildcards."""
    return "|".join(re.escape(name) for name in names)


wildcard_constraints:
    scenario=one_of(SCENARIOS),
    population=one_of(POPULATIONS),
    run=one_of(CONFIG.runs()),
    method=one_of(CONFIG.methods),
    round="[0-9]+",
    client="[0-9]+",


@functools.cache
def settings_json(stage, *names):
    """Canonical JSON of a stage's settings."""
    return stages.canonical_json(getattr(stages, f"{stage}_stage")(CONFIG, *names))


def settings(stage):
    """Params function: what a stage depends on, and nothing else, decides whether it reruns."""

    def of_job(wildcards):
        names = [
            wildcards[key]
            for key in ("scenario", "population", "run")
            if key in wildcards.keys()
        ]
        return settings_json(stage, *names)

    return of_job


def method_settings(wildcards):
    """Params of a row of the tables: those of the run that it reads."""
    return settings_json("client", wildcards.scenario, METHODS[wildcards.method].run)


def of_population(path):
    """Input function: a file of the population behind a scenario."""

    def of_job(wildcards):
        return path.format(population=CONFIG.data_slug(wildcards.scenario))

    return of_job


PARTITION = f"{RESULTS}/scenarios/{{population}}/partition.json"
TOKENS = f"{RESULTS}/scenarios/{{population}}/tokens-{CONFIG.backbone.name}"


def names(clients):
    """Names of clients as they stand in paths."""
    return [f"{client:03d}" for client in clients]


def clients_of(scenario):
    """Names of the clients of a scenario."""
    return names(range(SCENARIOS[scenario][0].clients))


@functools.cache
def population(scenario, run):
    """Who takes part in which round of a run."""
    return stages.run_stage(CONFIG, scenario, run).population


def cut(clients):
    """Cut clients into jobs, as `fedamole plan` counts them."""
    return [tuple(part) for part in workload.shards(CONFIG, clients)]


class Shard(NamedTuple):
    """Jobs that differ in wildcards only: one rule trains them."""

    clients: tuple[str, ...]
    rounds: str  # Regular expression.
    keeps: bool
    scenarios: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()


def boxes(pairs):
    """Cut (scenario, run) pairs into products of scenarios and runs, which wildcards can say."""
    scenarios_of = {}
    for scenario, run in pairs:
        scenarios_of.setdefault(run, []).append(scenario)
    runs_of = {}
    for run, scenarios in scenarios_of.items():
        runs_of.setdefault(tuple(scenarios), []).append(run)
    return [(scenarios, tuple(runs)) for scenarios, runs in runs_of.items()]


def training_shards():
    """Cut the training of all runs into jobs.

    With one client a job a wildcard stands for all of them. The files are the same in every case.
    Only where clients are drawn anew for every round, a job of several clients knows its round.
    """
    found = {}
    for scenario, run in itertools.product(SCENARIOS, CONFIG.runs()):
        for clients, rounds in jobs_of_run(scenario, run) if RUNS[run].trains else []:
            shard = Shard(clients, rounds, RUNS[run].keeps)
            found.setdefault(shard, []).append((scenario, run))
    return [
        shard._replace(scenarios=scenarios, runs=runs)
        for shard, pairs in found.items()
        for scenarios, runs in boxes(pairs)
    ]


def jobs_of_run(scenario, run):
    """Clients that one job trains, and the rounds in which there is such a job."""
    who = population(scenario, run)
    if CONFIG.execution.clients_per_job == 1:
        return [(("{client}",), TRAINED)]
    if who.everyone or who.pooled:
        return [(clients, TRAINED) for clients in cut(names(who.drawn(1)))]
    return [
        (clients, f"{round_:03d}")
        for round_ in range(1, CONFIG.rounds + 1)
        for clients in cut(names(who.reporting(round_)))
    ]


def testing_shards():
    """Cut the tests of averaged models into jobs: pairs of clients and scenarios."""
    if CONFIG.execution.clients_per_job == 1:
        return [(("{client}",), list(SCENARIOS))]
    found = {}
    for scenario in SCENARIOS:
        for clients in cut(clients_of(scenario)):
            found.setdefault(clients, []).append(scenario)
    return list(found.items())


def client_numbers(clients):
    """Params function: the numbers of a shard's clients.

    It takes the outputs, so that Snakemake counts it as derived from them: cutting the work into other
    jobs changes no number, and must rerun nothing.
    """

    def of_job(wildcards, output):
        return [int(client.format(**wildcards)) for client in clients]

    return of_job


SHARD_NAMES = {}


def shard_name(rule_name, clients, keeps=False, rounds=TRAINED):
    """Name of the rule for a shard, as it stands in logs and reports."""
    name = rule_name
    if clients != ("{client}",):
        name += f"_{clients[0]}_{clients[-1]}"
    if rounds != TRAINED:
        name += f"_round_{rounds}"
    if keeps:
        name += "_keeping"
    SHARD_NAMES[name] = number = SHARD_NAMES.get(name, 0) + 1
    return name if number == 1 else f"{name}_{number}"


def shard_file(folder, rule_name, clients, suffix):
    """File of one job of a shard's rule under a folder such as logs."""
    last = "" if len(clients) == 1 else f"_{clients[-1]}"
    stem = f"{rule_name}_{clients[0]}{last}"
    return f"{RESULTS}/{folder}/{{scenario}}/{{run}}/round_{{round}}/{stem}.{suffix}"


def in_round(wildcards, round_, name):
    """A file of the same run in another round."""
    return f"{ROUND}/{name}".format(
        scenario=wildcards.scenario, run=wildcards.run, round=f"{round_:03d}"
    )


def before(name):
    """Input function: a file of the round before."""

    def of_job(wildcards):
        return in_round(wildcards, int(wildcards.round) - 1, name)

    return of_job


def every_client(name):
    """Input function: a file of each client that takes part in this round."""

    def of_job(wildcards):
        who = population(wildcards.scenario, wildcards.run)
        return expand(
            f"{ROUND}/{name}",
            scenario=wildcards.scenario,
            run=wildcards.run,
            round=wildcards.round,
            client=names(who.reporting(int(wildcards.round))),
        )

    return of_job


def kept_before(keeps):
    """Input function: what the clients of this round kept when they last took part.

    Those of all of them, whoever this job trains: another cut into jobs must not change its inputs,
    or Snakemake would run it again.
    """

    def of_job(wildcards):
        who = population(wildcards.scenario, wildcards.run)
        round_ = int(wildcards.round)
        last = {
            client: who.last_before(client, round_)
            for client in (who.reporting(round_) if keeps else [])
        }
        return [
            in_round(wildcards, at, f"kept_{client:03d}.h5")
            for client, at in last.items()
            if at is not None
        ]

    return of_job


def rounds_of(row):
    """Numbers of the rounds that a row of the tables reports."""
    return range(1, CONFIG.rounds + 1) if row.trains else [0]


def metrics_of_row(wildcards):
    """Input function: the clients' metrics behind a row of the tables."""
    row = METHODS[wildcards.method]
    averaged = row.evaluated == "aggregated"
    name = "aggregated" if averaged else "metrics"
    who = population(wildcards.scenario, row.run)
    everyone = range(who.clients)
    return [
        path
        for round_ in rounds_of(row)
        for path in expand(
            f"{ROUND}/{name}_{{client}}.json",
            scenario=wildcards.scenario,
            run=row.run,
            round=f"{round_:03d}",
            client=names(everyone if averaged else who.reporting(round_)),
        )
    ]


def assignments_of_row(wildcards):
    """Input function: the assignments that the rounds of a row trained under."""
    row = METHODS[wildcards.method]
    return expand(
        f"{ROUND}/assignment.h5",
        scenario=wildcards.scenario,
        run=row.run,
        round=[f"{round_ - 1:03d}" for round_ in rounds_of(row) if row.assigns],
    )


def short_list(name):
    """Params function: many inputs as words with braces, which bash expands.

    It takes the inputs, so that Snakemake counts it as derived from them.
    """

    def of_job(wildcards, input):
        return path_lists.braced(input[name])

    return of_job


def progress_of_round(wildcards, output):
    """Params function: folder for what each client is doing.

    It takes the outputs for the same reason as client_numbers.
    """
    return PROGRESS.format(**wildcards)


def folder_of_run(name):
    """Params function: folder of a run under one such as progress, with a folder for each round.

    It takes the outputs for the same reason as client_numbers.
    """

    def of_job(wildcards, output):
        run = METHODS[wildcards.method].run
        return f"{RESULTS}/{name}/{wildcards.scenario}/{run}"

    return of_job


def quorum(wildcards, output):
    """Params function: the share of clients that must report.

    It takes the outputs for the same reason as client_numbers: it decides whether a study goes on, and
    may be lowered late.
    """
    run = (
        METHODS[wildcards.method].run if "method" in wildcards.keys() else wildcards.run
    )
    here = CONFIG.at(wildcards.scenario)
    return f"--quorum {stages.quorum_of(here, run)}"


@functools.cache
def ranks_of(scenario, run):
    """Processes that work on one client of a run together."""
    return stages.run_stage(CONFIG, scenario, run).training.ranks


def layout(wildcards, output):
    """Params function: how the clients of a job lie on its processes and nodes; see the last one.

    A run that is not trained takes fewer ranks for a client, and so more clients at once.
    """
    processes = CONFIG.execution.processes(CONFIG.training.ranks)
    ranks = ranks_of(wildcards.scenario, wildcards.run)
    return f"--at-once {processes // ranks} --nodes {CONFIG.execution.nodes}"


# As the report shows them; capitals come first, so that its switch starts with the page.
FORMATS = {".html": "HTML", ".csv": "csv"}
CAPTIONS = Path(workflow.basedir) / "workflow/report"


def caption(*names):
    """Caption under the first of the names that there is one for, seen from the rules."""
    return next(
        f"../report/{name}.rst"
        for name in names
        if (CAPTIONS / f"{name}.rst").is_file()
    )


def report_table(path):
    """Put the tables into the report of `snakemake --report`: to read, and as numbers to download."""
    name = Path(path)
    if name.suffix not in FORMATS:
        return path
    return report(
        path,
        caption=caption(f"{name.stem}_table", "table"),
        category="Tables",
        labels={"table": name.stem, "format": FORMATS[name.suffix]},
    )


def report_figure(path):
    """Put the vector figures into the report of `snakemake --report`, one folder per kind."""
    name = Path(path)
    if name.suffix != ".svg":
        return path
    labels = figure_labels(name.stem)
    return report(
        path,
        caption=caption(labels["figure"], "figure"),
        category="Figures",
        subcategory=labels["figure"],
        labels=labels,
    )


def figure_labels(stem):
    """What the name of a figure says: its kind, and the scenario, seed and method that it is of."""
    known = {}
    for slug, (scenario, seed) in SCENARIOS.items():
        known[scenario.slug] = {"scenario": scenario.slug}
        known[slug] = {"scenario": scenario.slug, "seed": str(seed)}
    # The longest: the name of a scenario is how those of its seeds begin.
    slugs = [slug for slug in known if stem.startswith(f"{slug}-")]
    prefix = max(slugs, key=len, default="")
    rest = stem.removeprefix(f"{prefix}-" if prefix else "")
    method, _, kind = rest.rpartition("-")
    labels = {"figure": kind, **known.get(prefix, {}), "method": method}
    return {name: value for name, value in labels.items() if value}


def report_settings(path):
    """Put the page of the settings into the report of `snakemake --report`."""
    labels = {"settings": "of the study"}
    return report(path, caption=caption("settings"), category="Settings", labels=labels)


def metrics_of_study():
    """Metrics and costs that are shown, and their settings; in cached mode checked."""
    if CACHED:
        cache = check_cache(Path(CACHE), CONFIG, CONFIG.stale == "accept")
        return cache.metrics, cache.costs, cache.settings
    results = stages.results_stage(CONFIG)
    if CONFIG.study:
        check_shared(Path(RESULTS) / "metrics", results)
    # What runs cost differs from time to time: gathered only where it is shown.
    kinds = ["jsonl"] + asks_for_costs(results) * ["costs.json"]
    files = [
        expand(
            f"{RESULTS}/metrics/{{scenario}}/{{method}}.{kind}",
            scenario=SCENARIOS,
            method=CONFIG.methods,
        )
        for kind in kinds
    ]
    return files[0], sum(files[1:], []), results


def shown():
    """Name the tables and figures too; what cannot be shown ends the parse."""
    try:
        metrics, costs, results = metrics_of_study()
        tables = [f"{OUTPUT}/tables/{name}" for name in table_names(results)]
        figures = [f"{OUTPUT}/figures/{name}" for name in figure_names(results)]
    except FedamoleError as error:
        raise WorkflowError(str(error)) from None
    return metrics, costs, results, tables, figures


METRICS, COSTS, RESULTS_STAGE, TABLES, FIGURES = shown()
MANIFEST = f"{RESULTS}/metrics/manifest.json"
