"""Memory of a process that trains and tests clients, on a GPU and on its host (torch-free).

What a pass keeps for its backward pass was measured with ``saved_tensors_hooks`` on Llama models
with HMoLE layers; a test repeats that. The bases were read off finished jobs.
"""

import math
from dataclasses import dataclass

from fedamole.config import Config
from fedamole.planning.contents import contents_of, virtual_tokens
from fedamole.planning.model_size import ModelSize
from fedamole.planning.volumes import FLOAT, adapters_of
from fedamole.planning.workload import sequences_per_pass, works_of
from fedamole.registry import RUNS
from fedamole.settings import CHOICES_AT_ONCE, AdapterSettings, BackboneSettings
from fedamole.stages import RunStage

MB, GB = 2**20, 10**9
BYTES = {"float32": 4, "bfloat16": 2}
# Of a weight in 4 bits and its share of the scales: one of 64 weights in float32, or in 8 bits with
# one of 256 scales in float32 (Dettmers et al. 2023, arXiv:2305.14314, section 3).
QUANTIZED = {"nf4": 1 / 2 + 4 / 64, "nf4-double": 1 / 2 + 1 / 64 + 4 / (64 * 256)}
# Of an attention score where all are kept: its softmax in float32, and the softmax in bfloat16 or
# the cap of Gemma 2. Other implementations than eager keep none.
SCORE = 8
# Python with torch, transformers, PEFT and DeepSpeed: 0.5 GB were measured on a CPU; on a GPU its
# libraries come on top, and on the device the context, cuBLAS and what the allocator keeps.
CPU_BASE, GPU_HOST_BASE, GPU_BASE = 700 * MB, 2500 * MB, 1000 * MB
# Part of the longest sequence that is an answer, at most.
LONGEST_ANSWER = {"classification": 1 / 16, "generation": 1 / 2}
# DeepSpeed's defaults, in parameters.
MAX_LIVE, MAX_REUSE, PREFETCH = 1_000_000_000, 1_000_000_000, 50_000_000
MARGIN = 1.5
SMALLEST_MB, UNKNOWN_MB = 2000, 8000


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, with sequences of max_length.

    Attributes
    ----------
    weights
        Frozen weights, and the slices of others that ZeRO-3 gathers.
    adapters
        Adapters with gradients, Adam's state and buffers.
    training, testing
        Activations and logits of the largest pass.
    base
        Everything else.
    """

    weights: float
    adapters: float
    training: float
    testing: float
    base: float

    @property
    def peak(self) -> float:
        """All that is there at once."""
        return self.weights + self.adapters + max(self.training, self.testing) + self.base


@dataclass(frozen=True)
class ZeRO:
    """How DeepSpeed cuts a model: the stage, and whether parameters wait on the host."""

    stage: int
    offload: bool = False

    def __str__(self) -> str:
        return f"{self.stage}, weights on the host" if self.offload else str(self.stage)


def zero_of(config: Config) -> ZeRO:
    """What the config asks for."""
    settings = config.training.deepspeed.get("zero_optimization", {})
    stage = config.training.zero_stage
    return ZeRO(stage, stage == 3 and _is_offloaded(settings.get("offload_param")))


def _is_offloaded(section: object) -> bool:
    """Whether a section of DeepSpeed's settings names another device."""
    return isinstance(section, dict) and section.get("device", "none") != "none"


def gpu_memory(config: Config, size: ModelSize, zero: ZeRO, checkpointing: bool) -> Memory:
    """Memory on the GPU of one rank.

    Parameters
    ----------
    config, size
        The study and its model.
    zero
        How the model is cut.
    checkpointing
        Whether activations are computed again in the backward pass.
    """
    return Memory(
        weights=_weights(config, size, zero),
        adapters=_adapters(config, size, zero),
        training=training_bytes(config, size, checkpointing),
        testing=testing_bytes(config, size),
        base=GPU_BASE,
    )


def weight_bytes(config: Config, size: ModelSize) -> float:
    """Bytes of all frozen weights; of quantized ones the linear layers are, but for the output."""
    width = BYTES[config.backbone.dtype]
    if config.backbone.quantization is None:
        return size.num_parameters * width
    others = size.num_parameters - size.num_linear
    return size.num_linear * QUANTIZED[config.backbone.quantization] + others * width


def _unpacked(config: Config, size: ModelSize) -> float:
    """Bytes of the largest linear layer, where each is unpacked when its turn comes."""
    if config.backbone.quantization is None:
        return 0.0
    largest = max(layer.in_features * layer.out_features for layer in size.layers)
    return largest * BYTES[config.backbone.dtype]


