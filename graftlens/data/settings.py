"""What all groups of settings have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class Settings(BaseModel):
    """Frozen, without unknown names; a number is finite, and neither true nor false."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: Any) -> Any:
        # Pydantic would read true as 1.
        wanted = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and wanted in (int, float):
            what = "a whole number" if wanted is int else "a number"
            raise ValueError(
                f"{info.field_name}={value} is a truth value, but {what} is wanted. Write the "
                "number, or leave the setting out for its default."
            )
        return value
