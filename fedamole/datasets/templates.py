"""A row -> the prompt that the model reads and the answer that it should give."""

from fedamole.datasets.rows import Row
from fedamole.errors import FedamoleError
from fedamole.settings import DatasetSettings

# Wording of Stanford Alpaca (Taori et al. 2023), which fine-tuned models are known to follow.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)


def render_prompt(row: Row, settings: DatasetSettings) -> str:
    """Fill the template of a data set with the fields of a row.

    ``alpaca`` takes the field ``instruction`` and, where the row has one that is not blank,
    ``input``.

    Raises
    ------
    FedamoleError
        If the row lacks a field of the template; with its file and line.
    """
    names = settings.template_fields
    template = settings.template
    if template == "alpaca":
        has_input = "input" in settings.fields or "input" in row.values
        with_input = has_input and bool(row.text(settings.fields.get("input", "input")).strip())
        template = ALPACA_WITH_INPUT if with_input else ALPACA_WITHOUT_INPUT
        names = names if with_input else ["instruction"]
    return template.format_map({name: row.text(settings.fields.get(name, name)) for name in names})


def find_label(row: Row, settings: DatasetSettings) -> int:
    """Find the class of a row's answer, as a position in ``answers``.

    Raises
    ------
    FedamoleError
        If the label is none of the allowed ones; with file and line.
    """
    value = row.text(settings.label or "")
    labels = list(settings.answers)
    if value not in labels:
        dropped = f"; dropped: {', '.join(settings.drop_classes)}" if settings.drop_classes else ""
        raise FedamoleError(
            f"{row.where}: label {value!r} of field {settings.label!r} is out of range; allowed: "
            f"{', '.join(labels)}; none: {', '.join(map(repr, settings.no_label))}{dropped}"
        )
    return labels.index(value)


def render_response(row: Row, label: int | None, settings: DatasetSettings) -> str:
    """Give the answer that the model should learn.

    Raises
    ------
    FedamoleError
        If the row lacks the field of the answer; with its file and line.
    """
    if label is not None:
        return list(settings.answers.values())[label]
    return row.text(settings.response or "")
