"""Every setting of a run: its meaning, unit, default and limits, in one place (torch-free).

A config file is made of these sections (:mod:`fedamole.config`); a command gets those that its
stage depends on (:mod:`fedamole.stages`).
"""

import re
import string
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# Of DeepSpeed's keys those that make sense here; it ignores misspelt ones without a word.
DEEPSPEED_KEYS = (
    "activation_checkpointing",
    "aio",
    "communication_data_type",
    "flops_profiler",
    "gradient_predivide_factor",
    "prescale_gradients",
    "wall_clock_breakdown",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
ZERO_KEYS = (
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
    "zero_hpz_partition_size",
    "zero_quantized_gradients",
    "zero_quantized_weights",
)
Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """Base of all sections: closed, frozen, documented by the strings under the fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class GeneratedBackbone(Section):
    """A tiny Llama with random weights and a tokenizer trained on the data; for tests."""

    vocab_size: int = Field(default=512, ge=300, le=65536)
    """Size of the byte-level BPE vocabulary."""
    hidden_size: int = Field(default=32, ge=8)
    """Width of the residual stream."""
    num_layers: int = Field(default=2, ge=1)
    """Number of decoder layers."""
    num_heads: int = Field(default=4, ge=1)
    """Number of attention heads; divides hidden_size."""
    intermediate_size: int = Field(default=64, ge=8)
    """Width of the feed-forward layers."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "GeneratedBackbone":
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 * num_heads "
                f"({2 * self.num_heads}): rotary embeddings need an even head width"
            )
        return self


class BackboneSource(Section):
    """Where the language model comes from: exactly one of hub, folder, gguf, generate."""

    name: Slug
    """Name of the backbone; names its folder under results/backbones."""
    hub: str | None = None
    """Model id on the Hugging Face hub, for example ``meta-llama/Llama-3.2-1B``."""
    revision: str | None = None
    """Commit, tag or branch of the hub model; only with hub."""
    folder: str | None = None
    """Local folder in the layout of ``save_pretrained``."""
    gguf: str | None = None
    """GGUF file; converted once to safetensors."""
    package: str | None = None
    """Installed Python package that the gguf path is relative to."""
    generate: GeneratedBackbone | None = None
    """A tiny random model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, unless you read that code."""

    @model_validator(mode="after")
    def _one_source(self) -> "BackboneSource":
        given = [key for key in ("hub", "folder", "gguf", "generate") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of hub, folder, gguf, generate; given: {given or 'none'}"
            )
        if self.revision and not self.hub:
            raise ValueError("revision goes with hub only")
        if self.package and not self.gguf:
            raise ValueError("package goes with gguf only")
        return self


