"""Scores of a model against the slow and obvious way of computing them."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rouge import Rouge
from tiny import EOS, make_store, tiny_llama
from transformers import GenerationConfig, LlamaForCausalLM

from fedamole.backbone import load_backbone
from fedamole.batches import collate
from fedamole.datasets.tokens import TokenStore
from fedamole.distributed import collect, share_of_rank
from fedamole.evaluation import accuracy, choice_losses, evaluation_loss, rouge_l
from fedamole.generation import generate
from fedamole.pools import ClientGroup, ClientState
from fedamole.settings import (
    AdapterSettings,
    BackboneSettings,
    EvaluationSettings,
    TrainingSettings,
)
from fedamole.soft_prompts import SOFT_PROMPT
from fedamole.training import ScoredModel, sharded_for_testing

pytestmark = pytest.mark.usefixtures("group")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(initializer_range=0.5)


@pytest.fixture(scope="module")
def store() -> TokenStore:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, 40, size=n).tolist() for n in (5, 12, 7, 9, 12, 6, 8)]
    prompts = [2, 7, 3, 8, 4, 5, 1]
    return make_store(sequences, prompts, choices=[[5, EOS], [6, 7, EOS], [8, 9, 10, EOS]])


def losses_one_by_one(model: LlamaForCausalLM, ids: np.ndarray, prompt: int) -> list[float]:
    """Token losses of a response from the whole logits of one sequence without padding."""
    tokens = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None]
    with torch.no_grad():
        log_probs = model(input_ids=tokens).logits[0].log_softmax(-1)
    return [-float(log_probs[t - 1, tokens[0, t]]) for t in range(prompt, len(ids))]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_loss_is_the_mean_over_all_response_tokens(
    model: LlamaForCausalLM, store: TokenStore, batch_size: int
) -> None:
    rows = store.clients[0].eval
    expected = [
        loss
        for row in rows
        for loss in losses_one_by_one(model, store.ids(row), store.prompt_length(row))
    ]
    scored = ScoredModel(model, 0.0).eval()
    found = evaluation_loss(scored, store, rows, batch_size, CPU)
    assert found == pytest.approx(np.mean(expected), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_accuracy_takes_the_choice_with_the_lowest_mean_loss(
    model: LlamaForCausalLM, store: TokenStore, batch_size: int
) -> None:
    rows = store.clients[0].test
    expected = []
    for row in rows:
        prompt = store.ids(row)[: store.prompt_length(row)]
        means = [
            np.mean(losses_one_by_one(model, np.concatenate([prompt, choice]), len(prompt)))
            for choice in store.choices
        ]
        expected.append(int(np.argmin(means)))
    score = accuracy(ScoredModel(model, 0.0).eval(), store, rows, batch_size, CPU)
    assert score.answers == expected
    assert score.value == pytest.approx(np.mean(np.array(expected) == store.labels[rows]))
    assert len(set(expected)) > 1


def answer_alone(model: LlamaForCausalLM, prompt: np.ndarray, longest: int) -> list[int]:
    """The likeliest token, again and again, from the whole sequence each time."""
    tokens = list(map(int, prompt))
    while len(tokens) < len(prompt) + longest:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        if token == EOS:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_generation_in_batches_equals_one_at_a_time(
    model: LlamaForCausalLM, store: TokenStore, batch_size: int
) -> None:
    """Answers end at different times, so that others take their places."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 40, size=n) for n in rng.integers(1, 16, size=40)]
    expected = [answer_alone(model, prompt, 10) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 3
    settings = EvaluationSettings(batch_size=batch_size, max_new_tokens=10)
    assert generate(model, prompts, store, settings, CPU) == expected


def test_a_batch_does_not_wait_for_its_longest_answer(
    model: LlamaForCausalLM, store: TokenStore
) -> None:
    """Answers of 10 and of 0 or 1 tokens, two at a time: fewer passes than five batches of ten."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 40, size=6) for _ in range(300)]
    answers = [answer_alone(model, prompt, 10) for prompt in prompts]
    order = sorted(range(300), key=lambda index: len(answers[index]))
    chosen = [prompts[index] for pair in zip(order[:5], order[-5:], strict=True) for index in pair]
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    generate(model, chosen, store, EvaluationSettings(batch_size=2, max_new_tokens=10), CPU)
    hook.remove()
    assert len(passes) < 5 * 10 * 0.8


def test_no_prompts_have_no_answers(model: LlamaForCausalLM, store: TokenStore) -> None:
    assert generate(model, [], store, EvaluationSettings(), CPU) == []


def soft_model(model: LlamaForCausalLM) -> ScoredModel:
    """Behind a soft prompt, whose passes are not alike: some read prompts, some go on."""
    rng = np.random.default_rng(4)
    prompt = {"embedding.weight": rng.normal(size=(1, 3, 32)).astype(np.float32)}
    nothing = np.zeros(0, dtype=np.int64)
    state = ClientState({"prompt": ClientGroup(("prompt",), {}, nothing, nothing, prompt)})
    return ScoredModel(SOFT_PROMPT.insert(model, state, AdapterSettings()), 0.0).eval()


def all_answers(scored: ScoredModel, store: TokenStore) -> dict[str, list[Any]]:
    rows, settings = np.arange(len(store)), EvaluationSettings(batch_size=2, max_new_tokens=10)
    prompts = [store.ids(row)[: store.prompt_length(row)] for row in rows]
    return {
        "generated": generate(scored.model, prompts, store, settings, CPU),
        "chosen": accuracy(scored, store, rows, 2, CPU).answers,
        "losses": choice_losses(scored.model, store, rows, 2, CPU).tolist(),
    }


def rank_of_two(rank: int, folder: str, store: TokenStore) -> None:
    """What one of two processes does."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    file = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=file, rank=rank, world_size=2)
    scored = soft_model(tiny_llama(initializer_range=0.5))
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = TrainingSettings(batch_size=2, ranks=2, deepspeed={"zero_optimization": zero})
    with sharded_for_testing(scored, settings):
        torch.save(all_answers(scored, store), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_with_a_sharded_model_give_the_answers_of_one(
    store: TokenStore, tmp_path: Path
) -> None:
    """Under ZeRO-3 a rank that ran the model less often than the other would wait for ever."""
    torch.multiprocessing.spawn(rank_of_two, args=(str(tmp_path), store), nprocs=2)
    expected = all_answers(soft_model(tiny_llama(initializer_range=0.5)), store)
    assert len({len(answer) for answer in expected["generated"]}) > 1
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["generated"] == expected["generated"]
        assert found["chosen"] == expected["chosen"]
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5, atol=1e-5)


def test_a_loaded_model_brings_no_generation_habits_of_its_own(
    model: LlamaForCausalLM, store: TokenStore, tmp_path: Path
) -> None:
    """Instruct models come with a repetition penalty, which would change the greedy answer."""
    prompts = [store.ids(row)[: store.prompt_length(row)] for row in range(len(store))]
    settings = EvaluationSettings(batch_size=3, max_new_tokens=10)
    expected = generate(model, prompts, store, settings, CPU)
    model.save_pretrained(tmp_path)
    habits = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=2)
    habits.save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path, BackboneSettings(name="x", folder=str(tmp_path)))
    assert generate(loaded, prompts, store, settings, CPU) == expected


