"""Data sets, and how they are spread over clients."""

import re
import string
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedamole.settings.section import Section, Slug

# Caps of a client's test set: a generated answer takes a hundred times longer than a chosen one.
DEFAULT_MAX_TEST = {"classification": 200, "generation": 50}


class SourceSettings(Section):
    """Where the rows of a data set come from: the hub, local files, or files of the hub."""

    hub: str | None = None
    """Data set id on the Hugging Face hub."""
    subset: str | None = None
    """Configuration name of the hub data set, for example ``sst2`` of ``glue``."""
    revision: str | None = None
    """Commit, tag or branch of the hub data set. A whole commit, 40 digits, is also what a cached
    copy must be of."""
    splits: list[str] = Field(default=["train"], min_length=1)
    """Splits that are pooled before partitioning; of a hub data set or of Natural Instructions."""
    files: list[str] = Field(default=[])
    """Files or glob patterns, read in sorted order: .jsonl, .json, .csv, .tsv, .parquet, also .gz;
    seen from the working directory, or with ``hub`` from the top of its repository. For
    ``natural-instructions`` the folder with tasks/ and splits/, for ``mcl-wic`` its .data files."""
    package: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Installed Python package that the files are relative to; it is not imported."""
    layout: Literal["records", "conversations", "natural-instructions", "mcl-wic"] = "records"
    """How rows lie in the files. ``records``: one object per row. ``conversations``: YAML with
    lists of turns, every question with the answer that follows it. ``natural-instructions``: its
    v2.8 folder. ``mcl-wic``: a .data and a .gold file with the same ids, both arrays in JSON."""

    @model_validator(mode="after")
    def _one_source(self) -> "SourceSettings":
        if not (self.hub or self.files):
            raise ValueError("needs hub, files, or both: files of the hub's repository")
        if self.package and (self.hub or not self.files):
            raise ValueError("package goes with files only, and not with hub")
        if self.hub and self.layout != "records":
            raise ValueError(f"layout {self.layout} goes with files only, and not with hub")
        for key in ("subset", "revision"):
            if getattr(self, key) and not self.hub:
                raise ValueError(f"{key} goes with hub only")
        if self.hub and self.files and self.subset:
            raise ValueError("subset names files of the hub; give it, or files, not both")
        if self.files and self.layout != "natural-instructions" and self.splits != ["train"]:
            raise ValueError(
                "splits goes with hub and layout natural-instructions only, and not with files"
            )
        return self


class DatasetSettings(Section):
    """What a data set is: source, prompt, answers, classes and metric."""

    name: Slug
    """Name of the data set."""
    source: SourceSettings
    """Where its rows come from."""
    task: Literal["generation", "classification"]
    """How a model is tested: ROUGE-L of the generated answer, or accuracy over the answers."""
    template: str
    """``alpaca``, or a text with the fields of a row in braces; a brace itself is doubled."""
    fields: dict[str, str] = Field(default={})
    """Columns of the file by the name that the template uses, where they differ. A column may lie
    inside another: ``answers.text.0`` is the first item of ``text`` in ``answers``, and
    ``passages.text.*`` all its items, one per line; so it is for response, label and category."""
    response: str | None = None
    """Column with the answer text (generation)."""
    no_response: list[str] = Field(default=[])
    """Answers that mean "none" (generation); such rows are dropped and counted, as are those with
    an empty answer."""
    label: str | None = None
    """Column with the class label (classification)."""
    answers: dict[str, str] = Field(default={})
    """Answer text by label value, in class order (classification). Truth values are ``"true"`` and
    ``"false"``."""
    no_label: list[str] = Field(default=["-1", ""])
    """Label or category values that mean "none"; such rows are dropped and counted."""
    category: str | None = None
    """Column with the class that the partition uses; default: the label. A data set without either
    can be partitioned ``iid`` only."""
    drop_classes: list[str] = Field(default=[])
    """Label or category values whose rows are left out and counted; of categories each must
    occur."""
    drop_duplicates: bool = False
    """Drop rows whose prompt and answer both occurred before."""
    eval_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of a client's examples for evaluation."""
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of a client's examples for testing."""

    @model_validator(mode="after")
    def _task_has_what_it_needs(self) -> "DatasetSettings":
        if self.task == "generation" and not self.response:
            raise ValueError("a generation data set needs response: the column with the answer")
        if self.task == "generation" and (self.label or self.answers):
            raise ValueError("label and answers go with classification only")
        if self.task == "classification" and self.no_response:
            raise ValueError("no_response goes with generation only; see no_label, drop_classes")
        if self.task == "classification" and not (self.label and len(self.answers) >= 2):
            raise ValueError("a classification data set needs label and at least two answers")
        if self.task == "classification" and self.response:
            raise ValueError("response goes with generation only; the answers are the responses")
        if self.drop_classes and not (self.category or self.label):
            raise ValueError("drop_classes goes with a category or a label only")
        if self.eval_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"eval_fraction {self.eval_fraction} + test_fraction {self.test_fraction} must be "
                "less than 1: nothing would be left to train on"
            )
        return self

    @model_validator(mode="after")
    def _answers_differ(self) -> "DatasetSettings":
        texts = list(self.answers.values())
        if "" in texts or len(set(texts)) < len(texts):
            raise ValueError(f"answers {texts} must be different texts, none of them empty")
        for key in ("no_label", "drop_classes"):
            if both := sorted(set(getattr(self, key)) & set(self.answers)):
                raise ValueError(f"label values {both} stand in both answers and {key}")
        return self

    @model_validator(mode="after")
    def _template_is_text_with_fields(self) -> "DatasetSettings":
        names = self.template_fields
        if not names:
            raise ValueError(f"template {self.template!r} must be alpaca or contain a {{field}}")
        for name in names:
            if not name.isidentifier():
                raise ValueError(f"template field {{{name}}} must be a plain name in braces")
        if unused := sorted(set(self.fields) - set(names)):
            raise ValueError(f"fields {unused} are not in the template, which has {names}")
        return self

    @property
    def template_fields(self) -> list[str]:
        """Names in the braces of the template, each once, in order."""
        if self.template == "alpaca":
            return ["instruction", "input"]
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(f"template {self.template!r} is broken ({error})") from error
        names = (
            f"{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
            for _, name, spec, conversion in parts
            if name is not None
        )
        return list(dict.fromkeys(names))

    @property
    def metric(self) -> str:
        """Name of the reported metric."""
        return "accuracy" if self.task == "classification" else "rouge_l"


