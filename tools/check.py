"""`fastlora check`: whether a compiled training step has the loss and the gradients of the eager one."""

from pathlib import Path

from rich.console import Console

import fastlora
from fastlora.tools.finetune import run_errors
from fastlora.tools.one_batch import model_and_batch
from fastlora.tools.output import check_file, writing
from fastlora.tools.quiet import quiet
from fastlora.tools.settings import Settings


def check(settings: Settings, console: Console, *, defer_logits: bool, json: Path | None) -> bool:
    """Check one batch, print the result, write it to the file asked for, and return whether the step is right."""
    with quiet():
        settings.check()
        check_file("--json", json)
        model, batch = model_and_batch(settings)
        with run_errors():
            found = fastlora.check(model.train(), defer_logits=defer_logits, **batch)
        console.print(str(found), markup=False, highlight=False, soft_wrap=True)
        if json is not None:
            with writing(json):
                json.write_text(found.to_json() + "\n", encoding="utf-8")
    return found.right