class BackboneLoading(Section):
    """How a job loads the prepared model."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the frozen weights. Adapters are float32 whatever this says."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _attention_knows_the_dtype(self) -> "BackboneLoading":
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise ValueError("attention flash_attention_2 needs dtype bfloat16")
        return self


class BackboneSize(Section):
    """Sizes of the model, by the names of its ``config.json``; for estimates only."""

    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    num_hidden_layers: int = Field(ge=1)
    """Number of decoder layers."""
    intermediate_size: int = Field(ge=1)
    """Width of the feed-forward layers."""
    num_attention_heads: int = Field(ge=1)
    """Number of attention heads."""
    num_key_value_heads: int | None = Field(default=None, ge=1)
    """Number of heads of keys and values; default: num_attention_heads."""
    head_dim: int | None = Field(default=None, ge=1)
    """Width of a head; default: hidden_size / num_attention_heads."""
    vocab_size: int = Field(ge=1)
    """Size of the vocabulary."""
    tie_word_embeddings: bool = True
    """Whether the output layer shares the weights of the input embedding."""


class BackboneSettings(BackboneLoading, BackboneSource):
    """The frozen language model: where it comes from, and how it is loaded."""

    size: BackboneSize | None = None
    """How large it is. Memory and time of the jobs, and ``fedamole plan``, follow from it until the
    model is prepared. It changes no number; not needed for folder and generate."""


class SourceSettings(Section):
    """Where the rows of a data set come from: exactly one of hub and files."""

    hub: str | None = None
    """Data set id on the Hugging Face hub."""
    subset: str | None = None
    """Configuration name of the hub data set, for example ``sst2`` of ``glue``."""
    revision: str | None = None
    """Commit, tag or branch of the hub data set."""
    splits: list[str] = Field(default=["train"], min_length=1)
    """Splits that are pooled before partitioning; of a hub data set or of Natural Instructions."""
    files: list[str] = Field(default=[])
    """Files or glob patterns, read in sorted order: .jsonl, .json, .csv, .parquet, also .gz; seen
    from the working directory. For ``natural-instructions`` the folder with tasks/ and splits/."""
    package: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Installed Python package that the files are relative to; it is not imported."""
    layout: Literal["records", "conversations", "natural-instructions"] = "records"
    """How rows lie in the files. ``records``: one object per row. ``conversations``: YAML with
    lists of turns, every question with the answer that follows it. ``natural-instructions``: its
    v2.8 folder."""

    @model_validator(mode="after")
    def _one_source(self) -> "SourceSettings":
        if bool(self.hub) == bool(self.files):
            raise ValueError("needs exactly one of hub and files")
        if self.package and not self.files:
            raise ValueError("package goes with files only")
        if self.hub and self.layout != "records":
            raise ValueError(f"layout {self.layout} goes with files only")
        for key in ("subset", "revision"):
            if getattr(self, key) and not self.hub:
                raise ValueError(f"{key} goes with hub only")
        if self.files and self.layout != "natural-instructions" and self.splits != ["train"]:
            raise ValueError("splits goes with hub and layout natural-instructions only")
        return self


class DatasetSettings(Section):
    """What a data set is: source, prompt, answers, classes and metric."""

    name: Slug
    """Name of the data set."""
    source: SourceSettings
    """Where its rows come from."""
    task: Literal["generation", "classification"]
    """How a model is tested: ROUGE-L of the generated answer, or accuracy over the answers."""
    template: str
    """``alpaca``, or a text with the fields of a row in braces; a brace itself is doubled."""
    fields: dict[str, str] = Field(default={})
    """Column names of the file by the name that the template uses, where they differ."""
    response: str | None = None
    """Column with the answer text (generation)."""
    label: str | None = None
    """Column with the class label (classification)."""
    answers: dict[str, str] = Field(default={})
    """Answer text by label value, in class order (classification). Truth values are ``"true"`` and
    ``"false"``."""
    no_label: list[str] = Field(default=["-1", ""])
    """Label or category values that mean "none"; such rows are dropped and counted."""
    category: str | None = None
    """Column with the class that the partition uses; default: the label."""
    drop_duplicates: bool = False
    """Drop rows whose prompt and answer both occurred before."""
    eval_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of a client's examples for evaluation."""
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of a client's examples for testing."""

    @model_validator(mode="after")
    def _task_has_what_it_needs(self) -> "DatasetSettings":
        if self.task == "generation" and not self.response:
            raise ValueError("a generation data set needs response: the column with the answer")
        if self.task == "generation" and (self.label or self.answers):
            raise ValueError("label and answers go with classification only")
        if self.task == "classification" and not (self.label and len(self.answers) >= 2):
            raise ValueError("a classification data set needs label and at least two answers")
        if self.task == "classification" and self.response:
            raise ValueError("response goes with generation only; the answers are the responses")
        if not (self.category or self.label):
            raise ValueError("needs category: the column with the class that the partition uses")
        if self.eval_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"eval_fraction {self.eval_fraction} + test_fraction {self.test_fraction} must be "
                "less than 1: nothing would be left to train on"
            )
        return self

    @model_validator(mode="after")
    def _answers_differ(self) -> "DatasetSettings":
        texts = list(self.answers.values())
        if "" in texts or len(set(texts)) < len(texts):
            raise ValueError(f"answers {texts} must be different texts, none of them empty")
        if both := sorted(set(self.no_label) & set(self.answers)):
            raise ValueError(f"label values {both} stand in both answers and no_label")
        return self

    @model_validator(mode="after")
    def _template_is_text_with_fields(self) -> "DatasetSettings":
        names = self.template_fields
        if not names:
            raise ValueError(f"template {self.template!r} must be alpaca or contain a {{field}}")
        for name in names:
            if not name.isidentifier():
                raise ValueError(f"template field {{{name}}} must be a plain name in braces")
        if unused := sorted(set(self.fields) - set(names)):
            raise ValueError(f"fields {unused} are not in the template, which has {names}")
        return self

    @property
    def template_fields(self) -> list[str]:
        """Names in the braces of the template, each once, in order."""
        if self.template == "alpaca":
            return ["instruction", "input"]
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(f"template {self.template!r} is broken ({error})") from error
        names = (
            f"{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
            for _, name, spec, conversion in parts
            if name is not None
        )
        return list(dict.fromkeys(names))

    @property
    def metric(self) -> str:
        """Name of the reported metric."""
        return "accuracy" if self.task == "classification" else "rouge_l"


