# From sources to what every job reads: the backbone, the split, the tokens.


rule prepare_backbone:
    """Download, link, convert or generate the backbone, once."""
    output:
        directory(BACKBONE),
    log:
        f"{RESULTS}/logs/prepare_backbone.log",
    benchmark:
        f"{RESULTS}/benchmarks/prepare_backbone.tsv"
    resources:
        mem_mb=MEM_MB,
        runtime=240,
    params:
        settings=settings("backbone"),
    shell:
        r"""
        fedamole prepare-backbone \
            --settings {params.settings:q} \
            --out {output:q} \
            2>&1 | tee {log:q}
        """


rule partition:
    """Spread a data set over the clients and split each client's examples."""
    output:
        PARTITION,
    log:
        f"{RESULTS}/logs/{{population}}/partition.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{population}}/partition.tsv"
    resources:
        mem_mb=MEM_MB,
        runtime=30,
    params:
        settings=settings("scenario"),
    shell:
        r"""
        fedamole partition \
            --settings {params.settings:q} \
            --out {output:q} \
            2>&1 | tee {log:q}
        """


rule tokenize:
    """Turn every example that a client uses into tokens, once per scenario."""
    input:
        partition=rules.partition.output,
        backbone=BACKBONE,
    output:
        directory(TOKENS),
    log:
        f"{RESULTS}/logs/{{population}}/tokenize.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{population}}/tokenize.tsv"
    resources:
        mem_mb=MEM_MB,
        runtime=30,
    params:
        settings=settings("tokens"),
    shell:
        r"""
        fedamole tokenize \
            --settings {params.settings:q} \
            --partition {input.partition:q} \
            --backbone {input.backbone:q} \
            --out {output:q} \
            2>&1 | tee {log:q}
        """
