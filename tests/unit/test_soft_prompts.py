"""Soft prompts: what they compute, what is trained, where they start, and a federated round."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONFIGS, POSITIONS, make_backbone, settings_of
from federation import CLIENTS, Federation, Round
from naive import check_choices
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scipy.stats import kstest
from tiny import EOS, make_store
from transformers import PreTrainedModel

from fedamole.artifacts import Header, write_record
from fedamole.backbone import load_backbone, load_tokenizer
from fedamole.batches import Batch, collate
from fedamole.cli.session_checks import prompt_length
from fedamole.client import ClientReport
from fedamole.config import load_config
from fedamole.config_files import read_yaml
from fedamole.errors import FedamoleError
from fedamole.generation import generate
from fedamole.methods import load
from fedamole.pool_files import write_pool
from fedamole.pools import ClientGroup, ClientState, Pool
from fedamole.settings import AdapterSettings, EvaluationSettings, TrainingSettings
from fedamole.soft_prompts import SOFT_PROMPT
from fedamole.stages import RunStage, digest, run_stage
from fedamole.targets import BackboneFacts
from fedamole.token_embeddings import embedding_width, embeddings_of
from fedamole.training import LocalTraining, ScoredModel, engine_for, train, trained_tensors

pytestmark = [
    pytest.mark.usefixtures("group"),
    pytest.mark.filterwarnings("ignore:`torch.distributed.*` is deprecated:FutureWarning"),
]

CHECKOUT = Path(__file__).parents[2]
CPU = torch.device("cpu")
VIRTUAL, HIDDEN = 5, 24
TEXT = "What is a robot?"
RUNS = ["fedprompt", "fedptuning"]


@dataclass(frozen=True)
class Tiny:
    """A prepared backbone."""

    family: str
    folder: Path
    facts: dict[str, Any]

    @property
    def prepared(self) -> Path:
        return self.folder / "prepared"

    def load(self, **changes: Any) -> PreTrainedModel:
        settings = settings_of(self.family, self.folder / "model", **changes)
        return load_backbone(self.prepared, settings)

    def run(self, run: str, max_length: int = 16, **prompt: Any) -> RunStage:
        raw = read_yaml(CHECKOUT / "configs/smoke.yaml") | {"methods": [run], "prompt": prompt}
        raw["backbone"] = {"name": self.family, "folder": str(self.folder / "model")}
        raw["scenarios"][0]["max_length"] = max_length
        config = load_config(raw, CHECKOUT / "configs")
        return run_stage(config, next(iter(config.scenario_seeds())), run)

    def first_pool(self, run: str, **prompt: Any) -> Pool:
        facts = BackboneFacts([], self.prepared)
        return load(run).init_pool(self.run(run, **prompt), facts)


@pytest.fixture(scope="module")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """One backbone per family."""
    made: dict[str, Tiny] = {}

    def tiny_of(family: str) -> Tiny:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = Tiny(family, folder, make_backbone(folder, family))
            write_facts(made[family].prepared, made[family].facts)
        return made[family]

    return tiny_of


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    write_record(folder / "backbone.json", Header("backbone", "0" * 64), facts)


@pytest.fixture(params=list(CONFIGS))
def tiny(request: pytest.FixtureRequest, make_tiny: Callable[[str], Tiny]) -> Tiny:
    return make_tiny(request.param)


@pytest.fixture
def llama(make_tiny: Callable[[str], Tiny]) -> Tiny:
    return make_tiny("llama")


def state_of(tiny: Tiny, run: str) -> ClientState:
    """A soft prompt with values of a size that matters."""
    width = embedding_width(tiny.prepared, settings_of(tiny.family, tiny.folder))
    rng = np.random.default_rng(4)
    shapes = {"embedding.weight": (1, VIRTUAL, width)}
    if run == "fedptuning":
        for layer, (inputs, outputs) in {0: (width, HIDDEN), 2: (HIDDEN, HIDDEN)}.items():
            shapes[f"mlp_head.{layer}.weight"] = (1, outputs, inputs)
            shapes[f"mlp_head.{layer}.bias"] = (1, outputs)
        shapes |= {"mlp_head.4.weight": (1, width, HIDDEN), "mlp_head.4.bias": (1, width)}
    shared = {name: rng.normal(scale=0.5, size=s).astype(np.float32) for name, s in shapes.items()}
    none = np.zeros(0, dtype=np.int64)
    return ClientState({"prompt": ClientGroup(("prompt",), {}, none, none, shared)})


def inserted(backbone: PreTrainedModel, state: ClientState) -> Any:
    return SOFT_PROMPT.insert(backbone, state, AdapterSettings()).eval()


def prompt_by_hand(state: ClientState) -> torch.Tensor:
    """The embeddings of the virtual tokens, in NumPy."""
    shared = {name: array[0] for name, array in state.groups["prompt"].shared.items()}
    values = shared["embedding.weight"]
    if "mlp_head.0.weight" in shared:
        for layer in (0, 2, 4):
            values = (
                values @ shared[f"mlp_head.{layer}.weight"].T + shared[f"mlp_head.{layer}.bias"]
            )
            values = values if layer == 4 else np.maximum(values, 0)
    return torch.from_numpy(values)


@torch.no_grad()
def logits_by_hand(backbone: PreTrainedModel, state: ClientState, ids: torch.Tensor) -> Any:
    """One sequence behind the prompt, all positions: (V + T, vocabulary)."""
    tokens = backbone.get_input_embeddings()(ids)
    together = torch.cat([prompt_by_hand(state).to(tokens.dtype), tokens])
    return backbone(inputs_embeds=together[None], use_cache=False).logits[0]


def sequences(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(EOS + 1, 300, size=length) for length in lengths]


def ragged_batch() -> Batch:
    return collate(sequences(5, 12, 9), [2, 7, 4], 0)


# What the model computes


@pytest.mark.parametrize("run", RUNS)
def test_losses_of_a_batch_are_those_of_embeddings_joined_by_hand(tiny: Tiny, run: str) -> None:
    """Padding, positions and the choice of logits against one plain pass per sequence."""
    backbone, state = tiny.load(), state_of(tiny, run)
    alone = []
    for row, prompt in zip(sequences(5, 12, 9), [2, 7, 4], strict=True):
        ids = torch.from_numpy(row)
        scores = logits_by_hand(backbone, state, ids)[VIRTUAL:].double().log_softmax(-1)
        chosen = scores[torch.arange(len(ids) - 1), ids[1:]]
        alone.append(-chosen[prompt - 1 :].sum())
    scored = ScoredModel(inserted(backbone, state), 0.0).eval()
    with torch.no_grad():
        together, _ = scored(ragged_batch())
    torch.testing.assert_close(together.double(), torch.stack(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_losses_are_those_of_peft(llama: Tiny, run: str) -> None:
    state, batch = state_of(llama, run), ragged_batch()
    with torch.no_grad():
        found, _ = ScoredModel(inserted(llama.load(), state), 0.0).eval()(batch)
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL}
    config = PromptTuningConfig(**common)
    if run == "fedptuning":
        config = PromptEncoderConfig(encoder_hidden_size=HIDDEN, **common)
    model = get_peft_model(llama.load(), config)
    shared = state.groups["prompt"].shared
    model.prompt_encoder["default"].load_state_dict(
        {name: torch.from_numpy(array[0]) for name, array in shared.items()}
    )
    labels = torch.full_like(batch.input_ids, -100)
    labels[:, 1:][:, batch.positions] = batch.targets
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        expected = model.eval()(**inputs, labels=labels).loss
    torch.testing.assert_close(found.sum() / batch.num_targets, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_answers_in_a_padded_batch_are_those_of_argmax_token_by_token(tiny: Tiny, run: str) -> None:
    """No cache, no padding, no generate(): the whole sequence again for every new token."""
    prompts = sequences(4, 13, 9, 17)
    store = make_store([ids.tolist() for ids in prompts], [1] * 4, choices=[])
    backbone, state = tiny.load(), state_of(tiny, run)
    expected = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt)
        while len(ids) < len(prompt) + 8 and EOS not in ids:
            following = logits_by_hand(backbone, state, ids)[-1].argmax()
            ids = torch.cat([ids, following[None]])
        expected.append([token for token in ids[len(prompt) :].tolist() if token != EOS])
    assert len({tuple(answer) for answer in expected}) == 4
    for batch_size in (1, 4):
        settings = EvaluationSettings(batch_size=batch_size, max_new_tokens=8)
        assert generate(inserted(backbone, state), prompts, store, settings, CPU) == expected


@pytest.mark.parametrize("run", RUNS)
def test_choices_after_one_prompt_have_the_losses_of_each_alone(tiny: Tiny, run: str) -> None:
    backbone, state = tiny.load(), state_of(tiny, run)
    check_choices(
        inserted(backbone, state),
        lambda ids: logits_by_hand(backbone, state, ids)[VIRTUAL:],
        sequences(4, 13, 9, 17, 9, 1),
    )


def test_the_prompt_changes_the_answer(llama: Tiny) -> None:
    prompts, backbone = sequences(9), llama.load()
    store = make_store([ids.tolist() for ids in prompts], [1], choices=[])
    settings = EvaluationSettings(max_new_tokens=8)
    plain = generate(backbone, prompts, store, settings, CPU)
    model = inserted(backbone, state_of(llama, "fedprompt"))
    assert generate(model, prompts, store, settings, CPU) != plain


# What is trained


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("run", RUNS)
def test_gradients_are_those_of_the_prompt_and_of_nothing_else(
    tiny: Tiny, run: str, checkpointing: bool
) -> None:
    """Against the gradient through embeddings that were joined by hand."""
    state = state_of(tiny, run)
    backbone = tiny.load(gradient_checkpointing=checkpointing)
    model = inserted(backbone, state)
    if checkpointing:
        model.train()
        for layer in model.modules():
            # OPT drops activations.
            layer.dropout = 0.0
    prompt = model.prompt_encoder(torch.arange(VIRTUAL)[None])
    (loss_B, _) = ScoredModel(model, 0.0)(ragged_batch())
    loss_B.sum().backward()
    named = {name for name, p in model.named_parameters() if p.grad is not None}
    assert named == {f"prompt_encoder.{name}" for name in state.groups["prompt"].shared}
    found = {name: p.grad for name, p in model.prompt_encoder.named_parameters()}

    plain, leaf = tiny.load(), prompt.detach().requires_grad_()
    total = torch.zeros(())
    for row, length in zip(sequences(5, 12, 9), [2, 7, 4], strict=True):
        ids = torch.from_numpy(row)
        joined = torch.cat([leaf[0], plain.get_input_embeddings()(ids)])[None]
        logits = plain(inputs_embeds=joined, use_cache=False).logits[0]
        scores = logits[VIRTUAL + length - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(scores, ids[length:], reduction="sum")
    total.backward()
    parameters = dict(model.prompt_encoder.named_parameters())
    expected = torch.autograd.grad(
        prompt, list(parameters.values()), grad_outputs=leaf.grad.float()
    )
    for name, gradient in zip(parameters, expected, strict=True):
        assert (found[name] - gradient).norm() < 1e-3 * gradient.norm()


def trained(backbone: PreTrainedModel, state: ClientState, **changes: Any) -> ClientState:
    """Four steps on one batch."""
    settings = TrainingSettings(steps=4, batch_size=3, **changes)
    model = SOFT_PROMPT.insert(backbone, state, AdapterSettings())
    with engine_for(ScoredModel(model, 0.0), settings, 1e-2) as engine:
        place = LocalTraining(seed=1, round=1, client=0)
        record = train(engine, iter([[ragged_batch()]] * 4), 4, place, settings, CPU)
        result = SOFT_PROMPT.extract(trained_tensors(engine, settings.zero_stage), state)
    SOFT_PROMPT.remove(model)
    assert record.loss_last and record.loss_first and record.loss_last < record.loss_first
    return result


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_backbone_without_its_prompt_is_what_it_was_bit_by_bit(
    family: str, run: str, make_tiny: Callable[[str], Tiny]
) -> None:
    tiny = make_tiny(family)
    backbone, state = tiny.load(), state_of(tiny, run)
    inputs = {"input_ids": ragged_batch().input_ids, "use_cache": False}
    with torch.no_grad():
        expected = backbone(**inputs).logits
    result = trained(backbone, state)
    with torch.no_grad():
        assert torch.equal(backbone(**inputs).logits, expected)
    for name, before in state.groups["prompt"].shared.items():
        after = result.groups["prompt"].shared[name]
        assert after.shape == before.shape
        assert not np.array_equal(after, before), name


@pytest.mark.parametrize("run", RUNS)
def test_a_prompt_stays_float32_before_a_bfloat16_backbone(llama: Tiny, run: str) -> None:
    state = state_of(llama, run)
    result = trained(llama.load(dtype="bfloat16"), state)
    exact = trained(llama.load(), state)
    for name, array in result.groups["prompt"].shared.items():
        assert array.dtype == np.float32, name
        # Of numbers rounded to bfloat16 the lower half of the bits would be zero.
        assert (np.ascontiguousarray(array).view(np.uint32) & 0xFFFF).any(), name
        np.testing.assert_allclose(array, exact.groups["prompt"].shared[name], atol=0.1)


# Where it starts


def test_a_text_prompt_starts_as_the_embeddings_of_its_text(tiny: Tiny) -> None:
    """As the loaded model embeds them: Gemma scales, OPT has a width of its own."""
    tokenizer = load_tokenizer(tiny.prepared, settings_of(tiny.family, tiny.folder))
    ids = torch.tensor(tokenizer(TEXT).input_ids)
    group = tiny.first_pool("fedprompt", text=TEXT).groups["prompt"]
    expected = tiny.load().get_input_embeddings()(ids).detach()
    assert group.modules == ("prompt",)
    assert list(group.shared) == ["embedding.weight"]
    found = group.shared["embedding.weight"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected[None].numpy())


def test_a_text_prompt_starts_where_that_of_peft_does(llama: Tiny) -> None:
    found = llama.first_pool("fedprompt", text=TEXT).groups["prompt"].shared["embedding.weight"]
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=found.shape[1],
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=TEXT,
        tokenizer_name_or_path=str(llama.prepared),
    )
    expected = get_peft_model(llama.load(), config).prompt_encoder["default"].embedding.weight
    np.testing.assert_array_equal(found[0], expected.detach().numpy())


@pytest.mark.parametrize("layout", ["rows alone", "shards", "tied", "no prefix", "bin"])
def test_embeddings_are_found_however_the_weights_are_stored(
    layout: str, make_tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    tiny = make_tiny("qwen2")
    settings, ids = settings_of("qwen2", tiny.folder), [7, 3, 299, 3]
    expected = embeddings_of(tiny.prepared, settings, ids)
    (tmp_path / "config.json").write_text((tiny.prepared / "config.json").read_text())
    tensors, name = load_file(tiny.prepared / "model.safetensors"), "model.embed_tokens.weight"
    if layout == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    elif layout == "shards":
        weight_map = dict.fromkeys(tensors, "a.safetensors") | {name: "b.safetensors"}
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file({name: tensors.pop(name)}, tmp_path / "b.safetensors")
        save_file(tensors, tmp_path / "a.safetensors")
    else:
        # The other tensors are not there: whoever reads them would fail.
        stored = {"tied": "lm_head.weight", "no prefix": "embed_tokens.weight"}.get(layout, name)
        save_file({stored: tensors[name]}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(embeddings_of(tmp_path, settings, ids), expected)


def test_an_encoder_starts_as_torch_would_draw_it(llama: Tiny) -> None:
    shared = llama.first_pool("fedptuning").groups["prompt"].shared
    names = get_peft_model(
        llama.load(),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, encoder_hidden_size=1024),
    ).prompt_encoder["default"]
    assert {name: array.shape[1:] for name, array in shared.items()} == {
        name: tuple(parameter.shape) for name, parameter in names.named_parameters()
    }
    assert kstest(shared["embedding.weight"].ravel(), "norm").pvalue > 0.01
    widths = {"mlp_head.0": 64, "mlp_head.2": 1024, "mlp_head.4": 1024}
    for layer, inputs in widths.items():
        for key in ("weight", "bias"):
            scaled = shared[f"{layer}.{key}"].ravel() * np.sqrt(inputs)
            assert kstest(scaled, "uniform", args=(-1, 2)).pvalue > 0.01, (layer, key)


def test_a_wider_encoder_leaves_the_table_as_it_was(llama: Tiny) -> None:
    tables = [
        llama.first_pool("fedptuning", encoder_width=width).groups["prompt"].shared
        for width in (16, 32)
    ]
    assert np.array_equal(tables[0]["embedding.weight"], tables[1]["embedding.weight"])


def test_a_text_without_tokens_is_refused(tmp_path: Path, llama: Tiny) -> None:
    for path in llama.prepared.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = llama.run("fedprompt", text="  ")
    with pytest.raises(FedamoleError, match="prompt: text '  ' has no token; a soft prompt needs"):
        load("fedprompt").init_pool(settings, BackboneFacts([], tmp_path))


@pytest.mark.parametrize("run", RUNS)
def test_a_prompt_that_takes_the_last_positions_is_refused(
    run: str, make_tiny: Callable[[str], Tiny]
) -> None:
    """The tiny OPT has 48 learned positions; max_length is 16 and more."""
    opt = make_tiny("opt")
    facts = BackboneFacts([], opt.prepared)
    pool = load(run).init_pool(opt.run(run, text=TEXT), facts)
    virtual = pool.groups["prompt"].shared["embedding.weight"].shape[1]
    load(run).init_pool(opt.run(run, max_length=POSITIONS - virtual, text=TEXT), facts)
    with pytest.raises(FedamoleError) as raised:
        load(run).init_pool(opt.run(run, max_length=POSITIONS - virtual + 1, text=TEXT), facts)
    assert f"a soft prompt of {virtual} tokens need {POSITIONS + 1}; lower" in str(raised.value)


# A federated round


PROMPT = {"virtual_tokens": 4, "encoder_width": 8, "text": TEXT}


@pytest.fixture(scope="module", params=RUNS)
def round_(
    request: pytest.FixtureRequest, federation: Federation, tmp_path_factory: Any
) -> tuple[str, Round]:
    session = federation.session(request.param, prompt=PROMPT)
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, next(federation.rounds(session, folder, count=1))


def test_the_next_prompt_is_the_mean_of_the_uploads(round_: tuple[str, Round]) -> None:
    _, done = round_
    assert len(done.uploads) == CLIENTS
    for name, array in done.pool.groups["prompt"].shared.items():
        parts = [upload.state.groups["prompt"].shared[name] for upload in done.uploads]
        expected = np.mean(np.array(parts, dtype=np.float64), axis=0)
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7)
        before = done.previous.groups["prompt"].shared[name]
        for part in parts:
            assert not np.array_equal(part, before)
    assert done.pool.provenance
    assert done.pool.provenance.num_examples_K.tolist() == [11] * CLIENTS


def test_files_keep_a_prompt_as_it_is(round_: tuple[str, Round]) -> None:
    _, done = round_
    for upload in done.uploads:
        sent = done.results[upload.client].upload.state.groups["prompt"]
        for name, array in sent.shared.items():
            assert np.array_equal(upload.state.groups["prompt"].shared[name], array)
        received = done.states[upload.client].groups["prompt"].shared
        for name, array in done.previous.groups["prompt"].shared.items():
            assert np.array_equal(received[name], array)


def test_the_average_is_tested_with_the_prompt_of_the_pool(
    round_: tuple[str, Round], federation: Federation
) -> None:
    """Its loss by hand; and it is neither that of the local model (-ft) nor of the first prompt."""
    run, done = round_
    method, session = load(run), federation.session(run, prompt=PROMPT)
    none = np.zeros(0, dtype=np.int64)

    def tested(pool: Pool, client: int) -> ClientReport:
        shared = pool.groups["prompt"].shared
        state = ClientState({"prompt": ClientGroup(("prompt",), {}, none, none, shared)})
        report = method.evaluate_client(session, client, 1, state)
        assert report.eval_loss == pytest.approx(loss_by_hand(session, client, state), abs=1e-5)
        return report

    for client in range(CLIENTS):
        local = done.results[client].report.eval_loss
        average, first = tested(done.pool, client), tested(done.previous, client)
        assert average.training is None
        assert len({local, average.eval_loss, first.eval_loss}) == 3


def loss_by_hand(session: Any, client: int, state: ClientState) -> float:
    store = session.store
    backbone = load_backbone(session.folder, session.settings.run.backbone)
    losses = []
    for row in store.clients[client].eval:
        ids = torch.from_numpy(store.ids(row).astype(np.int64))
        start, length = store.prompt_length(row), len(prompt_by_hand(state))
        scores = logits_by_hand(backbone, state, ids)[length + start - 1 : -1]
        losses += torch.nn.functional.cross_entropy(scores, ids[start:], reduction="none").tolist()
    return float(np.mean(losses))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sliced_weights_train_answer_and_test_alike(
    round_: tuple[str, Round], federation: Federation, checkpointing: bool
) -> None:
    """ZeRO-3, where the token embeddings are cut too, against whole weights."""
    run, done = round_
    loading = {"gradient_checkpointing": checkpointing}
    whole = federation.session(run, prompt=PROMPT)
    sliced = federation.session(
        run, prompt=PROMPT, backbone=loading, training={"deepspeed": "zero3"}
    )
    assert sliced.settings.run.training.zero_stage == 3
    result = load(run).train_client(sliced, 0, 1, done.states[0], None)
    for name, array in done.results[0].upload.state.groups["prompt"].shared.items():
        found = result.upload.state.groups["prompt"].shared[name]
        np.testing.assert_allclose(found, array, rtol=0, atol=1e-5, err_msg=name)
    tested = [load(run).evaluate_client(s, 0, 0, done.states[0]) for s in (whole, sliced)]
    for one, other in (tested, (done.results[0].report, result.report)):
        assert one.eval_loss == pytest.approx(other.eval_loss, abs=1e-5)
        assert one.score == other.score


def test_a_job_counts_the_prompt_that_its_pool_has(
    federation: Federation, round_: tuple[str, Round], tmp_path: Path
) -> None:
    run, done = round_
    settings = federation.stage(run, prompt=PROMPT).run
    write_pool(tmp_path / "pool.h5", Header("pool", digest(settings)), done.previous)
    expected = done.states[0].groups["prompt"].shared["embedding.weight"].shape[1]
    assert prompt_length(settings, tmp_path / "pool.h5") == expected > 0
    assert prompt_length(federation.stage("fedit").run, tmp_path / "none.h5") == 0
