"""FML and FedAPEN against two separate PEFT models, full logits and plain loops."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONFIGS
from federation import Federation, Round, contents
from naive import check_choices
from peft import LoraConfig, get_peft_model
from scipy.optimize import minimize_scalar
from tiny import make_store
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedamole.backbone import load_backbone
from fedamole.batches import Batch, collate
from fedamole.evaluation import evaluation_loss
from fedamole.generation import generate
from fedamole.hmole_peft import hmole_layers
from fedamole.methods.building_blocks import two_experts, with_two_experts
from fedamole.mutual import Ensemble, MutualModel, fit_weight
from fedamole.pools import ClientGroup, ClientState
from fedamole.settings import AdapterSettings, EvaluationSettings, FedapenSettings

pytestmark = pytest.mark.usefixtures("group")

ADAPTER = AdapterSettings(rank=3, alpha=6, dropout=0.0)
TARGETS = {key: ["q_proj", "v_proj"] for key in CONFIGS} | {"falcon": ["query_key_value"]}
CPU = torch.device("cpu")


def make_backbone(family: str = "llama") -> PreTrainedModel:
    """Weights large enough that adapters change which token is the likeliest."""
    torch.manual_seed(1)
    config = copy.deepcopy(CONFIGS[family])
    config._attn_implementation = "eager" if family == "gemma2" else "sdpa"
    # Tied to its inputs, a random model says the last token again and again.
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval().requires_grad_(False)


def make_pair(backbone: PreTrainedModel, family: str = "llama") -> ClientState:
    """A private and a shared LoRA of random values."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(scale=0.5, size=shape).astype(np.float32)

    modules: dict[str, list[str]] = {}
    for name, module in backbone.named_modules():
        if name.rpartition(".")[2] in TARGETS[family]:
            modules.setdefault(name.rpartition(".")[2], []).append(name)
            width, height = module.in_features, module.out_features
    groups, tensors = {}, {}
    for leaf, names in modules.items():
        module = backbone.get_submodule(names[0])
        width, height = module.in_features, module.out_features
        tensors[leaf] = {"lora_A": draw(2, 2, 3, width), "lora_B": draw(2, 2, height, 3)}
        nothing = np.zeros(0, dtype=np.int64)
        groups[leaf] = ClientGroup(tuple(names), {}, nothing, nothing, {})
    return with_two_experts(ClientState(groups), tensors)


def peft_models(family: str = "llama", backbone: PreTrainedModel | None = None) -> list[nn.Module]:
    """The private and the shared model, each by itself."""
    backbone = backbone or make_backbone(family)
    tensors = two_experts(pair := make_pair(backbone, family))
    models = []
    for expert in (0, 1):
        config = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=TARGETS[family])
        model = get_peft_model(copy.deepcopy(backbone), config)
        for name, group in pair.groups.items():
            for index, module in enumerate(group.modules):
                layer = model.get_submodule(f"base_model.model.{module}")
                for key in ("lora_A", "lora_B"):
                    value = torch.from_numpy(tensors[name][key][index, expert].copy())
                    getattr(layer, key)["default"].weight.data = value
        models.append(model)
    return models


def mutual(
    joint_loss: bool, weight: float = 0.3, family: str = "llama", checkpointing: bool = False
) -> MutualModel:
    backbone = make_backbone(family)
    if checkpointing:
        backbone.activation_checkpointing_enable({"use_reentrant": False})
        backbone.enable_input_require_grads()
    form = Ensemble(weight).form(joint_loss)
    scored = form.scored(form.insert(backbone, make_pair(backbone, family), ADAPTER), 0.1)
    assert isinstance(scored, MutualModel)
    return scored


def sequences(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 300, size=length) for length in lengths]


LENGTHS, PROMPTS = (9, 14, 11), (3, 8, 4)


def make_batch() -> Batch:
    return collate(sequences(*LENGTHS), PROMPTS, 0)


