"""Data sets from files, packages and the hub: what is read, dropped, and refused with its line."""

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from fedamole.config import parse
from fedamole.datasets import sources
from fedamole.datasets.files import find_files, package_folder
from fedamole.datasets.loading import Corpus, load_corpus
from fedamole.datasets.rows import Row
from fedamole.errors import FedamoleError
from fedamole.settings import DatasetSettings, SourceSettings

ROWS = [
    {"question": "Who?", "extra": "A {strange} text", "answer": "Me, myself", "topic": "person"},
    {"question": "How\nmany?", "extra": "", "answer": "Two", "topic": "number"},
    {"question": "When?", "extra": "It is ten.", "answer": "Zehn Uhr früh", "topic": "number"},
]


def generation(files: list[str], **changes: Any) -> DatasetSettings:
    data = {
        "name": "mine",
        "source": {"files": files},
        "task": "generation",
        "template": "alpaca",
        "fields": {"instruction": "question", "input": "extra"},
        "response": "answer",
        "category": "topic",
    }
    return parse(DatasetSettings, data | changes, "test")


def classification(files: list[str], **changes: Any) -> DatasetSettings:
    data = {
        "name": "mine",
        "source": {"files": files},
        "task": "classification",
        "template": "{premise} => {hypothesis}?",
        "label": "label",
        "answers": {"0": "Yes", "1": "Maybe", "2": "No"},
    }
    return parse(DatasetSettings, data | changes, "test")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_in(path: Path, suffix: str) -> None:
    if suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            delimiter = "," if suffix == ".csv" else "\t"
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        write_lines(path, ROWS)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_corpus(tmp_path: Path, suffix: str, compressed: bool) -> None:
    path = tmp_path / f"rows{suffix}"
    write_in(path, suffix)
    if compressed:
        whole = gzip.compress(path.read_bytes())
        path.unlink()
        path = path.with_name(path.name + ".gz")
        path.write_bytes(whole)
    corpus = load_corpus(generation([str(path)]))
    assert corpus.classes == ("number", "person")
    assert [example.category for example in corpus.examples] == [1, 0, 0]
    assert [example.response for example in corpus.examples] == [row["answer"] for row in ROWS]
    assert "### Input:\nA {strange} text\n\n### Response:" in corpus.examples[0].prompt
    reference = load_corpus(generation([write_lines(tmp_path / "reference.jsonl", ROWS)]))
    assert corpus.digest == reference.digest


def test_alpaca_prompt_is_the_one_of_stanford(tmp_path: Path) -> None:
    corpus = load_corpus(generation([write_lines(tmp_path / "a.jsonl", ROWS)]))
    assert corpus.examples[1].prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nHow\nmany?\n\n### Response:"
    )
    assert corpus.examples[2].prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhen?\n\n### Input:\nIt is ten.\n\n### Response:"
    )


