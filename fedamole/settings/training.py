"""Local training, and testing."""

import math
from typing import Any

from pydantic import Field, model_validator

from fedamole.settings.section import Section

# The paper's number of optimizer steps per round.
DEFAULT_STEPS = 200
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


class TrainingSettings(Section):
    """Local training of one client in one round."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps per round; default 200 unless local_epochs is given."""
    min_steps: int | None = Field(default=None, ge=1)
    """Fewest steps of a client, for devices of unequal speed: each client's own number is drawn
    between min_steps and steps, once for all rounds; default: all take steps."""
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
    """Processes (GPUs) that train one client together; of packs each one trains its own."""
    pack_clients: int = Field(default=1, ge=1)
    """Clients that train at once through one frozen backbone, each with its own experts, optimizer
    and examples. The numbers are those of separate training but for the last bits. Methods that put
    something else than LoRA experts into the model train one client after another all the same."""
    pack_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of one forward pass of a pack, padding included; default: those of a step, or
    what pack_memory_gb leaves room for. A micro-batch that is larger goes alone."""
    pack_memory_gb: float | None = Field(default=None, gt=0)
    """Memory for what a forward pass of a pack keeps for its backward pass, in GB (10^9 bytes);
    pack_tokens follows from it and from the size of the backbone."""
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
        most = self.steps or DEFAULT_STEPS
        if self.min_steps and (self.local_epochs or self.min_steps > most):
            raise ValueError(
                f"min_steps {self.min_steps} must not exceed steps {most}, and goes with steps only"
            )
        self._check_packs()
        self._check_deepspeed()
        if self.pack_clients > 1:
            # Every rank has clients of its own, each with its whole batch.
            if self.batch_size % self.sequences_per_pass:
                raise ValueError(
                    f"batch_size {self.batch_size} must be a multiple of micro_batch_size "
                    f"{self.micro_batch_size}"
                )
            return self
        if self.batch_size % self.ranks:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of ranks {self.ranks}"
            )
        if self.batch_size % (self.ranks * self.sequences_per_pass):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of ranks * micro_batch_size "
                f"({self.ranks} * {self.sequences_per_pass})"
            )
        return self

    def _check_deepspeed(self) -> None:
        """Refuse keys that DeepSpeed would ignore, or that are set here."""
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

    def _check_packs(self) -> None:
        """Refuse settings of packs that exclude each other."""
        if self.pack_tokens and self.pack_memory_gb:
            raise ValueError("pack_tokens and pack_memory_gb exclude each other")
        if self.pack_clients == 1 and (self.pack_tokens or self.pack_memory_gb):
            raise ValueError("pack_tokens and pack_memory_gb need pack_clients above 1")
        zero = self.deepspeed.get("zero_optimization", {})
        if self.pack_clients > 1 and isinstance(zero, dict):
            if zero.get("stage") == 3:
                raise ValueError(
                    f"pack_clients {self.pack_clients} needs the whole backbone in every process; "
                    "with ZeRO stage 3 only 1 is possible"
                )
            if "offload_optimizer" in zero:
                raise ValueError(
                    f"pack_clients {self.pack_clients} keeps Adam's state where the model is; "
                    "leave offload_optimizer out"
                )

    def most_steps(self, num_examples: float) -> int:
        """Optimizer steps of a round on so many examples; on the fastest device if they differ."""
        if self.local_epochs:
            return math.ceil(self.local_epochs * num_examples / self.batch_size)
        return self.steps or DEFAULT_STEPS

    @property
    def sequences_per_pass(self) -> int:
        """Sequences per forward pass of one rank."""
        ranks = 1 if self.pack_clients > 1 else self.ranks
        return self.micro_batch_size or self.batch_size // ranks

    @property
    def one_by_one(self) -> "TrainingSettings":
        """The same without packs: for methods whose clients cannot be packed.

        Raises
        ------
        ValueError
            If the ranks of a client cannot share its batches.
        """
        packs = {"pack_clients", "pack_tokens", "pack_memory_gb"}
        return TrainingSettings(**self.model_dump(exclude=packs))

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the DeepSpeed settings."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))


# Choices that are scored together behind one prompt; its keys and values are copied for each.
CHOICES_AT_ONCE = 4


class EvaluationSettings(Section):
    """Testing of a model on a client's evaluation and test sets."""

    batch_size: int = Field(default=8, ge=1)
    """Sequences per forward pass."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest generated answer in tokens."""