def logits_of_responses(model: nn.Module, row: int) -> tuple[Tensor, Tensor]:
    """Logits (T, V) of one sequence alone, and the tokens that follow."""
    ids = torch.from_numpy(sequences(*LENGTHS)[row])
    logits_TV = model(input_ids=ids[None]).logits[0]
    return logits_TV[PROMPTS[row] - 1 : -1], ids[PROMPTS[row] :]


def naive_loss(models: list[nn.Module], weight: float | None, row: int) -> Tensor:
    """The losses of the module's docstring, from full logits of two models."""
    (private, targets), (shared, _) = [logits_of_responses(model, row) for model in models]
    p, q = private.softmax(-1), shared.softmax(-1)
    loss = functional.cross_entropy(private, targets, reduction="sum")
    loss = loss + functional.cross_entropy(shared, targets, reduction="sum")
    loss = loss + functional.kl_div(p.log(), q.detach(), reduction="sum")
    loss = loss + functional.kl_div(q.log(), p.detach(), reduction="sum")
    if weight is not None:
        mixed = weight * p + (1 - weight) * q
        loss = loss + functional.nll_loss(mixed.log(), targets, reduction="sum")
    return loss


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("joint_loss", [False, True])
def test_losses_and_gradients_are_those_of_two_separate_models(
    joint_loss: bool, checkpointing: bool
) -> None:
    scored = mutual(joint_loss, checkpointing=checkpointing).train()
    token_B, balance_B = scored(make_batch())
    models = peft_models()
    expected_B = [naive_loss(models, 0.3 if joint_loss else None, row) for row in range(3)]
    torch.testing.assert_close(token_B, torch.stack(expected_B), rtol=2e-5, atol=1e-4)
    assert torch.equal(balance_B, torch.zeros(3))
    # Unequal factors, so that every sequence has to arrive at its own.
    factors = torch.tensor([1.0, 0.3, 2.0])
    (token_B * factors).sum().backward()
    sum(e * f for e, f in zip(expected_B, factors, strict=True)).backward()
    layers = hmole_layers(scored)
    assert len(layers) == 4
    for name, layer in layers.items():
        for expert, model in enumerate(models):
            reference = model.get_submodule(f"base_model.model.{name}")
            for key in ("lora_A", "lora_B"):
                expected = getattr(reference, key)["default"].weight.grad
                assert expected.abs().max() > 1e-3
                torch.testing.assert_close(
                    getattr(layer, key).grad[expert], expected, rtol=1e-3, atol=2e-4
                )


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_joint_loss_has_a_gradient_at_every_weight(weight: float) -> None:
    scored = mutual(True, weight).train()
    token_B, _ = scored(make_batch())
    expected_B = [naive_loss(peft_models(), weight, row) for row in range(3)]
    torch.testing.assert_close(token_B, torch.stack(expected_B), rtol=2e-5, atol=1e-4)
    token_B.sum().backward()
    for parameter in scored.parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_evaluation_loss_is_that_of_the_mean_probability(weight: float) -> None:
    scored = mutual(False, weight).eval()
    store = make_store([s.tolist() for s in sequences(*LENGTHS)], list(PROMPTS), choices=[])
    found = evaluation_loss(scored, store, np.arange(3), 2, CPU)
    losses = []
    with torch.no_grad():
        models = peft_models()
        for row in range(3):
            (private, targets), (shared, _) = [logits_of_responses(m, row) for m in models]
            mixed = weight * private.softmax(-1) + (1 - weight) * shared.softmax(-1)
            losses += (-mixed[range(len(targets)), targets].log()).tolist()
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


def naive_answer(models: list[nn.Module], weight: float, prompt: np.ndarray) -> list[int]:
    """Greedy decoding of one prompt without padding, cache or hooks."""
    ids = torch.from_numpy(prompt)[None]
    for _ in range(6):
        private, shared = (model(input_ids=ids).logits[0, -1].softmax(-1) for model in models)
        token = (weight * private + (1 - weight) * shared).argmax()
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    answer: list[int] = ids[0, len(prompt) :].tolist()
    return answer[: answer.index(2)] if 2 in answer else answer


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "falcon"])
def test_generation_is_that_of_two_models_token_by_token(family: str) -> None:
    scored = mutual(False, 0.4, family).eval()
    prompts = sequences(5, 9, 6, 12, 7)
    store = make_store([[3, 4]], [1], choices=[])
    settings = EvaluationSettings(batch_size=3, max_new_tokens=6)
    found = generate(scored.model, prompts, store, settings, CPU)
    models = peft_models(family)
    with torch.no_grad():
        assert found == [naive_answer(models, 0.4, prompt) for prompt in prompts]
        # Neither model alone says the same, so that the test can tell.
        for weight in (0.0, 1.0):
            assert found != [naive_answer(models, weight, prompt) for prompt in prompts]


