# How the work of the clients is cut into jobs. No rules.


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