def test_patterns_are_read_in_sorted_order_and_no_file_twice(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        write_lines(tmp_path / f"{name}.jsonl", [{**ROWS[0], "answer": name}])
    corpus = load_corpus(generation([f"{tmp_path}/[bc].jsonl", f"{tmp_path}/*.jsonl"]))
    assert [example.response for example in corpus.examples] == ["b", "c", "a"]


def test_rows_without_label_or_answer_and_duplicates_are_dropped_and_counted(
    tmp_path: Path,
) -> None:
    pairs = [{"premise": "p", "hypothesis": "h", "label": value} for value in (0, -1, 2, 0, None)]
    path = write_lines(tmp_path / "pairs.jsonl", pairs)
    corpus = load_corpus(classification([path], drop_duplicates=True))
    assert [(example.response, example.label) for example in corpus.examples] == [
        ("Yes", 0),
        ("No", 2),
    ]
    assert corpus.classes == ("Yes", "Maybe", "No")
    assert corpus.dropped == {"no_label": 2, "no_response": 0, "duplicate": 1}
    path = write_lines(tmp_path / "silent.jsonl", [*ROWS, {**ROWS[0], "answer": " "}])
    assert load_corpus(generation([path])).dropped["no_response"] == 1


def test_classes_and_answers_that_are_not_wanted_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [*ROWS, {**ROWS[0], "topic": "spam"}, {**ROWS[0], "answer": " n/a "}]
    path = write_lines(tmp_path / "rows.jsonl", [*rows, {**ROWS[0], "topic": "junk", "answer": ""}])
    changes = {"drop_classes": ["spam", "junk", "number"], "no_response": ["n/a"]}
    corpus = load_corpus(generation([path], **changes))
    assert [example.response for example in corpus.examples] == ["Me, myself"]
    assert corpus.classes == ("person",)
    assert corpus.dropped == {"no_label": 0, "no_response": 1, "duplicate": 0, "other_class": 4}
    assert corpus.unwanted == {
        "drop_classes": {"spam": 1, "junk": 1, "number": 2},
        "no_response": {"n/a": 1},
    }


def test_a_category_to_drop_that_no_row_has_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(FedamoleError, match=r"'numbr' is no topic of any row; did you mean number"):
        load_corpus(generation([path], drop_classes=["numbr"]))


def test_a_class_beside_the_label_is_what_is_spread_and_dropped(tmp_path: Path) -> None:
    pairs = [
        {"premise": "p", "hypothesis": str(n), "label": n % 3, "genre": genre}
        for n, genre in enumerate(["talk", "news", "talk", "spam", ""])
    ]
    path = write_lines(tmp_path / "pairs.jsonl", pairs)
    corpus = load_corpus(classification([path], category="genre", drop_classes=["spam"]))
    assert corpus.classes == ("news", "talk")
    assert [(example.category, example.label) for example in corpus.examples] == [
        (1, 0),
        (0, 1),
        (1, 2),
    ]
    assert (corpus.dropped["other_class"], corpus.dropped["no_label"]) == (1, 1)


def test_columns_inside_columns() -> None:
    row = Row(
        {
            "answers": {"text": ["a tower", 2.0, None], "start": []},
            "a.b": "dotted",
            "a": {"b": "inner", "": "none"},
            "items": [{"name": "x"}, {"name": "y"}],
            "nothing": None,
        },
        "f:1",
    )
    found = {
        "answers.text.0": "a tower",
        "answers.text.1": "2",
        "answers.text.2": "",
        "answers.text.*": "a tower\n2\n",
        "answers.start.0": "",
        "answers.start.*": "",
        "a.b": "dotted",
        "a.": "none",
        "items.1.name": "y",
        "nothing": "",
        "nothing.at.0.all": "",
    }
    assert {column: row.text(column) for column in found} == found
    for column, message in (
        ("answer", "has no field 'answer'; did you mean 'answers'? its fields are ['a', 'a.b', "),
        ("answers", "field 'answers' holds a dict; a text or a number is needed, such as that of "),
        ("answers.text", "field 'answers.text' holds a list; a text or a number is needed, such "),
        ("answers.texts.0", "field 'answers' has no entry 'texts'; its entries are ['start', "),
        ("answers.text.3", "field 'answers.text' has no item '3'; it has 3, from 0 on"),
        ("answers.text.-1", "field 'answers.text' has no item '-1'; it has 3, from 0 on"),
        ("answers.text.x", "field 'answers.text' has no item 'x'; it has 3, from 0 on"),
        ("answers.text.0.x", "field 'answers.text.0' has no 'x'; it holds a str"),
        ("items.*", "field 'items.*' holds a dict; a text or a number is needed"),
        ("items.*.name", "field 'items' has no item '*'; it has 2, from 0 on"),
    ):
        with pytest.raises(FedamoleError) as caught:
            row.text(column)
        assert str(caught.value).startswith(f"f:1: {message}"), column


def test_a_data_set_without_classes_has_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    corpus = load_corpus(generation([path], category=None))
    assert corpus.classes == ("all",)
    assert corpus.categories.tolist() == [0, 0, 0]


def test_files_of_the_hub_are_found_in_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is laid out as huggingface_hub does it."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source = SourceSettings(hub="org/mine", revision="v1", files=["data/*.tsv"])
    with pytest.raises(FedamoleError, match="hub data set 'org/mine' .revision v1.: cannot be loa"):
        find_files(source, fetch=False)
    repository = tmp_path / "datasets--org--mine"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text("c0ffee")
    folder = repository / "snapshots" / "c0ffee"
    (folder / "data").mkdir(parents=True)
    with pytest.raises(FedamoleError, match="hub data set 'org/mine': has no file 'data/..tsv'"):
        find_files(source, fetch=False)
    for name in ("b", "a"):
        (folder / "data" / f"{name}.tsv").touch()
    assert find_files(source, fetch=False) == [folder / "data" / f"{name}.tsv" for name in "ab"]


def test_truth_values_and_numbers_are_labels_in_every_format(tmp_path: Path) -> None:
    answers = {"false": "No", "true": "Yes"}
    rows = [{"premise": 1.0, "hypothesis": 2, "label": True}]
    path = write_lines(tmp_path / "truth.jsonl", rows)
    (example,) = load_corpus(classification([path], answers=answers)).examples
    assert (example.prompt, example.label) == ("1 => 2?", 1)


BROKEN = {
    "a.jsonl": ('{"question": "a"\n', "a.jsonl:1: is not valid JSON (Expecting ',' delimiter"),
    "b.jsonl": ('\n[1, 2]\n', "b.jsonl:2: holds a list; an object with named fields is needed"),
    "c.jsonl": ('{}\n', "c.jsonl:1: has no field 'topic'; its fields are []"),
    "d.json": ('[\n{"topic": "x"},\n\n]', "d.json:4: is not valid JSON"),
    "e.json": (
        '[\n{"topic": "x", "question": "q", "answer": "a", "extra": ""},\n{"topic": "x",\n"a": 1}]',
        "e.json:3: has no field 'extra'; its fields are ['a', 'topic']",
    ),
    "f.csv": ("\ntopic,question\n\nc\n", "f.csv:4: has 1 fields; the header has 2"),
    "g.csv": ('topic,question\na,"b', "g.csv:2: is not valid CSV"),
    "n.csv": ('topic,"a b",x,"a b"\n', "n.csv:1: has column 'a b' 2 times; every column needs a"),
    "o.csv": ("\ntopic,topic,topic\n", "o.csv:2: has column 'topic' 3 times"),
    "h.csv": ('topic,x\n"a\nb",c', "h.csv:2: has no field 'extra'; its fields are ['topic', 'x']"),
    "i.txt": ("", "i.txt: has an unknown format '.txt'; allowed: .jsonl, .json, .csv, .tsv, .parq"),
    "p.tsv": ('topic\tx\n"a"b\tc', "p.tsv:2: is not valid TSV with CSV's quotes ("),
    "j.jsonl.gz": ("plain", "j.jsonl.gz: is not a whole gzip file"),
    "k.parquet": ("PAR1", "k.parquet: is not a whole Parquet file"),
    "l.jsonl": ("", "data set mine: no row is left (its source has none)"),
    "m.jsonl": ('{"topic": ["x"]}', "m.jsonl:1: field 'topic' holds a list; a text or a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(FedamoleError) as caught:
        load_corpus(generation([str(tmp_path / name)]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_gzip_and_wrong_encoding_are_refused(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS * 100).encode()
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(lines)[:-20])
    with pytest.raises(FedamoleError, match="half.jsonl.gz: is not a whole gzip file"):
        load_corpus(generation([str(tmp_path / "half.jsonl.gz")]))
    (tmp_path / "latin.jsonl").write_bytes(b"\n" + '{"a": "früh"}'.encode("latin-1"))
    with pytest.raises(FedamoleError, match="latin.jsonl:2: is not UTF-8 text"):
        load_corpus(generation([str(tmp_path / "latin.jsonl")]))


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_names_the_line_of_a_wrong_byte(tmp_path: Path, suffix: str, end: str) -> None:
    lines = ["\ufefftopic,question,extra,answer", *["tüchtig,q,,a"] * 299, 't,"q', 'früh",,a']
    assert lines[301] == 'früh",,a'
    data = end.join(lines[:301]).encode() + (end + lines[301]).encode("latin-1")
    path = tmp_path / f"late{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    with pytest.raises(FedamoleError) as caught:
        load_corpus(generation([str(path)]))
    # After the header, 299 rows and the first line of a cell of two.
    assert str(caught.value) == f"{path}:302: is not UTF-8 text (invalid start byte)"


def test_csv_cells_may_be_long_documents(tmp_path: Path) -> None:
    text = "long " * 40_000
    (tmp_path / "a.csv").write_text(f"topic,question,extra,answer\nt,q,{text},a\n")
    (example,) = load_corpus(generation([f"{tmp_path}/a.csv"])).examples
    assert text in example.prompt


def test_home_is_expanded_in_paths_and_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "data").mkdir(parents=True)
    write_lines(tmp_path / "home" / "data" / "a.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    for pattern in ("~/data/a.jsonl", "~/d*/*.jsonl"):
        assert len(load_corpus(generation([pattern])).examples) == 3
    with pytest.raises(FedamoleError, match=f"{tmp_path}/home/b.jsonl: no such data file"):
        load_corpus(generation(["~/b.jsonl"]))
    # No user has this name, so it is the name of a file.
    write_lines(tmp_path / "~no such user.jsonl", ROWS)
    assert len(load_corpus(generation(["~no such user.jsonl"])).examples) == 3


def test_label_out_of_range_names_value_line_and_what_is_allowed(tmp_path: Path) -> None:
    pair = {"premise": "p", "hypothesis": "h"}
    path = write_lines(tmp_path / "pairs.jsonl", [{**pair, "label": 1}, {**pair, "label": 3}])
    with pytest.raises(FedamoleError) as caught:
        load_corpus(classification([path]))
    assert str(caught.value) == (
        f"{path}:2: label '3' of field 'label' is out of range; allowed: 0, 1, 2; none: '-1', ''"
    )


def test_missing_files_and_packages_are_named(tmp_path: Path) -> None:
    with pytest.raises(FedamoleError, match=r"nothing/\*.jsonl: no such data file"):
        load_corpus(generation([f"{tmp_path}/nothing/*.jsonl"]))
    source = {"files": ["x.jsonl"], "package": "no_such_corpus"}
    with pytest.raises(FedamoleError, match="not installed; try: pip install no-such-corpus"):
        load_corpus(generation([], source=source))


@pytest.mark.parametrize("name", ["no_such.part", "", "__main__"])
def test_odd_package_names_are_not_installed_either(name: str) -> None:
    with pytest.raises(FedamoleError, match=f"the Python package '{name}' is not installed"):
        package_folder(name)


def test_package_is_found_without_being_imported() -> None:
    sys.modules.pop("chatterbot_corpus", None)
    assert (package_folder("chatterbot_corpus") / "data" / "english" / "ai.yml").is_file()
    assert "chatterbot_corpus" not in sys.modules


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "no field"}, "must be alpaca or contain a {field}"),
        ({"template": "{a"}, "is broken"),
        ({"template": "{a.b}"}, "{a.b} must be a plain name"),
        ({"template": "{a:>10}"}, "{a:>10} must be a plain name"),
        ({"fields": {"c": "d"}}, "fields ['c'] are not in the template"),
        ({"answers": {"0": "A", "1": "A"}}, "must be different texts"),
        ({"answers": {"0": "A", "-1": "B"}}, "['-1'] stand in both answers and no_label"),
        ({"eval_fraction": 0.5, "test_fraction": 0.5}, "nothing would be left to train on"),
        ({"source": {"hub": "a", "layout": "conversations"}}, "goes with files only"),
        ({"source": {"files": ["a"], "splits": ["dev"]}}, "splits goes with hub"),
        ({"source": {"files": ["a"], "subset": "b"}}, "subset goes with hub only"),
        ({"source": {"hub": "a", "files": ["b"], "subset": "c"}}, "give it, or files, not both"),
        ({"source": {"hub": "a", "files": ["b"], "splits": ["c"]}}, "splits goes with hub"),
        ({"source": {"hub": "a", "files": ["b"], "package": "c"}}, "package goes with files only"),
        ({"source": {}}, "needs hub, files, or both"),
        ({"drop_classes": ["5", "1"]}, "['1'] stand in both answers and drop_classes"),
        ({"no_response": ["none"]}, "no_response goes with generation only"),
    ],
)
def test_contradictory_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FedamoleError) as caught:
        classification(["x.jsonl"], **change)
    assert message in str(caught.value)


