"""A cache is the metrics of a study, whole, unchanged and of its settings, or it is refused."""

import hashlib
import json
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from study import Study, write_lines

from fedamole import cache_archive, registry, stages
from fedamole.artifacts import Header, canonical
from fedamole.cache import Cache, check_cache
from fedamole.cache_archive import pack, summary, unpack, verify
from fedamole.cli import main
from fedamole.config import Config, load_config
from fedamole.config_files import read_yaml
from fedamole.costs import RoundCosts, RunCosts, write_costs
from fedamole.errors import FedamoleError
from fedamole.machine import Platform, this_platform
from fedamole.manifest import (
    MANIFEST,
    Manifest,
    costs_name,
    describe,
    metrics_name,
    read_manifest,
    write_manifest,
)
from fedamole.registry import lookup
from fedamole.results import expected, read_metrics
from fedamole.tables import table_files

SLUG = "chatterbot-dir0.5-s42"
HERE = Platform(processor="here", cores=2, system="Linux", python="3.11.7", packages={})
THERE = HERE.model_copy(update={"processor": "there"})
Change = dict[str, Any]


def score(slug: str, method: str, round_: int, client: int) -> float:
    return (len(method) + round_ + client) / 40


def study(configs: Path, **changes: Any) -> Config:
    """The smoke study, with some of its settings replaced."""
    return load_config({**read_yaml(configs / "smoke.yaml"), **changes}, configs)


def write_metrics(folder: Path, config: Config) -> list[Path]:
    """Metrics files as `gather` writes them for a config, by the code of now."""
    names = {scenario.slug: config.seeds for scenario in config.scenarios}
    made = Study(score, score, config.methods, names, clients=3, rounds=config.rounds)
    paths = made.write(folder)
    for path in paths:
        header, *lines = map(json.loads, path.read_text().splitlines())
        run = lookup(path.stem).run
        header["header"]["digest"] = stages.digest(
            stages.client_stage(config, path.parent.name, run)
        )
        write_lines(path, [header, *lines])
    return paths


def add_manifest(folder: Path, config: Config | None, machine: Platform = HERE) -> Manifest:
    """Describe a folder again."""
    old = read_manifest(folder / MANIFEST) if (folder / MANIFEST).exists() else None
    settings = stages.results_stage(config) if config else None
    made = describe(folder, folder.glob("*/*.jsonl"), machine, settings, old)
    write_manifest(folder / MANIFEST, made)
    return made


@pytest.fixture
def config(configs: Path) -> Config:
    return study(configs)


@pytest.fixture
def folder(config: Config, tmp_path: Path) -> Path:
    """The cache of the smoke study."""
    write_metrics(tmp_path / "metrics", config)
    add_manifest(tmp_path / "metrics", config)
    return tmp_path / "metrics"


def refused(folder: Path, config: Config, accept_stale: bool = False) -> list[str]:
    """Lines of the refusal of a cache, without the folder."""
    with pytest.raises(FedamoleError) as raised:
        check_cache(folder, config, accept_stale)
    return [line.removeprefix(f"{folder}/") for line in str(raised.value).splitlines()]


def unverified(path: Path) -> list[str]:
    """Lines of the refusal to verify a folder or archive."""
    with pytest.raises(FedamoleError) as raised:
        verify(path)
    return [line.removeprefix(f"{path}") for line in str(raised.value).splitlines()]


