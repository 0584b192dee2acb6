"""The data sets of configs/datasets: made rows in the layout of each, from files and from a hub."""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mini_hub
import pyarrow
import pyarrow.parquet
import pytest

from fedamole.config import load_config, parse
from fedamole.config_files import read_yaml
from fedamole.datasets.loading import Corpus, load_corpus
from fedamole.doctor import study as doctor
from fedamole.errors import FedamoleError
from fedamole.settings import DatasetSettings, ScenarioSettings

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "datasets").glob("*.yaml"))
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """Rows of a data set by split, and what they must become."""

    rows: Mapping[str, Rows]
    examples: Sequence[tuple[str, str]]
    classes: Sequence[str]
    categories: Sequence[int]
    dropped: Mapping[str, int] = field(default_factory=dict)


def nli(premise: str, hypothesis: str, label: int, names: tuple[str, str]) -> dict[str, Any]:
    return {names[0]: premise, names[1]: hypothesis, "label": label, "idx": 7}


def passages(*texts: str) -> dict[str, Any]:
    return {
        "is_selected": [0] * len(texts),
        "passage_text": list(texts),
        "url": ["u"] * len(texts),
    }


def exam(answer: str, *options: str) -> dict[str, Any]:
    text = {"example_id": "high1.txt", "article": "A fox {ran}.", "question": "Who _ ?"}
    return {**text, "options": list(options), "answer": answer}


