"""The settings of a fine-tuning run, and checks that need neither torch nor files."""

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from fastlora.tools.errors import UsageError


class Lower(str, Enum):
    """Values of the option `lower` of `fastlora.compile`."""

    AUTO = "auto"
    INDUCTOR = "inductor"
    EAGER = "eager"


@dataclass(frozen=True)
class Settings:
    """Options of `fastlora finetune`, with None for the built-in model and data and the default learning rate."""

    model: str | None = None
    data: Path | None = None
    output: Path = Path("fastlora-run")
    steps: int = 50
    batch_size: int = 8
    max_length: int = 512
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    learning_rate: float | None = None
    seed: int = 0
    lower: Lower = Lower.AUTO
    gradient_checkpointing: bool = False
    bf16: bool = False
    load_in_4bit: bool = False
    compare: bool = True
    strict: bool = False

    @property
    def model_name(self) -> str:
        return self.model or "the built-in model"

    @property
    def effective_learning_rate(self) -> float:
        """The learning rate, by default larger for the built-in model, whose frozen weights are random."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 if self.model else 1e-2

    def check(self) -> None:
        """Raise `UsageError` for the first number that is out of range."""
        for option, number in (
            ("--steps", self.steps),
            ("--batch-size", self.batch_size),
            ("--rank", self.rank),
            ("--alpha", self.alpha),
        ):
            if number < 1:
                raise UsageError(f"{option} {number}: must be a whole number of at least 1")
        if self.max_length < 2:
            raise UsageError(f"--max-length {self.max_length}: must be at least 2, one input token and one label")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout}: must be at least 0 and less than 1")
        if not (math.isfinite(self.effective_learning_rate) and self.effective_learning_rate > 0):
            raise UsageError(f"--learning-rate {self.learning_rate}: must be greater than 0, for example 2e-4")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed}: must be from 0 to {2**32 - 1}")
