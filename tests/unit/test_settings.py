"""Configs: names are looked up, mistakes are explained, digests follow the settings."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field

from fedamole import stages
from fedamole.cli import main
from fedamole.config import FOLDERS, Config, load_config, parse
from fedamole.config_files import check_config_files, read_yaml
from fedamole.errors import FedamoleError
from fedamole.registry import METHODS
from fedamole.settings import (
    AssignmentSettings,
    DatasetSettings,
    PartitionSettings,
    Section,
    TrainingSettings,
)

DP_SGD = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}


@pytest.fixture
def smoke(configs: Path) -> dict[str, Any]:
    """The smoke config as it stands in its file."""
    return yaml.safe_load((configs / "smoke.yaml").read_text())


def change(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Set one value, given by its path such as ``training.steps``."""
    *parents, last = path.split(".")
    inner: Any = config
    for part in parents:
        inner = inner[int(part)] if isinstance(inner, list) else inner.setdefault(part, {})
    inner[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("roundz", 3, "roundz: is not a setting (value 3); did you mean rounds? allowed: "),
        ("training.lr", 1, "training: lr: is not a setting (value 1); "),
        (
            "methods",
            ["fedamol"],
            "method 'fedamol' is unknown; did you mean fedamole? allowed: centralised, fdlora, ",
        ),
        ("methods", ["fedit", "fedit"], "method 'fedit' stands twice"),
        (
            "methods",
            "fedit",
            "methods: 'fedit' is not allowed; a list is needed, such as ['fedit']",
        ),
        (
            "tables.rivals",
            ["fedamole"],
            "tables: rivals: 'fedamole' is not among the other methods fedit, fedit-ft, zero-shot",
        ),
        ("methods", ["FedAMoLE"], "method 'FedAMoLE' is unknown; did you mean fedamole? allowed: "),
        (
            "privacy.embeddings",
            5,
            "embeddings: 5 is not allowed; a section is needed, with eta, mech",
        ),
        ("backbone", "my/x.yaml", "backbone 'my/x.yaml': there is no such file, seen from /"),
        ("participation.fraction", 0.2, "clients 1 does not hold; of 3 clients 1 are drawn for a"),
        (
            "scenarios.0.dataset",
            "chaterbot",
            "'chaterbot' is unknown; did you mean chatterbot? allowed: ag-news, ",
        ),
        ("scenarios.0.partition", "dri0.5", "partition 'dri0.5' is unknown; allowed: iid, dir<"),
        ("scenarios.0.clients", 0, "clients: 0 is not allowed; input should be greater than or"),
        ("backbone", "smollm3", "backbone 'smollm3' is unknown; "),
        ("backbone.folder", "x", "needs exactly one of hub, folder, gguf, generate"),
        ("training.batch_size", 3, None),
        ("training.ranks", 4, "batch_size 2 must be a multiple of ranks 4"),
        ("training.deepspeed", "zero9", "deepspeed 'zero9' is unknown; did you mean zero"),
        ("training.deepspeed", {"fp16": {}}, "deepspeed keys ['fp16'] are set by fedamole"),
        ("training.deepspeed", {"zero": {}}, "deepspeed key 'zero' is not allowed; allowed: act"),
        ("training.deepspeed", {"zero_optimization": {"stage": 7}}, "with a stage from 0 to 3"),
        ("training.deepspeed", {"zero_optimization": 3}, "zero_optimization 3 must be a mapping"),
        ("adapter.target_modules", [], "target_modules: [] is not allowed"),
        ("training.learning_rate", "fast", "learning_rate: 'fast' is not allowed"),
        ("assignment.min_experts", 1, "min_experts 1 >= top_k 2 does not hold"),
        ("assignment.choices", 4, "choices 4 <= clients 3 does not hold"),
        (
            "assignment.num_experts",
            2,
            "clients * min_experts = 3 * 2 = 6 <= num_experts * choices = 2 * 2 = 4 does not hold",
        ),
        (
            "assignment.num_experts",
            30,
            "num_experts * choices = 30 * 2 = 60 <= clients * max_experts = 3 * 6 = 18",
        ),
        ("backbone", "llama-3", "backbone 'llama-3' is unknown; did you mean llama-3.2-"),
        ("backbone", "*", "backbone '*' is unknown"),
        ("backbone.attention", "flash_attention_2", "flash_attention_2 needs dtype bfloat16"),
        ("results", "my{results}", "results: 'my{results}' is not allowed"),
        ("tables", {"reference": "fedmole"}, "reference 'fedmole' is not among the methods fedam"),
        ("execution", {"gpus": 1}, None),
        ("study", "mine", None),
        ("study", "runs", "study 'runs' is the name of a folder that the results have; take "),
        ("scenarios", 5, "scenarios: 5 is not allowed; "),
        ("scenarios", [5], "scenarios: item 1: 5 is not allowed; "),
        ("results", "~/study", "results '~/study' must not start with ~"),
        ("training.deepspeed", {"zero_optimization": {"stgae": 3}}, "key 'stgae' is not allowed"),
        ("training.deepspeed", {"zero_optimization": {"stage": True}}, "with a stage from 0 to 3"),
        ("execution", {"clients_per_job": 0}, "clients_per_job 0 must be at least 1, or all"),
        (
            "execution.clients_per_job",
            "ALL",
            "my.yaml: execution: clients_per_job: 'ALL' is not allowed; "
            "allowed: a whole number or 'all'",
        ),
        ("execution.clients_per_job", 1.5, "1.5 is not allowed; allowed: a whole number or 'all'"),
    ],
)
def test_a_mistake_is_explained_in_one_line(
    smoke: dict[str, Any], configs: Path, path: str, value: Any, message: str | None
) -> None:
    config = change(smoke, path, value)
    if message is None:
        load_config(config, configs)
        return
    with pytest.raises(FedamoleError) as raised:
        load_config(config, configs, "my.yaml")
    text = str(raised.value)
    assert message in text
    assert text.startswith("my.yaml: ")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"show": ["main", "sweep"]}, "show: sweep needs a sweep"),
        ({"show": ["published"]}, "show: published needs numbers of a paper"),
        ({"figures": ["bars", "sweep"]}, "figures: sweep needs a sweep"),
        ({"figures": ["stability"]}, "figures: stability needs a method with experts"),
        ({"figures": ["routing"]}, "figures: routing needs a method with experts"),
        ({"figures": ["experts"]}, "figures: experts needs a method with experts"),
        ({"figures": ["assignment"]}, "figures: assignment needs a method with experts"),
        ({"show": ["assignments"]}, "show: assignments needs a method with experts"),
        ({"show": ["significance"]}, "show: significance needs the reference method and another"),
        ({"show": ["overhead", "clients"], "figures": ["overhead", "classes"]}, None),
    ],
)
def test_what_cannot_be_shown_is_refused_when_the_config_is_read(
    smoke: dict[str, Any], configs: Path, tables: dict[str, Any], message: str | None
) -> None:
    config = smoke | {"methods": ["fedit", "fedit-ft"], "tables": tables}
    if message is None:
        load_config(config, configs)
        return
    with pytest.raises(FedamoleError) as raised:
        load_config(config, configs, "my.yaml")
    assert str(raised.value).startswith(f"my.yaml: tables: {message}")
    assert "\n" not in str(raised.value)


