"""What a job refuses before any of its clients starts."""

from pathlib import Path
from typing import Any

import pytest
from federation import CLIENTS, SIZES, made_up_tokens

from fedamole.cli.session_checks import check_session
from fedamole.config import load_config
from fedamole.config_files import read_yaml
from fedamole.errors import ClientError, FedamoleError
from fedamole.stages import ClientStage, client_stage

CHECKOUT = Path(__file__).parents[2]
FACTS = {"name": "tiny", "positions": 2048}


def stage(run: str, **sections: Any) -> ClientStage:
    raw = read_yaml(CHECKOUT / "configs/smoke.yaml") | {"methods": [run]} | sections
    config = load_config(raw, CHECKOUT / "configs")
    return client_stage(config, next(iter(config.scenario_seeds())), run)


def private(run: str, delta: float) -> ClientStage:
    noise = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": delta}
    return stage(run, privacy={"dp_sgd": noise})


def check(settings: ClientStage, virtual_tokens: int = 0) -> None:
    check_session(settings, FACTS, made_up_tokens(), virtual_tokens)


def test_delta_is_held_against_all_that_a_client_trains_on() -> None:
    """Runs without embeddings train on the embedding set too; pooled data are those of all."""
    own, whole = SIZES["train"], SIZES["train"] + SIZES["embedding"]
    between = (1 / whole + min(1 / own, 0.1)) / 2
    check(private("fedamole", between))
    for run, size in (("fedit", whole), ("local", whole), ("centralised", CLIENTS * whole)):
        check(private(run, 0.99 / size))
        with pytest.raises(FedamoleError, match=f"; client 0 has {size}$") as raised:
            check(private(run, 1.01 / size))
        assert not isinstance(raised.value, ClientError)


@pytest.mark.parametrize("run", ["fedprompt", "fedptuning"])
def test_a_soft_prompt_takes_positions_of_sequences_and_answers(run: str) -> None:
    settings = stage(run, evaluation={"max_new_tokens": 1900})
    used = settings.run.scenario.max_length + 1900
    check(settings, virtual_tokens=2048 - used)
    with pytest.raises(FedamoleError, match="answers of 1900 tokens need 2049; lower max_length"):
        check(settings, virtual_tokens=2049 - used)
