# What people read. These rules see only settings and the metrics files, so they cannot train.


rule describe_study:
    """Write down all settings as they hold, defaults included: a page and a config file."""
    output:
        page=report_settings(STUDY[0]),
        config=STUDY[1],
    log:
        f"{OUTPUT}/logs/describe_study.log",
    benchmark:
        f"{OUTPUT}/benchmarks/describe_study.tsv"
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        settings=settings("study"),
    shell:
        r"""
        fedamole describe-study \
            --settings {params.settings:q} \
            --out-config {output.config:q} \
            --out-page {output.page:q} \
            2>&1 | tee {log:q}
        """


rule draw_tables:
    """Write the tables: methods x scenarios, and client by client."""
    input:
        metrics=METRICS,
        costs=COSTS,
    output:
        [report_table(path) for path in TABLES],
    log:
        f"{OUTPUT}/logs/draw_tables.log",
    benchmark:
        f"{OUTPUT}/benchmarks/draw_tables.tsv"
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        settings=stages.canonical_json(RESULTS_STAGE),
        folder=lambda wildcards, output: Path(output[0]).parent,
    shell:
        r"""
        fedamole tables \
            --settings {params.settings:q} \
            --metrics {input.metrics:q} \
            --costs {input.costs:q} \
            --out-dir {params.folder:q} \
            2>&1 | tee {log:q}
        """


rule draw_figures:
    """Draw the figures, each as svg and png and with the numbers it shows."""
    input:
        metrics=METRICS,
        costs=COSTS,
    output:
        [report_figure(path) for path in FIGURES],
    log:
        f"{OUTPUT}/logs/draw_figures.log",
    benchmark:
        f"{OUTPUT}/benchmarks/draw_figures.tsv"
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        settings=stages.canonical_json(RESULTS_STAGE),
        folder=lambda wildcards, output: Path(output[0]).parent,
    shell:
        r"""
        fedamole figures \
            --settings {params.settings:q} \
            --metrics {input.metrics:q} \
            --costs {input.costs:q} \
            --out-dir {params.folder:q} \
            2>&1 | tee {log:q}
        """
