"""What all parts of a result file have in common."""

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """Unknown keys are errors; non-finite numbers are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
