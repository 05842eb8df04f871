"""`fastlora bench step` on a tiny model, with real processes: arguments, checks, table and files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.kernels.core import shortcuts
from fastlora.tools.bench.step import results, weights
from fastlora.tools.bench.step.batches import parse
from fastlora.tools.bench.step.command import is_ranked_everywhere
from fastlora.tools.bench.step.contenders import CONTENDERS, RATIO, Contender, get_contender
from fastlora.tools.bench.step.measurement import Trainer, compute_loss, gradients, measure
from fastlora.tools.bench.step.processes import run_worker
from fastlora.tools.bench.step.reference import REFERENCE, write_reference
from fastlora.tools.cli import main

CPU = torch.device("cpu")
TINY = ["bench", "step", "--model", "tiny", "--batch", "2x16", "--steps", "2", "--warmup", "1"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    weights.save("tiny", 2, folder, CPU)
    return folder


@dataclass
class Race:
    """What one command printed and wrote: two contenders that work, one with a wrong gradient, and two that fail."""

    exit_code: int
    out: str
    err: str
    folder: Path

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text())


FAULTY = [
    Contender("fastlora-halved", "faulty_contenders:one_gradient_halved", ratio=RATIO),
    Contender("raising", "faulty_contenders:raising"),
    Contender("dying", "faulty_contenders:dying"),
]


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Race:
    folder = tmp_path_factory.mktemp("race") / "out"
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    names = ",".join(["fastlora-halved", "raising", "dying", "fastlora", "eager"])
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        for each in FAULTY:
            patch.setitem(CONTENDERS, each.name, each)
        exit_code = main([*TINY, "--contenders", names, "--output", str(folder)])
    return Race(exit_code, out.getvalue(), err.getvalue(), folder)


def test_results_are_printed_and_written(race: Race) -> None:
    _check_table(race.out)
    rows = {row["contender"]: row for row in race.results["steps"] if row["status"] == "ranked"}
    assert rows.keys() == {"eager", "fastlora"}
    _check_rows(rows)
    assert race.results["conditions"]["model"] == "tiny"
    assert torch.__version__.startswith(race.results["conditions"]["versions"]["torch"])
    with open(race.folder / "steps.csv", newline="") as file:
        written = {row["contender"]: row["seconds"] for row in csv.DictReader(file)}
    assert {name: float(written[name]) for name in rows} == {name: row["seconds"] for name, row in rows.items()}
    if not torch.cuda.is_available():
        _check_cuda_measurements_are_null(rows, race.results["conditions"])
        assert not (race.folder / "frontier.png").exists()


def _check_table(printed: str) -> None:
    assert "2x16 fastlora: ranked" in printed
    assert "tiny, 2 layers, 2x16 tokens" in printed
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert {cells[1] for cells in lines if cells[0] in ("1", "2")} == {"eager", "fastlora"}
    assert sorted(cells[0] for cells in lines if cells[0].isdigit()) == ["1", "2"]


def _check_rows(rows: dict[str, Any]) -> None:
    for row in rows.values():
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"])
        assert len(row["all_seconds"]) == 2
        assert row["seconds"] > 0
        assert row["first_step_seconds"] > 0
        assert row["gradient_error"] <= RATIO * row["eager_gradient_error"]
        assert len(row["tensor_errors"]) == 2 * 7 * 2
        assert row["gradient_norm"] > 0
    assert rows["eager"]["times_eager"] == 1
    assert rows["eager"]["times_eager_error"] == pytest.approx(1, abs=0.2)
    assert rows["fastlora"]["loss"] == pytest.approx(rows["eager"]["loss"], rel=1e-2)
    assert rows["fastlora"]["described"]["coverage"]["lora"]["fused"] > 0


def _check_cuda_measurements_are_null(rows: dict[str, Any], conditions: dict[str, Any]) -> None:
    for row in rows.values():
        for name in ("peak_bytes", "extra_bytes", "first_step_peak_bytes", "limit_seconds", "share_of_limit"):
            assert row[name] is None
    assert conditions["ceilings"] is None


def test_wrong_and_failing_contenders_are_listed_but_not_ranked(race: Race) -> None:
    steps = race.results["steps"]
    ranks = {row.get("rank"): row["contender"] for row in steps}
    assert {ranks[1], ranks[2]} == {"eager", "fastlora"}
    assert [row["contender"] for row in steps[2:]] == ["fastlora-halved", "raising", "dying"]
    assert [row["status"] for row in steps] == ["ranked", "ranked", "wrong", "failed", "failed"]
    halved, raising, dying = steps[2:]
    assert halved["worst_tensor"].endswith("layers.0.self_attn.q_proj.lora_A.default.weight")
    assert halved["worst_tensor_error"] == pytest.approx(0.5, abs=0.02)
    assert "gradient" in halved["problem"]
    assert raising["problem"] == "RuntimeError: no kernel for this shape"
    assert dying["problem"] == "ended with exit code 3: last words"
    assert "dying failed: ended with exit code 3: last words" in race.out


def test_the_exit_code_says_whether_fastlora_is_ranked_everywhere(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in FAULTY:
        monkeypatch.setitem(CONTENDERS, each.name, each)
    assert race.exit_code == 1
    assert race.err.startswith("error: fastlora is not ranked everywhere")
    assert [is_ranked_everywhere(race.results["steps"][:n]) for n in (2, 3)] == [True, False]


def test_a_worker_is_stopped_after_the_timeout(tmp_path: Path) -> None:
    found = run_worker("save_weights", tmp_path, tmp_path / "log", timeout=0.05, model="tiny", layers=1)
    assert found == {"error": "stopped after --timeout 0.05 seconds"}
    assert {path.name for path in tmp_path.iterdir()} == {"log"}


def test_terminating_the_command_stops_its_worker(tmp_path: Path) -> None:
    imports = "from fastlora.tools.bench.step.processes import run_worker; from pathlib import Path; "
    paths = f"Path({str(tmp_path)!r}), Path({str(tmp_path / 'log')!r})"
    call = f"run_worker('save_weights', {paths}, 60, model='tiny', layers=1)"
    command = subprocess.Popen([sys.executable, "-c", imports + call])
    while not _workers(tmp_path):
        assert command.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)  # until the command waits for the worker
    command.terminate()
    assert command.wait(600) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("worker-*"))
    assert not _workers(tmp_path)


def _workers(folder: Path) -> list[str]:
    """Return the command lines of workers in the folder."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has just ended
            lines.append((process / "cmdline").read_bytes().decode(errors="replace"))
    return [line for line in lines if str(folder / "worker-") in line]