def flip(path: Path, offset: int) -> None:
    """Change one byte."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def tables_of(cache: Cache) -> dict[str, str]:
    return table_files(read_metrics(cache.metrics, cache.settings), cache.settings)


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# Versions


@pytest.mark.parametrize("stage", stages.Versions.model_fields)
@pytest.mark.parametrize("run", ["fedamole", "fdlora", "zero-shot"])
def test_settings_under_old_versions_are_those_of_the_old_code(
    config: Config, stage: str, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stages.digest(stages.client_stage(config, SLUG, run))
    versions = stages.versions_of(run)
    monkeypatch.setitem(stages.VERSIONS, stage, stages.VERSIONS[stage] + 1)
    assert stages.digest(stages.client_stage(config, SLUG, run)) != before
    assert stages.digest(stages.client_stage(config, SLUG, run, versions)) == before


# The right cache


def test_a_whole_cache_gives_the_files_and_settings_of_the_tables(
    folder: Path, config: Config
) -> None:
    found = check_cache(folder, config)
    assert found.metrics == [folder / SLUG / f"{method}.jsonl" for method in config.methods]
    assert found.settings == stages.results_stage(config)


def test_a_smaller_study_uses_a_part_of_a_cache(folder: Path, configs: Path) -> None:
    (folder / "note.txt").write_text("not asked for")
    found = check_cache(folder, study(configs, methods=["zero-shot", "fedit"]))
    assert [path.stem for path in found.metrics] == ["zero-shot", "fedit"]


def test_every_missing_file_is_named(folder: Path, config: Config) -> None:
    for method in ("fedit", "zero-shot"):
        (folder / SLUG / f"{method}.jsonl").unlink()
    expected = [f"{SLUG}/fedit.jsonl: is missing", f"{SLUG}/zero-shot.jsonl: is missing"]
    assert refused(folder, config) == expected


def test_a_larger_study_misses_what_was_never_run(folder: Path, configs: Path) -> None:
    larger = study(configs, seeds=[42, 43], methods=["fedit"])
    assert refused(folder, larger) == ["chatterbot-dir0.5-s43/fedit.jsonl: is missing"]


def test_a_cache_without_manifest_says_how_to_make_one(folder: Path, config: Config) -> None:
    (folder / MANIFEST).unlink()
    (line,) = refused(folder, config)
    assert line.startswith(f"{MANIFEST}: there is no manifest; ")
    assert line.endswith(f"fedamole cache manifest {folder} --configfile FILE")


@pytest.mark.parametrize("offset", [0, 30, 700, -2])
def test_a_flipped_byte_is_named(folder: Path, config: Config, offset: int) -> None:
    flip(folder / SLUG / "fedit.jsonl", offset)
    (line,) = refused(folder, config)
    assert line.startswith(f"{SLUG}/fedit.jsonl: differs from the manifest (SHA-256 ")


def test_a_file_that_the_manifest_does_not_know_is_refused(
    folder: Path, configs: Path, config: Config
) -> None:
    write_metrics(folder, study(configs, methods=["local"]))
    wanted = study(configs, methods=["local", "fedit"])
    assert refused(folder, wanted) == [f"{SLUG}/local.jsonl: is not in the manifest"]


@pytest.mark.parametrize("accept", [False, True])
def test_files_of_other_settings_are_refused(
    folder: Path, configs: Path, config: Config, accept: bool
) -> None:
    """The zero-shot model knows no learning rate: its file is right for both."""
    training = {"steps": 3, "batch_size": 2, "learning_rate": 0.5}
    other = study(configs, training=training)
    lines = refused(folder, other, accept)
    assert [line.split(":")[0] for line in lines] == [
        f"{SLUG}/{method}.jsonl" for method in ("fedamole", "fedit", "fedit-ft")
    ]
    digests = [stages.digest(stages.client_stage(c, SLUG, "fedit"))[:12] for c in (config, other)]
    assert lines[1].endswith(
        f": was made with other settings (digest {digests[0]}, the config gives {digests[1]})"
    )


def test_another_number_of_rounds_is_refused(folder: Path, configs: Path) -> None:
    """Rounds are in no digest; the zero-shot model has none."""
    lines = refused(folder, study(configs, rounds=5))
    assert lines == [
        f"{SLUG}/{method}.jsonl: has 2 rounds; the config says 5"
        for method in ("fedamole", "fedit", "fedit-ft")
    ]


def test_all_problems_are_said_at_once(folder: Path, configs: Path) -> None:
    (folder / SLUG / "zero-shot.jsonl").unlink()
    flip(folder / SLUG / "fedit.jsonl", 100)
    assert len(refused(folder, study(configs, rounds=5))) == 4


# Stale files


def test_files_of_older_code_are_stale_and_not_mixed(
    folder: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stages.VERSIONS["run"]
    monkeypatch.setitem(stages.VERSIONS, "run", run + 1)
    lines = refused(folder, config)
    assert len(lines) == len(config.methods)
    assert lines[1] == (
        f"{SLUG}/fedit.jsonl: is stale, made by other code (stage run: version {run}, now "
        f"{run + 1}); its numbers may differ from those of this code"
    )


def test_only_the_files_of_a_changed_method_are_stale(
    folder: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.RUNS, "fedit", replace(registry.RUNS["fedit"], version=1))
    names = [line.split(": is stale, ")[0] for line in refused(folder, config)]
    assert names == [f"{SLUG}/fedit.jsonl", f"{SLUG}/fedit-ft.jsonl"]


def test_accepted_stale_files_give_the_tables_of_the_same_numbers(
    folder: Path,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = stages.VERSIONS["client"]
    monkeypatch.setitem(stages.VERSIONS, "client", client + 1)
    stale = check_cache(folder, config, accept_stale=True)
    change = f"stage client: version {client}, now {client + 1}"
    assert caplog.messages == [f"{folder}: 4 stale files, made by other code ({change})"]
    caplog.clear()
    write_metrics(tmp_path / "fresh", config)
    add_manifest(tmp_path / "fresh", config)
    fresh = check_cache(tmp_path / "fresh", config)
    assert not caplog.messages
    assert stale.settings != fresh.settings
    assert tables_of(stale) == tables_of(fresh)
    with pytest.raises(FedamoleError, match="was made with other settings"):
        read_metrics(stale.metrics, fresh.settings)


def test_stale_files_of_other_settings_are_mixed(
    folder: Path, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stages.VERSIONS, "tokens", 9)
    other = study(configs, training={"steps": 3, "batch_size": 2, "learning_rate": 0.5})
    lines = refused(folder, other, accept_stale=True)
    assert len(lines) == 3
    assert "was made with other settings" in lines[0]
    assert lines[0].endswith(", and by other code (stage tokens: version 1, now 9)")


# The manifest


def test_equal_files_give_an_equal_manifest(folder: Path, config: Config) -> None:
    before = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).unlink()
    add_manifest(folder, config)
    assert (folder / MANIFEST).read_bytes() == before


def test_a_manifest_names_no_host_path_or_user(folder: Path, config: Config) -> None:
    (folder / MANIFEST).unlink()
    add_manifest(folder, config, this_platform())
    text = (folder / MANIFEST).read_text()
    machine = json.loads(text)["machines"][0]
    assert set(machine) == {"processor", "cores", "system", "python", "packages"}
    assert set(machine["packages"]) == {"deepspeed", "torch", "transformers"}
    assert socket.gethostname() not in text
    assert str(folder.parent) not in text


def test_what_is_known_of_unchanged_files_stays(
    folder: Path, configs: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was made anew belongs to the machine and the code of now."""
    old = read_manifest(folder / MANIFEST)
    monkeypatch.setitem(stages.VERSIONS, "run", stages.VERSIONS["run"] + 1)
    write_metrics(folder, study(configs, methods=["fedit"]))
    made = add_manifest(folder, config, THERE)
    assert made.machines == [HERE, THERE]
    changed = f"{SLUG}/fedit.jsonl"
    for name, entry in made.files.items():
        assert entry.machine == (name == changed)
        assert entry.versions.run == old.files[name].versions.run + (name == changed)
    assert [line.split(":")[0] for line in refused(folder, config)] == [
        f"{SLUG}/{method}.jsonl" for method in ("fedamole", "fedit-ft", "zero-shot")
    ]