PAIR = ("sentence1", "sentence2")
NLI = ("premise", "hypothesis")
SAMPLES = {
    "alpaca": Sample(
        {
            "train": [
                {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "x"},
                {"instruction": "Greet.", "input": "", "output": "Hi", "text": "x"},
                {"instruction": "Nothing.", "input": "", "output": "", "text": "x"},
            ]
        },
        [
            (
                "Below is an instruction that describes a task, paired with an input that provides "
                "further context. Write a response that appropriately completes the request.\n\n"
                "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:",
                "3",
            ),
            (
                "Below is an instruction that describes a task. Write a response that "
                "appropriately completes the request.\n\n### Instruction:\nGreet.\n\n### Response:",
                "Hi",
            ),
        ],
        ["all"],
        [0, 0],
        {"no_response": 1},
    ),
    "squad": Sample(
        {
            "train": [
                {
                    "id": "1",
                    "title": "Paris",
                    "context": "It has a tower.",
                    "question": "What has it?",
                    "answers": {"text": ["a tower", "tower"], "answer_start": [7, 9]},
                },
            ],
            "validation": [
                {
                    "id": "2",
                    "title": "Oslo",
                    "context": "It lies on a fjord.",
                    "question": "Where is it?",
                    "answers": {"text": ["on a fjord"], "answer_start": [8]},
                },
                {
                    "id": "3",
                    "title": "Oslo",
                    "context": "It lies on a fjord.",
                    "question": "How old is it?",
                    "answers": {"text": [], "answer_start": []},
                },
            ],
        },
        [
            (
                "It has a tower.\n"
                "Answer this question with words of the text above: What has it?\n",
                "a tower",
            ),
            (
                "It lies on a fjord.\n"
                "Answer this question with words of the text above: Where is it?\n",
                "on a fjord",
            ),
        ],
        ["Oslo", "Paris"],
        [1, 0],
        {"no_response": 1},
    ),
    "ms-marco": Sample(
        {
            "validation": [
                {
                    "query": "how tall is it",
                    "query_type": "NUMERIC",
                    "answers": ["9 m", "nine metres"],
                    "passages": passages("It is 9 m tall.", "It is red."),
                    "wellFormedAnswers": [],
                },
                {
                    "query": "who is it",
                    "query_type": "PERSON",
                    "answers": ["No Answer Present."],
                    "passages": passages("Some", "Others"),
                    "wellFormedAnswers": [],
                },
            ]
        },
        [
            (
                "It is 9 m tall.\nIt is red.\n"
                "Answer this question from the passages above: how tall is it\n",
                "9 m",
            )
        ],
        ["NUMERIC"],
        [0],
        {"no_response": 1},
    ),
    "mnli": Sample(
        {
            "train": [nli("It rains.", "It is wet.", 0, NLI), nli("It rains.", "Dry.", 2, NLI)],
            "validation_matched": [nli("He ran.", "He won.", 1, NLI)],
            "validation_mismatched": [nli("He ran.", "?", -1, NLI)],
        },
        [
            (
                "It rains.\nBased on the text above, can it be inferred that "
                '"It is wet."? Answer Yes, Maybe or No.\n',
                "Yes",
            ),
            (
                "It rains.\nBased on the text above, can it be inferred that "
                '"Dry."? Answer Yes, Maybe or No.\n',
                "No",
            ),
            (
                "He ran.\nBased on the text above, can it be inferred that "
                '"He won."? Answer Yes, Maybe or No.\n',
                "Maybe",
            ),
        ],
        ["Yes", "Maybe", "No"],
        [0, 2, 1],
        {"no_label": 1},
    ),
    "rte": Sample(
        {
            "train": [nli("It rains.", "It is wet.", 0, PAIR), nli("It rains.", "Dry.", 1, PAIR)],
            "validation": [nli("He ran.", "?", -1, PAIR)],
        },
        [
            (
                "It rains.\nBased on the text above, can it be inferred that "
                '"It is wet."? Answer Yes or No.\n',
                "Yes",
            ),
            (
                "It rains.\nBased on the text above, can it be inferred that "
                '"Dry."? Answer Yes or No.\n',
                "No",
            ),
        ],
        ["Yes", "No"],
        [0, 1],
        {"no_label": 1},
    ),
    "sst5": Sample(
        {
            "train": [{"text": "Superb .", "label": 4, "label_text": "very positive"}],
            "validation": [{"text": "So so .", "label": 2, "label_text": "neutral"}],
            "test": [{"text": "Awful !", "label": 0, "label_text": "very negative"}],
        },
        [
            (
                f"{text}\nHow positive is this sentence of a film review? Answer Very negative, "
                "Negative, Neutral, Positive or Very positive.\n",
                answer,
            )
            for text, answer in (
                ("Superb .", "Very positive"),
                ("So so .", "Neutral"),
                ("Awful !", "Very negative"),
            )
        ],
        ["Very negative", "Negative", "Neutral", "Positive", "Very positive"],
        [4, 2, 0],
    ),
    "wic": Sample(
        {
            "train": [
                {"word": "bank", **nli("A bank lends.", "The bank closed.", 1, PAIR), "start1": 2},
            ],
            "validation": [
                {"word": "bank", **nli("A bank lends.", "The river's bank.", 0, PAIR), "start1": 2},
                {"word": "bank", **nli("A bank lends.", "?", -1, PAIR), "start1": 2},
            ],
        },
        [
            (
                f'A bank lends.\n{second}\nDoes the word "bank" have the same meaning in both '
                "sentences above? Answer Yes or No.\n",
                answer,
            )
            for second, answer in (("The bank closed.", "Yes"), ("The river's bank.", "No"))
        ],
        ["No", "Yes"],
        [1, 0],
        {"no_label": 1},
    ),
    "race": Sample(
        {
            "train": [exam("D", "cat", "dog", "hen", "fox")],
            "validation": [exam("A", "fox", "dog", "hen", "cat")],
            "test": [],
        },
        [
            (
                "A fox {ran}.\nWho _ ?\nA. cat\nB. dog\nC. hen\nD. fox\n"
                "Which is right according to the text above? Answer A, B, C or D.\n",
                "D",
            ),
            (
                "A fox {ran}.\nWho _ ?\nA. fox\nB. dog\nC. hen\nD. cat\n"
                "Which is right according to the text above? Answer A, B, C or D.\n",
                "A",
            ),
        ],
        ["A", "B", "C", "D"],
        [3, 0],
    ),
    "boolq": Sample(
        {
            "train": [{"question": "is it old", "answer": True, "passage": "It is old."}],
            "validation": [{"question": "is it new", "answer": False, "passage": "It is old."}],
        },
        [
            ("It is old.\nBased on the text above, is it old? Answer Yes or No.\n", "Yes"),
            ("It is old.\nBased on the text above, is it new? Answer Yes or No.\n", "No"),
        ],
        ["No", "Yes"],
        [1, 0],
    ),
    "masakhanews": Sample(
        {
            "train": [
                {"category": "sports", "headline": "Goal", "text": 'He "won"\nit.', "url": "/1"},
                {"category": "health", "headline": "Flu", "text": "It is back.", "url": "/2"},
            ],
            "dev": [
                {"category": "business", "headline": "Oil", "text": "It fell.", "url": "/3"},
                {"category": "religion", "headline": "Mass", "text": "It was long.", "url": "/4"},
            ],
            "test": [{"category": "entertainment", "headline": "x", "text": "y", "url": "/5"}],
        },
        [
            (
                f"{text}\nWhich label describes this news article most accurately? "
                "Answer Business, Politics, Sports or Technology.\n",
                answer,
            )
            for text, answer in (('Goal\nHe "won"\nit.', "Sports"), ("Oil\nIt fell.", "Business"))
        ],
        ["Business", "Politics", "Sports", "Technology"],
        [2, 0],
        {"other_class": 3},
    ),
    "yelp-full": Sample(
        {"train": [{"label": 4, "text": "Great"}], "test": [{"label": 0, "text": "Cold\\nsoup"}]},
        [
            ("Great\nHow many stars does this review give? Answer 1, 2, 3, 4 or 5.\n", "5"),
            ("Cold\\nsoup\nHow many stars does this review give? Answer 1, 2, 3, 4 or 5.\n", "1"),
        ],
        ["1", "2", "3", "4", "5"],
        [4, 0],
    ),
    "yelp-polarity": Sample(
        {"train": [{"text": "Great", "label": 1}], "test": [{"text": "Cold", "label": 0}]},
        [
            (f"{text}\nIs this review negative or positive? Answer Negative or Positive.\n", answer)
            for text, answer in (("Great", "Positive"), ("Cold", "Negative"))
        ],
        ["Negative", "Positive"],
        [1, 0],
    ),
}  # fmt: skip
# Files of the real repositories that are no Parquet files of a split.
NATIVE = {
    "sst5": ("{split}.jsonl", {"validation": "dev"}),
    "masakhanews": ("data/eng/{split}.tsv", {}),
}