def test_the_reference_is_that_of_the_whole_batch(saved: Path) -> None:
    from safetensors.torch import load_file

    found = write_reference(saved, rows=3, length=8, device=CPU)
    model = weights.add_adapters(weights.load(saved, CPU, torch.float32), saved).train()
    loss = compute_loss(model, weights.make_batch(model.config.vocab_size, 3, 8, CPU), CPU, autocast=False)
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    reference = load_file(saved / REFERENCE)
    expected = gradients(model)
    assert expected.keys() == reference.keys()
    for name, value in expected.items():
        assert value.norm() > 0
        torch.testing.assert_close(reference[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


def test_adapters_must_equal_the_saved_ones(saved: Path) -> None:
    model = weights.add_adapters(weights.load(saved, CPU), saved)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="29 parameters require gradients, but 28 adapter weights were saved"):
        weights.load_adapters(model, saved)
    model = weights.add_adapters(weights.load(saved, CPU), saved)
    with pytest.raises(ValueError, match="differs from the saved weight"):
        weights.load_adapters(model.bfloat16(), saved)


def test_every_contender_has_a_preparation() -> None:
    for contender in CONTENDERS.values():
        module, _, function = contender.prepare.partition(":")
        assert callable(getattr(import_module(module), function))
    assert {name for name, contender in CONTENDERS.items() if contender.is_fastlora} == {
        "fastlora",
        "fastlora@0",
        "fastlora-graphs",
        "fastlora-no-graphs",
        "fastlora-inductor",
        "fastlora-checkpointing",
        "fastlora-inductor-checkpointing",
    }


def test_a_contender_name_may_have_a_memory_budget() -> None:
    found = get_contender("fastlora@1.5GiB")
    assert (found.name, found.is_fastlora, found.options) == ("fastlora@1.5GiB", True, {"memory_budget": "1.5GiB"})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "GPT-9"], "--model GPT-9: unknown"),
        (["--contenders", "eager,nobody"], "--contenders nobody: unknown"),
        (["--contenders", "eager@1GiB"], "--contenders eager@1GiB: unknown"),
        (["--batch", "4"], "--batch 4: must be sequences x tokens"),
        (["--batch", "0x16"], "--batch 0x16: must be"),
        (["--batch", "2x1"], "--batch 2x1: must be"),
        (["--layers", "0"], "--layers 0: must be"),
        (["--steps", "0"], "--steps 0: must be"),
        (["--timeout", "0"], "--timeout 0: must be"),
    ],
)
def test_errors_name_the_wrong_argument(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    output = tmp_path / "out"
    assert main(["bench", "step", "--output", str(output), *arguments]) == 2
    assert named in capsys.readouterr().err
    assert not output.exists()


def test_the_plot_has_the_pareto_frontier(tmp_path: Path) -> None:
    def row(contender: str, seconds: float, gib: float, status: str = "ranked") -> dict[str, Any]:
        measured = {"seconds": seconds, "extra_bytes": gib * 2**30, "tokens_per_second": 8192 / seconds}
        return {
            "contender": contender,
            "status": status,
            "batch": "4x2048",
            "rows": 4,
            "length": 2048,
            "limit_seconds": 0.2,
            **measured,
        }

    rows = [row("eager", 0.4, 40), row("fastlora", 0.25, 10), row("small", 0.3, 5), row("slow", 0.5, 6)]
    assert [each["contender"] for each in results.frontier(rows)] == ["small", "fastlora"]
    conditions = {"model": "Llama-3.1-8B", "layers": 16, "device": "a GPU"}
    unranked = row("wrong", 0.1, 1, status="wrong")
    written = results.write(tmp_path, conditions, [*rows, unranked])
    assert "frontier.png" in written
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert results.rank([unranked, *rows])[-1] is unranked
    assert rows[1]["rank"] == 1
    assert rows[1]["times_eager"] == pytest.approx(1.6)


def test_a_contender_name_may_disable_one_shortcut() -> None:
    for name in shortcuts.NAMES:
        assert get_contender(f"fastlora-without-{name}").options == {"mode": "no-cudagraphs", "without": name}
    with pytest.raises(ValueError, match=r"fastlora-without-\(plans\|traces\|kernels\|precompilation\)"):
        get_contender("fastlora-without-unknown")


def test_random_lengths_are_within_bounds_and_reproducible() -> None:
    batches = parse("4x8-32")
    assert (str(batches), batches.is_constant) == ("4x8-32", False)
    lengths = batches.lengths()
    assert lengths == parse("4x8-32").lengths()
    assert lengths[0] == max(lengths) == 32
    assert min(lengths) >= 8
    assert len(set(lengths)) > 4
    assert parse("4x32").lengths() == [32]


@pytest.mark.parametrize("text", ["4x1", "x8", "4x32-8", "4x8-", "0x8", "4x8x8"])
def test_invalid_batches_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="4x128-1024 for changing lengths"):
        parse(text)


def test_each_step_takes_the_next_batch(saved: Path, tmp_path: Path) -> None:
    model = weights.add_adapters(weights.load(saved, CPU), saved)
    batches = [weights.make_batch(model.config.vocab_size, 2, length, CPU) for length in (8, 4, 6)]
    trainer = Trainer(model, batches, CPU)
    found = measure(trainer, steps=2, warmup=1, path=tmp_path / "gradients.safetensors")
    assert len(found["all_seconds"]) == 6
    assert found["tokens_per_second"] == pytest.approx(2 * 6 / found["seconds"])
