# What a job asks of a cluster, and whose jobs are at work. No rules.
#
# What the study needs comes from its config. How this cluster grants it stands in the profile, under
# default-resources, beside what Snakemake's plugin reads there: gpu_request, gpu_type, max_runtime,
# max_mem_mb. See slurm/README.md.
from fedamole import owner, slurm
from fedamole.planning.memory import job_memory_mb
from fedamole.planning.model_size import model_size
from fedamole.planning.times import job_minutes
from fedamole.snakemake_profile import unquoted

GPU_REQUESTS = ("gpus", "gres", "gpus-per-node")


def site_settings():
    """What the profile says of this cluster, as text by name."""
    given = workflow.resource_settings.default_resources
    pairs = [arg.split("=", 1) for arg in given.args] if given else []
    return {name: unquoted(value) for name, value in pairs}


SITE = site_settings()
for name, value in SITE.items():
    if "CHANGE_ME" in value:
        raise WorkflowError(
            f"profile: default-resources: {name} is CHANGE_ME; set it to that of your cluster "
            "(slurm/README.md), then let `fedamole doctor` check it"
        )
if SITE.get("gpu_request", "gpus") not in GPU_REQUESTS:
    raise WorkflowError(
        f"profile: default-resources: gpu_request {SITE['gpu_request']!r} is unknown; "
        f"allowed: {', '.join(GPU_REQUESTS)}"
    )


def site_limit(name):
    """A limit of this cluster, or none."""
    value = SITE.get(name)
    if value is None:
        return float("inf")
    if not value.isdigit():
        raise WorkflowError(
            f"profile: default-resources: {name} {value!r} must be a whole number"
        )
    return int(value)


MAX_MINUTES, MAX_MEM_MB = site_limit("max_runtime"), site_limit("max_mem_mb")
SIZE = model_size(CONFIG.backbone, Path(BACKBONE))
MEM_MB = CONFIG.execution.mem_mb or job_memory_mb(CONFIG, SIZE)


def memory(wildcards, attempt):
    """Resources function: memory in MB; half as much again with every attempt."""
    return min(round(MEM_MB * 1.5 ** (attempt - 1)), MAX_MEM_MB)


def minutes(clients, trains=False):
    """Resources function for a shard: run time; twice as much with every attempt."""

    @functools.cache
    def at_first(scenario, pooled):
        settings = SCENARIOS[scenario][0]
        number = settings.clients if pooled else len(clients)
        return CONFIG.execution.runtime or job_minutes(
            CONFIG.at(scenario), SIZE, settings, number, pooled
        )

    def of_job(wildcards, attempt):
        pooled = trains and RUNS[wildcards.run].pooled
        first = at_first(wildcards.scenario, pooled)
        return min(first * 2 ** (attempt - 1), MAX_MINUTES)

    return of_job


def gpu_resources(gpus, nodes):
    """GPUs in the words of this cluster: --gpus, --gres or --gpus-per-node."""
    # Other names than those of the plugin do nothing. `gpu` is also what --resources gpu=1 counts
    # on a machine without SLURM.
    how, kind = SITE.get("gpu_request", "gpus"), SITE.get("gpu_type", "")
    if not gpus:
        return {}
    if how == "gres":
        return {"gres": ":".join(filter(None, ["gpu", kind, str(gpus // nodes)]))}
    if how == "gpus-per-node" or nodes > 1:
        # --gpus may give three to one node and one to the other.
        kinds = ":".join(filter(None, [kind, str(gpus // nodes)]))
        return {"slurm_extra": f"{SITE.get('slurm_extra', '')} --gpus-per-node={kinds}"}
    return {"gpu": gpus} | ({"gpu_model": kind} if kind else {})


def job_resources():
    """Nodes, tasks and GPUs of a job that trains or tests."""
    execution, training = CONFIG.execution, CONFIG.training
    gpus = gpu_resources(execution.gpus, execution.nodes)
    if execution.nodes == 1:
        # Without a number of nodes SLURM may take one GPU from each of several.
        return {"nodes": 1, **gpus} if gpus else {}
    here = execution.processes(training.ranks) // execution.nodes
    # The plugin wants tasks for one task on every node, tasks_per_node for more.
    tasks = {"tasks_per_node": here} if here > 1 else {"tasks": execution.nodes}
    return {
        "nodes": execution.nodes,
        "mpi": "srun",
        # Tasks of a job with GPUs would become tasks per GPU.
        "tasks_per_gpu": 0,
        "cpus_per_task": training.cpu_threads,
        **tasks,
        **gpus,
    }


JOB_RESOURCES = job_resources()
# On one node the job is one task, which starts its processes itself.
CORES = (
    CONFIG.execution.processes(CONFIG.training.ranks)
    * CONFIG.training.cpu_threads
    // CONFIG.execution.nodes
)


def naming_jobs(path):
    """Input function: a plain path. On the way the jobs of this study get a name.

    By it the next head, `fedamole status` and people find them. The executor takes the name when it
    starts, and is known only while the graph is built, which is when input functions run.
    """

    def of_job(wildcards):
        executor = workflow.executor_settings
        if workflow.is_main_process and hasattr(executor, "jobname_prefix"):
            executor.jobname_prefix = slurm.study_tag(Path(RESULTS))
        return path

    return of_job


def refuse_second_head():
    """Stop if jobs of a head that was killed are still at work: they write the same files."""
    if not slurm.is_here():
        return
    try:
        jobs = slurm.jobs_of_study(Path(RESULTS))
    except FedamoleError as error:
        if workflow.executor_plugin.name != "slurm":
            return
        raise WorkflowError(
            f"cannot ask SLURM for jobs of an earlier run: {error}"
        ) from None
    if jobs:
        numbers = " ".join(str(job.id) for job in jobs)
        raise WorkflowError(
            f"{len(jobs)} jobs of an earlier run of {RESULTS} are still there: {numbers}. Wait for "
            f"them, or: scancel {numbers} (clients that are done are kept). `fedamole submit` "
            "waits by itself."
        )


onstart:
    refuse_second_head()
    owner.claim(Path(RESULTS))


onsuccess:
    owner.release(Path(RESULTS))


onerror:
    owner.release(Path(RESULTS))