def encode(rows: Rows, suffix: str) -> bytes:
    """Write rows in a format of files."""
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".tsv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


def settings_of(name: str, **source: Any) -> DatasetSettings:
    """The settings of a data set, with its own source or another."""
    data = read_yaml(CONFIGS / "datasets" / f"{name}.yaml")
    return parse(DatasetSettings, data | ({"source": source} if source else {}), name)


def write_files(folder: Path, name: str, suffix: str) -> list[str]:
    """Write the rows of a sample, one file per split; the names in the order of the splits."""
    files = []
    for split, rows in SAMPLES[name].rows.items():
        if rows:
            path = folder / f"{split}{suffix}"
            path.write_bytes(encode(rows, suffix))
            files.append(str(path))
    return files


def repository(name: str) -> dict[str, bytes]:
    """The repository of a data set on the hub, as its data card lists it."""
    source, rows = settings_of(name).source, SAMPLES[name].rows
    # One row at least: the real splits have some, and Parquet cannot tell the columns of none.
    rows = {split: some or rows["train"] for split, some in rows.items()}
    if name in NATIVE:
        pattern, other = NATIVE[name]
        paths = {split: pattern.format(split=other.get(split, split)) for split in rows}
        files = {paths[s]: encode(rows[s], Path(paths[s]).suffix) for s in rows}
        script = {"masakhanews.py": b"raise SystemExit"} if name == "masakhanews" else {}
        return {**files, **script, "README.md": b"---\nlicense: other\n---\n"}
    config = source.subset or "default"
    lines = [f"  - split: {split}\n    path: {config}/{split}-*\n" for split in rows]
    card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{''.join(lines)}---\n"
    files = {
        f"{config}/{split}-00000-of-00001.parquet": encode(some, ".parquet")
        for split, some in rows.items()
    }
    return {**files, "README.md": card.encode()}


