"""Hugging Face Trainer and TRL have the same losses with and without fastlora."""

import copy

import pytest
import torch
from datasets import Dataset
from tiny_models import batch, build
from transformers import Trainer, TrainerCallback, TrainingArguments

import fastlora
from fastlora.tools.builtin_model import build_tokenizer


class Losses(TrainerCallback):
    """Records the logged loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values.append(logs["loss"])


def rows(count: int = 8) -> Dataset:
    return Dataset.from_list([{k: v[0].tolist() for k, v in batch(seed=seed).items()} for seed in range(count)])


def train(model, folder, **options) -> tuple[list[float], Trainer]:
    losses = Losses()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-3,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", seed=0, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(2), callbacks=[losses])
    trainer.train()
    return losses.values, trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"label_smoothing_factor": 0.1},
        {"gradient_accumulation_steps": 2},
    ],
    ids=["plain", "bf16", "checkpointing", "reentrant-checkpointing", "label-smoothing", "accumulation"],
)
def test_trainer_losses_equal_eager_ones(options, tmp_path):
    model = build("llama")
    twin = copy.deepcopy(model)
    expected, _ = train(twin, tmp_path / "eager", **options)
    found, _ = train(fastlora.compile(model), tmp_path / "fused", **options)
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=2e-3 if "bf16" in options else 2e-6)
    coverage = fastlora.report(model).coverage
    assert coverage["lora"].fused == coverage["lora"].seen == 21


def test_the_loss_of_a_trainer_run_is_fused_and_no_logits_are_made(tmp_path):
    model = fastlora.compile(build("llama"))
    train(model, tmp_path)
    report = fastlora.report(model)
    assert report.coverage["loss"].fused == 1
    assert not [note for note in report.notes if "materialized" in note]


def test_evaluation_within_training_gives_eager_metrics(tmp_path):
    model = build("llama")
    twin = copy.deepcopy(model)
    metrics = []
    for candidate, name in ((twin, "eager"), (fastlora.compile(model), "fused")):
        _, trainer = train(candidate, tmp_path / name, eval_strategy="steps", eval_steps=2)
        metrics.append(trainer.evaluate()["eval_loss"])
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)


def test_a_trainer_checkpoint_resumes(tmp_path):
    model = fastlora.compile(build("llama"))
    losses = Losses()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, save_steps=2, report_to="none",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows()).train()
    arguments.max_steps, arguments.logging_steps = 4, 1
    resumed = Trainer(model=fastlora.compile(build("llama")), args=arguments, train_dataset=rows(), callbacks=[losses])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_trl_supervised_losses_equal_eager_ones(tmp_path):
    from trl import SFTConfig, SFTTrainer

    found = {}
    for name in ("eager", "fused"):
        model = build("llama")
        if name == "fused":
            fastlora.compile(model)
        losses = Losses()
        arguments = SFTConfig(
            output_dir=str(tmp_path / name), max_steps=3, per_device_train_batch_size=2, logging_steps=1, seed=0,
            report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", bf16=False, max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=rows().select_columns(["input_ids"]),
            callbacks=[losses],
            processing_class=build_tokenizer(),
        )
        trainer.train()
        found[name] = losses.values
        if name == "fused":
            coverage = fastlora.report(model).coverage
            assert coverage["lora"].fused == coverage["lora"].seen == 21
    assert found["fused"] == pytest.approx(found["eager"], rel=1e-5)


def test_gradients_survive_a_step_under_autocast_inside_the_graph():
    """Accelerate adds autocast to the model's forward, so a whole-model trace contains it as nodes."""
    model = build("llama")
    inputs = {**batch(), "use_cache": False}

    def forward(**kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**kwargs).loss

    expected = forward(**inputs)
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = torch.compile(forward, backend="fastlora")(**inputs)
    found.backward()
    assert float(found) == pytest.approx(float(expected), rel=2e-3)
    for name, parameter in model.named_parameters():
        if name in wanted:
            difference = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
            assert difference < 0.06, name


def test_a_head_that_the_trainer_bypasses_is_not_a_miss(tmp_path):
    """TRL's trainers read the head's weight and fuse the loss themselves."""
    model = fastlora.compile(build("llama"))
    model(**batch()).loss.backward()
    assert fastlora.report(model).coverage["loss"].seen == 1
    fastlora.compile(model)
    model.base_model.model.model(
        **{k: v for k, v in batch().items() if k != "labels"}
    ).last_hidden_state.sum().backward()
    assert fastlora.report(model).coverage.get("loss", fastlora.Coverage()).seen == 0