class PartitionSettings(Section):
    """How the classes are spread over the clients."""

    kind: Literal["dirichlet", "meta", "pathological", "iid"]
    """Law of the split."""
    alpha: float | None = Field(default=None, gt=0)
    """Concentration of the Dirichlet law; small is heterogeneous."""
    classes_per_client: int | None = Field(default=None, ge=1)
    """Classes each client gets (meta, pathological)."""

    @model_validator(mode="after")
    def _kind_has_its_parameter(self) -> "PartitionSettings":
        needs = {"dirichlet": "alpha", "meta": "classes_per_client"}
        needs["pathological"] = "classes_per_client"
        for key in ("alpha", "classes_per_client"):
            if (getattr(self, key) is not None) != (needs.get(self.kind) == key):
                verb = "needs" if needs.get(self.kind) == key else "takes no"
                raise ValueError(f"partition {self.kind} {verb} {key}")
        return self

    @property
    def slug(self) -> str:
        """Short form as used in the paper: dir0.5, meta1, pathological2, iid."""
        if self.kind == "dirichlet":
            return f"dir{self.alpha:g}"
        return self.kind + str(self.classes_per_client or "")


def _expand_partition(value: Any) -> Any:
    """Turn the paper's short form (``dir0.5``) into the section it stands for."""
    if not isinstance(value, str):
        return value
    if value == "iid":
        return {"kind": "iid"}
    if match := re.fullmatch(r"dir(\d+(?:\.\d+)?(?:e-?\d+)?)", value):
        return {"kind": "dirichlet", "alpha": float(match[1])}
    if match := re.fullmatch(r"(meta|pathological)(\d+)", value):
        return {"kind": match[1], "classes_per_client": int(match[2])}
    raise ValueError(
        f"partition {value!r} is unknown; allowed: iid, dir<alpha> such as dir0.5, "
        "meta<classes per client>, pathological<classes per client>"
    )


class ScenarioSettings(Section):
    """One federated population: a data set spread over clients."""

    name: Slug | None = None
    """Name of the scenario; default ``{dataset}-{partition}``."""
    dataset: DatasetSettings
    """The data set: a name (configs/datasets), the path of a YAML file, or the section itself."""
    partition: Annotated[PartitionSettings, BeforeValidator(_expand_partition)]
    """Law of the split, or its short form: dir0.5, meta1, pathological2, iid."""
    clients: int = Field(default=10, ge=1)
    """Number of clients K."""
    min_examples: int = Field(default=10, ge=4)
    """Redraw a Dirichlet split until every client has this many examples."""
    max_embedding: int = Field(default=200, ge=1)
    """Cap of a client's embedding set."""
    max_eval: int = Field(default=200, ge=1)
    """Cap of a client's evaluation set."""
    max_test: int | None = Field(default=None, ge=1)
    """Cap of a client's test set; default 200 (classification) or 50 (generation)."""
    max_length: int = Field(default=1024, ge=16)
    """Longest sequence in tokens. Longer prompts are dropped, longer answers cut."""

    @property
    def slug(self) -> str:
        """Name without the seed."""
        return self.name or f"{self.dataset.name}-{self.partition.slug}"

    def seeded_slug(self, seed: int) -> str:
        """Name with the seed, as it stands in paths and log lines."""
        return f"{self.slug}-s{seed}"


