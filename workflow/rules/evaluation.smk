# Tests of aggregated models, and the one file per row that tables and figures read.


for clients, scenarios in testing_shards():

    rule:
        name:
            shard_name("evaluate_clients", clients)
        input:
            backbone=naming_jobs(BACKBONE),
            tokens=of_population(TOKENS),
            pool=f"{ROUND}/pool.h5",
        output:
            metrics=[f"{ROUND}/aggregated_{client}.json" for client in clients],
        log:
            shard_file("logs", "evaluate_clients", clients, "log"),
        benchmark:
            shard_file("benchmarks", "evaluate_clients", clients, "tsv")
        wildcard_constraints:
            scenario=one_of(scenarios),
        threads: CORES
        resources:
            **JOB_RESOURCES,
            mem_mb=memory,
            runtime=minutes(clients),
        params:
            settings=settings("client"),
            clients=client_numbers(clients),
            layout=layout,
            progress=progress_of_round,
        shell:
            r"""
            fedamole evaluate-clients {params.layout} \
                --settings {params.settings:q} \
                --round {wildcards.round} \
                --clients {params.clients} \
                --progress {params.progress:q} \
                --backbone {input.backbone:q} \
                --tokens {input.tokens:q} \
                --pool {input.pool:q} \
                --out-metrics {output.metrics:q} \
                2>&1 | tee {log:q}
            """


rule gather:
    """Collect the small facts of a run into one file: all that tables and figures read."""
    input:
        partition=of_population(PARTITION),
        metrics=metrics_of_row,
        assignments=assignments_of_row,
    output:
        f"{RESULTS}/metrics/{{scenario}}/{{method}}.jsonl",
    log:
        f"{RESULTS}/logs/{{scenario}}/gather_{{method}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{scenario}}/gather_{{method}}.tsv"
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        settings=method_settings,
        quorum=quorum,
        # A file for each client and round: with all paths, bash would refuse the text as too long.
        metrics=short_list("metrics"),
    shell:
        r"""
        printf '%s\n' {params.metrics} | fedamole gather {params.quorum} \
            --settings {params.settings:q} \
            --scenario {wildcards.scenario:q} \
            --method {wildcards.method:q} \
            --partition {input.partition:q} \
            --metrics-list /dev/stdin \
            --assignments {input.assignments:q} \
            --out {output:q} \
            2>&1 | tee {log:q}
        """


rule write_manifest:
    """List the metrics files with what they were made under, for a move to another machine."""
    input:
        metrics=METRICS,
        costs=COSTS,
    output:
        # Of files that did not change, the old one knows where they were made.
        update(MANIFEST),
    log:
        f"{RESULTS}/logs/write_manifest.log",
    benchmark:
        f"{RESULTS}/benchmarks/write_manifest.tsv"
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        settings=settings("manifest"),
    shell:
        r"""
        fedamole cache manifest \
            --settings {params.settings:q} \
            --metrics {input.metrics:q} \
            --out {output:q} \
            2>&1 | tee {log:q}
        """


rule gather_costs:
    """Collect what a run cost: it differs from time to time, so it is in no metrics file.

    Nobody reads uploads or pools here, which `fedamole prune` may have deleted: the jobs that had
    them have said how large they were.
    """
    input:
        metrics=rules.gather.output,
    output:
        f"{RESULTS}/metrics/{{scenario}}/{{method}}.costs.json",
    log:
        f"{RESULTS}/logs/{{scenario}}/gather_costs_{{method}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{scenario}}/gather_costs_{{method}}.tsv"
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        settings=method_settings,
        progress=folder_of_run("progress"),
        benchmarks=folder_of_run("benchmarks"),
    shell:
        r"""
        fedamole gather-costs \
            --settings {params.settings:q} \
            --scenario {wildcards.scenario:q} \
            --method {wildcards.method:q} \
            --metrics {input.metrics:q} \
            --progress {params.progress:q} \
            --benchmarks {params.benchmarks:q} \
            --out {output:q} \
            2>&1 | tee {log:q}
        """