@pytest.mark.parametrize("family", list(CONFIGS))
def test_choices_after_one_prompt_have_the_losses_of_the_mixed_probabilities(family: str) -> None:
    models = peft_models(family)

    def log_probabilities(ids: Tensor) -> Tensor:
        private, shared = [model(input_ids=ids[None]).logits[0].softmax(-1) for model in models]
        return (0.4 * private + 0.6 * shared).log()

    scored = mutual(True, 0.4, family).eval()
    check_choices(scored.model, log_probabilities, sequences(5, 9, 6, 12, 7))


def test_removing_the_ensemble_gives_the_backbone_back() -> None:
    backbone, ids = make_backbone(), torch.arange(3, 12)[None]
    before = backbone(input_ids=ids).logits
    ensemble = Ensemble(0.5)
    model = ensemble.insert(backbone, make_pair(backbone), ADAPTER)
    assert not torch.allclose(model(input_ids=ids).logits, before)
    ensemble.remove(model)
    assert torch.equal(backbone(input_ids=ids).logits, before)
    assert not backbone._forward_hooks and not backbone._forward_pre_hooks


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers_are_the_log_probabilities_of_both_models(batch_size: int) -> None:
    scored = mutual(True).eval()
    store = make_store([s.tolist() for s in sequences(*LENGTHS)], list(PROMPTS), choices=[])
    found = scored.answers(store, np.array([2, 0, 1]), batch_size, CPU)
    with torch.no_grad():
        models = peft_models()
        for logs_2T, row in zip(found, (2, 0, 1), strict=True):
            for logs_T, model in zip(logs_2T, models, strict=True):
                logits, targets = logits_of_responses(model, row)
                expected = -functional.cross_entropy(logits, targets, reduction="none")
                np.testing.assert_allclose(logs_T, expected.numpy(), atol=1e-4)


def answers_of(means: list[float], seed: int = 0) -> list[np.ndarray]:
    """Log-probabilities of 20 sequences; those of the two models spread around their means."""
    rng = np.random.default_rng(seed)
    return [
        (-np.abs(rng.normal(means, 1.0, (rng.integers(2, 6), 2))).T).astype(np.float32)
        for _ in range(20)
    ]


def loss_of(weight: float, answers: list[np.ndarray]) -> float:
    p, q = np.exp(np.concatenate(answers, axis=1).astype(np.float64))
    return float(-np.log(weight * p + (1 - weight) * q).mean())


