"""The HMoLE layer against a plain loop over its formula, against PEFT LoRA, and its laws."""

# Axes: B = sequences, T = tokens of a sequence, D = d_in, O = d_out, N = routed experts

import copy
import pickle

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from fedamole.errors import FedamoleError
from fedamole.hmole import HMoLELinear, embed

D_IN, D_OUT, RANK, ALPHA = 6, 5, 3, 7.0
PADDING = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)


def make_layer(num_experts: int, top_k: int, seed: int = 0, **arguments) -> HMoLELinear:
    """Make a float64 layer whose parameters are all random: B = 0 would hide most mistakes."""
    torch.manual_seed(seed)
    layer = HMoLELinear(nn.Linear(D_IN, D_OUT), RANK, ALPHA, num_experts, top_k, **arguments)
    layer.base_layer.requires_grad_(False)
    for parameter in layer.parameters(recurse=False):
        nn.init.normal_(parameter)
    return layer.double()


def make_input(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, D_IN, dtype=torch.float64, generator=generator).requires_grad_()


def loop_over_formula(
    layer: HMoLELinear, x_BTD: Tensor, mask_BT: Tensor | None, dropped_BTD: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, balance loss per sequence and counts, one token and expert at a time."""
    dropped_BTD = x_BTD if dropped_BTD is None else dropped_BTD
    num_experts, top_k, scale = layer.num_experts, layer.top_k, layer.alpha / layer.rank
    sequences, losses, counts_N = [], [], torch.zeros(num_experts, dtype=torch.int64)
    for sequence in range(x_BTD.shape[0]):
        outputs, probabilities, chosen_N = [], [], torch.zeros(num_experts, dtype=torch.int64)
        for position in range(x_BTD.shape[1]):
            x, dropped = x_BTD[sequence, position], dropped_BTD[sequence, position]
            token = layer.token_proj @ x
            scores = [torch.dot(layer.lora_A[i] @ x, token) / RANK**0.5 for i in range(num_experts)]
            p = torch.softmax(torch.stack(scores), 0)
            selection = sorted(range(num_experts), key=lambda i: -p[i].item())[:top_k]
            y = layer.base_layer(x)
            if layer.shared_expert:
                y = y + scale * layer.lora_B[-1] @ (layer.lora_A[-1] @ dropped)
            for i in selection:
                q = p[i] / sum(p[j] for j in selection)
                y = y + q * scale * layer.lora_B[i] @ (layer.lora_A[i] @ dropped)
            outputs.append(y)
            if mask_BT is None or mask_BT[sequence, position]:
                probabilities.append(p)
                chosen_N[selection] += 1
        loss = torch.zeros((), dtype=torch.float64)
        if probabilities:
            fraction_N = chosen_N / (top_k * len(probabilities))
            loss = num_experts * (torch.stack(probabilities).mean(0) * fraction_N).sum()
        sequences.append(torch.stack(outputs))
        losses.append(loss)
        counts_N += chosen_N
    return torch.stack(sequences), torch.stack(losses), counts_N


def gradients(y: Tensor, loss_B: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weight_y = torch.randn(y.shape, dtype=y.dtype, generator=generator)
    weight_B = torch.randn(loss_B.shape, dtype=loss_B.dtype, generator=generator)
    return list(torch.autograd.grad((y * weight_y).sum() + (loss_B * weight_B).sum(), inputs))


def trainable(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def observed_dropout(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Read drop(x) off a layer whose only expert is the identity."""
    width = x.shape[-1]
    layer = HMoLELinear(nn.Linear(width, width), width, width, 0, 0, dropout).double()
    nn.init.zeros_(layer.base_layer.weight)
    nn.init.zeros_(layer.base_layer.bias)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(width))
        layer.lora_B.copy_(torch.eye(width))
    torch.manual_seed(seed)
    return layer(x)


CASES = [(1, 1), (2, 1), (3, 2), (4, 3), (3, 3), (8, 2)]


@pytest.mark.parametrize("shared_expert", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), CASES)
def test_layer_equals_the_loop_over_the_formula(num_experts, top_k, padded, shared_expert):
    layer, x = make_layer(num_experts, top_k, shared_expert=shared_expert), make_input(3, 4)
    mask_BT = PADDING if padded else None
    layer.routing_context.token_mask_BT = mask_BT
    y = layer(x)
    expected_y, expected_loss_B, expected_counts_N = loop_over_formula(layer, x, mask_BT)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(layer.balance_loss_B, expected_loss_B)
    assert torch.equal(layer.routed_tokens_N, expected_counts_N)
    inputs = [x, *trainable(layer)]
    assert len(inputs) == 4
    torch.testing.assert_close(
        gradients(y, layer.balance_loss_B, inputs),
        gradients(expected_y, expected_loss_B, inputs),
    )