# ---------------------------------------------------------------- data sets that come with configs


def load_config_set(configs: Path, name: str, **source: Any) -> Corpus:
    data = yaml.safe_load((configs / "datasets" / f"{name}.yaml").read_text(encoding="utf-8"))
    parse(DatasetSettings, data, name)
    data["source"] = source or data["source"]
    return load_corpus(parse(DatasetSettings, data, name))


def class_sizes(corpus: Corpus) -> dict[str, int]:
    names = [corpus.classes[number] for number in corpus.categories]
    return {name: names.count(name) for name in corpus.classes}


def test_dolly(configs: Path, shared_data: Path) -> None:
    corpus = load_config_set(configs, "dolly", files=[f"{shared_data}/dolly-15k/*.jsonl.gz"])
    sizes = class_sizes(corpus)
    assert (len(corpus.examples), len(sizes)) == (15_011, 8)
    assert (sizes["open_qa"], sizes["creative_writing"]) == (3_742, 709)
    with_context = sum("### Input:" in example.prompt for example in corpus.examples)
    assert 0 < with_context < len(corpus.examples)


def test_snli(configs: Path, shared_data: Path) -> None:
    corpus = load_config_set(configs, "snli", files=[f"{shared_data}/snli/*.jsonl.gz"])
    assert class_sizes(corpus) == {
        "Yes": 2_981 + 3_329 + 3_368,
        "Maybe": 2_994 + 3_235 + 3_219,
        "No": 3_024 + 3_278 + 3_237,
    }
    assert set(corpus.dropped.values()) == {0}


