"""Mutual learning of a private and a shared LoRA, and the ensemble of both.

Both adapters are experts of the same HMoLE layers: expert 0 is private, expert 1 shared. Hooks on
the language model double every batch of B sequences: the first B rows run with the private adapter
alone, the others with the shared one. Whoever calls the model, ``generate`` included, sees B
sequences and the logits of the ensemble; a cache of keys and values just has twice as many rows.

With the distributions p (private) and q (shared) of a response token y, and the weight w of the
private model, local training minimises

    fml       -log p(y) - log q(y) + KL(q' || p) + KL(p' || q)
    fedapen   the same - log(w p(y) + (1 - w) q(y))

where p' and q' are p and q without gradient: each model learns from the other as from a fixed
teacher (Zhang et al. 2018, arXiv:1706.00384). FML (Shen et al. 2020, arXiv:2006.16765) weighs the
two parts of a model's loss by alpha and 1 - alpha; this is alpha = 1/2, but for a factor of 2 that
Adam is blind to. FedAPEN (Qin et al., KDD 2023) adds the loss of the ensemble. It averages
predictions; here these are probabilities, while the authors' code averages logits. The training
losses in reports are these sums.
"""

# Axes: B = sequences, P = positions with a target, V = vocabulary, T = response tokens of one
#       sequence, 2 = private, shared
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fedamole import distributed
from fedamole.adapters import extract_state, insert_adapters, remove_adapters
from fedamole.batches import IGNORED, Batch, collate
from fedamole.datasets.tokens import TokenStore
from fedamole.forms import Form
from fedamole.hmole_peft import hmole_layers
from fedamole.pools import ClientState
from fedamole.settings import AdapterSettings, FedapenSettings
from fedamole.training import ScoredModel

# Inputs of a language model that have one row per sequence.
ROWS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


