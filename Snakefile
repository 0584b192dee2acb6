# fedamole: federated fine-tuning as a graph of files. Try `snakemake -n --configfile configs/smoke.yaml`.
import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.10")

if not workflow.configfiles:

    configfile: str(Path(workflow.basedir) / "configs/demo.yaml")


container: "workflow/envs/fedamole.sif"


include: "workflow/rules/common.smk"


if CACHED:
    # Nothing that could train is known then.
    MANIFESTS = []

else:

    include: "workflow/rules/shards.smk"
    include: "workflow/rules/inputs.smk"
    include: "workflow/rules/cluster.smk"
    include: "workflow/rules/data.smk"
    include: "workflow/rules/rounds.smk"
    include: "workflow/rules/evaluation.smk"

    MANIFESTS = [MANIFEST]

    # A SLURM job costs more than these do: they run beside Snakemake itself.
    localrules:
        prepare_backbone,
        partition,
        tokenize,
        init_server,
        aggregate,
        assign,
        gather,
        gather_costs,
        write_manifest,


include: "workflow/rules/report.smk"
include: "workflow/rules/tables.smk"


report: "workflow/report/workflow.rst"


localrules:
    all,
    paper,
    describe_study,
    tables,
    draw_tables,
    draw_figures,


rule all:
    """Everything the config asks for: tables, figures, settings, and what they were made from."""
    default_target: True
    input:
        TABLES,
        FIGURES,
        STUDY,
        MANIFESTS,


rule paper:
    """The same, by the name that the configs of the paper go by."""
    input:
        rules.all.input,


rule tables:
    """Tables, figures and settings, without the manifest: all that cached mode can make."""
    input:
        TABLES,
        FIGURES,
        STUDY,