@pytest.mark.parametrize("hypothesis", ["", " ", "...", ". ."])
def test_an_empty_answer_scores_zero(hypothesis: str) -> None:
    assert rouge_l(hypothesis, "a reference") == 0.0


def test_rouge_is_that_of_the_package_also_for_long_texts() -> None:
    text, reference = "the cat sat on the mat . it slept", "a cat sat on a mat . it woke"
    expected = Rouge().get_scores(text, reference)[0]["rouge-l"]["f"]
    assert rouge_l(text, reference) == expected
    assert 0.5 < expected < 1
    long = " ".join(f"word{index}" for index in range(1200))
    assert rouge_l(long, long) == pytest.approx(1.0)


def test_a_batch_marks_just_the_response_tokens() -> None:
    batch = collate([np.array([5, 6, 7, 8]), np.array([9, 10])], [2, 1], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.positions.tolist() == [0, 1, 2]
    assert batch.targets.tolist() == [[-100, 7, 8], [10, -100, -100]]
    assert batch.num_targets == 3


def test_only_a_padded_batch_gives_the_model_a_mask() -> None:
    padded = collate([np.array([5, 6, 7, 8]), np.array([9, 10])], [2, 1], pad_id=0)
    even = collate([np.array([5, 6, 7]), np.array([8, 9, 10])], [2, 1], pad_id=0)
    assert torch.equal(padded.mask, padded.attention_mask)
    assert even.to(CPU).mask is None
    assert even.attention_mask.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_one_rank_has_all_the_work() -> None:
    items = [[1], [2], [3]]
    assert share_of_rank(items) == items
    assert collect(["a", "b", "c"], 3) == ["a", "b", "c"]


def test_tokens_of_a_store_on_disk_are_scored_alike(
    model: LlamaForCausalLM, store: TokenStore, tmp_path: Path
) -> None:
    from fedamole.artifacts import Header
    from fedamole.datasets.tokens import write_store

    write_store(tmp_path / "tokens", Header("tokens", "d"), store)
    mapped = TokenStore.open(tmp_path / "tokens", "d")
    assert isinstance(mapped.input_ids, np.memmap)
    scored = ScoredModel(model, 0.0).eval()
    rows = store.clients[0].eval
    expected = evaluation_loss(scored, store, rows, 4, CPU)
    assert evaluation_loss(scored, mapped, mapped.clients[0].eval, 4, CPU) == expected
