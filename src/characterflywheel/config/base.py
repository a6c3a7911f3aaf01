"""What all sections of the configuration have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all configuration sections: immutable; unknown keys and numbers without end are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
