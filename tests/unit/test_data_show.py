"""What ``fedamole data show`` prints, by files that a person would have, and what it refuses."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import yaml
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from fedamole.cli import data_view, main
from fedamole.config import parse
from fedamole.datasets import overview
from fedamole.datasets.loading import load_corpus
from fedamole.datasets.overview import spread_examples
from fedamole.datasets.splits import make_partition
from fedamole.settings import ScenarioSettings

README = Path(__file__).parents[2] / "configs" / "README.md"
Show = Callable[..., str]


@pytest.fixture
def show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Show]:
    """Run the command in a folder of its own; gives what it prints."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, fails: bool = False) -> str:
        assert main(["data", "show", *arguments]) == (2 if fails else 0)
        printed = capsys.readouterr()
        return printed.err if fails else printed.out

    yield run
    signal.signal(signal.SIGTERM, handler)


def rows(number: int) -> list[dict[str, Any]]:
    """Questions of four topics; the answers of the last topic are missing."""
    topics = ("river", "stone", "wood", "silence")
    return [
        {"q": " ".join(["why"] * (1 + n % 7)) + f" {n}?", "topic": topics[n % 10 // 3],
         "a": {"text": "" if n % 10 == 9 else f"because {n}"}}
        for n in range(number)
    ]  # fmt: skip


DATASET = {
    "name": "mine",
    "source": {"files": ["mine.jsonl"]},
    "task": "generation",
    "template": "Question:\n{q}\nAnswer: ",
    "response": "a.text",
    "category": "topic",
    "drop_classes": ["stone"],
    "no_response": ["unknown"],
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A data set of 200 rows and its YAML file."""
    lines = "".join(json.dumps(row) + "\n" for row in rows(200))
    (tmp_path / "mine.jsonl").write_text(lines)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(DATASET))
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of Llama."""
    model = tokenizers.ByteLevelBPETokenizer()
    texts = [row["q"] for row in rows(200)]
    model.train_from_iterator(texts, vocab_size=300, special_tokens=["<s>", "</s>"])
    model._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model._tokenizer, bos_token="<s>", eos_token="</s>"
    )


def table_of(text: str) -> dict[str, list[int]]:
    """Rows of the split by their name, blocks of clients put together."""
    found: dict[str, list[int]] = {}
    for line in text[text.index("\nSplit ") :].splitlines():
        cells = re.split(r"\s{2,}", line)
        if len(cells) > 1 and cells[0] != "client" and not set(line) <= {"-", " "}:
            numbers = [0 if cell == "." else int(cell) for cell in cells[1:]]
            found.setdefault(cells[0], []).extend(numbers)
    return found


def test_everything_asked_for_is_printed(
    show: Show, files: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(files / "model")
    text = show("mine.yaml", "--backbone", "model", "--clients", "3", "--seed", "7")
    assert text.startswith(
        "data set  mine, generation, metric rouge_l\n"
        "source    mine.jsonl\n"
        "examples  120\n"
        "dropped   rows 20 without an answer, 60 of classes that the data set drops\n"
        "- classes 'stone' 60\n"
        "- answers 'unknown' 0\n"
        "classes   2: river 60, wood 60\n"
        "\n"
        "An example of river\n"
        "prompt    | <s>Question:\n"
        "          | why 0?\n"
        "          | Answer:\n"
        "answer    | because 0</s>\n"
        "\n"
        "An example of wood\n"
    )
    kept = [row for row in rows(200) if row["topic"] in ("river", "wood")]
    prompts = [len(tokenizer.encode(f"Question:\n{row['q']}\nAnswer: ")) for row in kept]
    answers = [len(tokenizer.encode(row["a"]["text"])) for row in kept]
    for name, lengths in (("prompt", prompts), ("answer", answers)):
        expected = [f"{np.median(lengths):.0f}", f"{np.percentile(lengths, 95):.0f}"]
        (line,) = re.findall(rf"^{name} +(\d+) +(\d+) +(\d+)$", text, re.MULTILINE)
        assert [*line] == [*expected, str(max(lengths))]
    assert "Lengths in tokens, of all examples" in text
    assert "\nSplit dir1 over 3 clients, seed 7: examples of each client\n" in text


def test_the_split_is_that_of_the_workflow(show: Show, files: Path) -> None:
    text = show("mine.yaml", "--partition", "dir0.5", "--clients", "4", "--seed", "9")
    settings = {"dataset": DATASET, "partition": "dir0.5", "clients": 4}
    scenario = parse(ScenarioSettings, settings, "test")
    division = make_partition(load_corpus(scenario.dataset), scenario, seed=9)
    table = table_of(text)
    for name, counts in zip(("river", "wood"), division.counts.T, strict=True):
        assert table[name] == [*counts, sum(counts)]
    for name in ("train", "embedding", "eval", "test"):
        sizes = [len(client.parts()[name]) for client in division.clients]
        assert table[f"- {name}"] == [*sizes, sum(sizes)]


def test_long_prompts_and_answers_are_counted(
    show: Show, files: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(files / "results" / "backbones" / "tiny")
    (files / "results" / "backbones" / "tiny" / "backbone.json").touch()
    kept = [row for row in rows(200) if row["topic"] in ("river", "wood")]
    prompts = [len(tokenizer.encode(f"Question:\n{row['q']}\nAnswer: ")) for row in kept]
    limit = sorted(prompts)[90]
    study = {
        "backbone": {"name": "tiny", "generate": {}},
        "methods": ["zero-shot"],
        "seeds": [5, 6],
        "scenarios": [
            {"dataset": "./mine.yaml", "partition": "iid", "clients": 2, "max_length": limit},
            {"dataset": "./mine.yaml", "partition": "dir10", "clients": 3, "max_length": limit},
        ],
    }
    (files / "study.yaml").write_text(yaml.safe_dump(study))
    text = show("study.yaml", "--examples", "0")
    cut = sum(
        length < limit < length + len(tokenizer.encode(row["a"]["text"]))
        for length, row in zip(prompts, kept, strict=True)
    )
    assert cut > 0
    assert (
        f"{sum(length >= limit for length in prompts)} prompts have max_length {limit} or more "
        f"tokens and will be dropped; {cut} answers will be cut.\n"
    ) in text
    assert text.count("data set  mine") == 1
    assert re.findall(r"^Split (\w+) over (\d) clients, seed (\d)", text, re.MULTILINE) == [
        ("iid", "2", "5"),
        ("dir10", "3", "5"),
    ]


def test_without_a_tokenizer_words_are_counted(show: Show, files: Path) -> None:
    text = show("mine.yaml", "--clients", "2", "--examples", "0")
    kept = [row for row in rows(200) if row["topic"] in ("river", "wood")]
    lengths = [2 + len(row["q"].split()) for row in kept]
    assert f"prompt  {np.median(lengths):>6.0f}" in text
    assert "Lengths in words" in text
    assert text.endswith("With --backbone also the special tokens are shown, and tokens counted.\n")
    assert "An example" not in text


def test_many_clients_and_classes_stay_narrow_and_complete(show: Show, files: Path) -> None:
    lines = [{"q": "?", "a": {"text": "x"}, "topic": f"{'long ' * 9}{n % 40}"} for n in range(4000)]
    lines[0]["q"] = "word " * 999 + "end"
    (files / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (files / "mine.yaml").write_text(yaml.safe_dump({**DATASET, "drop_classes": []}))
    text = show("mine.yaml", "--clients", "50")
    assert max(map(len, text.splitlines())) <= data_view.WIDTH
    table = table_of(text)
    assert len(table["all classes"]) == 51
    assert sum(table["all classes"][:50]) == table["all classes"][50] == 4000
    # Names are cut, so that the 20 that are listed look the same.
    assert len(table[f"{'long ' * 5}lo..."]) == 20 * 51
    assert table["20 others"][50] == 2000
    heads = [line.split()[1:] for line in text.splitlines() if line.startswith("client ")]
    assert [head for line in heads for head in line] == [*map(str, range(50)), "together"]
    # Of a long text the middle is left out: both ends matter.
    assert re.search(r"prompt +\| Question:\n.*\n +\.\.\. \d+ lines \.\.\.\n.* end\n", text, re.S)


def test_examples_go_round_the_classes_from_the_largest(files: Path) -> None:
    data = {**DATASET, "source": {"files": [str(files / "mine.jsonl")]}, "drop_classes": []}
    corpus = load_corpus(
        parse(ScenarioSettings, {"dataset": data, "partition": "iid"}, "t").dataset
    )
    chosen = spread_examples(corpus, 5)
    names = [corpus.classes[example.category] for example in chosen]
    assert names == ["river", "stone", "wood", "river", "stone"]
    assert len({example.prompt for example in chosen}) == 5
    assert len(spread_examples(corpus, 10_000)) == len(corpus.examples)


def test_lengths_of_a_large_data_set_are_those_of_a_part(
    show: Show, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "MAX_COUNTED", 50)
    assert "Lengths in words, of 50 of 120 examples\n" in show("mine.yaml", "--clients", "2")


def test_a_terminal_obeys_nothing_that_stands_in_the_data(show: Show, files: Path) -> None:
    line = {"q": "\x1b[31mred\x07 früh", "a": {"text": "\u202ex"}, "topic": "\x1b[2J"}
    (files / "mine.jsonl").write_text((json.dumps(line) + "\n") * 40)
    assert "it has '\\x1b[2J'" in show("mine.yaml", fails=True)
    (files / "mine.yaml").write_text(yaml.safe_dump({**DATASET, "drop_classes": []}))
    text = show("mine.yaml", "--clients", "2")
    assert "| \\x1b[31mred\\x07 früh\n" in text
    assert "answer    | \\u202ex\n" in text
    assert "An example\n" in text
    assert not set(text) & set("\x1b\x07\u202e")


def test_a_local_copy_stands_in_for_the_hub(show: Show, files: Path) -> None:
    pairs = [{"premise": "p", "hypothesis": f"h{n}", "label": n % 4 - 1} for n in range(80)]
    for name in ("a", "b"):
        (files / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    text = show("snli", "--clients", "2", "--file", "a.jsonl", "b.jsonl")
    assert "source    a.jsonl, b.jsonl\n" in text
    assert "dropped   rows 40 without a label or category\n" in text
    assert "classes   3: Yes 40, Maybe 40, No 40\n" in text


def test_real_natural_instructions_are_shown(show: Show, shared_data: Path) -> None:
    folder = str(shared_data / "natural-instructions-2.8")
    text = show("natural-instructions", "--file", folder, "--partition", "meta1", "--clients", "29")
    assert "classes   29: " in text
    counts = table_of(text)
    assert max(map(len, text.splitlines())) <= data_view.WIDTH
    assert counts["all classes"][29] == sum(counts["all classes"][:29]) == 34_469


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["snl"], "data set 'snl' is unknown; did you mean snli? allowed: ag-news, "),
        (["x/y.yaml"], "x/y.yaml: cannot be read (No such file or directory)"),
        (["mine.jsonl"], "mine.jsonl: is a file of data; name the YAML file of a data set, which"),
        (["mine.yaml", "--partition", "dri1"], "mine: partition: partition 'dri1' is unknown; "),
        (["mine.yaml", "--clients", "0"], "mine: clients: 0 is not allowed; "),
        (["mine.yaml", "--examples", "-1"], "--examples -1 must be 0 or more"),
        (["mine.yaml", "--file", "no.csv"], "no.csv: no such data file, seen from "),
        (["dolly", "--file", "mine.jsonl"], "mine.jsonl:1: has no field 'category'; its fields "),
        (["mine.yaml", "--backbone", "qwen2.5-1b"], "backbone 'qwen2.5-1b' is unknown; did you "),
        (["mine.yaml", "--backbone", "."], ".: has no usable tokenizer ("),
        (
            ["mine.yaml", "--backbone", "smollm2-135m"],
            "backbone 'smollm2-135m' is not prepared in results; give the folder of a model, or ",
        ),
        (["mine.yaml", "--clients", "20"], "120 examples cannot feed 20 clients with at least 10"),
        (["mine.yaml", "--partition", "meta1"], "partition meta1 over 10 clients needs 10 classes"),
        (["study.yaml", "--file", "a"], "--file goes with a data set; study.yaml is a study, "),
        (["study.yaml"], "study.yaml: methods: is missing"),
        (["broken.yaml"], "broken.yaml:3: is not valid YAML ("),
        (["list.yaml"], "list.yaml: [] is not allowed; "),
        (["alpaca", "--partition", "dir1"], "alpaca: partition dir1 spreads classes, and data "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_one_line(show: Show, files: Path, arguments: list[str], message: str) -> None:
    (files / "study.yaml").write_text(
        "backbone: smollm2-135m\nscenarios: [{dataset: ./mine.yaml, partition: iid}]\n"
    )
    (files / "broken.yaml").write_text("a: 1\nb: [\n")
    (files / "list.yaml").write_text("[]\n")
    (line,) = show(*arguments, fails=True).splitlines()
    assert line.startswith(f"fedamole: {message}")


def test_the_example_of_the_documentation_works(show: Show, tmp_path: Path) -> None:
    text = README.read_text()
    section = text[text.index("### Your own") : text.index("A classification has a label")]
    blocks = re.findall(r"`([\w./-]+)`:\n\n```\w+\n(.*?)```", section, re.S)
    assert [name for name, _ in blocks] == ["my-data/tickets.jsonl", "my-data/tickets.yaml"]
    (tmp_path / "my-data").mkdir()
    for name, content in blocks:
        # "and so on"
        copies = 40 if name.endswith(".jsonl") else 1
        (tmp_path / name).write_text(content * copies)
    (command,) = re.findall(r"^    fedamole data show (.*)$", section, re.MULTILINE)
    shown = show(*command.split())
    assert "| Question: Where is my invoice?\n          | Answer:\n" in shown
    assert "answer    | Under Account.\n" in shown
    assert "dropped   rows 40 without an answer, 40 of classes that the data set drops\n" in shown
    assert "classes   2: billing 40, device 40\n" in shown
    (scenario,) = re.findall(r"a scenario says `(.*?)`", section)
    assert parse(ScenarioSettings, {
        **yaml.safe_load(scenario),
        "dataset": yaml.safe_load((tmp_path / "my-data/tickets.yaml").read_text()),
    }, "documentation").slug == "tickets-dir0.5"  # fmt: skip


def test_the_classification_of_the_documentation_works(show: Show, tmp_path: Path) -> None:
    text = README.read_text()
    section = text[text.index("A classification has a label") :]
    (content,) = re.findall(r"```yaml\n(.*?)```", section, re.S)[:1]
    (tmp_path / "reviews.yaml").write_text(content)
    (tmp_path / "my-data").mkdir()
    (tmp_path / "my-data" / "reviews.csv").write_text(
        "text,stars\n" + '"Great, I say",5\nCold soup,1\nWell,3\n' * 30
    )
    shown = show("reviews.yaml", "--clients", "2")
    assert "classes   2: Bad 30, Good 30\n" in shown
    assert "| Great, I say\n          | Is this review good or bad? Answer Good or Bad.\n" in shown