def test_a_sweep_can_be_shown(smoke: dict[str, Any], configs: Path) -> None:
    """Its points, which have no sweep of their own, are configs as well."""
    sweep = {"training.steps": [1, 2]}
    tables = {"show": ["sweep"], "figures": ["sweep", "stability"]}
    assert len(load_config(smoke | {"sweep": sweep, "tables": tables}, configs).points) == 2


@pytest.mark.parametrize("command", ["plan", "show"])
def test_commands_for_people_refuse_what_cannot_be_shown(
    smoke: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(smoke | {"tables": {"figures": ["sweep"]}}))
    assert main([command, "--configfile", str(path)]) == 2
    assert capsys.readouterr().err == f"fedamole: {path}: tables: figures: sweep needs a sweep\n"


def test_a_study_may_have_no_name_of_a_folder_of_the_results() -> None:
    rules = Path(__file__).parents[2] / "workflow/rules"
    text = "".join(path.read_text() for path in rules.glob("*.smk"))
    assert set(FOLDERS) == set(re.findall(r"\{(?:RESULTS|OUTPUT)\}/(\w+)", text))


def test_a_missing_section_is_named(configs: Path) -> None:
    with pytest.raises(FedamoleError, match="config: backbone: is missing"):
        load_config({"scenarios": [], "methods": ["fedit"]}, configs)


