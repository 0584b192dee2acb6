"""The command that prints the JSON schema of a config file."""

import argparse
import json

from fedamole.config import Config


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser("schema", help="print the JSON schema of a config file")
    parser.set_defaults(command=run_schema)


def run_schema(args: argparse.Namespace) -> None:
    """Print the schema; editors use it to complete and check configs."""
    print(config_schema(), end="")


def config_schema() -> str:
    """JSON schema of a config, with the names that may stand for whole sections."""
    schema = Config.model_json_schema()
    by_name = {"type": "string", "description": "a name, or the path of a file"}
    places = [
        (schema["properties"], "backbone"),
        (schema["$defs"]["ScenarioSettings"]["properties"], "dataset"),
        (schema["$defs"]["ScenarioSettings"]["properties"], "partition"),
        (schema["$defs"]["TrainingSettings"]["properties"], "deepspeed"),
    ]
    for properties, key in places:
        section = properties[key]
        described = {k: section.pop(k) for k in ("title", "description", "default") if k in section}
        properties[key] = {"anyOf": [by_name, section], **described}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"