@pytest.mark.parametrize("means", [[1.0, 1.3], [1.4, 1.0]])
def test_the_weight_goes_to_the_minimum_of_the_loss(means: list[float]) -> None:
    answers = answers_of(means)
    best = minimize_scalar(loss_of, bounds=(0, 1), args=(answers,), method="bounded").x
    assert 0.05 < best < 0.95 and abs(best - 0.5) > 0.02
    distances = [
        abs(fit_weight(answers, 0.5, FedapenSettings(passes=passes), 20) - best)
        for passes in (1, 10, 100, 3000)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3
    # In batches it jitters, by as much as the step is long.
    found = fit_weight(answers, 0.5, FedapenSettings(passes=500), 4)
    assert abs(found - best) < 0.05


def test_the_weight_is_clipped_and_comes_back() -> None:
    better, worse = np.array([[-1.0, -2.0]]), np.array([[-3.0, -2.5]])
    settings = FedapenSettings(learning_rate=0.3, passes=20)
    for first, second, end in ((better, worse, 1.0), (worse, better, 0.0)):
        assert fit_weight([np.concatenate([first, second])], 0.5, settings, 1) == end
        assert fit_weight([np.concatenate([second, first])], end, settings, 1) == 1 - end
    impossible = [np.array([[-2000.0], [-1.0]]), np.array([[-1.0], [-2000.0]])]
    assert 0 <= fit_weight(impossible, 0.0, FedapenSettings(), 1) <= 1


def test_a_weight_takes_steps_of_adam() -> None:
    """Two steps written out: both models fixed, one token."""
    p, q, rate, weight, first, second = 0.6, 0.1, 0.05, 0.5, 0.0, 0.0
    for step in (1, 2):
        slope = -(p - q) / (weight * p + (1 - weight) * q)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        scale = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        weight -= rate * first / (1 - 0.9**step) / scale
    found = fit_weight(
        [np.log([[p], [q]])], 0.5, FedapenSettings(learning_rate=rate, passes=2), batch_size=1
    )
    assert found == pytest.approx(weight, abs=1e-12)


@pytest.fixture(scope="module")
def played(federation: Federation) -> dict[str, list[Round]]:
    folder = federation.folder.parent
    return {
        run: list(federation.rounds(federation.session(run), folder / run))
        for run in ("fml", "fedapen")
    }


@pytest.mark.parametrize("run", ["fml", "fedapen"])
def test_the_shared_adapter_is_averaged_and_the_private_one_stays(
    played: dict[str, list[Round]], run: str
) -> None:
    first, second = played[run]
    for name, group in first.pool.groups.items():
        assert group.experts == {} and first.pool.num_experts == 0
        for key, mean in group.shared.items():
            sent = [u.state.groups[name].shared[key].astype(np.float64) for u in first.uploads]
            np.testing.assert_allclose(mean, np.mean(sent, axis=0), atol=1e-7)
            assert not np.array_equal(sent[0], sent[1])
            # What was averaged is where all clients go on from.
            for state in second.states.values():
                assert np.array_equal(state.groups[name].shared[key], mean)
    # The upload has one LoRA; the private one is in no file but the client's own.
    for upload, result in zip(first.uploads, first.results.values(), strict=True):
        assert upload.state.groups["q_proj"].shared.keys() == {"lora_A", "lora_B"}
        kept = result.kept.groups["q_proj"]["lora_A"]
        assert not np.array_equal(kept, upload.state.groups["q_proj"].shared["lora_A"])


def test_private_adapters_start_apart_and_go_on_from_where_they_were(
    federation: Federation, played: dict[str, list[Round]], tmp_path: Path
) -> None:
    # A step size of nothing leaves what a client starts from.
    still = federation.session("fml", training={"learning_rate": 1e-30})
    starts = next(federation.rounds(still, tmp_path))
    first = [result.kept.groups["q_proj"] for result in starts.results.values()]
    assert np.abs(first[0]["lora_B"]).max() < 1e-20
    assert not np.array_equal(first[0]["lora_A"], first[1]["lora_A"])
    width = first[0]["lora_A"].shape[2]
    assert np.abs(first[0]["lora_A"]).max() <= 1 / np.sqrt(width)
    shared = starts.uploads[0].state.groups["q_proj"].shared["lora_A"]
    assert np.array_equal(shared, starts.previous.groups["q_proj"].shared["lora_A"])
    for one, two in zip(*(r.results.values() for r in played["fml"]), strict=True):
        before, after = one.kept.groups["v_proj"], two.kept.groups["v_proj"]
        # Two steps of Adam are no longer than two step sizes.
        for key in ("lora_A", "lora_B"):
            assert 0 < np.abs(after[key] - before[key]).max() < 2.1 * 5e-3


def test_only_fedapen_learns_its_weight_and_holds_the_embedding_set_back(
    played: dict[str, list[Round]],
) -> None:
    for run, num_train in (("fml", 11), ("fedapen", 6)):
        for round_ in played[run]:
            assert {upload.num_examples for upload in round_.uploads} == {num_train}
    assert all(result.kept.numbers == {} for result in played["fml"][1].results.values())
    weights = [[r.kept.numbers["weight"] for r in p.results.values()] for p in played["fedapen"]]
    # Ten passes of three steps of 1e-3, from one half and then from where it was.
    for one, two in zip(*weights, strict=True):
        assert 0 < abs(one - 0.5) <= 0.0301 and 0 < abs(two - one) <= 0.0301


def test_the_learned_weight_is_that_of_the_embedding_set_and_is_tested(
    federation: Federation, tmp_path: Path
) -> None:
    """Made again from the kept and the uploaded adapter by two PEFT models."""
    session = federation.session(
        "fedapen",
        training={"learning_rate": 0.05},
        fedapen={"initial_weight": 0.6, "learning_rate": 0.01, "passes": 7},
    )
    round_ = next(federation.rounds(session, tmp_path))
    rows = session.store.clients[0].embedding
    backbone = load_backbone(federation.folder, session.settings.run.backbone)
    members = [round_.results[0].kept.groups, shared_tensors(round_.uploads[0].state)]
    answers, losses = [], []
    with torch.no_grad():
        models = [plain_lora(backbone, tensors) for tensors in members]
        for row in rows:
            answers.append(np.stack([answer_of(model, session.store, row) for model in models]))
    weight = fit_weight(answers, 0.6, session.settings.run.fedapen, batch_size=2)
    assert round_.results[0].kept.numbers["weight"] == pytest.approx(weight, abs=1e-5)
    assert 0.05 < abs(weight - 0.6) < 0.4
    with torch.no_grad():
        for row in session.store.clients[0].eval:
            p, q = np.exp([answer_of(model, session.store, row) for model in models])
            losses += (-np.log(weight * p + (1 - weight) * q)).tolist()
            sizes = [np.mean(np.log(p)), np.mean(np.log(q))]
    assert round_.results[0].report.eval_loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert np.ptp(sizes) > 1e-3


def shared_tensors(state: ClientState) -> dict[str, dict[str, np.ndarray]]:
    return {name: group.shared for name, group in state.groups.items()}


def plain_lora(backbone: PreTrainedModel, tensors: dict[str, dict[str, np.ndarray]]) -> nn.Module:
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(copy.deepcopy(backbone), config).eval()
    for name, by_key in tensors.items():
        for index in (0, 1):
            module = f"base_model.model.model.layers.{index}.self_attn.{name}"
            for key, value in by_key.items():
                layer = getattr(model.get_submodule(module), key)["default"]
                layer.weight.data = torch.from_numpy(value[index].copy())
    return model


def answer_of(model: nn.Module, store: Any, row: int) -> np.ndarray:
    ids = torch.from_numpy(store.ids(row).astype(np.int64))
    start = store.prompt_length(row)
    logs = model(input_ids=ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
    return logs[range(len(ids) - start), ids[start:]].numpy()


def test_rounds_give_the_same_bytes_again(
    federation: Federation, played: dict[str, list[Round]], tmp_path: Path
) -> None:
    list(federation.rounds(federation.session("fedapen"), tmp_path))
    assert contents(tmp_path) == contents(federation.folder.parent / "fedapen")


@pytest.mark.parametrize("run", ["fml", "fedapen"])
def test_zero_3_trains_and_tests_the_same_ensemble(
    federation: Federation, played: dict[str, list[Round]], run: str, tmp_path: Path
) -> None:
    cut = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    session = federation.session(run, training={"deepspeed": cut})
    found, expected = next(federation.rounds(session, tmp_path)), played[run][0]
    for one, other in zip(found.results.values(), expected.results.values(), strict=True):
        assert one.report.eval_loss == pytest.approx(other.report.eval_loss, abs=1e-5)
        assert one.report.score.answers == other.report.score.answers
        assert one.kept.numbers == pytest.approx(other.kept.numbers, abs=1e-4)
        for name, tensors in other.kept.groups.items():
            for key, value in tensors.items():
                np.testing.assert_allclose(one.kept.groups[name][key], value, atol=1e-5)