def check(corpus: Corpus, sample: Sample) -> None:
    """Compare a corpus with what a sample says."""
    assert [(e.prompt, e.response) for e in corpus.examples] == list(sample.examples)
    assert list(corpus.classes) == list(sample.classes)
    assert corpus.categories.tolist() == list(sample.categories)
    found = {reason: count for reason, count in corpus.dropped.items() if count}
    assert found == dict(sample.dropped)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", SAMPLES)
def test_local_files_give_prompts_answers_and_classes(
    tmp_path: Path, name: str, suffix: str
) -> None:
    files = write_files(tmp_path, name, suffix)
    check(load_corpus(settings_of(name, files=files)), SAMPLES[name])


def test_a_local_copy_of_masakhanews_is_in_tsv(tmp_path: Path) -> None:
    files = write_files(tmp_path, "masakhanews", ".tsv")
    check(load_corpus(settings_of("masakhanews", files=files)), SAMPLES["masakhanews"])


def test_every_data_set_of_the_hub_gives_what_its_local_copy_gives(tmp_path: Path) -> None:
    settings = {name: settings_of(name) for name in SAMPLES}
    hub = {str(settings[name].source.hub): {"main": repository(name)} for name in SAMPLES}
    with mini_hub.serving(hub) as endpoint:
        lines = [found.model_dump_json(exclude_defaults=True) for found in settings.values()]
        found = mini_hub.load(lines, tmp_path / "home", endpoint)
    for name, one in zip(SAMPLES, found, strict=True):
        assert "error" not in one, one
        responses = [response for _, response in SAMPLES[name].examples]
        # The empty test split of RACE stands for rows; they are those of train once more.
        assert one["responses"][: len(responses)] == responses, name
        if all(SAMPLES[name].rows.values()):
            files = write_files(tmp_path, name, ".jsonl")
            local = load_corpus(settings_of(name, files=files))
            assert (one["digest"], one["dropped"]) == (local.digest, local.dropped), name


def test_the_samples_are_all_data_sets_that_no_real_rows_test() -> None:
    real = {"ag-news", "chatterbot", "dolly", "natural-instructions", "snli"}
    assert set(NAMES) == set(SAMPLES) | real | {"mcl-wic"}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_named_as_its_data_set_and_says_where_it_comes_from(name: str) -> None:
    settings = settings_of(name)
    assert settings.name == name
    text = (CONFIGS / "datasets" / f"{name}.yaml").read_text()
    head = text[: text.index("\nname:")]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "# Source: https://" in head
    assert re.search("[Cc]opy|Own files", head)
    if settings.source.hub:
        assert f"https://huggingface.co/datasets/{settings.source.hub}," in head


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_a_classification_names_all_its_answers(name: str) -> None:
    settings = settings_of(name)
    asked = settings.template.rpartition("Answer ")[2].rstrip(".\n")
    names = [part for text in asked.split(" or ") for part in text.split(", ")]
    if settings.task == "classification":
        assert sorted(names) == sorted(settings.answers.values())
    elif settings.template != "alpaca":
        assert settings.template.endswith("\n")


@pytest.mark.parametrize("name", NAMES)
def test_every_data_set_can_be_named_in_a_config(name: str) -> None:
    law = "dir0.1" if name != "alpaca" else "iid"
    raw = {"backbone": "smollm2-135m", "methods": ["zero-shot"]}
    config = load_config({**raw, "scenarios": [{"dataset": name, "partition": law}]}, CONFIGS)
    assert config.scenarios[0].dataset == settings_of(name)


def test_a_data_set_without_classes_is_spread_iid_only() -> None:
    ScenarioSettings(dataset=settings_of("alpaca"), partition="iid")
    for law in ("dir1.0", "meta1", "pathological2"):
        with pytest.raises(FedamoleError) as caught:
            parse(ScenarioSettings, {"dataset": settings_of("alpaca"), "partition": law}, "x")
        assert f"partition {law.removesuffix('.0')} spreads classes, and data set" in str(
            caught.value
        )
        assert str(caught.value).endswith("alpaca has none (it names no category); allowed: iid")