def test_a_file_of_unknown_code_gets_no_entry(folder: Path, configs: Path, config: Config) -> None:
    add_manifest(folder, None)
    other = study(configs, methods=["fedit"], evaluation={"batch_size": 1})
    (path,) = write_metrics(folder, other)
    with pytest.raises(FedamoleError, match=rf"{path}: no manifest knows this file; --configfile"):
        add_manifest(folder, None)
    with pytest.raises(FedamoleError, match=rf"{path}: was made with other settings or by other"):
        add_manifest(folder, config)
    add_manifest(folder, other)


def test_a_file_in_the_place_of_another_method_gets_no_entry(folder: Path, config: Config) -> None:
    """Both rows are of one run, so that their digests agree."""
    shutil.copy(folder / SLUG / "fedit.jsonl", folder / SLUG / "fedit-ft.jsonl")
    expected = f"{SLUG}/fedit-ft.jsonl: holds fedit on {SLUG}; its place is "
    with pytest.raises(FedamoleError, match=expected):
        add_manifest(folder, config)


def test_a_broken_file_gets_no_entry(folder: Path, config: Config) -> None:
    path = folder / SLUG / "fedit.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(FedamoleError, match=r"fedit\.jsonl:\d+: is not a whole JSON line"):
        add_manifest(folder, config)


