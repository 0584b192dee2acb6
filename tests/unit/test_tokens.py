"""Token ids of a scenario: right border, right text, mapped not read, and refused when broken."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from fedamole import stages
from fedamole.artifacts import Header, read_record, sha256, write_record
from fedamole.cli import data
from fedamole.datasets.loading import Corpus, Example
from fedamole.datasets.splits import Partition, make_partition, partition_record, read_partition
from fedamole.datasets.tokenize import tokenize_scenario
from fedamole.datasets.tokens import TokenStore, write_store
from fedamole.errors import FedamoleError
from fedamole.partition import ClientSplit
from fedamole.settings import BackboneSettings, DatasetSettings, ScenarioSettings

WORDS = (
    "what",
    "colour",
    "has",
    "a",
    "river",
    "and",
    "why",
    "count",
    "stones",
    "früh",
    "am",
    "Ufer",
)


def make_examples(number: int) -> tuple[Example, ...]:
    rng = np.random.default_rng(number)
    texts = [" ".join(rng.choice(WORDS, 8)) for _ in range(number)]
    return tuple(Example(f"Q: {t}\nA:", t.upper(), i % 2, i % 2) for i, t in enumerate(texts))


CORPUS = Corpus(make_examples(120), ("even", "odd"), {"no_label": 0})
DATASET = DatasetSettings(
    name="mine",
    source={"files": ["rows.jsonl"]},
    task="classification",
    template="Q: {question}\nA:",
    label="label",
    answers={"0": "Yes", "1": "No"},
)
SCENARIO = ScenarioSettings(dataset=DATASET, partition="dir1.0", clients=3, max_length=64)


def make_tokenizer(special: str | None = None, **tokens: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE that adds, by itself, what the template ``special`` says."""
    model = tokenizers.ByteLevelBPETokenizer()
    texts = [example.prompt + example.response for example in CORPUS.examples]
    model.train_from_iterator(texts, vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"])
    if special:
        model._tokenizer.post_processor = processors.TemplateProcessing(
            single=special, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=model._tokenizer, **({"eos_token": "</s>"} | tokens)
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer("<s> $A", bos_token="<s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def division() -> Partition:
    return make_partition(CORPUS, SCENARIO, seed=1)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, division: Partition) -> Path:
    store = tokenize_scenario(CORPUS, division, SCENARIO, tokenizer)
    write_store(tmp_path / "tokens", Header("tokens", "abc"), store)
    return tmp_path / "tokens"


def positions(division: Partition, part: str) -> list[int]:
    return [int(i) for client in division.clients for i in client.parts()[part]]


def rows(store: TokenStore, part: str) -> list[int]:
    return [int(row) for client in store.clients for row in client.parts()[part]]


@pytest.mark.parametrize("part", ["train", "embedding", "eval", "test"])
def test_tokens_decode_to_prompt_and_answer(
    folder: Path, tokenizer: PreTrainedTokenizerFast, division: Partition, part: str
) -> None:
    store = TokenStore.open(folder, "abc")
    for row, position in zip(rows(store, part), positions(division, part), strict=True):
        ids, border = store.ids(row), store.prompt_length(row)
        example = CORPUS.examples[position]
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(ids[1:border]) == example.prompt
        assert tokenizer.decode(ids[border:-1]) == example.response
        assert store.labels[row] == example.label
        if part in ("eval", "test"):
            assert store.reference(row) == example.response


def test_store_is_memory_mapped_and_read_only(folder: Path) -> None:
    store = TokenStore.open(folder)
    assert isinstance(store.input_ids, np.memmap)
    assert isinstance(store.ids(3), np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        store.input_ids[0] = 1
    dtypes = [store.input_ids.dtype, store.offsets.dtype, store.prompt_lengths.dtype]
    assert dtypes == [np.int32, np.int64, np.int32]
    assert store.offsets[-1] == len(store.input_ids)
    assert len(store.offsets) == len(store) + 1 == 1 + sum(map(len, store.clients))


@pytest.mark.parametrize(
    ("special", "prefix"), [(None, []), ("$A", []), ("<s> $A", [0]), ("<s> $A </s>", [0])]
)
def test_prompt_gets_what_the_tokenizer_sets_before_it_and_nothing_after(
    division: Partition, special: str | None, prefix: list[int]
) -> None:
    tokenizer = make_tokenizer(special)
    store = tokenize_scenario(CORPUS, division, SCENARIO, tokenizer)
    example = CORPUS.examples[positions(division, "train")[0]]
    prompt = tokenizer.encode(example.prompt, add_special_tokens=False)
    answer = tokenizer.encode(example.response, add_special_tokens=False)
    assert store.ids(0).tolist() == [*prefix, *prompt, *answer, 1]
    assert store.prompt_length(0) == len(prefix) + len(prompt)


def test_padding_falls_back_to_the_end_token(division: Partition) -> None:
    plain = tokenize_scenario(CORPUS, division, SCENARIO, make_tokenizer())
    assert (plain.eos_id, plain.pad_id) == (1, 1)
    padded = tokenize_scenario(CORPUS, division, SCENARIO, make_tokenizer(pad_token="<pad>"))
    assert (padded.eos_id, padded.pad_id) == (1, 2)


def test_choices_are_the_tokens_of_an_answer_with_its_end(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    choices = TokenStore.open(folder).choices
    assert [tokenizer.decode(choice) for choice in choices] == ["Yes</s>", "No</s>"]


def test_long_prompts_are_dropped_and_long_answers_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    def length(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    limit = 30
    assert length("1" * 40) == 40
    texts = ["1" * number for number in range(40)]
    corpus = Corpus(tuple(Example(text, "answer", 0, -1) for text in texts), ("x",), {})
    ids = np.arange(40).reshape(4, 10).T.reshape(-1)
    clients = (ClientSplit(*np.split(ids, 4)),)
    division = Partition(("x",), np.array([[40]]), clients, {}, corpus.digest)
    settings = SCENARIO.model_copy(update={"max_length": limit})
    store = tokenize_scenario(corpus, division, settings, tokenizer)
    prompts = [1 + length(text) for text in texts]
    answer = length("answer") + 1
    assert store.dropped == [sum(n >= limit for n in prompts)]
    assert store.cut == [sum(n < limit < n + answer for n in prompts)]
    assert store.dropped[0] > 0
    assert store.cut[0] > 0
    lengths = np.diff(store.offsets)
    assert lengths.max() == limit
    assert (lengths > store.prompt_lengths).all()
    assert len(store) == 40 - store.dropped[0]


def test_client_without_any_short_prompt_is_an_error(
    tokenizer: PreTrainedTokenizerFast, division: Partition
) -> None:
    settings = SCENARIO.model_copy(update={"max_length": 4})
    with pytest.raises(FedamoleError, match="client 0 has no train example left: all .* prompts"):
        tokenize_scenario(CORPUS, division, settings, tokenizer)


def test_tokenizer_without_end_token_is_an_error(division: Partition) -> None:
    with pytest.raises(FedamoleError, match="has no end-of-sequence token"):
        tokenize_scenario(CORPUS, division, SCENARIO, make_tokenizer(eos_token=None))


def test_arrays_are_the_files_of_numpy(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.npy"):
        np.save(tmp_path / "reference.npy", np.load(path))
        assert path.read_bytes() == (tmp_path / "reference.npy").read_bytes()


WRITE_WITH_LITTLE_ROOM = """
    import resource, sys
    from pathlib import Path
    import numpy as np
    from fedamole.artifacts import Header
    from fedamole.datasets.tokens import TokenStore, write_store
    from fedamole.errors import FedamoleError
    from fedamole.partition import ClientSplit

    path, lengths = Path(sys.argv[1]) / "tokens", np.full(400, 50)
    store = TokenStore(
        input_ids=np.arange(lengths.sum()), offsets=np.cumsum([0, *lengths]),
        prompt_lengths=lengths, labels=lengths,
        clients=(ClientSplit(*np.split(np.arange(400), 4)),),
        references={row: "text" * 10 for row in range(200, 400)},
        choices=[], eos_id=1, pad_id=1, dropped=[0], cut=[0],
    )
    for room in range(0, 100_000, 1021):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            write_store(path, Header("tokens", "d"), store)
        except FedamoleError as error:
            assert "cannot be written, the file size limit is exceeded" in str(error), error
            assert str(path.parent) in str(error) and "\\n" not in str(error), error
            assert not list(path.parent.iterdir())
        else:
            print("needed", room)
            break
"""


def test_a_file_size_limit_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WRITE_WITH_LITTLE_ROOM), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    # The 20,000 token ids are four bytes each.
    assert int(done.stdout.split()[1]) >= 80_000
    assert len(TokenStore.open(tmp_path / "tokens")) == 400


def test_store_of_other_settings_is_refused(folder: Path) -> None:
    with pytest.raises(FedamoleError, match="was made with other settings"):
        TokenStore.open(folder, "other")


def truncate(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-9])


def replace_array(folder: Path, name: str, array: np.ndarray) -> None:
    np.save(folder / name, array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "meta.json: cannot be read"),
        (lambda f: truncate(f, "input_ids.npy"), "input_ids.npy: is not a whole token file"),
        (lambda f: (f / "labels.npy").write_bytes(b""), "labels.npy: is not a whole token file"),
        (lambda f: (f / "labels.npy").unlink(), "labels.npy: cannot be read"),
        (lambda f: truncate(f, "meta.json"), "meta.json: is not a whole JSON file"),
        (lambda f: (f / "clients.json").write_text("{}"), "is not a file of fedamole"),
        (
            lambda f: shutil.copy(f / "meta.json", f / "clients.json"),
            "holds tokens; token-clients is needed",
        ),
        (lambda f: replace_array(f, "labels.npy", np.zeros(3)), "holds float64 in 1 dimensions"),
        (lambda f: replace_array(f, "labels.npy", np.zeros(3, np.int32)), "labels is 3; meta.json"),
        (lambda f: replace_array(f, "offsets.npy", np.zeros(0, np.int64)), "not a whole token st"),
    ],
)
def test_broken_store_is_refused(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(FedamoleError, match=message):
        TokenStore.open(folder)


# ------------------------------------------------------------------------------- the two commands


@pytest.fixture
def study(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> stages.TokensStage:
    """Settings of a scenario whose data and backbone lie in tmp_path."""
    lines = [{"question": e.prompt, "label": e.label} for e in CORPUS.examples]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    tokenizer.save_pretrained(tmp_path / "backbone")
    write_facts(tmp_path / "backbone")
    source = DATASET.source.model_copy(update={"files": [str(tmp_path / "rows.jsonl")]})
    dataset = DATASET.model_copy(update={"source": source})
    scenario = SCENARIO.model_copy(update={"dataset": dataset})
    return stages.TokensStage(
        scenario=stages.ScenarioStage(scenario=scenario, seed=42),
        backbone=stages.BackboneStage(backbone=BackboneSettings(name="b", folder="b")),
    )


def write_facts(folder: Path, positions: int | None = 64) -> None:
    """Say of a backbone what tokenizing has to know."""
    facts = {"name": "b", "positions": positions}
    write_record(folder / "backbone.json", Header("backbone", "0" * 64), facts)


def run(*arguments: str | Path) -> None:
    parser = argparse.ArgumentParser()
    data.register(parser.add_subparsers())
    args = parser.parse_args([str(argument) for argument in arguments])
    args.command(args)


def run_both(study: stages.TokensStage, home: Path, out: Path) -> None:
    settings = stages.canonical_json(study.scenario)
    run("partition", "--settings", settings, "--out", out / "partition.json")
    run_tokenize(study, home, out)


def run_tokenize(study: stages.TokensStage, home: Path, out: Path) -> None:
    settings = stages.canonical_json(study)
    files = ("--partition", out / "partition.json", "--backbone", home / "backbone")
    run("tokenize", "--settings", settings, *files, "--out", out / "tokens")


def test_commands_write_the_same_bytes_every_time(
    study: stages.TokensStage, tmp_path: Path
) -> None:
    contents = []
    for name in ("one", "two"):
        run_both(study, tmp_path, tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append({str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 7


def test_files_name_their_settings_and_parents(study: stages.TokensStage, tmp_path: Path) -> None:
    run_both(study, tmp_path, tmp_path)
    store = TokenStore.open(tmp_path / "tokens", stages.digest(study))
    header, _ = read_record(tmp_path / "tokens" / "meta.json", "tokens")
    assert header.parents == {
        "partition": sha256(tmp_path / "partition.json"),
        "backbone": sha256(tmp_path / "backbone" / "backbone.json"),
    }
    division = read_partition(tmp_path / "partition.json", stages.digest(study.scenario))
    assert division.classes == ("Yes", "No")
    assert division.counts.sum() == len(CORPUS.examples)
    assert [len(split) for split in division.clients] == [len(split) for split in store.clients]
    with pytest.raises(FedamoleError, match="was made with other settings"):
        read_partition(tmp_path / "partition.json", "0" * 64)


def test_partition_record_is_read_back_as_it_was(division: Partition, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(
        json.dumps(
            {"header": json.loads(Header("partition", "d").to_json())} | partition_record(division)
        )
    )
    again = read_partition(tmp_path / "p.json", "d")
    assert partition_record(again) == partition_record(division)
    content = json.loads((tmp_path / "p.json").read_text())
    del content["counts"]
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(FedamoleError, match="is not a whole partition record"):
        read_partition(tmp_path / "p.json")


def test_data_changed_after_the_partition_are_refused(
    study: stages.TokensStage, tmp_path: Path
) -> None:
    run_both(study, tmp_path, tmp_path)
    rows_file = tmp_path / "rows.jsonl"
    rows_file.write_text(rows_file.read_text().replace("river", "brook"))
    with pytest.raises(FedamoleError, match="data set mine: has changed since it was partitioned"):
        run_tokenize(study, tmp_path, tmp_path)


def test_folder_without_backbone_or_tokenizer_is_refused(
    study: stages.TokensStage, tmp_path: Path
) -> None:
    run_both(study, tmp_path, tmp_path)
    (tmp_path / "empty").mkdir()
    home = tmp_path / "home" / "backbone"
    home.mkdir(parents=True)
    with pytest.raises(FedamoleError, match="is not a prepared backbone"):
        run_tokenize(study, home.parent, tmp_path)
    write_facts(home)
    with pytest.raises(FedamoleError, match="has no usable tokenizer"):
        run_tokenize(study, home.parent, tmp_path)


def test_sequences_longer_than_the_positions_of_the_backbone_are_refused(
    study: stages.TokensStage, tmp_path: Path
) -> None:
    write_facts(tmp_path / "backbone", positions=63)
    with pytest.raises(FedamoleError, match="positions for 63 tokens"):
        run_both(study, tmp_path, tmp_path)