class AdapterSettings(Section):
    """The trainable part of a client's model."""

    rank: int = Field(default=8, ge=1)
    """LoRA rank r."""
    alpha: float = Field(default=16.0, gt=0)
    """LoRA scale numerator; the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout probability in front of the LoRA path."""
    top_k: int = Field(default=2, ge=1)
    """Domain experts that work on a token."""
    balance_weight: float = Field(default=0.001, ge=0)
    """Weight of the load balancing loss."""
    target_modules: list[str] | None = Field(default=None, min_length=1)
    """Ends of the names of the linear layers to adapt; default: PEFT's for the model family."""


class AssignmentSettings(Section):
    """Who holds which experts (RSEA)."""

    num_experts: int = Field(default=30, ge=1)
    """Domain experts E per module."""
    choices: int = Field(default=2, ge=1)
    """Clients c that each expert chooses."""
    min_experts: int | None = Field(default=None, ge=1)
    """Fewest domain experts of a client per module; default max(2, top_k)."""
    max_experts: int = Field(default=8, ge=1)
    """Most domain experts of a client per module."""

    def bounds(self, top_k: int) -> tuple[int, int]:
        """Fewest and most domain experts of a client per module (b_min, b_max)."""
        return self.min_experts or max(2, top_k), self.max_experts

    def infeasibility(self, clients: int, top_k: int) -> str | None:
        """Name the capacity inequality that fails for K clients; None if an assignment exists.

        Feasible iff K b_min <= E c <= K b_max, c <= K and b_min <= E.
        """
        fewest, most = self.bounds(top_k)
        total = self.num_experts * self.choices
        checks = [
            (fewest >= top_k, f"min_experts {fewest} >= top_k {top_k}"),
            (fewest <= most, f"min_experts {fewest} <= max_experts {most}"),
            (self.choices <= clients, f"choices {self.choices} <= clients {clients}"),
            (fewest <= self.num_experts, f"min_experts {fewest} <= num_experts {self.num_experts}"),
            (
                clients * fewest <= total,
                f"clients * min_experts = {clients} * {fewest} = {clients * fewest} <= "
                f"num_experts * choices = {self.num_experts} * {self.choices} = {total}",
            ),
            (
                total <= clients * most,
                f"num_experts * choices = {self.num_experts} * {self.choices} = {total} <= "
                f"clients * max_experts = {clients} * {most} = {clients * most}",
            ),
        ]
        return next((text for holds, text in checks if not holds), None)


class AggregationSettings(Section):
    """How the server averages."""

    weighting: Literal["uniform", "examples", "tokens"] = "uniform"
    """Weight of a client in a mean: equal (the paper), its training examples, or the tokens that it
    routed to the expert."""


