"""The settings of a fine-tuning run and the checks that need neither torch nor the files."""

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from fastlora.tools.problems import UsageError


class Lower(str, Enum):
    """How fastlora turns the rewritten graph into code."""

    AUTO = "auto"
    INDUCTOR = "inductor"
    EAGER = "eager"


@dataclass(frozen=True)
class Settings:
    """What `fastlora finetune` was asked to do. `None` stands for the built-in model or data."""

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
        """A random small model learns only at a rate that would ruin a pretrained one."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 if self.model else 1e-2

    def check(self) -> None:
        """Raise `UsageError` for the first number that makes no sense."""
        for option, number in (
            ("--steps", self.steps),
            ("--batch-size", self.batch_size),
            ("--rank", self.rank),
            ("--alpha", self.alpha),
        ):
            if number < 1:
                raise UsageError(f"{option} {number}: must be a whole number of at least 1")
        if self.max_length < 2:
            raise UsageError(f"--max-length {self.max_length}: must be at least 2, a token to read and one to learn")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout}: must be at least 0 and less than 1")
        if not (math.isfinite(self.effective_learning_rate) and self.effective_learning_rate > 0):
            raise UsageError(f"--learning-rate {self.learning_rate}: must be greater than 0, for example 2e-4")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed}: must be from 0 to {2**32 - 1}")