def test_ag_news(configs: Path, shared_data: Path) -> None:
    corpus = load_config_set(configs, "ag-news", files=[f"{shared_data}/ag-news/*.jsonl.gz"])
    assert class_sizes(corpus) == dict.fromkeys(("World", "Sports", "Business", "Sci/Tech"), 1_900)


def test_natural_instructions(configs: Path, shared_data: Path) -> None:
    folder = shared_data / "natural-instructions-2.8"
    corpus = load_config_set(
        configs, "natural-instructions", files=[str(folder)], layout="natural-instructions"
    )
    sizes = class_sizes(corpus)
    assert len(sizes) == 29
    assert sizes["task1600_smcalflow_sentence_generation"] == 1_029
    task = json.loads((folder / "tasks" / "task381_boolq_question_generation.json").read_bytes())
    number = corpus.classes.index("task381_boolq_question_generation")
    first = next(example for example in corpus.examples if example.category == number)
    assert first.response == task["Instances"][0]["output"][0]
    assert task["Definition"][0] in first.prompt
    assert task["Instances"][0]["input"] in first.prompt


def test_chatterbot_is_every_question_with_the_answer_after_it(configs: Path) -> None:
    corpus = load_config_set(configs, "chatterbot")
    folder = package_folder("chatterbot_corpus") / "data" / "english"
    pairs, unanswered = [], 0
    for path in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(path.read_bytes())["conversations"]:
            turns = [turns] if isinstance(turns, str) else turns
            unanswered += len(turns) % 2
            pairs += [(turns[i], turns[i + 1]) for i in range(0, len(turns) - 1, 2)]
    assert len(corpus.classes) == 21
    assert len(corpus.examples) == len(set(pairs))
    assert corpus.dropped["duplicate"] == len(pairs) - len(set(pairs))
    assert corpus.dropped["no_response"] == unanswered