@pytest.mark.parametrize("raw", [None, [], "text", 3])
def test_a_config_without_settings_is_refused(configs: Path, raw: Any) -> None:
    with pytest.raises(FedamoleError, match="my.yaml: holds no settings"):
        load_config(raw, configs, "my.yaml")


def test_dates_and_numbers_of_yaml_become_text(smoke: dict[str, Any], configs: Path) -> None:
    text = "{name: x, hub: lab/x, revision: 2024-01-01}"
    config = load_config(change(smoke, "backbone", yaml.safe_load(text)), configs)
    assert config.backbone.revision == "2024-01-01"


def test_a_date_may_be_a_key_and_a_slash_may_end_the_results(
    smoke: dict[str, Any], configs: Path
) -> None:
    dataset = read_yaml(configs / "datasets/snli.yaml")
    dataset["answers"] = yaml.safe_load("{2024-01-01: 'Yes', 7: 'No', true: Maybe}")
    smoke["scenarios"][0]["dataset"] = dataset
    config = load_config({**smoke, "results": "out/"}, configs)
    assert list(config.scenarios[0].dataset.answers) == ["2024-01-01", "7", "true"]
    assert config.results == "out"


@pytest.mark.parametrize(
    ("ranks", "execution", "message"),
    [
        (2, {"gpus": 1}, "gpus 1 must be 0 .CPU. or at least clients_at_once .* ranks = 2"),
        (1, {"gpus": 1, "clients_at_once": 2}, "gpus 1 must be 0 .CPU. or at least .* = 2"),
        (1, {"nodes": 2}, "nodes 2 must divide the processes of a job, .* = 1 \\* 1 = 1"),
        (2, {"nodes": 2, "clients_at_once": 3, "gpus": 7}, "gpus 7 must be a multiple of nodes 2"),
        (2, {"nodes": 3, "clients_at_once": 3}, None),
        (4, {"nodes": 2, "clients_at_once": 1}, None),
        (4, {"nodes": 3, "clients_at_once": 3}, None),
        (6, {"nodes": 4, "clients_at_once": 2}, None),
        (6, {"nodes": 3, "clients_at_once": 2}, "nodes 3 cut the 6 ranks of a client unevenly"),
        (1, {"clients_per_job": 2, "clients_at_once": 3}, "clients_at_once 3 must not exceed"),
        (1, {"clients_per_job": 0}, "clients_per_job 0 must be at least 1, or all"),
    ],
)
def test_processes_of_a_job_must_lie_evenly(
    smoke: dict[str, Any],
    configs: Path,
    ranks: int,
    execution: dict[str, Any],
    message: str | None,
) -> None:
    change(smoke, "training", {"ranks": ranks, "batch_size": 12})
    change(smoke, "execution", execution)
    if message is None:
        load_config(smoke, configs)
        return
    with pytest.raises(FedamoleError, match=message):
        load_config(smoke, configs)


@pytest.mark.parametrize("backbone", ["opt-350m", {"name": "tiny", "generate": {}}])
def test_sequences_that_the_backbone_has_no_positions_for_are_refused(
    smoke: dict[str, Any], configs: Path, backbone: Any
) -> None:
    """OPT and generated models have 2048; an answer has up to 8 tokens, a soft prompt 20."""
    smoke["backbone"] = backbone
    for method, longest in (("fedit", 2040), ("fedptuning", 2020)):
        smoke["methods"] = [method]
        load_config(change(smoke, "scenarios.0.max_length", longest), configs)
        with pytest.raises(FedamoleError, match="has positions for 2048 tokens, and .* need 2049"):
            load_config(change(smoke, "scenarios.0.max_length", longest + 1), configs)


def test_one_name_for_two_data_sets_is_refused(smoke: dict[str, Any], configs: Path) -> None:
    dataset = read_yaml(configs / "datasets/chatterbot.yaml")
    other = {**smoke["scenarios"][0], "name": "other", "dataset": {**dataset, "test_fraction": 0.2}}
    smoke["scenarios"].append(other)
    with pytest.raises(FedamoleError, match="'chatterbot' stands for two different data sets"):
        load_config(smoke, configs)


