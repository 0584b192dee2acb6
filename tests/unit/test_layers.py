"""Imports go downwards only, and what the Snakefile parses stays torch-free and quick."""

import argparse
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedamole.cli

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "fedamole"

# Lowest first; a module may import from its own layer and those before. See ARCHITECTURE.md.
LAYERS = [
    {"errors", "__init__"},
    {
        "registry",
        "settings",
        "mistakes",
        "sweeps",
        "shown",
        "config",
        "config_files",
        "stages",
        "randomness",
        "participation",
    }
    | {"slurm", "slurm_site", "snakemake_profile", "launching", "backbone_limits"}
    | {"machine", "path_lists"},
    {"artifacts", "pools", "hdf5", "pool_files", "pool_parts", "records", "progress", "owner"}
    | {"meter"},
    {"partition", "assignment", "aggregation", "targets", "results", "rendering", "tables"}
    | {"comparison", "main_table", "clients_table", "spread_table", "significance"}
    | {"sweep_table", "published_table", "markup"}
    | {"privacy", "accounting", "privacy_tables", "fusion"}
    | {"transport", "assignment_strategies", "assignment_measures", "assignment_table"}
    | {"figure_data", "figure_rows_scores", "figure_rows_experts", "routing_map"}
    | {"drawing", "drawing_parts", "drawing_bars", "drawing_lines", "drawing_heat"}
    | {"drawing_routing", "figures", "config_reference", "study_page"}
    | {"planning", "study_status", "head"}
    | {"manifest", "cache", "cache_archive", "sharing"}
    | {"costs", "overhead_table", "drawing_overhead"},
    {"datasets", "distributed", "batches", "routing", "hmole_function", "hmole", "hmole_peft"}
    | {
        "backbone",
        "adapters",
        "training",
        "dp_sgd",
        "embeddings",
        "contexts",
        "generation",
        "evaluation",
        "client",
        "device_meter",
        "forms",
        "mutual",
        "packed_layer",
        "packing",
        "soft_prompts",
        "token_embeddings",
        "doctor",
    },
    {"methods"},
    {"cli", "__main__"},
]
# The command line is parsed without these as well.
SERVER = {"numpy", "h5py", "ortools", "opacus", "nevergrad", "scipy", "submitit", "safetensors"}
HEAVY = {"torch", "transformers", "peft", "deepspeed", "datasets", "pandas", "matplotlib"}


def unit_of(path: Path) -> str:
    """The module, or the sub-package, that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def layer_of(unit: str) -> int:
    found = [level for level, units in enumerate(LAYERS) if unit in units]
    assert found, f"fedamole.{unit} has no layer: add it here and to ARCHITECTURE.md"
    return found[0]


def imported_units(path: Path) -> set[str]:
    """Units of fedamole that a file imports, whether at its top or inside a function."""
    units = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fedamole" and len(parts) > 1:
                inner = PACKAGE / parts[1]
                exists = inner.is_dir() or inner.with_suffix(".py").is_file()
                units.add(parts[1] if exists else "__init__")
    return units


def type_checking_imports(path: Path) -> set[str]:
    """Units that a file imports for annotations only."""
    tree = ast.parse(path.read_text())
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return {
        (node.module or "").split(".")[1]
        for block in blocks
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedamole.")
    }


def test_imports_go_downwards() -> None:
    upwards = [
        f"{path.relative_to(PACKAGE)} imports fedamole.{unit}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for unit in imported_units(path) - type_checking_imports(path)
        if layer_of(unit) > layer_of(unit_of(path))
    ]
    assert upwards == []


def test_methods_do_not_import_each_other() -> None:
    shared = {"__init__", "building_blocks"}
    methods = {path.stem for path in PACKAGE.glob("methods/*.py")} - shared
    for path in PACKAGE.glob("methods/*.py"):
        text = path.read_text()
        assert not {m for m in methods if f"from fedamole.methods.{m} import" in text}, path


def test_what_the_snakefile_imports_is_light() -> None:
    code = (
        "import sys, fedamole.stages, fedamole.config, fedamole.registry, fedamole.results\n"
        "import fedamole.cache, fedamole.sharing\n"
        "import fedamole.cli; fedamole.cli._parser()\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def loaded_by(*arguments: str) -> set[str]:
    """Packages that are loaded when a command line ends after it was parsed."""
    code = (
        "import sys, fedamole.cli\n"
        "try: fedamole.cli.main()\n"
        "except SystemExit: pass\n"
        "print('loaded', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "command", ["", "aggregate", "assign", "show", "status", "pool show", "cache"]
)
def test_help_loads_nothing_heavy(command: str) -> None:
    assert not (HEAVY | SERVER) & loaded_by(*command.split(), "--help")


def test_a_command_loads_its_own_module_only() -> None:
    parsers = {
        module: fedamole.cli._parser(commands[0])
        for module, commands in fedamole.cli.MODULES.items()
    }
    for module, parser in parsers.items():
        (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        assert tuple(subparsers.choices) == fedamole.cli.MODULES[module]


def test_test_modules_have_names_of_their_own() -> None:
    """Pytest collects `tests` without packages: two files of one name cannot be run together."""
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