@pytest.mark.parametrize("shared_expert", [True, False])
def test_only_the_lora_path_is_dropped(shared_expert):
    layer, x = make_layer(3, 2, dropout=0.4, shared_expert=shared_expert), make_input(3, 4)
    mask = observed_dropout(torch.ones_like(x), 0.4, seed=5).detach()
    torch.manual_seed(5)
    y = layer(x)
    expected_y, expected_loss_B, _ = loop_over_formula(layer, x, None, x * mask)
    assert (mask == 0).any()
    torch.testing.assert_close(y, expected_y)
    inputs = [x, *trainable(layer)]
    torch.testing.assert_close(
        gradients(y, layer.balance_loss_B, inputs),
        gradients(expected_y, expected_loss_B, inputs),
    )


def test_dropout_has_the_law_of_inverted_dropout_and_is_off_in_eval_mode():
    x = torch.ones(200, 100, dtype=torch.float64)
    dropped = observed_dropout(x, 0.25, seed=0)
    assert set(dropped.unique().tolist()) == {0.0, 1.0 / 0.75}
    # 20,000 draws: five standard deviations are 0.015.
    assert abs((dropped == 0).double().mean() - 0.25) < 0.015
    assert not torch.equal(dropped, observed_dropout(x, 0.25, seed=1))
    layer, x = make_layer(3, 2, dropout=0.25).eval(), make_input(3, 4)
    torch.testing.assert_close(layer(x), loop_over_formula(layer, x, None)[0])


def make_peft_lora(layer: HMoLELinear) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(layer.base_layer))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    lora = peft.get_peft_model(model, config).double().base_model.model[0]
    with torch.no_grad():
        lora.lora_A["default"].weight.copy_(layer.lora_A[0])
        lora.lora_B["default"].weight.copy_(layer.lora_B[0])
    return lora


@pytest.mark.parametrize(("num_experts", "shared_expert"), [(1, False), (0, True)])
def test_a_single_expert_equals_peft_lora(num_experts, shared_expert):
    layer, x = make_layer(num_experts, 1, shared_expert=shared_expert), make_input(3, 4)
    lora = make_peft_lora(layer)
    weights = [lora.lora_A["default"].weight, lora.lora_B["default"].weight]
    y, expected_y = layer(x), lora(x)
    torch.testing.assert_close(y, expected_y)
    nothing = torch.zeros(3, dtype=torch.float64)
    grads = gradients(y, nothing, [x, layer.lora_A, layer.lora_B])
    expected = gradients(expected_y, nothing, [x, *weights])
    torch.testing.assert_close([grads[0], grads[1][0], grads[2][0]], expected)


def test_a_layer_without_routed_experts_routes_nothing():
    layer = make_layer(0, 2)
    layer(make_input(3, 4))
    assert layer.token_proj is None
    assert {name for name, _ in layer.named_parameters(recurse=False)} == {"lora_A", "lora_B"}
    assert layer.balance_loss_B.tolist() == [0.0, 0.0, 0.0]
    assert layer.routed_tokens_N.shape == (0,)
    with pytest.raises(FedamoleError, match="num_experts=0"):
        layer.token_means()


def test_a_new_layer_equals_its_base_bit_by_bit():
    base = nn.Linear(D_IN, D_OUT)
    layer, x = HMoLELinear(base, RANK, ALPHA, 4, 2, dropout=0.1), torch.randn(3, 4, D_IN)
    assert torch.equal(layer(x), base(x))


def test_every_expert_is_drawn_anew_from_the_law_of_nn_linear():
    layer = HMoLELinear(nn.Linear(400, 5), 50, ALPHA, 3, 2)
    bound = 400**-0.5
    for rows in (*layer.lora_A, layer.token_proj):
        # Uniform: all values within the bound, and a variance of bound^2 / 3 (20,000 draws).
        assert rows.abs().max() <= bound
        assert abs(rows.var() / (bound**2 / 3) - 1) < 0.05
    assert len({rows.sum().item() for rows in layer.lora_A}) == 4
    assert not layer.lora_B.any()