# ------------------------------------------------------------------------------------- MCL-WiC


def write_pairs(folder: Path, tags: Rows) -> str:
    pairs = [
        {"id": f"t.{n}", "lemma": "bank", "pos": "NOUN", "sentence1": f"s{n}", "sentence2": "b",
         "start1": "0", "end1": "2", "start2": "0", "end2": "1"}
        for n in range(2)
    ]  # fmt: skip
    (folder / "training.en-en.data").write_text(json.dumps(pairs, indent=1))
    (folder / "training.en-en.gold").write_text(json.dumps(tags))
    return str(folder / "training.en-en.data")


def test_pairs_of_mcl_wic_meet_their_tags_by_id(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, [{"id": "t.1", "tag": "T"}, {"id": "t.0", "tag": "F"}])
    corpus = load_corpus(settings_of("mcl-wic", files=[path], layout="mcl-wic"))
    assert [(e.prompt[:2], e.response) for e in corpus.examples] == [("s0", "No"), ("s1", "Yes")]
    assert corpus.examples[0].prompt == (
        's0\nb\nDoes the word "bank" have the same meaning in both sentences above? '
        "Answer Yes or No.\n"
    )


def test_pairs_of_mcl_wic_without_tags_are_refused(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, [{"id": "t.0", "tag": "T"}])
    settings = settings_of("mcl-wic", files=[path], layout="mcl-wic")
    with pytest.raises(
        FedamoleError, match="training.en-en.data:13: id 't.1' has no tag in .*gold"
    ):
        load_corpus(settings)
    (tmp_path / "training.en-en.gold").unlink()
    with pytest.raises(FedamoleError, match="training.en-en.gold: cannot be read"):
        load_corpus(settings)
    settings = settings_of("mcl-wic", files=[str(tmp_path)], layout="mcl-wic")
    with pytest.raises(FedamoleError, match="has no suffix .data; a file of pairs in MCL-WiC has"):
        load_corpus(settings)


# --------------------------------------------------------------------------- bad rows, bad columns

