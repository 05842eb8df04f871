"""`fastlora check`: whether one training step, compiled, is the one that eager takes."""

from pathlib import Path

import torch
from rich.console import Console

import fastlora
from fastlora.tools.encoding import collator
from fastlora.tools.finetune import prepare
from fastlora.tools.output import check_file, writing
from fastlora.tools.problems import RunError, one_line
from fastlora.tools.quiet import quiet
from fastlora.tools.settings import Settings


def check(settings: Settings, console: Console, *, defer_logits: bool, json: Path | None) -> bool:
    """Check one batch, print what came of it, write it to the file asked for, and return whether it is right."""
    with quiet():
        settings.check()
        check_file("--json", json)
        job = prepare(settings)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        batch = collator(job.tokenizer, job.encoded.longest)(job.encoded.rows[: settings.batch_size]).to(device)
        try:
            found = fastlora.check(job.model.to(device).train(), defer_logits=defer_logits, **batch)
        except fastlora.FastLoRAError as problem:
            raise RunError(f"fastlora stopped: {one_line(problem)}") from problem
        except torch.OutOfMemoryError as problem:
            raise RunError("out of GPU memory; lower --batch-size or --max-length, or try --bf16") from problem
        console.print(str(found), markup=False, highlight=False, soft_wrap=True)
        if json is not None:
            with writing(json):
                json.write_text(found.to_json() + "\n", encoding="utf-8")
    return found.right