def test_permuting_the_experts_changes_nothing():
    layer, x = make_layer(5, 2), make_input(3, 4)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = copy.deepcopy(layer)
    with torch.no_grad():
        permuted.lora_A[:5] = layer.lora_A[order]
        permuted.lora_B[:5] = layer.lora_B[order]
    y, permuted_y = layer(x), permuted(x)
    torch.testing.assert_close(permuted_y, y)
    torch.testing.assert_close(permuted.balance_loss_B, layer.balance_loss_B)
    assert torch.equal(permuted.routed_tokens_N, layer.routed_tokens_N[order])
    grads = gradients(y, layer.balance_loss_B, trainable(layer))
    permuted_grads = gradients(permuted_y, permuted.balance_loss_B, trainable(permuted))
    torch.testing.assert_close(permuted_grads[0][:5], grads[0][order])
    torch.testing.assert_close(permuted_grads[2], grads[2])


def test_padding_changes_nothing():
    layer, x_BTD = make_layer(4, 2), make_input(2, 3)
    padded_BTD = torch.cat((100.0 * make_input(2, 2), x_BTD), 1)
    with layer.collecting():
        y = layer(x_BTD)
    expected = (layer.balance_loss_B, layer.routed_tokens_N, *layer.token_means())
    layer.routing_context.token_mask_BT = torch.arange(5).expand(2, 5) >= 2
    with layer.collecting():
        padded_y = layer(padded_BTD)
    torch.testing.assert_close(padded_y[:, 2:], y)
    padded = (layer.balance_loss_B, layer.routed_tokens_N, *layer.token_means())
    torch.testing.assert_close(padded, expected)


def test_two_dimensional_input_is_one_sequence():
    layer, x_TD = make_layer(4, 2), make_input(7)
    y = layer(x_TD)
    expected_y, expected_loss_B, _ = loop_over_formula(layer, x_TD.unsqueeze(0), None)
    torch.testing.assert_close(y, expected_y[0])
    torch.testing.assert_close(layer.balance_loss_B, expected_loss_B)
    torch.testing.assert_close(layer.balance_loss, expected_loss_B.mean())


def test_cutting_a_batch_into_parts_leaves_the_balance_loss_of_each_sequence():
    layer, x_BTD = make_layer(4, 2), make_input(3, 4)
    layer(x_BTD)
    whole_B = layer.balance_loss_B
    parts = []
    for x_TD in x_BTD:
        layer(x_TD.unsqueeze(0))
        parts.append(layer.balance_loss_B)
    torch.testing.assert_close(torch.cat(parts), whole_B)


def test_a_mask_that_does_not_fit_is_an_error():
    layer = make_layer(4, 2)
    layer.routing_context.token_mask_BT = torch.ones(3, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(3, 4, 6\)"):
        layer(make_input(3, 4))


@pytest.mark.parametrize("autocast", [True, False])
def test_a_bfloat16_backbone_leaves_routing_in_float32(autocast):
    torch.manual_seed(0)
    base = nn.Linear(64, 48)
    precise = HMoLELinear(base, 8, 16.0, 6, 2)
    nn.init.normal_(precise.lora_B)
    low = copy.deepcopy(precise)
    low.base_layer.to(torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters(recurse=False)} == {torch.float32}
    x = torch.randn(2, 100, 64).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = low(x)
    expected_y = precise(x.float())
    assert y.dtype == torch.bfloat16
    assert low.balance_loss_B.dtype == torch.float32
    assert torch.equal(low.routed_tokens_N, precise.routed_tokens_N)
    assert torch.equal(low.balance_loss_B, precise.balance_loss_B)
    torch.testing.assert_close(y.float(), expected_y, rtol=2e-2, atol=2e-2)
    nothing = torch.zeros(2)
    grads = gradients(y.float(), nothing, trainable(low)[:3])
    expected = gradients(expected_y, nothing, trainable(precise)[:3])
    for grad, reference in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - reference).norm() < 0.01 * reference.norm()


def test_autocast_does_not_lower_the_precision_of_a_float32_layer():
    torch.manual_seed(0)
    layer = HMoLELinear(nn.Linear(64, 48), 8, 16.0, 6, 2)
    x = torch.randn(2, 100, 64)
    layer(x)
    expected_B = layer.balance_loss_B
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert torch.equal(layer.balance_loss_B, expected_B)


