"""fastlora: a compiler pass between a PyTorch model and its execution.

It reads the graphs that TorchDynamo traces, finds LoRA adapters, norms, rotary embeddings, gated MLPs and losses, and
replaces each by a fused op with a hand-derived backward; what it does not know stays bit-identical. The pass knows no
model and changes nothing global: rules live in `fastlora.patterns`, ops in `fastlora.kernels`.
"""

from fastlora.api import compile, disable, explain, report
from fastlora.checking.agreement import Agreement
from fastlora.checking.check import check
from fastlora.errors import FastLoRAError, RuleError, StrictError
from fastlora.frontend.session import default_rules
from fastlora.match.rule import fuse, group, rule
from fastlora.reports.model import Coverage, Miss, Report, Site

__all__ = [
    "Agreement",
    "Coverage",
    "FastLoRAError",
    "Miss",
    "Report",
    "RuleError",
    "Site",
    "StrictError",
    "check",
    "compile",
    "default_rules",
    "disable",
    "explain",
    "fuse",
    "group",
    "report",
    "rule",
]
