# The federated rounds: round_000 is before training; round t trains from round t - 1.


rule init_server:
    """Make the first pool, and a first assignment from random scores."""
    input:
        backbone=BACKBONE,
    output:
        pool=f"{RUN}/round_000/pool.h5",
        assignment=f"{RUN}/round_000/assignment.h5",
    log:
        f"{RESULTS}/logs/{{scenario}}/{{run}}/round_000/init_server.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{scenario}}/{{run}}/round_000/init_server.tsv"
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        settings=settings("run"),
    shell:
        r"""
        fedamole init-server \
            --settings {params.settings:q} \
            --backbone {input.backbone:q} \
            --out-pool {output.pool:q} \
            --out-assignment {output.assignment:q} \
            2>&1 | tee {log:q}
        """


for shard in training_shards():

    rule:
        name:
            shard_name("train_clients", shard.clients, shard.keeps, shard.rounds)
        input:
            backbone=naming_jobs(BACKBONE),
            tokens=of_population(TOKENS),
            pool=before("pool.h5"),
            assignment=before("assignment.h5"),
            kept=kept_before(shard.keeps),
        output:
            uploads=[f"{ROUND}/client_{client}.h5" for client in shard.clients],
            metrics=[f"{ROUND}/metrics_{client}.json" for client in shard.clients],
            kept=[
                f"{ROUND}/kept_{client}.h5" for client in shard.clients if shard.keeps
            ],
        log:
            shard_file("logs", "train_clients", shard.clients, "log"),
        benchmark:
            shard_file("benchmarks", "train_clients", shard.clients, "tsv")
        wildcard_constraints:
            scenario=one_of(shard.scenarios),
            run=one_of(shard.runs),
            round=shard.rounds,
        # The rounds are the longest chain; tests of averaged models fill the gaps.
        priority: 10
        threads: CORES
        resources:
            **JOB_RESOURCES,
            mem_mb=memory,
            runtime=minutes(shard.clients, trains=True),
        params:
            settings=settings("client"),
            clients=client_numbers(shard.clients),
            layout=layout,
            progress=progress_of_round,
            quorum=quorum,
        shell:
            r"""
            fedamole train-clients {params.layout} {params.quorum} \
                --settings {params.settings:q} \
                --round {wildcards.round} \
                --clients {params.clients} \
                --progress {params.progress:q} \
                --backbone {input.backbone:q} \
                --tokens {input.tokens:q} \
                --pool {input.pool:q} \
                --assignment {input.assignment:q} \
                --kept {input.kept:q} \
                --out-uploads {output.uploads:q} \
                --out-metrics {output.metrics:q} \
                --out-kept {output.kept:q} \
                2>&1 | tee {log:q}
            """


rule aggregate:
    """Average what the clients uploaded."""
    input:
        pool=before("pool.h5"),
        assignment=before("assignment.h5"),
        uploads=every_client("client_{client}.h5"),
    output:
        f"{ROUND}/pool.h5",
    log:
        f"{RESULTS}/logs/{{scenario}}/{{run}}/round_{{round}}/aggregate.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{scenario}}/{{run}}/round_{{round}}/aggregate.tsv"
    wildcard_constraints:
        round=TRAINED,
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        settings=settings("run"),
        quorum=quorum,
    shell:
        r"""
        fedamole aggregate {params.quorum} \
            --settings {params.settings:q} \
            --pool {input.pool:q} \
            --assignment {input.assignment:q} \
            --uploads {input.uploads:q} \
            --out-pool {output:q} \
            2>&1 | tee {log:q}
        """


rule assign:
    """Choose who holds which experts in the next round."""
    input:
        pool=rules.aggregate.output,
    output:
        f"{ROUND}/assignment.h5",
    log:
        f"{RESULTS}/logs/{{scenario}}/{{run}}/round_{{round}}/assign.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{scenario}}/{{run}}/round_{{round}}/assign.tsv"
    wildcard_constraints:
        round=TRAINED,
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        settings=settings("run"),
    shell:
        r"""
        fedamole assign \
            --settings {params.settings:q} \
            --pool {input.pool:q} \
            --out-assignment {output:q} \
            2>&1 | tee {log:q}
        """
