"""Config files as data: read strictly, merged with their bases, names replaced (torch-free).

What the settings mean is in :mod:`fedamole.config`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedamole.errors import FedamoleError, did_you_mean


def read_yaml(path: Path) -> Any:
    """Read a YAML or JSON file.

    Raises
    ------
    FedamoleError
        If it is missing, not valid YAML, or has a key twice; with file and line.
    """
    try:
        return _load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FedamoleError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise FedamoleError(f"{path}{line}: is not valid YAML ({problem})") from error


def check_config_files(paths: Iterable[str | Path]) -> None:
    """Find mistakes in config files that Snakemake, which reads them first, says nothing about.

    Raises
    ------
    FedamoleError
        See :func:`read_yaml`.
    """
    for path in paths:
        read_yaml(Path(path))


def with_base(
    data: Mapping[str, Any], beside: Sequence[Path], origin: str, seen: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Add a config to the file that it names as its base, and that to its own, if it has one.

    Raises
    ------
    FedamoleError
        If there is no such file, it is no mapping, or a file is its own base.
    """
    name = data.get("base")
    if name is None:
        return dict(data)
    if not isinstance(name, str):
        raise FedamoleError(f"{origin}: base: {name!r} must be the path of a config file")
    places = [folder / name for folder in (*beside, Path())]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        looked = ", ".join(dict.fromkeys(map(str, places)))
        raise FedamoleError(f"{origin}: base: there is no file {name!r}; looked for {looked}")
    if path.resolve() in seen:
        raise FedamoleError(f"{path}: base: the file is a base of itself")
    below = read_yaml(path)
    if not isinstance(below, Mapping):
        raise FedamoleError(f"{path}: holds no settings; a mapping of names to values is needed")
    lower = with_base(plain(below), [path.parent], str(path), (*seen, path.resolve()))
    return _merged(lower, {key: value for key, value in data.items() if key != "base"})


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Put the settings of one mapping over those of another, section by section."""
    result = dict(lower)
    for key, value in upper.items():
        below = result.get(key)
        # A sweep is one thing: the settings of another must not stay in it.
        if isinstance(below, Mapping) and isinstance(value, Mapping) and key != "sweep":
            result[key] = _merged(below, value)
        else:
            result[key] = value
    return result


def named(value: Any, folder: Path, what: str, origin: str) -> Any:
    """Replace a name or path by the content of the file it stands for."""
    if not isinstance(value, str):
        return value
    is_path = "/" in value or value.endswith((".yaml", ".yml", ".json"))
    files = {path.stem: path for path in sorted(folder.glob("*.*"))}
    path = Path(value) if is_path else files.get(value)
    if path is None:
        raise FedamoleError(
            f"{origin}: {what} {value!r} is unknown; {did_you_mean(value, files)}"
            f"allowed: {', '.join(files)}, the path of a file, or the section itself"
        )
    if not path.is_file():
        raise FedamoleError(
            f"{origin}: {what} {value!r}: there is no such file, seen from {Path.cwd()}"
        )
    return plain(read_yaml(path))


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once; PyYAML itself keeps the last one and says nothing."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping, before merge keys (``<<``) add those of other mappings."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in lines:
                problem = f"{key.value!r} stands twice, first in line {lines[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


def _load(text: str) -> Any:
    """Parse JSON, or else YAML, as Snakemake does; to YAML ``1e9`` is a text and a tab an error."""
    try:
        data = json.loads(text)
    except ValueError:
        return yaml.load(text, _Loader)
    yaml.compose(text.replace("\t", " "), _Loader)  # Refuses a key that stands twice.
    return data


def _key(key: Any) -> str:
    """A key as text, as JSON would write it."""
    return str(key).lower() if isinstance(key, bool) else str(key)


def plain(data: Any) -> Any:
    """Keep what JSON can say: dates and keys that are numbers become text."""
    if isinstance(data, dict):
        return {_key(key): plain(value) for key, value in data.items()}
    if isinstance(data, list):
        return [plain(value) for value in data]
    return data if data is None or isinstance(data, str | int | float) else str(data)