def test_no_in_a_conversation_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "moods.yml"
    path.write_text("conversations:\n- - Are you sad?\n  - No\n- - 1 + 1?\n  - 2\n")
    source = {"files": [str(path)], "layout": "conversations"}
    settings = generation([], source=source, fields={}, response="response", category="category")
    assert [example.response for example in load_corpus(settings).examples] == ["No", "2"]
    assert load_corpus(settings).classes == ("moods",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("conversations: [", "c.yml:2: is not valid YAML"),
        ("categories: [a]", "c.yml: has no entry 'conversations'; its entries are ['categories']"),
        ("conversations:\n- - a\n  - {b: c}", "c.yml:3: is not a text; a turn is needed"),
        ("conversations:\n- - a\n  - b\n- {}", "c.yml:4: is not a list of turns"),
        ("conversations:\n- - a\n  - früh", "c.yml:3: is not UTF-8 text (invalid start byte)"),
        ("conversations:\n- - a\n  - \a", "c.yml:3: is not valid YAML (control characters are not"),
    ],
)
def test_broken_conversations_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.yml").write_text(content, encoding="latin-1")
    source = {"files": [str(tmp_path / "c.yml")], "layout": "conversations"}
    with pytest.raises(FedamoleError) as caught:
        load_corpus(
            generation([], source=source, fields={}, response="response", category="category")
        )
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def write_tasks(folder: Path, sizes: dict[str, int]) -> dict[str, Any]:
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    (folder / "splits" / "default" / "train_tasks.txt").write_text("\n".join([*sizes, ""]))
    for name, size in sizes.items():
        instances = [{"id": str(i), "input": "x", "output": ["y", "z"]} for i in range(size)]
        task = {"Definition": ["Do", name], "Instances": instances}
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(task))
    source = {"files": [str(folder)], "layout": "natural-instructions"}
    return {"source": source, "fields": {}, "response": "response", "category": "category"}


