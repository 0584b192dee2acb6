# Files and params of the jobs of rounds and rows. No rules.


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
