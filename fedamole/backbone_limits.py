"""What a study asks of its backbone and the backbone cannot do, said before anything computes.

Torch-free: read with the config, and again from the facts of the prepared backbone.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from fedamole.errors import FedamoleError
from fedamole.settings import BackboneLoading


def check_length(
    name: str,
    positions: int | None,
    max_length: int,
    new_tokens: int = 0,
    virtual_tokens: int = 0,
) -> None:
    """Refuse sequences that a model has no positions for.

    A model with learned positions (OPT) would end with an index error in the middle of a run;
    others would go on, with positions that they were never trained on.

    Parameters
    ----------
    name
        The backbone.
    positions
        Longest sequence that it takes, in tokens; None if it has no limit, or none is known.
    max_length
        Longest sequence of a scenario, in tokens.
    new_tokens
        Tokens that an answer may add to it; 0 where none is generated.
    virtual_tokens
        Tokens of a soft prompt in front of it; 0 without one.

    Raises
    ------
    FedamoleError
        If the sequences can be longer than the model takes.
    """
    needed = max_length + new_tokens + virtual_tokens
    if positions is None or needed <= positions:
        return
    asked, lower = f"max_length {max_length}", "max_length"
    if virtual_tokens:
        asked += f" and a soft prompt of {virtual_tokens} tokens"
        lower += ", the length of the prompt"
    if new_tokens:
        asked += f" and answers of {new_tokens} tokens"
    raise FedamoleError(
        f"backbone {name}: has positions for {positions} tokens, and {asked} need {needed}; "
        f"lower {lower} or evaluation: max_new_tokens"
    )


def check_loading(facts: Mapping[str, Any], loading: BackboneLoading) -> None:
    """Refuse ways to load a prepared backbone that will fail in the job that loads it.

    Parameters
    ----------
    facts
        Content of ``backbone.json``. A file of an older version says nothing of attention and
        linear layers; loading the model then does.
    loading
        How it shall be loaded.

    Raises
    ------
    FedamoleError
        If transformers has no such attention for the model, or bitsandbytes is not there or leaves
        the model's linear layers as they are.
    """
    name = facts["name"]
    if loading.attention == "sdpa" and facts.get("attention", "sdpa") != "sdpa":
        raise FedamoleError(
            f"backbone {name}: attention sdpa is not offered for {facts['model_type']}; take "
            "attention eager, or flash_attention_2 where it is installed"
        )
    if loading.quantization is None:
        return
    if classes := facts.get("special_linear", []):
        raise FedamoleError(unquantizable(name, loading, classes))
    check_bitsandbytes(name, loading)


def check_bitsandbytes(name: str, loading: BackboneLoading) -> None:
    """Refuse quantization without the package for it.

    Raises
    ------
    FedamoleError
        If bitsandbytes is not installed.
    """
    if loading.quantization and find_spec("bitsandbytes") is None:
        raise FedamoleError(
            f"backbone {name}: quantization {loading.quantization} needs bitsandbytes; "
            "pip install 'fedamole[quantization]', or leave quantization out"
        )


def unquantizable(name: str, loading: BackboneLoading, classes: list[str]) -> str:
    """What to say of linear layers that bitsandbytes would leave as they are."""
    return (
        f"backbone {name}: quantization {loading.quantization} takes layers of class Linear, and "
        f"this model has {', '.join(classes)}; leave quantization out"
    )