def test_largest_tasks_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_TASKS", 2)
    changes = write_tasks(tmp_path / "ni", {"task3": 4, "task1": 3, "task2": 5})
    assert class_sizes(load_corpus(generation([], **changes))) == {"task2": 5, "task3": 4}


def test_broken_tasks_are_refused(tmp_path: Path) -> None:
    changes = write_tasks(tmp_path / "ni", {"task1": 2, "task2": 2})
    path = tmp_path / "ni" / "tasks" / "task1.json"
    for content, message in (
        ('{"Definition": ["d"], "Instances": [{"input": "x", "output": []}]}', "instance 1: field"),
        ('{"Definition": ["d"], "Instances": [3]}', "instance 1: holds a int"),
        ('{"Definition": ["d"]}', "has no list 'Instances'"),
        ("{\n", "task1.json:2: is not valid JSON"),
    ):
        path.write_text(content)
        with pytest.raises(FedamoleError, match=message):
            load_corpus(generation([], **changes))
    path.unlink()
    with pytest.raises(FedamoleError, match="task1.json: cannot be read"):
        load_corpus(generation([], **changes))
    names = tmp_path / "ni" / "splits" / "default" / "train_tasks.txt"
    names.write_text("task1\ntäsk2\n", encoding="latin-1")
    with pytest.raises(FedamoleError, match="train_tasks.txt:2: is not UTF-8 text"):
        load_corpus(generation([], **changes))


HUB = """
import sys
from fedamole.datasets.loading import load_corpus
from fedamole.errors import FedamoleError
from fedamole.settings import DatasetSettings
assert not {"datasets", "torch", "transformers"} & set(sys.modules)
for hub in sys.argv[1:]:
    settings = DatasetSettings(
        name="x", source={"hub": hub}, task="generation", template="{question}",
        response="answer", category="topic",
    )
    try:
        print(len(load_corpus(settings).examples))
    except FedamoleError as error:
        print(error)
"""


def test_hub_loader_reads_a_folder_and_names_what_it_cannot_reach(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", ROWS)
    # Its own process: the loader reads its environment once, when it is imported.
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(tmp_path / "set"), "nobody/nothing"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == "3"
    assert second.startswith("hub data set 'nobody/nothing': cannot be loaded")
