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
