"""`fastlora explain`: what fastlora finds in a model, without training it."""

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


def explain(settings: Settings, console: Console, *, json: Path | None, html: Path | None) -> None:
    """Trace one batch, print the report and write it to the files asked for."""
    with quiet():
        settings.check()
        for option, path in (("--json", json), ("--html", html)):
            check_file(option, path)
        job = prepare(settings)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        batch = collator(job.tokenizer, job.encoded.longest)(job.encoded.rows[: settings.batch_size]).to(device)
        try:
            report = fastlora.explain(job.model.to(device), **batch)
        except fastlora.FastLoRAError as problem:
            raise RunError(f"fastlora stopped: {one_line(problem)}") from problem
        console.print(str(report), markup=False, highlight=False, soft_wrap=True)
        if json is not None:
            with writing(json):
                json.write_text(report.to_json() + "\n", encoding="utf-8")
        if html is not None:
            with writing(html):
                report.to_html(html)
