"""What all sections of the configuration have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all configuration sections: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