def _weights(config: Config, size: ModelSize, zero: ZeRO) -> float:
    """Frozen weights on the GPU of one rank."""
    whole = weight_bytes(config, size) + _unpacked(config, size)
    if zero.stage < 3:
        return whole
    own = 0 if zero.offload else whole / config.training.ranks
    settings = config.training.deepspeed.get("zero_optimization", {})
    live = settings.get("stage3_max_live_parameters", MAX_LIVE)
    # A weight stays for the backward pass if that comes back to it within the distance.
    reused = settings.get("stage3_max_reuse_distance", MAX_REUSE) / 2
    gathered = min(live, reused + settings.get("stage3_prefetch_bucket_size", PREFETCH))
    return min(whole, own + gathered * BYTES[config.backbone.dtype])


def _adapters(config: Config, size: ModelSize, zero: ZeRO) -> float:
    """Bytes of the largest client's adapters with gradients and Adam's two moments, all float32."""
    numbers = max(
        adapters_of(config, size, scenario, work).most_of_client(config.assignment.max_experts)
        for scenario in config.scenarios
        for work in works_of(config)
    )
    if (clients := packed_clients(config)) > 1:
        # Weights, gradients and Adam's two moments of every client of the pack.
        return FLOAT * numbers * 4 * clients
    ranks = config.training.ranks
    weights = 1 / ranks if zero.stage == 3 else 1.0
    gradients = 1 / ranks if zero.stage >= 2 else 1.0
    # From stage 1 on DeepSpeed keeps a master copy, and a bucket to reduce gradients in.
    optimizer = 3 / ranks + 1 if zero.stage else 2.0
    return FLOAT * numbers * (weights + gradients + optimizer)


def training_bytes(config: Config, size: ModelSize, checkpointing: bool) -> float:
    """What one forward pass of one rank keeps for its backward pass, logits included."""
    sequences, length = _models(config) * sequences_per_pass(config), _longest(config)
    each = _kept_bytes(pass_of(config), size, checkpointing)
    alone = sequences * length * each + _logits(config, size, sequences)
    if (clients := packed_clients(config)) == 1:
        return alone
    if config.training.pack_memory_gb:
        return max(GB * config.training.pack_memory_gb, alone)
    tokens = sequences * length * clients
    if config.training.pack_tokens:
        tokens = min(tokens, max(config.training.pack_tokens, sequences * length))
    return tokens * each + _logits(config, size, math.ceil(tokens / length))


def packed_clients(config: Config) -> int:
    """Most clients that a process trains at once."""
    if not any(RUNS[run].packs for run in config.runs()):
        return 1
    together = max(scenario.clients for scenario in config.scenarios)
    if config.execution.clients_per_job != "all":
        together = min(together, config.execution.clients_per_job)
    return min(together, config.training.pack_clients)


@dataclass(frozen=True)
class Pass:
    """What of the settings decides how much a forward pass keeps of a token.

    Attributes
    ----------
    backbone, adapter
        Their sections.
    max_experts
        Most domain experts of a client in one module.
    longest
        Tokens of the longest sequence.
    """

    backbone: BackboneSettings
    adapter: AdapterSettings
    max_experts: int
    longest: int


def pass_of(config: Config) -> Pass:
    """Passes of the study with the most to keep."""
    experts = config.assignment.max_experts
    return Pass(config.backbone, config.adapter, experts, _longest(config))


def pack_tokens(run: RunStage, size: ModelSize | None) -> int | None:
    """Most tokens of a pass of a pack; from the memory for it, if that is what is given.

    Parameters
    ----------
    run
        The run.
    size
        Its model; needed where memory is given.
    """
    training, scenario = run.training, run.scenario
    if training.pack_memory_gb is None:
        return training.pack_tokens
    assert size is not None, "the backbone of a job is prepared, so its size is known"
    kept = Pass(run.backbone, run.adapter, run.assignment.max_experts, scenario.max_length)
    each = _kept_bytes(kept, size, run.backbone.gradient_checkpointing)
    each += LONGEST_ANSWER[scenario.dataset.task] * _logit_bytes(run.backbone, size)
    return max(1, int(GB * training.pack_memory_gb / each))


def _kept_bytes(settings: Pass, size: ModelSize, checkpointing: bool) -> float:
    """Bytes that a pass keeps of one token for its backward pass, without logits."""
    everything = activation_bytes(settings, size)
    if not checkpointing:
        return everything
    # The input of every layer, and one layer at a time as without.
    layers = size.num_decoder_layers
    return everything / layers + layers * size.hidden_size * BYTES[settings.backbone.dtype]


