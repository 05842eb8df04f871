"""The rules that come with fastlora. A new architecture is a change here and in the tests, and nowhere else."""

from fastlora.patterns import dora, experts, lora, loss, mlp, norms, rotary
from fastlora.rule import GroupRule, Rule

RULES: list[Rule | GroupRule] = [
    *norms.RULES,
    *rotary.RULES,
    *mlp.RULES,
    *lora.RULES,
    *dora.RULES,
    *experts.RULES,
    *loss.RULES,
]
