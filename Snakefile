# fedamole: federated fine-tuning as a graph of files. Try `snakemake -n --configfile configs/smoke.yaml`.
import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.10")

if not workflow.configfiles:

    configfile: str(Path(workflow.basedir) / "configs/demo.yaml")


container: "workflow/envs/fedamole.sif"


include: "workflow/rules/common.smk"
include: "workflow/rules/cluster.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/rounds.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/tables.smk"


report: "workflow/report/workflow.rst"


# A SLURM job costs more than these do: they run beside Snakemake itself.
localrules:
    all,
    prepare_backbone,
    partition,
    tokenize,
    init_server,
    aggregate,
    assign,
    gather,
    describe_study,
    tables,
    figures,


rule all:
    """Everything the config asks for: tables, figures, and the settings they come from."""
    default_target: True
    input:
        TABLES,
        FIGURES,
        STUDY,
