"""What a study reads: its backbone and its data."""

import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fedamole.config import Config
from fedamole.datasets.files import find_files, package_folder
from fedamole.doctor.findings import Finding, error, ok, warning
from fedamole.errors import FedamoleError
from fedamole.settings import BackboneSettings, SourceSettings

WEIGHTS = ("*.safetensors", "*.bin")
NETWORK_LIMIT_S = 5


def backbone(config: Config, offline_is_error: bool = False) -> Finding:
    """Check that the backbone is prepared, or can be.

    Parameters
    ----------
    config
        The study.
    offline_is_error
        Whether this machine has to fetch a model of the hub itself, as a node would.
    """
    what, settings = "backbone", config.backbone
    prepared = Path(config.results) / "backbones" / settings.name
    if (prepared / "backbone.json").is_file():
        return _prepared(prepared)
    if settings.generate:
        return ok(what, f"{settings.name}: will be generated")
    if settings.hub:
        return _hub_model(settings, offline_is_error)
    try:
        return ok(what, f"{settings.name}: {_local_model(settings)}")
    except FedamoleError as problem:
        return error(what, str(problem), "correct backbone in the config")


def _prepared(folder: Path) -> Finding:
    """Check a prepared backbone: its files may be links to where the model came from."""
    broken = [path for path in sorted(folder.iterdir()) if not path.exists()]
    if not broken:
        return ok("backbone", f"{folder} is prepared")
    value = f"{broken[0]} points to {broken[0].readlink()}, which is not seen here"
    return error("backbone", value, "put the model where every machine sees it")


def _local_model(settings: BackboneSettings) -> Path:
    """Find the model of a folder or of a GGUF file.

    Raises
    ------
    FedamoleError
        If it is not there.
    """
    if settings.folder:
        folder = Path(settings.folder).expanduser()
        if not holds_model(folder):
            raise FedamoleError(f"folder {folder} has no config.json with *.safetensors or *.bin")
        return folder
    path = Path(str(settings.gguf)).expanduser()
    if settings.package:
        path = package_folder(settings.package) / path
    if not path.is_file():
        raise FedamoleError(f"GGUF file {path} does not exist")
    return path


def holds_model(folder: Path) -> bool:
    """Whether a folder has the files of a model."""
    has_weights = any(next(folder.glob(pattern), None) for pattern in WEIGHTS)
    return has_weights and (folder / "config.json").is_file()


def _hub_model(settings: BackboneSettings, offline_is_error: bool) -> Finding:
    """Look for a model of the hub in its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name = f"{settings.hub} (revision {settings.revision or 'default'})"
    try:
        folder = snapshot_download(
            str(settings.hub), revision=settings.revision, local_files_only=True
        )
    except LocalEntryNotFoundError:
        folder = ""
    except HFValidationError as problem:
        return error("backbone", str(problem), "correct backbone: hub in the config")
    if folder and holds_model(Path(folder)):
        return ok("backbone", f"{name}: in the cache, {folder}")
    return _not_cached("backbone", name, offline_is_error)


def _not_cached(what: str, name: str, offline_is_error: bool) -> Finding:
    """What to say of something that only the hub has."""
    if reaches_hub():
        return ok(what, f"{name}: will be fetched from the hub, which answers")
    value = f"{name} is not in the cache, and the hub does not answer here"
    advice = "on a host with network, first: snakemake --configfile FILE --cores 1 --until tokenize"
    return (error if offline_is_error else warning)(what, value, advice)


def reaches_hub() -> bool:
    """Whether this machine reaches the hub, or the proxy in front of it."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "on", "yes", "true"):
        return False
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = urllib.request.getproxies().get("https", hub)
    parts = urllib.parse.urlsplit(url if "//" in url else f"//{url}")
    try:
        address = (parts.hostname or "huggingface.co", parts.port or 443)
        with socket.create_connection(address, NETWORK_LIMIT_S):
            return True
    except (OSError, ValueError):
        return False


def data(config: Config, offline_is_error: bool = False) -> Iterator[Finding]:
    """Check that the data sets are tokenised, or can be read; each once."""
    sources = {scenario.dataset.name: scenario.dataset.source for scenario in config.scenarios}
    for name, source in sources.items():
        slugs = [
            slug
            for slug, (scenario, _) in config.data_seeds().items()
            if scenario.dataset.name == name
        ]
        if all(_is_tokenised(config, slug) for slug in slugs):
            yield ok("data", f"{name}: tokenised for {', '.join(slugs)}")
        else:
            yield _source(name, source, offline_is_error)


def _is_tokenised(config: Config, slug: str) -> bool:
    """Whether a population is ready for training."""
    tokens = Path(config.results) / "scenarios" / slug / f"tokens-{config.backbone.name}"
    return (tokens / "meta.json").is_file()


def _source(name: str, source: SourceSettings, offline_is_error: bool) -> Finding:
    """Check that the source of a data set is there."""
    if source.hub:
        if _is_cached(source.hub, source):
            return ok("data", f"{name}: {source.hub}, in the cache")
        return _not_cached("data", f"{name}: {source.hub}", offline_is_error)
    try:
        files = find_files(source)
    except FedamoleError as problem:
        return error("data", f"{name}: {problem}", "correct source: files of the data set")
    return ok("data", f"{name}: {len(files)} files, {files[0]}{' ...' if files[1:] else ''}")


def _is_cached(hub: str, source: SourceSettings) -> bool:
    """Whether a data set of the hub was read on this machine before; by the library's own names."""
    if source.files:
        try:
            return bool(find_files(source, fetch=False))
        except FedamoleError:
            return False
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    *owner, name = hub.split("/")
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return any((cache / "___".join([*owner, name])).glob("*/*/*"))
