"""The linear router, given weights and frozen experts against plain loops and closed forms."""

# Axes: B = sequences, T = tokens of a sequence, D = d_in, N = routed experts

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from fedamole.errors import FedamoleError
from fedamole.hmole import HMoLELinear
from fedamole.hmole_function import dropped_elements

D_IN, D_OUT, RANK, ALPHA = 6, 5, 3, 7.0
SCALE = ALPHA / RANK
PADDING = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
ROUTERS = ["embedding", "linear", "given"]


def make_layer(num_experts: int, top_k: int = 2, **arguments) -> HMoLELinear:
    """Make a float64 layer whose parameters are all random, with other weights per sequence."""
    torch.manual_seed(0)
    layer = HMoLELinear(nn.Linear(D_IN, D_OUT), RANK, ALPHA, num_experts, top_k, **arguments)
    layer.base_layer.requires_grad_(False)
    for parameter in layer.parameters(recurse=False):
        nn.init.normal_(parameter)
    layer.routing_context.expert_weights_BN = torch.randn(3, num_experts, dtype=torch.float64)
    return layer.double()


def make_input(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, D_IN, dtype=torch.float64, generator=generator).requires_grad_()


def trainable(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def gradients(y: Tensor, loss_B: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weight_y = torch.randn(y.shape, dtype=y.dtype, generator=generator)
    weight_B = torch.randn(loss_B.shape, dtype=loss_B.dtype, generator=generator)
    return list(torch.autograd.grad((y * weight_y).sum() + (loss_B * weight_B).sum(), inputs))


def dropped(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Apply the dropout that a layer draws after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    drawn = int(torch.randint(2**62, ()).item())
    mask = dropped_elements(x.flatten(0, -2).shape, dropout, drawn, x.device).view_as(x)
    return x * ~mask / (1.0 - dropout)


def loop(
    layer: HMoLELinear, x_BTD: Tensor, dropped_BTD: Tensor, mask_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, balance loss per sequence and counts, one token and expert at a time."""
    num_experts, top_k = layer.num_experts, layer.top_k
    outputs, losses = [], []
    counts_BN = torch.zeros(len(x_BTD), num_experts, dtype=torch.int64)
    for b, sequence_TD in enumerate(x_BTD):
        probabilities = []
        for t, x in enumerate(sequence_TD):
            if layer.router == "given":
                q = dict(enumerate(layer.routing_context.expert_weights_BN[b]))
            else:
                p = torch.softmax(torch.stack([(row * x).sum() for row in layer.gate]), 0)
                best = sorted(range(num_experts), key=lambda i: -p[i].item())[:top_k]
                q = {i: p[i] / sum(p[j] for j in best) for i in best}
                if mask_BT[b, t]:
                    probabilities.append(p)
                    counts_BN[b, best] += 1
            y = layer.base_layer(x)
            if layer.shared_expert:
                q[num_experts] = 1.0
            for i, weight in q.items():
                y = y + weight * SCALE * layer.lora_B[i] @ (layer.lora_A[i] @ dropped_BTD[b, t])
            outputs.append(y)
        loss = torch.zeros((), dtype=torch.float64)
        if probabilities:
            fraction_N = counts_BN[b] / (top_k * len(probabilities))
            loss = num_experts * (torch.stack(probabilities).mean(0) * fraction_N).sum()
        losses.append(loss)
    y_BTO = torch.stack(outputs).view(*x_BTD.shape[:2], D_OUT)
    return y_BTO, torch.stack(losses), counts_BN.sum(0)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shared_expert", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    ("router", "num_experts", "top_k"),
    [("linear", 1, 1), ("linear", 2, 2), ("linear", 5, 2), ("given", 1, 2), ("given", 4, 2)],
)
def test_the_layer_equals_the_loop(router, num_experts, top_k, padded, shared_expert, dropout):
    layer = make_layer(
        num_experts, top_k, router=router, shared_expert=shared_expert, dropout=dropout
    )
    x_BTD, mask_BT = make_input(3, 4), torch.ones_like(PADDING)
    if padded:
        mask_BT = layer.routing_context.token_mask_BT = PADDING
    torch.manual_seed(5)
    y = layer(x_BTD)
    expected_y, expected_loss_B, counts_N = loop(layer, x_BTD, dropped(x_BTD, dropout, 5), mask_BT)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(layer.balance_loss_B, expected_loss_B)
    assert torch.equal(layer.routed_tokens_N, counts_N)
    names = {name for name, _ in layer.named_parameters(recurse=False)}
    assert names == {"lora_A", "lora_B"} | ({"gate"} if router == "linear" else set())
    inputs = [x_BTD, *trainable(layer)]
    torch.testing.assert_close(
        gradients(y, layer.balance_loss_B, inputs), gradients(expected_y, expected_loss_B, inputs)
    )


def test_two_gated_experts_of_which_one_is_frozen_are_the_mixer_of_fedalt():
    """y = W0 x + s (a_0 B_0 A_0 x + a_1 B_1 A_1 x), a = softmax(G x), arXiv:2503.11880."""
    layer = make_layer(2, router="linear", shared_expert=False, frozen_experts=1)
    x_BTD = make_input(3, 4)
    own, rest = (tuple(w[i].detach().clone() for w in (layer.lora_A, layer.lora_B)) for i in (0, 1))
    gate = layer.gate.detach().clone()
    inputs = [x_BTD, *(tensor.requires_grad_() for tensor in (*own, gate))]
    a_BTN = torch.softmax(x_BTD @ gate.T, -1)
    expected_y = layer.base_layer(x_BTD)
    for i, (A, B) in enumerate((own, rest)):
        expected_y = expected_y + SCALE * a_BTN[..., i : i + 1] * (x_BTD @ A.T @ B.T)
    y = layer(x_BTD)
    torch.testing.assert_close(y, expected_y)
    nothing = torch.zeros(3, dtype=torch.float64)
    expected = gradients(expected_y, nothing, inputs)
    grad_x, grad_A, grad_B, grad_gate = gradients(
        y, nothing, [x_BTD, layer.lora_A, layer.lora_B, layer.gate]
    )
    torch.testing.assert_close([grad_x, grad_A[0], grad_B[0], grad_gate], expected)
    assert not grad_A[1].any()
    assert not grad_B[1].any()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("router", ROUTERS)
def test_freezing_changes_nothing_but_the_gradients_of_the_last_routed_experts(router, dropout):
    free = make_layer(4, router=router, dropout=dropout)
    frozen = make_layer(4, router=router, dropout=dropout, frozen_experts=2)
    results = []
    for layer in (free, frozen):
        x_BTD = make_input(3, 4)
        torch.manual_seed(5)
        y = layer(x_BTD)
        results.append([y, *gradients(y, layer.balance_loss_B, [x_BTD, *trainable(layer)])])
    for grad in results[0][2:4]:
        assert all(rows.any() for rows in grad)
        # Row 4 is the shared expert.
        grad[2:4] = 0.0
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))


def test_the_gate_is_drawn_from_the_law_of_nn_linear():
    gate = HMoLELinear(nn.Linear(400, 5), 2, ALPHA, 50, 2, router="linear").gate
    bound = 400**-0.5
    assert gate.shape == (50, 400)
    assert gate.dtype == torch.float32
    # Uniform: all values within the bound, and a variance of bound^2 / 3 (20,000 draws).
    assert gate.abs().max() <= bound
    assert abs(gate.var() / (bound**2 / 3) - 1) < 0.05


def test_one_row_of_weights_serves_all_sequences():
    layer, x_BTD = make_layer(2, router="given"), make_input(3, 4)
    weights_N = torch.tensor([0.3, -2.0])
    layer.routing_context.expert_weights_BN = weights_N.expand(3, 2)
    expected = layer(x_BTD)
    layer.routing_context.expert_weights_BN = weights_N.unsqueeze(0)
    assert torch.equal(layer(x_BTD), expected)


def test_the_mask_says_how_many_sequences_a_flat_input_has():
    layer, x_BTD = make_layer(2, router="given"), make_input(3, 4)
    expected = layer(x_BTD)
    layer.routing_context.token_mask_BT = PADDING
    assert torch.equal(layer(x_BTD.flatten(0, 1)), expected.flatten(0, 1))


@pytest.mark.parametrize("router", ["linear", "given"])
def test_without_routed_experts_every_router_is_plain_lora(router):
    layer, plain = make_layer(0, router=router), make_layer(0)
    layer.routing_context.expert_weights_BN = None
    x_BTD = make_input(3, 4)
    assert torch.equal(layer(x_BTD), plain(x_BTD))
    assert layer.gate is None
    assert layer.balance_loss_B.tolist() == [0.0, 0.0, 0.0]
    assert layer.routed_tokens_N.shape == (0,)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("router", ["linear", "given"])
def test_gradient_checkpointing_changes_nothing(router, dropout):
    layer, x_BTD = make_layer(4, router=router, dropout=dropout), make_input(3, 4)
    inputs = [x_BTD, *trainable(layer)]

    def block(x: Tensor) -> Tensor:
        # Recomputation stops at the last saved tensor; sin saves one after the layer is through.
        return layer(x).sin()

    torch.manual_seed(3)
    y = block(x_BTD)
    expected = [y, *gradients(y, layer.balance_loss_B, inputs)]
    torch.manual_seed(3)
    y = checkpoint(block, x_BTD, use_reentrant=False)
    recorded = layer.balance_loss_B
    torch.testing.assert_close([y, *gradients(y, recorded, inputs)], expected)
    assert layer.balance_loss_B is recorded


def test_a_bfloat16_backbone_leaves_the_gate_in_float32():
    torch.manual_seed(0)
    precise = HMoLELinear(nn.Linear(64, 48), 8, 16.0, 6, 2, router="linear")
    low = copy.deepcopy(precise)
    low.base_layer.to(torch.bfloat16)
    x = torch.randn(2, 100, 64).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert low(x).dtype == torch.bfloat16
    precise(x.float())
    assert torch.equal(low.routed_tokens_N, precise.routed_tokens_N)
    assert torch.equal(low.balance_loss_B, precise.balance_loss_B)


@pytest.mark.parametrize(
    ("router", "dropout", "columns"),
    [
        ("embedding", 0.0, 7 * RANK + RANK),
        ("embedding", 0.4, 7 * RANK + RANK),
        ("linear", 0.0, 7 * RANK + 7),
        # The LoRA path has a product of its own, with the dropped input.
        ("linear", 0.4, 7),
        ("given", 0.0, 7 * RANK),
        ("given", 0.4, 0),
    ],
)
def test_the_first_product_has_the_columns_that_the_router_reads(router, dropout, columns):
    layer = make_layer(7, router=router, dropout=dropout, shared_expert=False)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        layer(make_input(3, 4))
    products = [event for event in profiler.events() if event.name == "aten::mm"]
    assert products[0].input_shapes == [[12, D_IN], [D_IN, columns]]


@pytest.mark.parametrize("router", ["linear", "given"])
def test_only_the_embedding_router_has_embeddings(router):
    layer = make_layer(2, router=router)
    with layer.collecting():
        layer(make_input(3, 4))
    with pytest.raises(FedamoleError, match=f"num_experts=2 and router='{router}' has no"):
        layer.token_means()
    torch.testing.assert_close(layer.input_mean(), make_input(3, 4).flatten(0, 1).mean(0))


@pytest.mark.parametrize(
    ("weights_BN", "message"),
    [
        (None, 'router "given" needs routing_context.expert_weights_BN'),
        (torch.ones(2, 4), r"\(2, 4\) does not fit 3 sequences and 4 experts; allowed: \(3, 4\)"),
        (torch.ones(3, 5), r"\(3, 5\) does not fit 3 sequences and 4 experts"),
        (torch.ones(3, 4, requires_grad=True), "requires a gradient, but none flows into it"),
    ],
)
def test_weights_that_do_not_fit_are_errors(weights_BN, message):
    layer = make_layer(4, router="given")
    layer.routing_context.expert_weights_BN = weights_BN
    with pytest.raises(ValueError, match=message):
        layer(make_input(3, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": "random"}, "must be one of embedding, linear, given, got 'random'"),
        ({"frozen_experts": 5}, "frozen_experts must be in 0 to num_experts=4, got 5"),
        ({"frozen_experts": -1}, "frozen_experts must be in 0 to num_experts=4, got -1"),
        ({"router": "linear", "top_k": 5}, "num_experts=4 is less than top_k=5"),
        ({"router": "linear", "top_k": 0}, "top_k must be at least 1, got 0"),
    ],
)
def test_arguments_outside_their_limits_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        make_layer(4, **changes)
