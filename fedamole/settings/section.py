"""Base of all sections of the config."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

SLUG = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Slug = Annotated[str, Field(pattern=SLUG)]


class Section(BaseModel):
    """Base of all sections: closed, frozen, documented by the strings under the fields."""

    # Deferred: most commands read one section of many, and help none.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        defer_build=True,
    )