def activation_bytes(settings: Pass, size: ModelSize) -> float:
    """Bytes that all layers keep of one token for the backward pass of a frozen model.

    A linear layer keeps nothing, but what uses its output does; the gated product of the MLP is one
    more of its width. Both norms keep the residual stream in float32. An HMoLE layer keeps a few
    numbers for every expert, eager attention the scores of all tokens before.
    """
    outputs = sum(layer.out_features for layer in size.layers)
    width = BYTES[settings.backbone.dtype]
    kept = width * (outputs + size.num_decoder_layers * size.gate_width)
    if settings.backbone.attention == "eager":
        scores = size.num_decoder_layers * size.num_attention_heads * settings.longest
        kept += SCORE * scores
    norms = 2 * FLOAT * size.num_decoder_layers * size.hidden_size
    adapted = len(size.adapted(settings.adapter.target_modules))
    numbers = (settings.max_experts + 1) * (2 * settings.adapter.rank + 2)
    return kept + norms + FLOAT * adapted * numbers


def testing_bytes(config: Config, size: ModelSize) -> float:
    """Largest of the passes without gradients: losses of whole sequences, or generation."""
    sequences, length = _models(config) * config.evaluation.batch_size, _longest(config)
    width = BYTES[config.backbone.dtype]
    # One layer after another.
    kept = activation_bytes(pass_of(config), size)
    layer = sequences * length * kept / size.num_decoder_layers
    cached = length + config.evaluation.max_new_tokens
    cache = sequences * cached * size.num_decoder_layers * size.key_value_width * width
    answers = max(1, *(len(scenario.dataset.answers or ()) for scenario in config.scenarios))
    # Choices have the keys and values of their prompt each, beside those of the prompt itself.
    copies = min(answers, CHOICES_AT_ONCE)
    if copies > 1:
        cache *= 1 + copies
    return layer + max(_logits(config, size, copies * sequences), cache)


def _logits(config: Config, size: ModelSize, sequences: int) -> float:
    """Bytes of logits, and of two more copies in float32, where an answer is predicted."""
    positions = max(
        scenario.max_length * LONGEST_ANSWER[scenario.dataset.task] for scenario in config.scenarios
    )
    return sequences * positions * _logit_bytes(config.backbone, size)


def _logit_bytes(backbone: BackboneSettings, size: ModelSize) -> float:
    """Bytes of the logits of one position, and of two more copies in float32."""
    return size.vocab_size * (BYTES[backbone.dtype] + 2 * FLOAT)


def _longest(config: Config) -> int:
    """Longest sequence of the study with a soft prompt before it, in tokens."""
    prompt = max(virtual_tokens(run, config.prompt) for run in config.runs())
    return prompt + max(scenario.max_length for scenario in config.scenarios)


def _models(config: Config) -> int:
    """Most models that see a sequence side by side, each with a row of the batch."""
    return max(contents_of(run).models for run in config.runs())


def job_memory_mb(config: Config, size: ModelSize | None) -> int:
    """Memory per node that a job which trains or tests clients should ask for, in MB.

    Half as much again as is expected, at the point of a sweep that needs most; 8000 if the size of
    the model is unknown.
    """
    if size is None:
        return UNKNOWN_MB
    execution = config.execution
    here = execution.processes(config.training.ranks) / execution.nodes
    most = max(host_bytes(settings, size) for settings in config.variants())
    needed = MARGIN * here * most / MB
    return max(SMALLEST_MB, 100 * math.ceil(needed / 100))


def host_bytes(config: Config, size: ModelSize) -> float:
    """Bytes of one process on its host: of all there is on a CPU, of the loaded model for a GPU."""
    zero, whole = zero_of(config), weight_bytes(config, size) + _unpacked(config, size)
    # Every rank loads the whole model; ZeRO-3 then cuts its own slice out of it.
    sliced = whole / config.training.ranks if zero.stage == 3 else 0.0
    adapters = _adapters(config, size, zero)
    if config.execution.gpus:
        # What the clients of a pack start from and what they have trained, beside what is trained.
        packed = adapters / 2 if packed_clients(config) > 1 else 0.0
        return GPU_HOST_BASE + whole + packed + (sliced + adapters if zero.offload else 0.0)
    training = training_bytes(config, size, config.backbone.gradient_checkpointing)
    passes = max(training, testing_bytes(config, size))
    return CPU_BASE + whole + sliced + adapters + passes