class Ensemble:
    """The private and the shared adapter of one language model.

    Parameters
    ----------
    weight
        Of the private model in the ensemble, in [0, 1].

    Attributes
    ----------
    weight
        As above; may be changed at any time.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._apart = False
        self._hooks: list[RemovableHandle] = []

    def form(self, joint_loss: bool) -> Form:
        """How a state of two experts per module, private and shared, becomes this ensemble.

        Parameters
        ----------
        joint_loss
            Whether training minimises the loss of the ensemble too.
        """
        return Form(
            insert=self.insert,
            remove=self.remove,
            extract=extract_state,
            scored=lambda model, _: MutualModel(model, self, joint_loss),
        )

    def insert(
        self, backbone: PreTrainedModel, state: ClientState, settings: AdapterSettings
    ) -> nn.Module:
        """Put both adapters into the backbone and double its batches."""
        model = insert_adapters(backbone, state, settings, router="given")
        self._context = next(iter(hmole_layers(model).values())).routing_context
        self._hooks = [
            # Before the hook that reads the attention mask for the layers.
            backbone.register_forward_pre_hook(self._double, with_kwargs=True, prepend=True),
            backbone.register_forward_hook(self._combine),
        ]
        return model

    def remove(self, model: nn.Module) -> None:
        """Give the backbone back as it was."""
        for hook in self._hooks:
            hook.remove()
        remove_adapters(model)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let the model give the logits of both: 2B rows, those of the private adapter first."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    def mix(self, private: Tensor, shared: Tensor) -> Tensor:
        """Log-probabilities of the ensemble, from those of its members."""
        weights = (self.weight, 1.0 - self.weight)
        private_log, shared_log = (math.log(w) if w > 0 else -math.inf for w in weights)
        return torch.logaddexp(private + private_log, shared + shared_log)

    def _double(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the language model, whose callers name all arguments."""
        rows = {name: kwargs[name] for name in ROWS if kwargs.get(name) is not None}
        count, device = next((len(value), value.device) for value in rows.values())
        self._context.expert_weights_BN = torch.eye(2, device=device).repeat_interleave(count, 0)
        return args, kwargs | {name: torch.cat([value, value]) for name, value in rows.items()}

    def _combine(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the language model: the ensemble's log-probabilities for its logits."""
        if not self._apart:
            output.logits = self.mix(*output.logits.float().log_softmax(-1).chunk(2))
        return output


class MutualModel(ScoredModel):
    """Loss sums of mutual learning in training, and of the ensemble in evaluation.

    Parameters
    ----------
    model
        From :meth:`Ensemble.insert`.
    ensemble
        The ensemble that it is.
    joint_loss
        Whether training minimises the loss of the ensemble too.
    """

    def __init__(self, model: nn.Module, ensemble: Ensemble, joint_loss: bool) -> None:
        super().__init__(model, balance_weight=0.0)
        self.ensemble = ensemble
        self.joint_loss = joint_loss

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum the token losses of each sequence; see the top of the module for both kinds.

        Returns
        -------
        tuple of torch.Tensor
            (B,) loss sum over the response tokens in nats, and (B,) zeros; both float32.
        """
        if not self.training:
            return super().forward(batch)
        private_BPV, shared_BPV = self.log_probabilities(batch)
        private_BP, shared_BP = of_targets(private_BPV, batch), of_targets(shared_BPV, batch)
        loss_BP = _divergence(private_BPV, shared_BPV) + _divergence(shared_BPV, private_BPV)
        loss_BP = loss_BP - private_BP - shared_BP
        if self.joint_loss:
            loss_BP = loss_BP - self.ensemble.mix(private_BP, shared_BP)
        token_B = loss_BP.masked_fill(batch.targets == IGNORED, 0.0).sum(1)
        return token_B, torch.zeros_like(token_B)

    def log_probabilities(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, P, V) of the private and of the shared model, float32."""
        with self.ensemble.apart():
            logits_2BPV = self.logits(batch)
        private_BPV, shared_BPV = logits_2BPV.float().log_softmax(-1).chunk(2)
        return private_BPV, shared_BPV

    @torch.no_grad()
    def answers(
        self, store: TokenStore, rows: np.ndarray, batch_size: int, device: torch.device
    ) -> list[np.ndarray]:
        """Log-probabilities that both models give to the right responses, on all ranks.

        Parameters
        ----------
        store
            Tokens of the scenario.
        rows
            Rows of the store.
        batch_size
            Sequences per forward pass.
        device
            Where to compute.

        Returns
        -------
        list of numpy.ndarray
            For each row (2, T) float32: private and shared.
        """
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        found = []
        for part in distributed.share_of_rank(batches):
            prompts = [store.prompt_length(row) for row in part]
            batch = collate([store.ids(row) for row in part], prompts, store.pad_id).to(device)
            both = [of_targets(logs_BPV, batch) for logs_BPV in self.log_probabilities(batch)]
            logs_B2P = torch.stack(both, 1).cpu().numpy()
            real_BP = (batch.targets != IGNORED).cpu().numpy()
            found.append([logs[:, real] for logs, real in zip(logs_B2P, real_BP, strict=True)])
        gathered = distributed.collect(found, len(batches))
        return [logs_2T for sequences in gathered for logs_2T in sequences]


def of_targets(logs_BPV: Tensor, batch: Batch) -> Tensor:
    """Log-probability of every target, (B, P); any number where there is none."""
    return logs_BPV.gather(2, batch.targets.clamp(min=0).unsqueeze(2)).squeeze(2)


def _divergence(teacher_BPV: Tensor, student_BPV: Tensor) -> Tensor:
    """KL(teacher || student) of every position, (B, P), without gradient to the teacher."""
    return functional.kl_div(
        student_BPV, teacher_BPV.detach(), reduction="none", log_target=True
    ).sum(2)


def fit_weight(
    answers: Sequence[np.ndarray], start: float, settings: FedapenSettings, batch_size: int
) -> float:
    """Learn the weight of the private model, both models fixed (FedAPEN).

    Adam, started afresh, minimises the mean token loss of the ensemble over a batch; after every
    step the weight is clipped to [0, 1]. Nothing but the probabilities of the right tokens is
    needed, so no model runs here.

    Parameters
    ----------
    answers
        As :meth:`MutualModel.answers` gives them; visited in this order in every pass.
    start
        Weight to start from.
    settings
        Step size and passes.
    batch_size
        Sequences per step.
    """
    weight = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=settings.learning_rate)
    batches = [
        _ratios(np.concatenate(answers[begin : begin + batch_size], axis=1))
        for begin in range(0, len(answers), batch_size)
    ]
    for _ in range(settings.passes):
        for private_T, shared_T in batches:
            optimizer.zero_grad()
            loss = -(weight * private_T + (1 - weight) * shared_T).log().mean()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                weight.clamp_(0.0, 1.0)
    return weight.item()


def _ratios(logs_2T: np.ndarray) -> Tensor:
    """Probabilities over the larger of the two: the loss changes by a constant, and no underflow.

    A ratio below the smallest number counts as that: at weight 0 or 1 its logarithm is needed.
    """
    logs = torch.from_numpy(logs_2T.astype(np.float64))
    return (logs - logs.amax(0)).exp().clamp(min=torch.finfo(torch.float64).tiny)