# Costs, and other studies of the same folder


def write_costs_beside(folder: Path, config: Config, seconds: float = 1.0) -> list[Path]:
    """Files of costs as `gather-costs` writes them for a config, by the code of now."""
    paths = []
    for slug, methods in stages.results_stage(config).digests.items():
        for method, digest in methods.items():
            rounds = [RoundCosts(round=1, clients=[], aggregate_seconds=seconds)]
            costs = RunCosts(scenario=slug, seed=42, method=method, machines=[], rounds=rounds)
            paths.append(folder / costs_name(slug, method))
            write_costs(paths[-1], Header("costs", digest), costs)
    return paths


OVERHEAD: Change = {"tables": {"show": ["overhead"]}}


def test_costs_that_are_missing_or_changed_are_named(folder: Path, configs: Path) -> None:
    shown = study(configs, **OVERHEAD)
    paths = write_costs_beside(folder, shown)
    add_manifest(folder, shown)
    assert check_cache(folder, shown).costs == paths
    paths[0].unlink()
    flip(paths[1], 300)
    missing, changed = refused(folder, shown)
    assert missing == f"{paths[0].relative_to(folder)}: is missing"
    assert changed.startswith(f"{paths[1].relative_to(folder)}: differs from the manifest (SHA-256")
    assert check_cache(folder, study(configs)).costs == []