class TrainingSettings(Section):
    """Local training of one client in one round."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps per round; default 200 unless local_epochs is given."""
    local_epochs: int | None = Field(default=None, ge=1)
    """Passes over the client's training set per round, instead of steps."""
    batch_size: int = Field(default=1, ge=1)
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences per forward pass of one rank; default batch_size / ranks."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Adam step size in round 1."""
    learning_rate_decay: float = Field(default=0.99, gt=0, le=1)
    """Factor on the learning rate from one round to the next."""
    gradient_clipping: float = Field(default=0.0, ge=0)
    """Largest gradient norm; 0 does not clip."""
    ranks: int = Field(default=1, ge=1)
    """Processes (GPUs) that train one client together."""
    cpu_threads: int = Field(default=1, ge=1)
    """Threads of each process on a CPU. A setting, because sums in another order differ in the last
    bits."""
    deepspeed: dict[str, Any] = Field(default={"zero_optimization": {"stage": 1}})
    """DeepSpeed settings: a name (configs/deepspeed), the path of a JSON file, or the mapping
    itself. Batch sizes, optimizer and precision are set by fedamole."""

    @model_validator(mode="after")
    def _batch_divides(self) -> "TrainingSettings":
        if self.steps and self.local_epochs:
            raise ValueError("steps and local_epochs exclude each other")
        if self.batch_size % self.ranks:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of ranks {self.ranks}"
            )
        if self.batch_size % (self.ranks * self.sequences_per_pass):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of ranks * micro_batch_size "
                f"({self.ranks} * {self.sequences_per_pass})"
            )
        reserved = {"train_batch_size", "train_micro_batch_size_per_gpu", "optimizer", "scheduler"}
        reserved |= {"gradient_accumulation_steps", "gradient_clipping", "fp16", "bf16"}
        if taken := sorted(reserved & set(self.deepspeed)):
            raise ValueError(f"deepspeed keys {taken} are set by fedamole; leave them out")
        if unknown := sorted(set(self.deepspeed) - set(DEEPSPEED_KEYS)):
            raise ValueError(
                f"deepspeed key {unknown[0]!r} is not allowed; allowed: {', '.join(DEEPSPEED_KEYS)}"
            )
        zero = self.deepspeed.get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, dict) else None
        if type(stage) is not int or stage not in range(4):
            raise ValueError(
                f"deepspeed zero_optimization {zero!r} must be a mapping with a stage from 0 to 3"
            )
        if unknown := sorted(set(zero) - set(ZERO_KEYS)):
            raise ValueError(
                f"deepspeed zero_optimization: key {unknown[0]!r} is not allowed; "
                f"allowed: {', '.join(ZERO_KEYS)}"
            )
        return self

    @property
    def sequences_per_pass(self) -> int:
        """Sequences per forward pass of one rank."""
        return self.micro_batch_size or self.batch_size // self.ranks

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the DeepSpeed settings."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))


class EvaluationSettings(Section):
    """Testing of a model on a client's evaluation and test sets."""

    batch_size: int = Field(default=8, ge=1)
    """Sequences per forward pass."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest generated answer in tokens."""


class TablesSettings(Section):
    """What the tables show. Nothing here trains."""

    round: Literal["last", "best"] = "last"
    """Round that counts: the last one, or the best by mean evaluation loss."""
    reference: str = "fedamole"
    """Method whose gain over the best of the others is given."""
    decimals: int = Field(default=2, ge=0, le=6)
    """Decimals of the printed numbers (metrics in percent)."""


class ExecutionSettings(Section):
    """How the work is cut into jobs. Nothing here changes a number."""

    clients_per_job: int | Literal["all"] = "all"
    """Clients of one round that one job trains: 1, n, or all."""
    clients_at_once: int = Field(default=1, ge=1)
    """Clients that a job trains side by side, each with ranks of its own; the others wait."""
    nodes: int = Field(default=1, ge=1)
    """Nodes of a job on a cluster. Its processes, clients_at_once * ranks, are spread evenly over
    them."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of a job on all its nodes together: 0 (CPU), or at least one for each process."""
    mem_mb: int | None = Field(default=None, ge=100)
    """Memory per node that a job asks for, in MB; default: from the size of the model. Half as much
    again with every retry."""
    runtime: int | None = Field(default=None, ge=1)
    """Time that a job asks for, in minutes; default: a generous estimate from the size of the model
    and the work. Twice as much with every retry."""

    @model_validator(mode="after")
    def _positive(self) -> "ExecutionSettings":
        if self.clients_per_job != "all" and self.clients_per_job < 1:
            raise ValueError(f"clients_per_job {self.clients_per_job} must be at least 1, or all")
        if self.clients_per_job != "all" and self.clients_at_once > self.clients_per_job:
            raise ValueError(
                f"clients_at_once {self.clients_at_once} must not exceed clients_per_job "
                f"{self.clients_per_job}"
            )
        if self.gpus % self.nodes:
            raise ValueError(f"gpus {self.gpus} must be a multiple of nodes {self.nodes}")
        return self

    def processes(self, ranks: int) -> int:
        """Processes of a job whose clients take so many ranks each."""
        return self.clients_at_once * ranks