BAD_ROWS = {
    "squad": (
        {"answers": {"texts": ["a"]}},
        "field 'answers' has no entry 'text'; its entries are ['texts']",
    ),
    "ms-marco": (
        {"passages": ["a"]},
        "field 'passages' has no item 'passage_text'; it has 1, from 0 on",
    ),
    "race": ({"options": ["a", "b", "c"]}, "field 'options' has no item '3'; it has 3, from 0 on"),
    "wic": ({"word": {"form": "x"}}, "field 'word' holds a dict; a text or a number is needed, "),
    "boolq": (
        {"answer": "yes"},
        "label 'yes' of field 'answer' is out of range; allowed: false, true",
    ),
    "masakhanews": (
        {"category": "weather"},
        "label 'weather' of field 'category' is out of range; allowed: business, politics, sports, "
        "technology; none: '-1', ''; dropped: entertainment, health, religion",
    ),
    "yelp-full": ({"label": 5}, "label '5' of field 'label' is out of range; allowed: 0, 1, 2"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_of_another_layout_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    change, message = BAD_ROWS[name]
    rows = next(iter(SAMPLES[name].rows.values()))
    (tmp_path / "a.jsonl").write_bytes(encode([rows[0], {**rows[0], **change}], ".jsonl"))
    with pytest.raises(FedamoleError) as caught:
        load_corpus(settings_of(name, files=[f"{tmp_path}/a.jsonl"]))
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl:2: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"some": 1, "other": 2}\n')
    with pytest.raises(FedamoleError) as caught:
        load_corpus(settings_of(name, files=[f"{tmp_path}/a.jsonl"]))
    assert "a.jsonl:1: has no field '" in str(caught.value)
    assert str(caught.value).endswith("its fields are ['other', 'some']")


def test_a_misspelt_column_is_met_by_the_nearest(tmp_path: Path) -> None:
    rows = [{"Text": "x", "lable": 1}]
    (tmp_path / "a.jsonl").write_bytes(encode(rows, ".jsonl"))
    with pytest.raises(FedamoleError, match="has no field 'label'; did you mean 'lable'?"):
        load_corpus(settings_of("yelp-full", files=[f"{tmp_path}/a.jsonl"]))


# ------------------------------------------------------------------------------------- revisions

MINE = {"name": "mine", "task": "generation", "template": "{q}", "response": "a", "category": "c"}


def mine(**source: Any) -> str:
    return json.dumps({**MINE, "source": source})


def answers(*texts: str) -> bytes:
    return encode([{"q": "?", "a": text, "c": "x"} for text in texts], ".jsonl")


def test_a_revision_of_the_hub_is_what_is_read_also_from_the_cache(tmp_path: Path) -> None:
    old = {"train.jsonl": answers("old"), "more/a.tsv": b"q\ta\tc\n?\tolder\tx\n"}
    new = {"train.jsonl": answers("new", "newer"), "more/a.tsv": b"q\ta\tc\n?\tnewest\tx\n"}
    hub = {"org/Mine": {"main": new, "v1": old}, "org/Script": {"main": {"Script.py": b"1"}}}
    first, second = (mini_hub.commit("org/Mine", name) for name in ("v1", "main"))
    files = {"hub": "org/Mine", "files": ["more/*.tsv"]}
    asked = [
        mine(hub="org/Mine", revision="v1"),
        mine(hub="org/Mine", revision=first),
        mine(**files, revision="v1"),
        mine(**files),
        mine(hub="org/Mine", revision="v2"),
        mine(hub="org/Mine", files=["more/*.csv"]),
        mine(hub="org/Mine", subset="big", revision="v1"),
        mine(hub="org/Mine", splits=["dev"], revision="v1"),
        mine(hub="org/Script"),
        mine(hub="org/None"),
        mine(hub=str(tmp_path), revision="v1"),
    ]
    with mini_hub.serving(hub) as endpoint:
        *found, revision, file, subset, split, script, unknown, folder = mini_hub.load(
            asked, tmp_path / "home", endpoint
        )
    assert [one["responses"] for one in found] == [["old"], ["old"], ["older"], ["newest"]]
    for one, words in (
        (revision, ("(revision v2)", "v2")),
        (file, ("hub data set 'org/Mine': has no file 'more/*.csv'",)),
        (subset, ("'big' not found", "default")),
        (split, ('"dev"', "train")),
        (script, ("scripts are no longer supported", "name files of its repository")),
        (unknown, ("'org/None'", "without internet point files at a local copy")),
        (folder, ("is a local folder, which has no revisions",)),
    ):
        assert all(word in one["error"] for word in words), one
        assert "\n" not in one["error"]

    # Now without the hub. The library itself would give the copy of v1 for every revision.
    asked = [mine(hub="org/Mine", revision=sha) for sha in (first, second)]
    found = mini_hub.load([*asked, mine(**files, revision=first)], tmp_path / "home", None)
    assert found[0]["responses"] == ["old"]
    assert found[1]["error"] == (
        f"hub data set 'org/Mine': revision {second} cannot be fetched, and the cache has {first}"
    )
    assert found[2]["responses"] == ["older"]


def test_the_doctor_finds_files_of_the_hub_in_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    raw = {"backbone": "smollm2-135m", "methods": ["zero-shot"], "results": str(tmp_path / "r")}
    scenario = {"dataset": "masakhanews", "partition": "iid"}
    config = load_config({**raw, "scenarios": [scenario]}, CONFIGS)
    assert [finding.level for finding in doctor.data(config, True)] == ["error"]
    repository = tmp_path / "datasets--masakhane--masakhanews"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    for path in config.scenarios[0].dataset.source.files:
        assert [finding.level for finding in doctor.data(config, True)] == ["error"]
        file = repository / "snapshots" / "c0ffee" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert [finding.level for finding in doctor.data(config, True)] == ["ok"]