def test_embeddings_are_the_means_over_all_tokens_of_all_batches():
    layer = make_layer(4, 2).eval()
    batches = [make_input(3, 4), 2.0 * make_input(2, 5)]
    masks = [PADDING, None]
    with layer.collecting():
        for x, mask_BT in zip(batches, masks, strict=True):
            layer.routing_context.token_mask_BT = mask_BT
            layer(x)
    layer.routing_context.token_mask_BT = None
    layer(make_input(3, 4))
    real_TD = torch.cat((batches[0][PADDING], batches[1].flatten(0, 1)))
    client_R, experts_NR = layer.token_means()
    expected_client_R = torch.stack([layer.token_proj @ x for x in real_TD]).mean(0)
    expected_NR = torch.stack([layer.lora_A[:4] @ x for x in real_TD]).mean(0)
    assert client_R.dtype == experts_NR.dtype == torch.float32
    torch.testing.assert_close(client_R, expected_client_R.float())
    torch.testing.assert_close(experts_NR, expected_NR.float())
    torch.testing.assert_close(layer.input_mean(), real_TD.mean(0))
    gathered = embed(layer.input_mean(), layer.lora_A[:4], layer.token_proj)
    assert torch.equal(gathered[1], experts_NR)


def test_embeddings_without_a_real_token_are_an_error():
    layer = make_layer(4, 2)
    layer.routing_context.token_mask_BT = torch.zeros(3, 4, dtype=torch.bool)
    with layer.collecting():
        layer(make_input(3, 4))
    with pytest.raises(FedamoleError, match="at least one real token"):
        layer.token_means()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing_changes_nothing(dropout):
    layer, x = make_layer(4, 2, dropout=dropout), make_input(3, 4)
    inputs = [x, *trainable(layer)]

    def block(x: Tensor) -> Tensor:
        # Recomputation stops at the last saved tensor; sin saves one after the layer is through.
        return layer(x).sin()

    torch.manual_seed(3)
    y = block(x)
    expected = gradients(y, layer.balance_loss_B, inputs)
    expected_loss_B = layer.balance_loss_B.detach()
    torch.manual_seed(3)
    with layer.collecting():
        y = checkpoint(block, x, use_reentrant=False)
        recorded = layer.balance_loss_B
        torch.testing.assert_close(gradients(y, recorded, inputs), expected)
    # The recomputation in the backward pass must not record a second time.
    assert layer.balance_loss_B is recorded
    torch.testing.assert_close(recorded, expected_loss_B)
    torch.testing.assert_close(layer.input_mean(), x.flatten(0, 1).mean(0))


def test_statistics_belong_to_the_last_pass_only():
    layer = make_layer(4, 2)
    for _ in range(3):
        layer(make_input(3, 4))
    assert layer.routed_tokens_N.sum() == 3 * 4 * 2
    assert layer.routed_tokens_N.dtype == torch.int64


def count_matrix_products(num_experts: int, dropout: float = 0.0, input_grad: bool = True) -> int:
    layer = make_layer(num_experts, 2, dropout=dropout)
    x = make_input(3, 4).detach().requires_grad_(input_grad)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        (layer(x).sum() + layer.balance_loss_B.sum()).backward()
    names = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"}
    return sum(event.count for event in profiler.key_averages() if event.key in names)


def test_an_input_without_gradient_spares_the_two_products_for_it():
    layer, x = make_layer(4, 2), make_input(3, 4)
    expected = gradients(layer(x), layer.balance_loss_B, trainable(layer))
    y = layer(x.detach())
    torch.testing.assert_close(gradients(y, layer.balance_loss_B, trainable(layer)), expected)
    # The base layer's and the projection's.
    assert count_matrix_products(4, input_grad=False) == count_matrix_products(4) - 2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_number_of_matrix_products_does_not_depend_on_the_number_of_experts(dropout):
    assert count_matrix_products(2, dropout) == count_matrix_products(32, dropout) > 0


def test_a_layer_can_be_copied_and_pickled_after_a_forward_pass():
    layer, x = make_layer(4, 2), make_input(3, 4)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 1, "top_k": 2}, "num_experts=1 is less than top_k=2"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"num_experts": -1}, "num_experts must not be negative, got -1"),
        ({"num_experts": 0, "shared_expert": False}, "nothing to train"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"base_layer": nn.Conv1d(2, 2, 1)}, "base_layer must be nn.Linear, got Conv1d"),
    ],
)
def test_arguments_outside_their_limits_are_errors(changes, message):
    arguments = {"base_layer": nn.Linear(D_IN, D_OUT), "rank": RANK, "alpha": ALPHA}
    with pytest.raises(ValueError, match=message):
        HMoLELinear(**{**arguments, "num_experts": 4, "top_k": 2, **changes})
