"""Local training is the same however the batch is cut into passes, ranks and ZeRO stages."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedamole import stages
from fedamole.accounting import epsilon
from fedamole.artifacts import read_record
from fedamole.config import load_config
from fedamole.config_files import read_yaml
from fedamole.embeddings import Embedded
from fedamole.pool_files import read_assignment, read_client_state, read_upload
from fedamole.privacy import perturb_embedded
from fedamole.progress import read_progress
from fedamole.settings import TrainingSettings
from fedamole.training import learning_rate

pytestmark = pytest.mark.xdist_group("training")

CHECKOUT = Path(__file__).parents[2]
# One thread per process: two OpenMP threads on busy cores are 10 to 30 times slower.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def fedamole(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as the rules do."""
    return subprocess.run(
        [sys.executable, "-m", "fedamole", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
        timeout=240,
    )


def succeed(*arguments: str | Path) -> str:
    """Run a command that must not fail; give what it logs."""
    done = fedamole(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stderr


class Workshop:
    """The smoke config's files up to round 0, made by the commands themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw = read_yaml(CHECKOUT / "configs/smoke.yaml")
        self.raw["training"] = {
            "steps": 4,
            "batch_size": 4,
            "micro_batch_size": 1,
            "learning_rate": 1e-3,
        }
        self.backbone, self.tokens = folder / "backbone", folder / "tokens"
        self.extensions = folder / "torch-extensions"
        ENVIRONMENT["TORCH_EXTENSIONS_DIR"] = str(self.extensions)
        stage = self.stage()
        tokens = stage.run.tokens
        settings = {
            "backbone": stages.canonical_json(tokens.backbone),
            "scenario": stages.canonical_json(tokens.scenario),
            "tokens": stages.canonical_json(tokens),
        }
        partition = folder / "partition.json"
        succeed("prepare-backbone", "--settings", settings["backbone"], "--out", self.backbone)
        succeed("partition", "--settings", settings["scenario"], "--out", partition)
        inputs = ("--partition", partition, "--backbone", self.backbone)
        succeed("tokenize", "--settings", settings["tokens"], *inputs, "--out", self.tokens)

    def stage(self, run: str = "fedamole", **training: Any) -> stages.ClientStage:
        raw = json.loads(json.dumps(self.raw))
        raw["training"].update(training)
        config = load_config(raw, CHECKOUT / "configs")
        return stages.client_stage(config, next(iter(config.scenario_seeds())), run)

    def changed(self, **sections: dict[str, Any]) -> "Workshop":
        """The same files with other settings."""
        other = copy.copy(self)
        other.raw = {**self.raw, **{key: self.raw[key] | sections[key] for key in sections}}
        return other

    def init(self, name: str, stage: stages.ClientStage) -> tuple[Path, Path]:
        """Make pool and assignment before training."""
        folder = self.folder / name
        pool, assignment = folder / "pool.h5", folder / "assignment.h5"
        succeed(
            *("init-server", "--settings", stages.canonical_json(stage.run)),
            *("--backbone", self.backbone, "--out-pool", pool, "--out-assignment", assignment),
        )
        return pool, assignment

    def arguments(
        self, stage: stages.ClientStage, folder: Path, clients: list[int]
    ) -> list[str | Path]:
        """Arguments that train clients in round 1 from the pool in a folder."""
        return [
            *("train-clients", "--settings", stages.canonical_json(stage), "--round", "1"),
            *("--clients", *map(str, clients), "--backbone", self.backbone),
            *("--tokens", self.tokens, "--progress", folder / "progress"),
            *("--pool", folder / "pool.h5", "--assignment", folder / "assignment.h5"),
            *("--out-uploads", *(folder / f"client_{k}.h5" for k in clients)),
            *("--out-metrics", *(folder / f"metrics_{k}.json" for k in clients)),
        ]

    def try_training(
        self, stage: stages.ClientStage, pool: Path, assignment: Path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Train client 0, whatever comes of it."""
        return fedamole(*self.arguments(stage, pool.parent, [0]), **environment)

    def train(
        self,
        name: str,
        clients: list[int],
        run: str = "fedamole",
        at_once: int = 1,
        **training: Any,
    ) -> Path:
        """Train clients in round 1 from a fresh pool; give the folder with their uploads."""
        stage = self.stage(run, **training)
        folder = self.folder / name
        self.init(name, stage)
        succeed(*self.arguments(stage, folder, clients), "--at-once", str(at_once))
        return folder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def one_rank(workshop: Workshop) -> Path:
    return workshop.train("one-rank", [0, 1])


def metrics(path: Path) -> dict[str, Any]:
    return read_record(path, "metrics")[1]


def tensors(path: Path) -> dict[str, np.ndarray]:
    upload = read_upload(path)
    arrays = {"client embeddings": upload.client_embeddings_MR}
    for name, group in upload.state.groups.items():
        arrays |= {f"{name} experts {key}": value for key, value in group.experts.items()}
        arrays |= {f"{name} shared {key}": value for key, value in group.shared.items()}
        arrays[f"{name} expert embeddings"] = upload.expert_embeddings[name]
    return arrays


@pytest.mark.parametrize(
    ("ranks", "deepspeed"),
    [(1, "zero2"), (1, "zero3"), (1, "zero3_offload"), (2, "zero1"), (2, "zero2"), (2, "zero3")],
)
def test_ranks_and_zero_stages_give_the_same_weights(
    workshop: Workshop, one_rank: Path, ranks: int, deepspeed: str
) -> None:
    folder = workshop.train(f"{ranks}-{deepspeed}", [0], ranks=ranks, deepspeed=deepspeed)
    expected, found = tensors(one_rank / "client_0.h5"), tensors(folder / "client_0.h5")
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5, err_msg=name)
    routed = read_upload(one_rank / "client_0.h5").tokens
    for name, counts in read_upload(folder / "client_0.h5").tokens.items():
        # A token on the border between two experts may cross it by the last bit.
        assert np.abs(counts - routed[name]).sum() <= 0.02 * counts.sum()
    # Every rank tests its share of the examples; under ZeRO-3 through the sliced model.
    alone, shared = metrics(one_rank / "metrics_0.json"), metrics(folder / "metrics_0.json")
    assert shared["eval_loss"] == pytest.approx(alone["eval_loss"], abs=1e-4)
    assert shared["train_loss_last"] == pytest.approx(alone["train_loss_last"], abs=1e-4)
    assert len(shared["answers"]) == len(alone["answers"])
    assert sum(a == b for a, b in zip(shared["answers"], alone["answers"], strict=True)) >= 3


@pytest.mark.parametrize(
    ("run", "deepspeed"), [("fedit", "zero1"), ("fedit", "zero3"), ("zero-shot", "zero3")]
)
def test_two_ranks_test_a_pool_like_one(workshop: Workshop, run: str, deepspeed: str) -> None:
    found = {}
    for ranks, kind in ((1, "zero1"), (2, deepspeed)):
        stage = workshop.stage(run, ranks=ranks, micro_batch_size=1, deepspeed=kind)
        assert stage.run.training.ranks == ranks
        # The pool is that of one rank; how it is tested is what is compared.
        folder = workshop.folder / f"evaluate-{run}-{deepspeed}-{ranks}"
        pool, _ = workshop.init(folder.name, stage)
        out = [folder / f"metrics_{k}.json" for k in (0, 1)]
        succeed(
            *("evaluate-clients", "--settings", stages.canonical_json(stage), "--round", "0"),
            *("--clients", "0", "1", "--backbone", workshop.backbone),
            *("--tokens", workshop.tokens, "--pool", pool, "--out-metrics", *out),
            *("--progress", folder / "progress"),
        )
        found[ranks] = [metrics(path) for path in out]
    for alone, shared in zip(found[1], found[2], strict=True):
        assert shared["eval_loss"] == pytest.approx(alone["eval_loss"], abs=1e-5)
        assert shared["answers"] == alone["answers"]


def test_nothing_was_compiled(workshop: Workshop) -> None:
    """A start of DeepSpeed that runs g++ costs a minute or two on every node."""
    workshop.train("compiled", [0], ranks=2)
    assert not any(path.is_file() for path in workshop.extensions.rglob("*"))


def test_clients_side_by_side_give_the_same_bytes(workshop: Workshop, one_rank: Path) -> None:
    folder = workshop.train("side-by-side", [0, 1, 2], at_once=2)
    for name in ("client_0.h5", "client_1.h5", "metrics_0.json", "metrics_1.json"):
        assert (folder / name).read_bytes() == (one_rank / name).read_bytes()
    seats = {item.client: item.process for item in read_progress(folder / "progress")}
    assert seats[0] == seats[2] != seats[1]


def test_two_clients_of_two_ranks_side_by_side(workshop: Workshop) -> None:
    one_after_another = workshop.train("2x2-a", [0, 1], ranks=2)
    side_by_side = workshop.train("2x2-b", [0, 1], ranks=2, at_once=2)
    for name in ("client_0.h5", "client_1.h5", "metrics_0.json", "metrics_1.json"):
        assert (side_by_side / name).read_bytes() == (one_after_another / name).read_bytes()


def test_ranks_that_fedamole_did_not_start_are_one_clear_line(workshop: Workshop) -> None:
    stage = workshop.stage(ranks=1)
    done = workshop.try_training(stage, *workshop.init("foreign", stage), WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2
    assert "is 1, but 2 processes were started; fedamole starts them itself" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_client_that_fails_stops_no_other_and_a_retry_does_only_it(
    workshop: Workshop, one_rank: Path, ranks: int
) -> None:
    stage = workshop.stage(ranks=ranks)
    folder = workshop.folder / f"failing-{ranks}"
    workshop.init(folder.name, stage)
    arguments = workshop.arguments(stage, folder, [0, 1, 2])
    # Client 1 has lost its training set for a while.
    broken = workshop.folder / f"tokens-{ranks}"
    shutil.copytree(workshop.tokens, broken)
    whole = (broken / "clients.json").read_text()
    arguments[arguments.index(workshop.tokens)] = broken
    (broken / "clients.json").write_text(without_training_examples(whole, client=1))
    failed = fedamole(*arguments)
    assert failed.returncode == 2
    assert (
        "failed: chatterbot-dir0.5-s42 fedamole round 1 client 1 has no training" in failed.stderr
    )
    assert "no result of clients 1; the 2 that are done are kept" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not [*folder.glob("client_*.h5")]
    states = {item.client: item for item in read_progress(folder / "progress")}
    assert [states[k].state for k in range(3)] == ["done", "failed", "done"]
    assert states[1].error and "no training examples" in states[1].error

    (broken / "clients.json").write_text(whole)
    log = succeed(*arguments)
    assert "clients 0, 2 were done by an earlier attempt" in log
    assert "round 1 client 1: " in log
    assert "round 1 client 0: " not in log
    assert sorted(path.name for path in (folder / "progress").iterdir()) == [
        f"train_00{k}.json" for k in range(3)
    ]
    if ranks == 1:
        for name in ("client_0.h5", "client_1.h5", "metrics_0.json", "metrics_1.json"):
            assert (folder / name).read_bytes() == (one_rank / name).read_bytes()


def test_clients_that_all_fail_alike_are_not_dropped(workshop: Workshop) -> None:
    stage, folder = workshop.stage(), workshop.folder / "alike"
    workshop.init(folder.name, stage)
    broken = workshop.folder / "tokens-alike"
    shutil.copytree(workshop.tokens, broken)
    content = (broken / "clients.json").read_text()
    for client in (1, 2):
        content = without_training_examples(content, client)
    (broken / "clients.json").write_text(content)
    arguments = workshop.arguments(stage, folder, [1, 2])
    arguments[arguments.index(workshop.tokens)] = broken
    failed = fedamole(*arguments, "--quorum", "0.3")
    assert failed.returncode == 2
    assert "no result of clients 1, 2" in failed.stderr
    assert "drops out" not in failed.stderr and "Traceback" not in failed.stderr
    assert not [*folder.glob("client_*.h5")]


def test_a_mistake_that_is_none_of_the_client_fails_the_job_and_drops_nobody(
    workshop: Workshop,
) -> None:
    stage, folder = workshop.stage(), workshop.folder / "mistaken"
    pool, assignment = workshop.init(folder.name, stage)
    shutil.copy(assignment, pool)
    failed = fedamole(*workshop.arguments(stage, folder, [0]), "--quorum", "0.3")
    assert failed.returncode == 2
    assert f"fedamole: {pool}: holds assignment; pool is needed" in failed.stderr
    assert "no result of clients 0" in failed.stderr
    assert "drops out" not in failed.stderr and "Traceback" not in failed.stderr
    (record,) = read_progress(folder / "progress")
    assert (record.state, record.attempt) == ("failed", 0)


def without_training_examples(clients_json: str, client: int) -> str:
    record = json.loads(clients_json)
    start, _ = record["clients"][client]["train"]
    record["clients"][client]["train"] = [start, start]
    return json.dumps(record)


def test_files_of_other_inputs_are_not_taken_for_done(workshop: Workshop) -> None:
    folder = workshop.train("kept", [0])
    shutil.copy(folder / "client_0.h5", folder / "progress" / "client_0.h5")
    shutil.copy(folder / "metrics_0.json", folder / "progress" / "metrics_0.json")
    stage = workshop.stage()
    log = succeed(*workshop.arguments(stage, folder, [0]))
    assert "clients 0 were done" in log and "round 1 client 0" not in log

    (folder / "progress").mkdir(exist_ok=True)
    shutil.copy(folder / "client_0.h5", folder / "progress" / "client_0.h5")
    shutil.copy(folder / "metrics_0.json", folder / "progress" / "metrics_0.json")
    other = workshop.stage(learning_rate=2e-3)
    workshop.init("kept", other)
    log = succeed(*workshop.arguments(other, folder, [0]))
    assert "were done" not in log and "round 1 client 0" in log


@pytest.mark.parametrize("deepspeed", ["zero1", "zero3"])
def test_adapters_stay_float32_over_a_bfloat16_backbone(
    workshop: Workshop, one_rank: Path, deepspeed: str
) -> None:
    bfloat16 = workshop.changed(backbone={"dtype": "bfloat16"})
    folder = bfloat16.train(f"bfloat16-{deepspeed}", [0], deepspeed=deepspeed)
    for name, array in tensors(folder / "client_0.h5").items():
        assert array.dtype == np.float32, name
        # Of numbers rounded to bfloat16 the lower half of the bits would be zero.
        assert (np.ascontiguousarray(array).view(np.uint32) & 0xFFFF).any(), name
    exact, rounded = metrics(one_rank / "metrics_0.json"), metrics(folder / "metrics_0.json")
    for key in ("train_loss_first", "train_loss_last", "eval_loss"):
        assert rounded[key] == pytest.approx(exact[key], rel=5e-3)
        assert rounded[key] != exact[key]


def test_gradient_checkpointing_gives_the_same_weights(workshop: Workshop, one_rank: Path) -> None:
    checkpointing = workshop.changed(backbone={"gradient_checkpointing": True})
    folder = checkpointing.train("checkpointing", [0])
    expected, found = tensors(one_rank / "client_0.h5"), tensors(folder / "client_0.h5")
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-6, err_msg=name)
    routed = read_upload(one_rank / "client_0.h5").tokens
    for name, counts in read_upload(folder / "client_0.h5").tokens.items():
        assert np.array_equal(counts, routed[name])


def test_steps_follow_from_epochs() -> None:
    settings = TrainingSettings(local_epochs=3, batch_size=4)
    assert settings.most_steps(num_examples=10) == 8
    assert TrainingSettings().most_steps(num_examples=10) == 200


def test_the_learning_rate_decays_from_round_to_round() -> None:
    assert learning_rate(TrainingSettings(learning_rate=1.0), round_=3) == pytest.approx(0.99**2)


def test_training_moves_every_kind_of_tensor(one_rank: Path) -> None:
    stage_free = read_client_state(
        one_rank / "pool.h5", read_assignment(one_rank / "assignment.h5"), client=0
    )
    trained = read_upload(one_rank / "client_0.h5").state
    for name, group in stage_free.groups.items():
        for key, before in {**group.experts}.items():
            assert not np.array_equal(before, trained.groups[name].experts[key]), key
        for key, before in group.shared.items():
            assert not np.array_equal(before, trained.groups[name].shared[key]), key


def test_a_client_trained_alone_gives_the_same_bytes(workshop: Workshop, one_rank: Path) -> None:
    alone = workshop.train("alone", [1])
    for name in ("client_1.h5", "metrics_1.json"):
        assert (alone / name).read_bytes() == (one_rank / name).read_bytes()


def test_fedit_is_plain_lora_trained_by_hand(workshop: Workshop) -> None:
    """The whole path from tokens to upload against PEFT's LoRA and a plain training loop."""
    import torch
    from peft import LoraConfig, get_peft_model

    from fedamole.backbone import load_backbone
    from fedamole.batches import stream_of_examples
    from fedamole.datasets.tokens import TokenStore

    # Dropout masks have no common order with PEFT's.
    without_dropout = workshop.changed(adapter={"dropout": 0.0})
    folder = without_dropout.train("fedit", [2], run="fedit", batch_size=1)
    stage = without_dropout.stage("fedit", batch_size=1)

    torch.set_num_threads(1)
    model = load_backbone(workshop.backbone, stage.run.backbone)
    config = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(model, config)
    initial = read_client_state(folder / "pool.h5", None, client=2)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    with torch.no_grad():
        for group in initial.groups.values():
            for index, module in enumerate(group.modules):
                for key in ("lora_A", "lora_B"):
                    weight = torch.from_numpy(group.shared[key][index])
                    getattr(layers[module], key)["default"].weight.copy_(weight)
    store = TokenStore.open(workshop.tokens)
    rows = store.clients[2]
    train_rows = np.concatenate([rows.train, rows.embedding])
    order = train_rows[stream_of_examples(len(train_rows), 0, 4, stage.run.seed, 2)]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-3)
    for row in order:
        ids = torch.from_numpy(store.ids(row).astype(np.int64))[None]
        labels = ids.clone()
        labels[:, : store.prompt_length(row)] = -100
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()

    uploaded = read_upload(folder / "client_2.h5").state
    for group in uploaded.groups.values():
        for index, module in enumerate(group.modules):
            for key in ("lora_A", "lora_B"):
                expected = getattr(layers[module], key)["default"].weight.detach().numpy()
                np.testing.assert_allclose(group.shared[key][index], expected, atol=2e-6)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (4, "round 1 client 0: the loss of step 2 is nan; try a lower training: learning_rate"),
        (1, "round 1 client 0: the trained model is not finite (eval loss nan); try a lower"),
    ],
)
def test_a_training_that_diverges_is_one_clear_line(
    workshop: Workshop, steps: int, message: str
) -> None:
    stage = workshop.stage(learning_rate=1e30, steps=steps)
    pool, assignment = workshop.init(f"diverged-{steps}", stage)
    done = workshop.try_training(stage, pool, assignment)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in pool.parent.iterdir()) == [
        "assignment.h5",
        "pool.h5",
        "progress",
    ]