class PartitionSettings(Section):
    """How the classes are spread over the clients."""

    kind: Literal["dirichlet", "meta", "pathological", "iid"]
    """Law of the split."""
    alpha: float | None = Field(default=None, gt=0)
    """Concentration of the Dirichlet law; small is heterogeneous."""
    classes_per_client: int | None = Field(default=None, ge=1)
    """Classes each client gets (meta, pathological)."""

    @model_validator(mode="after")
    def _kind_has_its_parameter(self) -> "PartitionSettings":
        needs = {"dirichlet": "alpha", "meta": "classes_per_client"}
        needs["pathological"] = "classes_per_client"
        for key in ("alpha", "classes_per_client"):
            if (getattr(self, key) is not None) != (needs.get(self.kind) == key):
                verb = "needs" if needs.get(self.kind) == key else "takes no"
                raise ValueError(f"partition {self.kind} {verb} {key}")
        return self

    @property
    def slug(self) -> str:
        """Short form as used in the paper: dir0.5, meta1, pathological2, iid."""
        if self.kind == "dirichlet":
            return f"dir{self.alpha:g}"
        return self.kind + str(self.classes_per_client or "")


def _expand_partition(value: Any) -> Any:
    """Turn the paper's short form (``dir0.5``) into the section it stands for."""
    if not isinstance(value, str):
        return value
    if value == "iid":
        return {"kind": "iid"}
    if match := re.fullmatch(r"dir(\d+(?:\.\d+)?(?:e-?\d+)?)", value):
        return {"kind": "dirichlet", "alpha": float(match[1])}
    if match := re.fullmatch(r"(meta|pathological)(\d+)", value):
        return {"kind": match[1], "classes_per_client": int(match[2])}
    raise ValueError(
        f"partition {value!r} is unknown; allowed: iid, dir<alpha> such as dir0.5, "
        "meta<classes per client>, pathological<classes per client>"
    )


class ScenarioSettings(Section):
    """One federated population: a data set spread over clients."""

    name: Slug | None = None
    """Name of the scenario; default ``{dataset}-{partition}``."""
    dataset: DatasetSettings
    """The data set: a name (configs/datasets), the path of a YAML file, or the section itself."""
    partition: Annotated[PartitionSettings, BeforeValidator(_expand_partition)]
    """Law of the split, or its short form: dir0.5, meta1, pathological2, iid."""
    clients: int = Field(default=10, ge=1)
    """Number of clients K."""
    min_examples: int = Field(default=10, ge=4)
    """Redraw a Dirichlet split until every client has this many examples."""
    max_embedding: int = Field(default=200, ge=1)
    """Cap of a client's embedding set."""
    max_eval: int = Field(default=200, ge=1)
    """Cap of a client's evaluation set."""
    max_test: int | None = Field(default=None, ge=1)
    """Cap of a client's test set; default 200 (classification) or 50 (generation)."""
    max_length: int = Field(default=1024, ge=16)
    """Longest sequence in tokens. Longer prompts are dropped, longer answers cut."""

    @property
    def test_cap(self) -> int:
        """Cap of a client's test set."""
        return self.max_test or DEFAULT_MAX_TEST[self.dataset.task]

    @model_validator(mode="after")
    def _law_has_classes(self) -> "ScenarioSettings":
        if self.partition.kind != "iid" and not (self.dataset.category or self.dataset.label):
            raise ValueError(
                f"partition {self.partition.slug} spreads classes, and data set "
                f"{self.dataset.name} has none (it names no category); allowed: iid"
            )
        return self

    @property
    def slug(self) -> str:
        """Name without the seed."""
        return self.name or f"{self.dataset.name}-{self.partition.slug}"

    def seeded_slug(self, seed: int) -> str:
        """Name with the seed, as it stands in paths and log lines."""
        return f"{self.slug}-s{seed}"
