"""What a client tells the server of its data: mean embeddings per module and held expert."""

# Axes: M = modules, N = expert rows of a group, R = rank, D = d_in

from dataclasses import dataclass

import numpy as np
import torch

from fedamole.batches import collate
from fedamole.datasets.tokens import TokenStore
from fedamole.hmole import embed
from fedamole.hmole_peft import collecting_embeddings
from fedamole.pools import ClientState
from fedamole.training import ScoredModel


@dataclass(frozen=True)
class Embedded:
    """Mean embeddings of a client.

    Attributes
    ----------
    client_MR
        Mean of P x per module, float32, modules in the order of the state.
    experts
        By group: (N, R) mean of A_i x per held expert, float32, rows as in the state.
    """

    client_MR: np.ndarray
    experts: dict[str, np.ndarray]

    @staticmethod
    def nothing() -> "Embedded":
        """Embeddings of a method without domain experts."""
        return Embedded(np.zeros((0, 0), dtype=np.float32), {})


@torch.no_grad()
def embed_client(
    scored: ScoredModel,
    store: TokenStore,
    rows: np.ndarray,
    state: ClientState,
    batch_size: int,
    device: torch.device,
) -> Embedded:
    """Average the embeddings of all tokens of the embedding set (arXiv:2411.19128, section 4).

    The layers only collect the mean of x: mean(P x) = P mean(x). Every rank runs the whole set, so
    that each sums in the same order.

    Parameters
    ----------
    scored
        The trained model.
    store
        Tokens of the scenario.
    rows
        (N,) rows of the embedding set.
    state
        The trained tensors; under ZeRO-3 those in the model are slices.
    batch_size
        Sequences per forward pass.
    device
        Where to compute.
    """
    with collecting_embeddings(scored) as layers:
        for start in range(0, len(rows), batch_size):
            sequences = [store.ids(row) for row in rows[start : start + batch_size]]
            batch = collate(sequences, [0] * len(sequences), store.pad_id).to(device)
            # The head is of no use here: one position is the least it can be asked for.
            scored.model(
                input_ids=batch.input_ids,
                attention_mask=batch.mask,
                logits_to_keep=1,
                use_cache=False,
            )
    clients, experts = [], {}
    for name, group in state.groups.items():
        embeddings = []
        for index, module in enumerate(group.modules):
            client_R, experts_NR = embed(
                layers[module].input_mean().cpu(),
                torch.from_numpy(group.experts["lora_A"][group.module_N == index]),
                torch.from_numpy(group.shared["token_proj"][index]),
            )
            clients.append(client_R.numpy())
            embeddings.append(experts_NR.numpy())
        experts[name] = np.concatenate(embeddings)
    return Embedded(np.stack(clients), experts)