DP_SGD = {"noise_multiplier": 0.8, "max_grad_norm": 0.5, "delta": 1e-3}


@pytest.fixture(scope="module")
def private(workshop: Workshop) -> Workshop:
    """The same files with both kinds of privacy."""
    raw = {"dp_sgd": DP_SGD, "embeddings": {"eta": 50.0}}
    other = copy.copy(workshop)
    other.raw = {**workshop.raw, "privacy": raw, "training": {**workshop.raw["training"]}}
    del other.raw["training"]["micro_batch_size"]
    return other


@pytest.fixture(scope="module")
def privately(private: Workshop) -> Path:
    return private.train("private", [0, 1])


def test_private_training_is_the_same_on_two_ranks(private: Workshop, privately: Path) -> None:
    folder = private.train("private-2", [0], ranks=2, deepspeed="zero2")
    expected, found = tensors(privately / "client_0.h5"), tensors(folder / "client_0.h5")
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5, err_msg=name)


def test_a_client_trained_privately_alone_gives_the_same_bytes(
    private: Workshop, privately: Path
) -> None:
    alone = private.train("private-alone", [1])
    for name in ("client_1.h5", "metrics_1.json"):
        assert (alone / name).read_bytes() == (privately / name).read_bytes()


def test_metrics_say_what_a_client_has_spent(
    private: Workshop, privately: Path, one_rank: Path
) -> None:
    settings = private.stage().run.privacy.dp_sgd
    assert settings is not None
    for client in (0, 1):
        found = metrics(privately / f"metrics_{client}.json")
        assert found["epsilon"] == epsilon(settings, 4, found["num_train"], steps=4) > 0.1
        assert found["delta"] == 1e-3
        upload = read_upload(privately / f"client_{client}.h5")
        assert not any(counts.any() for counts in upload.tokens.values())
    assert "epsilon" not in metrics(one_rank / "metrics_0.json")


def test_noise_on_embeddings_changes_nothing_else(workshop: Workshop, one_rank: Path) -> None:
    noisy = copy.copy(workshop)
    noisy.raw = {**workshop.raw, "privacy": {"embeddings": {"eta": 5.0}}}
    folder = noisy.train("noisy", [0])
    clean, found = (read_upload(path / "client_0.h5") for path in (one_rank, folder))
    stage = noisy.stage().run
    assert stage.privacy.embeddings is not None
    expected = perturb_embedded(
        Embedded(clean.client_embeddings_MR, clean.expert_embeddings),
        clean.state,
        stage.privacy.embeddings,
        stage.seed,
        round_=1,
        client=0,
    )
    assert np.array_equal(found.client_embeddings_MR, expected.client_MR)
    assert not np.array_equal(found.client_embeddings_MR, clean.client_embeddings_MR)
    before, after = tensors(one_rank / "client_0.h5"), tensors(folder / "client_0.h5")
    for name, array in before.items():
        if "embeddings" not in name:
            assert np.array_equal(after[name], array), name
    for name, array in expected.experts.items():
        assert np.array_equal(found.expert_embeddings[name], array)
    assert metrics(folder / "metrics_0.json") == metrics(one_rank / "metrics_0.json")