def test_stale_costs_stop_only_a_study_that_shows_them(
    folder: Path, configs: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    write_costs_beside(folder, study(configs, evaluation={"batch_size": 1}, methods=["fedit"]))
    add_manifest(folder, config)
    stale = f"{SLUG}/fedit.costs.json"
    assert [stale in message for message in caplog.messages] == [True]
    assert caplog.messages[0].endswith("; it is left out of the manifest")
    assert check_cache(folder, config).costs == []
    shown = study(configs, methods=["fedit"], **OVERHEAD)
    assert refused(folder, shown) == [f"{stale}: is not in the manifest"]


def describe_as_the_rule(folder: Path, config: Config) -> Manifest:
    """Write the manifest of the files of a study, as the workflow does."""
    settings = stages.results_stage(config)
    pairs = expected(settings)
    paths = [str(folder / metrics_name(slug, method)) for slug, method in pairs]
    command = ["cache", "manifest", "--settings", stages.canonical_json(settings)]
    assert main([*command, "--metrics", *paths, "--out", str(folder / MANIFEST)]) == 0
    return read_manifest(folder / MANIFEST)


@pytest.mark.parametrize("change", ["made anew", "broken", "missing"])
def test_a_changed_file_of_another_study_is_left_out_of_the_manifest(
    folder: Path, configs: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    own, name = study(configs, methods=["fedit"]), f"{SLUG}/zero-shot.jsonl"
    before = read_manifest(folder / MANIFEST)
    if change == "made anew":
        write_metrics(folder, study(configs, methods=["zero-shot"], evaluation={"batch_size": 1}))
    elif change == "broken":
        (folder / name).write_text("{")
    else:
        (folder / name).unlink()
    made = describe_as_the_rule(folder, own)
    assert made.files == {key: each for key, each in before.files.items() if key != name}
    (message,) = caplog.messages
    assert message.startswith(f"{folder / name}: ")
    assert message.endswith("; it is left out of the manifest")
    assert check_cache(folder, own).metrics == [folder / SLUG / "fedit.jsonl"]


def test_a_manifest_made_in_parts_is_that_made_at_once(
    folder: Path, configs: Path, config: Config
) -> None:
    write_costs_beside(folder, config)
    add_manifest(folder, config)
    whole = (folder / MANIFEST).read_bytes()
    for methods in (["zero-shot"], ["fedit", "fedamole"]):
        describe_as_the_rule(folder, study(configs, methods=methods))
        assert (folder / MANIFEST).read_bytes() == whole


def test_unpacking_beside_another_study_keeps_both(
    folder: Path, configs: Path, config: Config, tmp_path: Path
) -> None:
    pack(folder, tmp_path / "study.zip")
    there, other = tmp_path / "there", study(configs, methods=["local"], **OVERHEAD)
    write_metrics(there, other)
    write_costs_beside(there, other)
    add_manifest(there, other, THERE)
    unpack(tmp_path / "study.zip", there)
    assert check_cache(there, config).metrics
    assert check_cache(there, other).costs == [there / SLUG / "local.costs.json"]
    merged = verify(there).manifest
    machines = {name: merged.machines[entry.machine] for name, entry in merged.files.items()}
    assert machines.pop(f"{SLUG}/local.jsonl") == THERE
    assert list(machines.values()) == [HERE] * len(config.methods)
    assert unpack(tmp_path / "study.zip", there) == []


def test_unpacking_forgets_a_file_that_was_changed_before(
    folder: Path, configs: Path, config: Config, tmp_path: Path
) -> None:
    pack(folder, tmp_path / "study.zip")
    there, other = tmp_path / "there", study(configs, methods=["local"])
    (path,) = write_metrics(there, other)
    add_manifest(there, other)
    flip(path, 50)
    unpack(tmp_path / "study.zip", there)
    assert (there / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()
    assert refused(there, other) == [f"{SLUG}/local.jsonl: is not in the manifest"]


def test_a_broken_manifest_is_replaced_by_force_only(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "study.zip")
    packed = content(folder)
    (folder / MANIFEST).write_text("mine")
    with pytest.raises(FedamoleError, match=r"manifest\.json: is not "):
        unpack(tmp_path / "study.zip", folder)
    unpack(tmp_path / "study.zip", folder, force=True)
    assert content(folder) == packed


def rewrite(folder: Path, change: Callable[[Any], None], sign: bool) -> None:
    """Change a manifest by hand, with or without the digest of its content."""
    record = json.loads((folder / MANIFEST).read_text())
    change(record)
    header = record.pop("header")
    if sign:
        header["digest"] = hashlib.sha256(canonical(record).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"header": header, **record}))


def set_entry(**values: Any) -> Callable[[Any], None]:
    """Change what a manifest says of FedIT."""
    return lambda record: record["files"][f"{SLUG}/fedit.jsonl"].update(values)


def test_a_manifest_that_was_changed_is_refused(folder: Path, config: Config) -> None:
    rewrite(folder, set_entry(package="9"), sign=False)
    (line,) = refused(folder, config)
    assert line.startswith(f"{MANIFEST}: was changed after it was written")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"package": "9"}, f"{SLUG}/fedit.jsonl: the manifest says package '9', the file '0.1.0'"),
        ({"rounds": 3}, f"{SLUG}/fedit.jsonl: the manifest says rounds 3, the file 2"),
        ({"size": 3}, f"{SLUG}/fedit.jsonl: differs from the manifest"),
        ({"machine": 1}, f"{MANIFEST}: '{SLUG}/fedit.jsonl': machine 1 is not in the list"),
        ({"method": "local"}, f"{MANIFEST}: '{SLUG}/fedit.jsonl' is not the place of local on"),
        ({"scenario": ".."}, f"{MANIFEST}: files: {SLUG}/fedit.jsonl: scenario: '..' is not"),
        ({"versions": {}}, f"{MANIFEST}: files: {SLUG}/fedit.jsonl: versions: backbone: is missi"),
    ],
)
def test_a_manifest_that_contradicts_its_files_is_refused(
    folder: Path, config: Config, values: Change, message: str
) -> None:
    rewrite(folder, set_entry(**values), sign=True)
    assert refused(folder, config)[0].startswith(message)


