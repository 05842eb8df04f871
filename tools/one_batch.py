"""The model and batch that `fastlora explain` and `fastlora check` use."""

from typing import Any

import torch

from fastlora.tools.encoding import collator
from fastlora.tools.finetune import prepare
from fastlora.tools.settings import Settings


def model_and_batch(settings: Settings) -> tuple[Any, dict[str, Any]]:
    """Return a model with adapters and the first batch of the data, on the GPU if there is one."""
    job = prepare(settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = collator(job.tokenizer, job.encoded.longest)(job.encoded.rows[: settings.batch_size])
    return job.model.to(device), dict(batch.to(device))
