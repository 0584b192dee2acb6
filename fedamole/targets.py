"""Which linear layers of a backbone are adapted (torch-free)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedamole.errors import FedamoleError
from fedamole.pools import ModuleShape


@dataclass(frozen=True)
class BackboneFacts:
    """What the first pool of a run is made from.

    Attributes
    ----------
    modules
        Linear layers that get adapters.
    folder
        The prepared backbone, for methods that start from its weights.
    """

    modules: list[ModuleShape]
    folder: Path


def target_modules(record: dict[str, Any], targets: list[str] | None) -> list[ModuleShape]:
    """Choose the linear layers to adapt from the facts of a backbone.

    Raises
    ------
    FedamoleError
        If a target matches nothing; lists what the model has.
    """
    modules = [ModuleShape(**module) for module in record["modules"]]
    found = sorted({module.name.rsplit(".", 1)[-1] for module in modules})
    wanted = targets or record["default_targets"]
    if not wanted:
        raise FedamoleError(
            f"target_modules: PEFT has no default for {record['model_type']}; the model has {found}"
        )

    def matches(module: ModuleShape, target: str) -> bool:
        return module.name == target or module.name.endswith(f".{target}")

    missing = [t for t in wanted if not any(matches(module, t) for module in modules)]
    if missing:
        raise FedamoleError(
            f"target_modules {missing} match no linear layer; the model has {found}"
        )
    return [module for module in modules if any(matches(module, t) for t in wanted)]
