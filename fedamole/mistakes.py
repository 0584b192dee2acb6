"""What pydantic found wrong, as a person would say it: setting, value, what is allowed."""

from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from fedamole.errors import did_you_mean
from fedamole.settings import Section


def explain(section: type[Section], errors: Sequence[Any]) -> list[str]:
    """Say pydantic's errors the way a person would, one line per mistake.

    Where a setting may have several types, pydantic reports each of them, with its name in the
    location; here they are one line.
    """
    groups: dict[Any, list[Any]] = {}
    for number, error in enumerate(errors):
        depth = _union_depth(section, error["loc"])
        groups.setdefault(number if depth is None else error["loc"][:depth], []).append(error)
    lines = []
    for key, group in groups.items():
        if isinstance(key, int):
            lines += [_explain_error(section, group[0])]
        else:
            lines += _explain_union(section, key, group)
    return lines


def _explain_union(
    section: type[Section], location: tuple[str | int, ...], errors: Sequence[Any]
) -> list[str]:
    """Say what none of the types of a setting took, or what is wrong inside the value."""
    depth = len(location) + 1
    if inside := [error for error in errors if len(error["loc"]) > depth]:
        moved = [{**error, "loc": location + error["loc"][depth:]} for error in inside]
        return [_explain_error(section, error) for error in moved]
    if len(errors) == 1:
        return [_explain_error(section, {**errors[0], "loc": location})]
    allowed = " or ".join(dict.fromkeys(map(_allowed, errors)))
    value = errors[0]["input"]
    return [f"{_where(location)}{value!r} is not allowed; allowed: {allowed}"]


def _allowed(error: Any) -> str:
    """Name what one type of a setting allows: ``a whole number``, ``'all'``."""
    text = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"].startswith(("greater_than", "less_than")):
        text = f"a number {text}"
    return text.split(", ")[0].replace("a valid integer", "a whole number")


def _explain_error(section: type[Section], error: Any) -> str:
    """Say one pydantic error."""
    where = _where(error["loc"])
    value = error["input"]
    if error["type"] == "extra_forbidden":
        names = _fields_at(section, error["loc"][:-1])
        hint = did_you_mean(error["loc"][-1], names)
        return f"{where}is not a setting (value {value!r}); {hint}allowed: {', '.join(names)}"
    if error["type"] == "missing":
        return f"{where}is missing"
    if error["type"] == "model_type":
        names = _fields_at(section, error["loc"])
        return f"{where}{value!r} is not allowed; a section is needed, with {', '.join(names)}"
    if error["type"] == "list_type":
        return f"{where}{value!r} is not allowed; a list is needed, such as [{value!r}]"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return where + message
    return f"{where}{value!r} is not allowed; {message[0].lower()}{message[1:]}"


def _where(location: tuple[str | int, ...]) -> str:
    """Write the place of an error as ``section: setting:``, with a space to go on from."""
    names = [f"item {part + 1}" if isinstance(part, int) else part for part in location]
    return "".join(f"{name}: " for name in names)


def _union_depth(section: Any, location: tuple[str | int, ...]) -> int | None:
    """Length of the location of the first setting on the way that may have several types."""
    annotation: Any = section
    for depth, part in enumerate(location):
        members = _members(annotation)
        if len(members) > 1:
            return depth
        annotation = _type_of_part(members[0], part)
    return None


def _members(annotation: Any) -> list[Any]:
    """Types that an annotation allows, without None, which pydantic names in no location."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        members = [_members(part) for part in get_args(annotation) if part is not NoneType]
        return [member for inner in members for member in inner]
    return [annotation]


def _type_of_part(annotation: Any, part: str | int) -> Any:
    """Annotation of a field of a section, or of an item of a list or mapping."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        field = annotation.model_fields.get(str(part))
        return field.annotation if field else Any
    arguments = get_args(annotation)
    return arguments[-1] if get_origin(annotation) in (list, dict) else Any


def _fields_at(section: Any, location: tuple[str | int, ...]) -> list[str]:
    """Names of the fields of the section at a location of an error."""
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation)
    return sorted(section.model_fields)


def _section_in(annotation: Any) -> Any:
    """Find the section class inside an annotation such as ``list[S]``, ``S | None``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (_section_in(part) for part in getattr(annotation, "__args__", ()))
    return next((section for section in inner if section is not None), None)
