"""The config file described from its classes: a JSON schema for editors, a reference for people."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fedamole.config import Config
from fedamole.errors import FedamoleError

BEGIN = "<!-- begin: config reference -->"
END = "<!-- end: config reference -->"

Schema = dict[str, Any]

# Section, field, and what may stand there instead of the section; fedamole.config reads it.
SHORT_FORMS = (
    ("Config", "backbone", "name (configs/models) or path of a file"),
    ("ScenarioSettings", "dataset", "name (configs/datasets) or path of a file"),
    ("ScenarioSettings", "partition", "short form such as dir0.5"),
    ("TablesSettings", "published", "name (configs/paper) or path of a file"),
    ("TrainingSettings", "deepspeed", "name (configs/deepspeed) or path of a file"),
)

_LIMITS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "minLength": "{} or more characters",
    "minItems": "{} or more items",
    "pattern": "matches {}",
}


def config_schema() -> str:
    """JSON schema of a config file, with the texts that may stand for whole sections."""
    return json.dumps(_schema(), indent=2, sort_keys=True) + "\n"


def config_reference() -> str:
    """Describe every setting: Markdown, one table per section, in the order of the classes."""
    schema = _schema()
    return "\n".join(
        _section(path, section, schema["$defs"]) for path, section in _sections("", schema, schema)
    )


def with_reference(text: str) -> str:
    """Put the reference between the markers of a Markdown text.

    Raises
    ------
    FedamoleError
        If the text does not have both markers, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or text.count(BEGIN) + text.count(END) > 2:
        raise FedamoleError(f"needs the lines {BEGIN} and {END}, once each and in this order")
    return f"{before}{BEGIN}\n\n{config_reference()}\n{END}{after}"


def _schema() -> Schema:
    """Schema of pydantic, and the short forms that :func:`fedamole.config.load_config` expands."""
    schema = Config.model_json_schema()
    for section, key, text in SHORT_FORMS:
        owner = schema if section == "Config" else schema["$defs"][section]
        field = owner["properties"][key]
        described = {k: field.pop(k) for k in ("title", "description", "default") if k in field}
        short = {"type": "string", "description": text}
        options = field.get("anyOf", [field])
        owner["properties"][key] = {"anyOf": [short, *options], **described}
    # What is required may stand in the base of a file.
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["base"]}]
    return schema


def _sections(path: str, section: Schema, schema: Schema) -> Iterator[tuple[str, Schema]]:
    """Walk the sections from the outside inwards, each with its path in a config file."""
    yield path, section
    for name, field in section["properties"].items():
        for option in _options(field):
            is_list = option.get("type") == "array"
            inner = option["items"] if is_list else option
            if "$ref" in inner:
                below = f"{path}.{name}".lstrip(".") + ("[]" if is_list else "")
                yield from _sections(below, _resolve(inner, schema["$defs"]), schema)


def _options(field: Schema) -> list[Schema]:
    """Alternatives of a field, without null."""
    return [option for option in field.get("anyOf", [field]) if option.get("type") != "null"]


def _resolve(field: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """Follow a reference to a section."""
    return definitions[field["$ref"].rpartition("/")[2]]


def _section(path: str, section: Schema, definitions: Mapping[str, Schema]) -> str:
    """Heading, purpose and table of one section."""
    lines = [
        f"### `{path}`" if path else "### The file itself",
        "",
        _prose(section["description"]),
        "",
        "| name | type | default | limits | meaning |",
        "| :--- | :--- | :--- | :--- | :--- |",
    ]
    # Of the whole file, those that a file without a base needs.
    required = section.get("required") or section.get("anyOf", [{}])[0].get("required", [])
    for name, field in section["properties"].items():
        default = "required" if name in required else _default(field)
        cells = [f"`{name}`", _type(field), default, _limits(field)]
        cells.append(_meaning(field, definitions))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _type(field: Schema) -> str:
    """Say what may stand there."""
    if "anyOf" not in field:
        return _type_of_option(field)
    # Of the alternatives only the short forms are described one by one.
    return " or ".join(o.get("description") or _type_of_option(o) for o in _options(field))


def _type_of_option(option: Schema) -> str:
    if "$ref" in option:
        return "section"
    if "const" in option or "enum" in option:
        return ", ".join(f"`{value}`" for value in option.get("enum", [option.get("const")]))
    if "type" not in option:
        return "value"
    if option["type"] == "array":
        return f"list of {_type_of_option(option['items'])}s"
    if option["type"] == "object":
        return "mapping"
    names = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false"}
    return names[option["type"]]


def _meaning(field: Schema, definitions: Mapping[str, Schema]) -> str:
    """Docstring of a field; pydantic leaves it out where the section's own says the same."""
    return _prose(field.get("description") or _resolve(field, definitions)["description"])


def _default(field: Schema) -> str:
    """Say what holds where nothing is given."""
    if any("$ref" in option for option in _options(field)) and field.get("default") is not None:
        return "its defaults"
    value = field.get("default")
    return "none" if value is None else f"`{json.dumps(value)}`"


def _limits(field: Schema) -> str:
    """Bounds of a value, and of the items of a list."""
    found = []
    for option in [field, *_options(field)]:
        for rules in (option, option.get("items", {})):
            found += [
                text.format(f"`{rules[key]}`" if key == "pattern" else rules[key])
                for key, text in _LIMITS.items()
                if key in rules
            ]
    return ", ".join(dict.fromkeys(found)).replace("|", "\\|")


def _prose(text: str) -> str:
    """Turn a docstring into the text of a table cell."""
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")
