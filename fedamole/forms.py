"""How the arrays that a client holds become trainable parts of the backbone, and come back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedamole.adapters import extract_state, insert_adapters, remove_adapters
from fedamole.training import ScoredModel

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from fedamole.pools import ClientState
    from fedamole.settings import AdapterSettings


@dataclass(frozen=True)
class Form:
    """One kind of trainable part. The default is the mixture of LoRA experts, and plain LoRA.

    Attributes
    ----------
    insert
        (backbone, state, settings) -> the model to train, in float32 where it is trainable.
    remove
        Takes the parts out of that model again; the backbone is as it was.
    extract
        (trained tensors by name, the state that was inserted) -> the trained state.
    scored
        (model, weight of the balance loss) -> the module whose forward pass gives the loss sums of
        a batch, as :class:`fedamole.training.ScoredModel` does; its ``model`` generates.
    """

    insert: "Callable[[PreTrainedModel, ClientState, AdapterSettings], nn.Module]" = insert_adapters
    remove: "Callable[[nn.Module], None]" = remove_adapters
    extract: "Callable[[dict[str, torch.Tensor], ClientState], ClientState]" = extract_state
    scored: "Callable[[nn.Module, float], ScoredModel]" = ScoredModel


MIXTURE = Form()
