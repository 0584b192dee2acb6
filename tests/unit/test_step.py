"""A training step is that of plain LoRA in transformers, wherever both can do the same."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama

from fedamole.batches import IGNORED, Batch, collate
from fedamole.hmole_peft import HMoLEConfig, hmole_layers
from fedamole.settings import TrainingSettings
from fedamole.training import LocalTraining, ScoredModel, engine_for, train, trained_tensors

pytestmark = [
    pytest.mark.usefixtures("group"),
    # PEFT 0.21 itself asks transformers 5.23 for this property.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TARGETS = ["q_proj", "v_proj"]
STEPS, LEARNING_RATE = 5, 1e-2


def batch_of(lengths: list[int]) -> Batch:
    ids_BT = np.random.default_rng(0).integers(3, 40, (len(lengths), max(lengths)))
    return collate([ids_BT[row, :n] for row, n in enumerate(lengths)], [4] * len(lengths), 0)


def train_lora(model: PeftModel, batch: Batch) -> list[float]:
    """Train as a script around transformers does."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    labels_BT = torch.full_like(batch.input_ids, IGNORED)
    labels_BT[:, batch.positions + 1] = batch.targets
    losses = []
    for _ in range(STEPS):
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        loss = model(**inputs, labels=labels_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("lengths", [[12], [9, 9, 9], [12, 7, 9]])
def test_one_expert_trains_like_peft_lora_with_adam(lengths: list[int]) -> None:
    torch.manual_seed(0)
    lora = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    mixture = get_peft_model(
        tiny_llama(),
        HMoLEConfig(r=4, alpha=8, dropout=0.0, num_experts=0, target_modules=TARGETS),
    )
    with torch.no_grad():
        for name, layer in hmole_layers(mixture).items():
            pair = lora.base_model.model.get_submodule(name)
            layer.lora_A[0] = pair.lora_A["default"].weight
            layer.lora_B[0] = pair.lora_B["default"].weight
    batch = batch_of(lengths)
    expected = train_lora(lora.train(), batch)
    settings = TrainingSettings(batch_size=len(lengths))
    place = LocalTraining(seed=1, round=1, client=0)
    with engine_for(ScoredModel(mixture, 0.0), settings, LEARNING_RATE) as engine:
        record = train(engine, [[batch]] * STEPS, STEPS, place, settings, torch.device("cpu"))
        found = trained_tensors(engine, settings.zero_stage)
    assert record.loss_first == pytest.approx(expected[0], abs=1e-5)
    assert record.loss_last == pytest.approx(expected[-1], abs=1e-5)
    assert expected[-1] < expected[0]
    for name in hmole_layers(mixture):
        pair = lora.base_model.model.get_submodule(name)
        for key in ("lora_A", "lora_B"):
            tensor = next(found[n] for n in found if n.endswith(f"{name}.{key}"))
            weight = getattr(pair, key)["default"].weight
            # A hundredth of a step: Adam makes whole steps of gradients that are mostly rounding.
            torch.testing.assert_close(
                tensor[0], weight.detach(), rtol=0, atol=0.01 * LEARNING_RATE
            )