# Archives


def test_an_archive_has_the_same_bytes_every_time(
    folder: Path, config: Config, tmp_path: Path
) -> None:
    pack(folder, tmp_path / "one.zip")
    for number, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, (number * 1e8, number * 1e8))
    (folder / MANIFEST).chmod(0o600)
    again = shutil.copytree(folder, tmp_path / "again")
    pack(again, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_what_was_packed_is_unpacked(folder: Path, config: Config, tmp_path: Path) -> None:
    pack(folder, tmp_path / "study.zip")
    unpack(tmp_path / "study.zip", tmp_path / "there")
    assert content(tmp_path / "there") == content(folder)
    assert check_cache(tmp_path / "there", config).settings == stages.results_stage(config)


def test_unpacking_twice_touches_nothing(folder: Path, tmp_path: Path) -> None:
    """Snakemake would redraw tables of touched files."""
    pack(folder, tmp_path / "study.zip")
    for path in content(folder):
        os.utime(folder / path, (1e9, 1e9))
    assert unpack(tmp_path / "study.zip", folder) == []
    assert {(folder / path).stat().st_mtime for path in content(folder)} == {1e9}


def test_files_that_differ_are_overwritten_by_force_only(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "study.zip")
    packed = content(folder)
    changed = folder / SLUG / "fedit.jsonl"
    changed.write_text("mine")
    (folder / SLUG / "zero-shot.jsonl").unlink()
    with pytest.raises(FedamoleError) as raised:
        unpack(tmp_path / "study.zip", folder)
    assert str(raised.value).splitlines() == [
        f"{changed}: differs from the archive",
        "nothing was unpacked; --force overwrites",
    ]
    assert changed.read_text() == "mine"
    assert not (folder / SLUG / "zero-shot.jsonl").exists()
    unpack(tmp_path / "study.zip", folder, force=True)
    assert content(folder) == packed


def test_a_folder_in_the_place_of_a_file_stays(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "study.zip")
    (tmp_path / "there" / MANIFEST / "mine").mkdir(parents=True)
    with pytest.raises(FedamoleError, match=r"manifest\.json: cannot be read \(Is a directory\)"):
        unpack(tmp_path / "study.zip", tmp_path / "there", force=True)
    assert content(tmp_path / "there") == {}


def test_what_is_not_whole_is_neither_verified_nor_packed(folder: Path, tmp_path: Path) -> None:
    flip(folder / SLUG / "fedit.jsonl", 50)
    (folder / SLUG / "zero-shot.jsonl").unlink()
    (folder / "note.txt").write_text("a stranger")
    (folder / ".manifest.json.x.part").write_text("scratch")
    lines = unverified(folder)
    assert lines[0].startswith(f"/{SLUG}/fedit.jsonl: differs from the manifest")
    assert lines[1:] == [
        f"/{SLUG}/zero-shot.jsonl: is missing",
        "/note.txt: is not in the manifest",
    ]
    with pytest.raises(FedamoleError):
        pack(folder, tmp_path / "study.zip")
    assert not (tmp_path / "study.zip").exists()


def test_a_summary_counts_runs_once(folder: Path) -> None:
    """Two of the four rows are tests of one run."""
    size = sum(path.stat().st_size for path in folder.glob("*/*"))
    assert summary(verify(folder)) == (
        f"{folder}: whole; 4 files of 3 runs, {size} bytes, fedamole 0.1.0, machines: here"
    )


def member(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("../evil.jsonl"), ": '../evil.jsonl' would leave the folder"),
        (member("a/../../evil.jsonl"), ": 'a/../../evil.jsonl' would leave the folder"),
        (member("/tmp/evil.jsonl"), ": '/tmp/evil.jsonl' would leave the folder"),
        (member("..\\evil.jsonl"), r": '..\\evil.jsonl' would leave the folder"),
        (member("a\nb"), r": 'a\nb' is no name of a file"),
        (member("link", stat.S_IFLNK | 0o777), ": 'link' is a link or another special file"),
        (member("pipe", stat.S_IFIFO), ": 'pipe' is a link or another special file"),
        (member("a/b.jsonl"), "/a/b.jsonl: is not in the manifest"),
        (member(f"{SLUG}/fedit.jsonl"), f": '{SLUG}/fedit.jsonl' stands twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_a_foreign_member_is_refused(
    folder: Path, tmp_path: Path, info: zipfile.ZipInfo, message: str
) -> None:
    path = tmp_path / "inner" / "study.zip"
    pack(folder, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    assert unverified(path) == [message]
    with pytest.raises(FedamoleError):
        unpack(path, tmp_path / "inner" / "there", force=True)
    assert set(content(tmp_path)) == {"inner/study.zip"} | {
        f"metrics/{name}" for name in content(folder)
    }


def test_an_archive_of_a_foreign_compression_is_refused(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "study.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.write(folder / MANIFEST, MANIFEST)
    expected = ": 'manifest.json' is compressed by method 14; stored or deflated are allowed"
    assert unverified(tmp_path / "study.zip") == [expected]


def test_an_archive_that_people_zipped_is_taken(folder: Path, tmp_path: Path) -> None:
    """It has entries for folders, and times and permissions of its own."""
    shutil.make_archive(str(tmp_path / "study"), "zip", folder)
    assert verify(tmp_path / "study.zip").whole.keys() == content(folder).keys()


def test_an_archive_that_declares_too_much_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(folder, tmp_path / "study.zip")
    size = sum(map(len, content(folder).values()))
    monkeypatch.setattr(cache_archive, "LIMIT", size)
    verify(tmp_path / "study.zip")
    monkeypatch.setattr(cache_archive, "LIMIT", size - 1)
    (line,) = unverified(tmp_path / "study.zip")
    assert line == f": would take {size} bytes; {size - 1} are allowed"


def test_an_archive_that_declares_too_little_is_not_inflated(tmp_path: Path) -> None:
    """64 MiB of zeros that say they were ten bytes."""
    path, size = tmp_path / "study.zip", 2**26
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, bytes(size))
    path.write_bytes(path.read_bytes().replace(struct.pack("<L", size), struct.pack("<L", 10)))
    tracemalloc.start()
    (line,) = unverified(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert line.startswith(": is not a whole zip archive (Bad CRC-32")
    assert peak < size / 10


@pytest.fixture
def small(configs: Path, tmp_path: Path) -> Path:
    """An archive of one file."""
    one = study(configs, methods=["zero-shot"])
    write_metrics(tmp_path / "small", one)
    add_manifest(tmp_path / "small", one)
    pack(tmp_path / "small", tmp_path / "small.zip")
    return tmp_path / "small.zip"


def test_a_truncated_archive_is_one_line(small: Path, tmp_path: Path) -> None:
    whole, path = small.read_bytes(), tmp_path / "cut.zip"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        (line,) = unverified(path)
        assert line.startswith(": is not a whole zip archive (")


def test_an_archive_with_a_flipped_byte_is_refused_or_holds_the_same(
    small: Path, tmp_path: Path
) -> None:
    """Some bytes of a zip archive mean nothing, such as times."""
    whole, path, files = small.read_bytes(), tmp_path / "flipped.zip", verify(small).whole
    refusals = 0
    for offset in range(len(whole)):
        changed = bytearray(whole)
        changed[offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        try:
            assert verify(path).whole == files
        except FedamoleError:
            refusals += 1
    assert refusals > len(whole) / 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.zip", None, ": cannot be read (No such file or directory)"),
        ("note.zip", b"hello", ": is not a whole zip archive (File is not a zip file)"),
    ],
)
def test_what_is_no_archive_is_one_line(
    tmp_path: Path, name: str, text: bytes | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text)
    assert unverified(tmp_path / name) == [message]


def test_a_hostile_manifest_is_one_line(tmp_path: Path) -> None:
    for text in (b"[" * 100_000, b"\xff", Header("manifest", "x").to_json().encode()):
        with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
            archive.writestr(MANIFEST, text)
        (line,) = unverified(tmp_path / "study.zip")
        assert line.startswith(f"/{MANIFEST}: is not ")


def test_a_hostile_metrics_file_is_one_line(small: Path, tmp_path: Path) -> None:
    text, name = b"[" * 100_000, f"{SLUG}/zero-shot.jsonl"
    known = verify(small).manifest.files[name]
    sums = {"sha256": hashlib.sha256(text).hexdigest(), "size": len(text)}
    made = Manifest(files={name: known.model_copy(update=sums)}, machines=[HERE])
    write_manifest(tmp_path / MANIFEST, made)
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        archive.write(tmp_path / MANIFEST, MANIFEST)
        archive.writestr(name, text)
    (line,) = unverified(tmp_path / "study.zip")
    assert line.startswith(f"/{name}:1: is not a whole JSON line")


@pytest.mark.parametrize("call", ["pack(Path(old), Path(new))", "unpack(Path(zip), Path(new))"])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    folder: Path, tmp_path: Path, call: str
) -> None:
    pack(folder, tmp_path / "study.zip")
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from fedamole.cache_archive import pack, unpack\n"
        "from fedamole.errors import FedamoleError\n"
        "old, zip, new = sys.argv[1:]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))\n"
        f"try: {call}\n"
        "except FedamoleError as error: print(error)\n"
    )
    new = tmp_path / "new" / "there"
    arguments = [str(folder), str(tmp_path / "study.zip"), str(new)]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith(str(new))
    assert line.endswith(": cannot be written, the file size limit is exceeded")
    whole = content(folder)
    for name, text in content(tmp_path / "new").items():
        assert text == whole[name.removeprefix("there/")]
    assert not (new / MANIFEST).exists()


