"""The frozen language model: made ready once (any source), loaded by every job."""

import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedamole.artifacts import sha256
from fedamole.backbone_limits import check_bitsandbytes, unquantizable
from fedamole.datasets.files import package_folder
from fedamole.errors import FedamoleError
from fedamole.pools import ModuleShape
from fedamole.randomness import derive_seed
from fedamole.settings import (
    GENERATED_POSITIONS,
    BackboneSettings,
    BackboneSource,
    GeneratedBackbone,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = ("*.safetensors", "*.bin")


def prepare_backbone(folder: Path, settings: BackboneSource, texts: Iterable[str]) -> None:
    """Fill a folder with the model and its tokenizer, in the layout of ``save_pretrained``.

    A local folder or a hub snapshot is linked, not copied; a GGUF file is converted; a generated
    model is made.

    Parameters
    ----------
    folder
        New, empty folder.
    settings
        Where the model comes from.
    texts
        Corpus for the tokenizer of a generated model; not read otherwise.

    Raises
    ------
    FedamoleError
        If the source is missing or no model.
    """
    if settings.generate:
        _generate(folder, settings.generate, texts)
    elif settings.gguf:
        _convert_gguf(folder, _gguf_path(settings))
    elif settings.folder:
        _link(folder, _checked_folder(Path(settings.folder).expanduser()))
    else:
        _link(folder, _download(settings))


def describe(folder: Path, settings: BackboneSource) -> dict[str, Any]:
    """Facts of a prepared backbone that the torch-free stages need.

    Returns
    -------
    dict
        ``modules`` (all linear layers: name, in_features, out_features), ``default_targets``,
        ``num_parameters``, ``model_type``, ``positions`` (longest sequence in tokens, or None),
        ``attention`` (what transformers itself would choose), ``special_linear`` (classes of linear
        layers that bitsandbytes leaves alone), ``files`` (SHA-256 by name: weights, tokenizer ...).
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    config = _config(folder, settings)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=settings.trust_remote_code
            )
    except (ValueError, ImportError) as error:
        raise _no_model(settings, error) from error
    layers = _linear_layers(model)
    modules = [
        ModuleShape(name, layer.in_features, layer.out_features) for name, layer in layers.items()
    ]
    return {
        "name": settings.name,
        "model_type": config.model_type,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "default_targets": _names_of_targets(TARGETS.get(config.model_type, []), modules),
        "positions": _positions(config),
        "attention": model.config._attn_implementation,
        "special_linear": _classes(layers.values(), but=nn.Linear),
        "modules": [asdict(module) for module in modules],
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """All linear layers by name but the output layer, which is mostly the embedding."""
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }


def _classes(layers: Iterable[nn.Module], but: type[nn.Module]) -> list[str]:
    """Names of the classes of layers that are not exactly of one class."""
    return sorted({type(layer).__name__ for layer in layers if type(layer) is not but})


def _positions(config: Any) -> int | None:
    """Longest sequence that a model was made for, in tokens; None without a limit (ALiBi)."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if getattr(text, "alibi", False) or not isinstance(positions, int):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return positions
    # These stretch the positions; the number above is the stretched one in some models only.
    original = rope.get("original_max_position_embeddings") or positions
    return max(positions, int(original * rope.get("factor", 1.0)))


def _names_of_targets(default: Any, modules: list[ModuleShape]) -> list[str]:
    """Ends of names, or the whole names that match where PEFT's default is a pattern."""
    if isinstance(default, str):
        return sorted(module.name for module in modules if re.fullmatch(default, module.name))
    return sorted(default)


def load_backbone(folder: Path, settings: BackboneSettings) -> PreTrainedModel:
    """Load a prepared backbone with all its parameters frozen.

    Raises
    ------
    FedamoleError
        If the files are no causal language model, the attention is not there, or the weights cannot
        be quantized.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[settings.dtype],
            attn_implementation=settings.attention,
            trust_remote_code=settings.trust_remote_code,
            **_quantization(settings),
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _no_model(settings, error) from error
    if settings.quantization:
        _check_quantized(model, settings)
    model.requires_grad_(False)
    model.eval()
    # A model may come with sampling or a repetition penalty; our greedy decoding has neither.
    model.generation_config = GenerationConfig()
    if settings.gradient_checkpointing:
        # transformers 5.23 renamed the switch.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def _quantization(settings: BackboneSettings) -> dict[str, Any]:
    """Arguments that load the linear layers in 4 bits (QLoRA, arXiv:2305.14314)."""
    if settings.quantization is None:
        return {}
    check_bitsandbytes(settings.name, settings)
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=settings.quantization == "nf4-double",
            bnb_4bit_compute_dtype=DTYPES[settings.dtype],
        )
    }


def _check_quantized(model: PreTrainedModel, settings: BackboneSettings) -> None:
    """Make sure that all linear layers are in 4 bits, and stay right on a CPU (as of 0.50)."""
    from bitsandbytes.nn import Linear4bit

    layers: list[Any] = list(_linear_layers(model).values())
    if classes := _classes(layers, but=Linear4bit):
        raise FedamoleError(unquantizable(settings.name, settings, classes))
    if model.device.type != "cpu":
        return
    # There a block of 64 weights that goes on in the next row is unpacked with the wrong scale.
    if ragged := sorted({layer.in_features for layer in layers if layer.in_features % 64}):
        raise FedamoleError(
            f"backbone {settings.name}: quantization {settings.quantization} needs a GPU for "
            f"linear layers of {ragged} inputs; on a CPU they must be multiples of 64"
        )
    for layer in layers:
        # With AVX512-BF16 the first test would pack the weights anew for a product that rounds more
        # and has no gradient: clients after it would train wrongly.
        layer.support_avx512bf16_for_cpu = False


def load_tokenizer(folder: Path, settings: BackboneSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a prepared backbone."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)


def _config(folder: Path, settings: BackboneSource) -> Any:
    """Read the model's config."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _no_model(settings, error) from error


def _no_model(settings: BackboneSource, error: Exception) -> FedamoleError:
    """What to say of a source that transformers cannot read."""
    reason = str(error).strip().splitlines()[0][:200]
    return FedamoleError(
        f"backbone {settings.name}: cannot be loaded as a causal language model ({reason})"
    )


def _checked_folder(folder: Path) -> Path:
    """Make sure that a folder holds a model."""
    if not folder.is_dir():
        raise FedamoleError(f"backbone folder {folder}: does not exist")
    if not (folder / "config.json").is_file():
        raise FedamoleError(f"backbone folder {folder}: has no config.json")
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        raise FedamoleError(f"backbone folder {folder}: has no *.safetensors and no *.bin")
    return folder


def _link(folder: Path, source: Path) -> None:
    """Link every file of a model folder: a 70B model is not copied."""
    folder.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file():
            (folder / path.name).symlink_to(path.resolve())


def _download(settings: BackboneSource) -> Path:
    """Fetch a hub model into the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(settings.hub),
                revision=settings.revision,
                ignore_patterns=["*.gguf", "*.msgpack", "*.h5", "*.onnx", "original/*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FedamoleError(
            f"backbone {settings.hub} (revision {settings.revision or 'default'}): cannot be "
            f"fetched from the hub ({reason})"
        ) from error


def _gguf_path(settings: BackboneSource) -> Path:
    """Find the GGUF file, inside a package without importing it or as a plain path."""
    path = Path(str(settings.gguf)).expanduser()
    if settings.package:
        path = package_folder(settings.package) / path
    if not path.is_file():
        raise FedamoleError(f"backbone {settings.name}: GGUF file {path} does not exist")
    return path


def _convert_gguf(folder: Path, path: Path) -> None:
    """Dequantise a GGUF file to float32 safetensors."""
    from transformers import GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise FedamoleError(
            f"{path}: is no whole GGUF file of a language model ({error})"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _generate(folder: Path, settings: GeneratedBackbone, texts: Iterable[str]) -> None:
    """Make a tiny Llama with seeded random weights and a tokenizer trained on the texts."""
    tokenizer = _train_tokenizer(settings.vocab_size, texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=GENERATED_POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(derive_seed(settings.seed, "backbone"))
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_tokenizer(vocab_size: int, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE: it can spell every text, so no token is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
