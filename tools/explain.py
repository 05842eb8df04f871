"""`fastlora explain`: what fastlora would fuse in a model, without training it."""

from pathlib import Path

from rich.console import Console

import fastlora
from fastlora.tools.finetune import run_errors
from fastlora.tools.one_batch import model_and_batch
from fastlora.tools.output import check_file, writing
from fastlora.tools.quiet import quiet
from fastlora.tools.settings import Settings


def explain(settings: Settings, console: Console, *, json: Path | None, html: Path | None) -> None:
    """Trace one batch, print the report and write it to the files asked for."""
    with quiet():
        settings.check()
        for option, path in (("--json", json), ("--html", html)):
            check_file(option, path)
        model, batch = model_and_batch(settings)
        with run_errors():
            report = fastlora.explain(model, **batch)
        console.print(str(report), markup=False, highlight=False, soft_wrap=True)
        if json is not None:
            with writing(json):
                json.write_text(report.to_json() + "\n", encoding="utf-8")
        if html is not None:
            with writing(html):
                report.to_html(html)