@pytest.mark.parametrize(
    ("methods", "privacy", "message"),
    [
        (["fedit", "local"], {"embeddings": {"eta": 1}}, "embeddings: no method uploads embeddi"),
        (["fedit", "fedamole-homo"], {"embeddings": {"eta": 1}}, None),
        (["zero-shot"], {"dp_sgd": DP_SGD}, "dp_sgd: no method trains; leave it out .*zero-shot"),
        (["zero-shot", "local"], {"dp_sgd": DP_SGD}, None),
    ],
)
def test_privacy_that_protects_nobody_is_refused(
    smoke: dict[str, Any],
    configs: Path,
    methods: list[str],
    privacy: dict[str, Any],
    message: str | None,
) -> None:
    raw = {**smoke, "methods": methods, "privacy": privacy}
    if message is None:
        assert load_config(raw, configs).privacy.model_dump(exclude_defaults=True) == privacy
    else:
        with pytest.raises(FedamoleError, match=f"privacy: {message}"):
            load_config(raw, configs)


def test_a_raised_stage_version_changes_the_digest(
    smoke: dict[str, Any], configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(smoke, configs)
    scenario = next(iter(config.scenario_seeds()))
    before = stages.digest(stages.run_stage(config, scenario, "fedamole"))
    monkeypatch.setitem(stages.VERSIONS, "run", stages.VERSIONS["run"] + 1)
    assert stages.digest(stages.run_stage(config, scenario, "fedamole")) != before


def test_a_quorum_is_a_setting_of_files_only_where_it_ends_simulated_dropouts(
    smoke: dict[str, Any], configs: Path
) -> None:
    def stage_with(**participation: float) -> tuple[stages.RunStage, float]:
        config = load_config({**smoke, "participation": participation}, configs)
        slug = next(iter(config.scenario_seeds()))
        stage = stages.run_stage(config, slug, "fedit")
        return stage, stages.with_quorum(stage, stages.quorum_of(config, "fedit")).population.fewest

    strict, lowered = stage_with(), stage_with(quorum=0.3)
    assert stages.digest(strict[0]) == stages.digest(lowered[0])
    assert (strict[1], lowered[1]) == (3, 1)
    lossy = [stage_with(dropout_rate=0.5, quorum=quorum)[0] for quorum in (0.3, 0.6)]
    assert stages.digest(lossy[0]) != stages.digest(lossy[1])


def test_pooled_data_have_no_quorum(smoke: dict[str, Any], configs: Path) -> None:
    config = load_config({**smoke, "participation": {"quorum": 0.5}}, configs)
    assert stages.quorum_of(config, "centralised") == 1


def test_the_version_of_a_method_reruns_no_other(
    smoke: dict[str, Any], configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digests() -> dict[str, str]:
        config = load_config({**smoke, "methods": ["fdlora", "fedit"]}, configs)
        slug = next(iter(config.scenario_seeds()))
        return {run: stages.digest(stages.run_stage(config, slug, run)) for run in config.runs()}

    before = digests()
    facts = stages.RUNS["fdlora"]
    monkeypatch.setitem(stages.RUNS, "fdlora", replace(facts, version=facts.version + 1))
    after = digests()
    assert after["fedit"] == before["fedit"] and after["fdlora"] != before["fdlora"]


@pytest.mark.parametrize(
    ("path", "value", "touched"),
    [
        ("aggregation.weighting", "examples", {"fedamole", "fedit", "fedprompt", "fedptuning"}),
        ("prompt.text", "Answer:", {"fedprompt"}),
        ("prompt.virtual_tokens", 7, {"fedptuning"}),
        ("prompt.encoder_width", 16, {"fedptuning"}),
    ],
)
def test_a_setting_is_part_of_the_runs_that_it_means_something_to(
    smoke: dict[str, Any], configs: Path, path: str, value: Any, touched: set[str]
) -> None:
    smoke["methods"] = ["fedamole", "fedit", "fedprompt", "fedptuning", "local", "centralised"]

    def stages_of(raw: dict[str, Any]) -> dict[str, stages.RunStage]:
        config = load_config(raw, configs)
        slug = next(iter(config.scenario_seeds()))
        return {run: stages.run_stage(config, slug, run) for run in config.runs()}

    before = stages_of(smoke)
    after = stages_of(change(smoke, path, value))
    changed = {run for run in before if stages.digest(before[run]) != stages.digest(after[run])}
    assert changed == touched
    section, name = path.split(".")
    assert all(getattr(getattr(after[run], section), name) == value for run in touched)


def test_without_experts_tokens_weigh_as_examples(smoke: dict[str, Any], configs: Path) -> None:
    def digest_of(run: str, weighting: str) -> str:
        config = load_config(change(smoke, "aggregation.weighting", weighting), configs)
        slug = next(iter(config.scenario_seeds()))
        return stages.digest(stages.run_stage(config, slug, run))

    assert digest_of("fedit", "tokens") == digest_of("fedit", "examples")
    assert digest_of("fedamole", "tokens") != digest_of("fedamole", "examples")


def test_the_study_of_all_methods_has_all(configs: Path) -> None:
    config = load_config(read_yaml(configs / "methods.yaml"), configs)
    assert set(config.methods) == set(METHODS)
    # Its data sets are those of the library, read from files.
    for scenario in config.scenarios:
        mine = scenario.dataset
        library = parse(DatasetSettings, read_yaml(configs / f"datasets/{mine.name}.yaml"), "")
        fractions = {"eval_fraction": library.eval_fraction, "test_fraction": library.test_fraction}
        assert mine.model_copy(update={"source": library.source, **fractions}) == library


def test_defaults_belong_to_the_stage_versions() -> None:
    """Defaults are in no digest: whoever changes one raises the version of its stage, and this."""
    import hashlib

    from fedamole import settings
    from fedamole.datasets.sources import MAX_TASKS
    from fedamole.partition import EMBEDDING_FRACTION

    sections = [
        section
        for section in vars(settings).values()
        if isinstance(section, type) and issubclass(section, settings.Section)
    ]
    # These change no number of a stage.
    unused = {settings.TablesSettings, settings.ExecutionSettings, settings.BackboneSize}
    unused |= {settings.PublishedSettings, settings.PublishedNumber}
    defaults = {
        f"{section.__name__}.{name}": repr(field.get_default(call_default_factory=False))
        for section in sections
        if section not in unused
        for name, field in section.model_fields.items()
        if (section, name) != (settings.BackboneSettings, "size")
    }
    constants = settings.DEFAULT_MAX_TEST, EMBEDDING_FRACTION, MAX_TASKS
    text = stages.VERSIONS, sorted(defaults.items()), constants
    assert hashlib.sha256(repr(text).encode()).hexdigest()[:8] == "ae32349a"


def test_a_baseline_does_not_depend_on_the_assignment(smoke: dict[str, Any], configs: Path) -> None:
    def digests() -> dict[str, str]:
        config = load_config(smoke, configs)
        scenario = next(iter(config.scenario_seeds()))
        return {r: stages.digest(stages.run_stage(config, scenario, r)) for r in config.runs()}

    before = digests()
    change(smoke, "assignment.num_experts", 7)
    after = digests()
    assert {run for run in before if before[run] != after[run]} == {"fedamole"}
    change(smoke, "training.learning_rate", 0.5)
    assert digests()["zero-shot"] == before["zero-shot"]


def test_broken_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("rounds: 3\nmethods: [fedit\nseeds: 1\n")
    with pytest.raises(FedamoleError, match=r"broken.yaml:3: is not valid YAML"):
        read_yaml(path)


def test_a_key_that_stands_twice_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("training:\n  steps: 3\nseeds: [1]\ntraining:\n  ranks: 2\n")
    with pytest.raises(FedamoleError) as raised:
        read_yaml(path)
    expected = f"{path}:4: is not valid YAML ('training' stands twice, first in line 1)"
    assert str(raised.value) == expected
    path = tmp_path / "twice.json"
    path.write_text('{\n\t"zero": {\n\t\t"stage": 1,\n\t\t"stage": 2\n\t}\n}\n')
    with pytest.raises(FedamoleError, match=r"twice.json:4: .*'stage' stands twice, .* line 3"):
        check_config_files([path])
    with pytest.raises(FedamoleError, match="absent.json: cannot be read"):
        check_config_files([str(tmp_path / "absent.json"), path])


def test_merged_keys_may_be_set_again(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(
        "deep:\n  inner: &inner {<<: &base {a: 1, b: 1}, a: 2}\n"
        "other: {<<: *inner, b: 3}\nboth: {<<: *base, a: 5, <<: *inner}\n"
    )
    check_config_files([path])
    assert read_yaml(path) == yaml.safe_load(path.read_text())
    assert read_yaml(path)["other"] == {"a": 2, "b": 3}


def test_json_is_read_as_json(tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text('{\n\t"zero_optimization": {"reduce_bucket_size": 5e8}\n}')
    assert read_yaml(path) == {"zero_optimization": {"reduce_bucket_size": 500_000_000.0}}


class Inner(Section):
    """A section that stands in a union below."""

    size: int | None = None


class Unions(Section):
    """Settings that may have several types."""

    amount: Annotated[int, Field(ge=1)] | Literal["all", "none"] | None = None
    items: dict[str, list[Inner | str]] = {}


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (
            {"amount": 0},
            ["amount: 0 is not allowed; allowed: a number greater than or equal to 1 or 'all' or"],
        ),
        ({"amount": []}, ["amount: [] is not allowed; allowed: a whole number or 'all' or 'none'"]),
        (
            {"items": {"x": ["ok", {"size": "big"}, {"sise": 1}, 7]}},
            [
                "items: x: item 2: size: 'big' is not allowed; input should be a valid integer",
                "items: x: item 3: sise: is not a setting (value 1); did you mean size? allowed: s",
                "items: x: item 4: 7 is not allowed; allowed: ",
            ],
        ),
    ],
)
def test_a_setting_of_several_types_has_one_line_per_mistake(
    data: dict[str, Any], lines: list[str]
) -> None:
    with pytest.raises(FedamoleError) as raised:
        parse(Unions, data, "x")
    found = str(raised.value).splitlines()
    assert len(found) == len(lines)
    for line, start in zip(found, lines, strict=True):
        assert line.startswith(f"x: {start}")
        assert "literal" not in line and "Inner:" not in line


@pytest.mark.parametrize("text", ["{", "[1]", "7"])
def test_settings_that_are_no_mapping_are_one_line(text: str) -> None:
    with pytest.raises(FedamoleError, match=r"^--settings: .+ is not allowed; .+$"):
        parse(TrainingSettings, text, "--settings")


def test_every_config_of_the_project_is_valid(configs: Path) -> None:
    paths = sorted(configs.glob("*.yaml")) + sorted(configs.glob("paper/*.yaml"))
    assert len(paths) >= 2
    for path in paths:
        if path.stem != "published":
            load_config(read_yaml(path), configs, str(path), [path.parent])


@pytest.mark.parametrize(
    ("short", "slug"),
    [("dir0.5", "dir0.5"), ("dir100", "dir100"), ("meta1", "meta1"), ("iid", "iid")],
)
def test_short_partitions_keep_their_name(
    smoke: dict[str, Any], configs: Path, short: str, slug: str
) -> None:
    config = load_config(change(smoke, "scenarios.0.partition", short), configs)
    assert config.scenarios[0].partition.slug == slug


def test_a_partition_takes_just_its_own_parameter() -> None:
    with pytest.raises(FedamoleError, match="partition dirichlet needs alpha"):
        parse(PartitionSettings, {"kind": "dirichlet"}, "x")
    with pytest.raises(FedamoleError, match="partition iid takes no alpha"):
        parse(PartitionSettings, {"kind": "iid", "alpha": 1.0}, "x")


def test_capacities_agree_with_brute_force() -> None:
    """Feasible iff K b_min <= E c <= K b_max, c <= K, b_min <= E: checked against a real solver."""
    import numpy as np
    from scipy.optimize import linprog

    for clients, experts, choices, fewest, most in np.ndindex(4, 4, 4, 3, 4):
        clients, experts, choices = clients + 1, experts + 1, choices + 1
        fewest, most = fewest + 1, most + 1
        settings = AssignmentSettings(
            num_experts=experts, choices=choices, min_experts=fewest, max_experts=most
        )
        rows = np.zeros((experts, experts * clients))
        columns = np.zeros((clients, experts * clients))
        for e in range(experts):
            rows[e, e * clients : (e + 1) * clients] = 1
        for k in range(clients):
            columns[k, k::clients] = 1
        solved = linprog(
            np.zeros(experts * clients),
            A_ub=np.concatenate([columns, -columns]),
            b_ub=[most] * clients + [-fewest] * clients,
            A_eq=rows,
            b_eq=[choices] * experts,
            bounds=(0, 1),
        )
        assert (settings.infeasibility(clients, top_k=1) is None) == (solved.status == 0)


def test_a_stage_only_depends_on_its_own_settings(smoke: dict[str, Any], configs: Path) -> None:
    def digests(config: Config) -> dict[str, str]:
        scenario = next(iter(config.scenario_seeds()))
        return {
            "backbone": stages.digest(stages.backbone_stage(config)),
            "scenario": stages.digest(stages.scenario_stage(config, scenario)),
            "tokens": stages.digest(stages.tokens_stage(config, scenario)),
            "run": stages.digest(stages.run_stage(config, scenario, "fedamole")),
            "client": stages.digest(stages.client_stage(config, scenario, "fedamole")),
            "results": stages.digest(stages.results_stage(config)),
        }

    def changed_by(path: str, value: Any) -> set[str]:
        import copy

        config = load_config(change(copy.deepcopy(smoke), path, value), configs)
        after = digests(config)
        return {stage for stage in before if before[stage] != after[stage]}

    before = digests(load_config(smoke, configs))
    assert changed_by("rounds", 9) == set()
    assert changed_by("results", "elsewhere") == set()
    assert changed_by("execution", {"clients_per_job": 1, "mem_mb": 9000}) == set()
    assert changed_by("tables", {"decimals": 4}) == {"results"}
    assert changed_by("evaluation.batch_size", 2) == {"client", "results"}
    assert changed_by("backbone.dtype", "bfloat16") == {"run", "client", "results"}
    assert changed_by("training.learning_rate", 1.0) == {"run", "client", "results"}
    assert changed_by("scenarios.0.max_length", 64) == {
        "scenario",
        "tokens",
        "run",
        "client",
        "results",
    }
    assert changed_by("backbone.generate.seed", 5) == {
        "backbone",
        "tokens",
        "run",
        "client",
        "results",
    }


def test_a_stage_survives_its_json(smoke: dict[str, Any], configs: Path) -> None:
    config = load_config(smoke, configs)
    stage = stages.client_stage(config, next(iter(config.scenario_seeds())), "fedamole")
    again = parse(stages.ClientStage, stages.canonical_json(stage), "--settings")
    assert again == stage
    assert stages.digest(again) == stages.digest(stage)


def test_the_order_of_columns_and_answers_is_kept(smoke: dict[str, Any], configs: Path) -> None:
    first = smoke["scenarios"][0]
    smoke["scenarios"] = [{**first, "name": "zz"}, {**first, "name": "aa"}]
    stage = stages.results_stage(load_config(smoke, configs))
    again = parse(stages.ResultsStage, stages.canonical_json(stage), "x")
    assert list(again.scenarios) == ["zz", "aa"]
    dataset = read_yaml(configs / "datasets/snli.yaml")
    answers = {"2": "No", "10": "Maybe", "1": "Yes"}
    smoke["scenarios"] = [{**first, "dataset": {**dataset, "answers": answers}}]
    config = load_config(smoke, configs)
    scenario = next(iter(config.scenario_seeds()))
    text = stages.canonical_json(stages.scenario_stage(config, scenario))
    kept = parse(stages.ScenarioStage, text, "x").scenario.dataset.answers
    assert list(kept.items()) == list(answers.items())


def test_remote_code_is_never_run_by_default(smoke: dict[str, Any], configs: Path) -> None:
    assert load_config(smoke, configs).backbone.trust_remote_code is False


def test_batches_are_cut_over_ranks_and_passes() -> None:
    settings = TrainingSettings(batch_size=8, ranks=2)
    assert settings.sequences_per_pass == 4
    with pytest.raises(FedamoleError, match=r"multiple of ranks \* micro_batch_size \(2 \* 3\)"):
        parse(TrainingSettings, {"batch_size": 8, "ranks": 2, "micro_batch_size": 3}, "x")