# Commands


def test_the_commands_make_pack_verify_and_unpack_a_cache(
    folder: Path, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, settings = folder / MANIFEST, stages.canonical_json(stages.results_stage(config))
    out.unlink()
    metrics = [str(path) for path in folder.glob("*/*.jsonl")]
    rule = ["cache", "manifest", "--settings", settings, "--metrics", *metrics, "--out", str(out)]
    assert main(rule) == 0
    before = out.read_bytes()
    assert main(["cache", "manifest", str(folder)]) == 0
    assert out.read_bytes() == before
    archive = str(tmp_path / "study.zip")
    assert main(["cache", "pack", str(folder), "--out", archive]) == 0
    assert main(["cache", "unpack", archive, "--into", str(tmp_path / "there")]) == 0
    assert content(tmp_path / "there") == content(folder)
    capsys.readouterr()
    assert main(["cache", "verify", archive]) == 0
    assert capsys.readouterr().out.startswith(f"{archive}: whole; 4 files of 3 runs, ")


def test_a_config_describes_a_folder_as_well(
    folder: Path, configs: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / MANIFEST).unlink()
    assert main(["cache", "manifest", str(folder)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == len(config.methods)
    smoke = str(configs / "smoke.yaml")
    assert main(["cache", "manifest", str(folder), "--configfile", smoke]) == 0
    assert check_cache(folder, config).metrics


def test_a_cache_that_fails_ends_with_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fedit", "zero-shot"):
        (folder / SLUG / f"{name}.jsonl").unlink()
    assert main(["cache", "verify", str(folder)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"fedamole: {folder}/{SLUG}/{name}.jsonl: is missing" for name in ("fedit", "zero-shot")
    ]


@pytest.mark.parametrize("arguments", [[], ["folder", "--out", "manifest.json"]])
def test_a_manifest_needs_one_place(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "manifest", *arguments]) == 2
    assert "needs FOLDER or --out FILE, not both" in capsys.readouterr().err
