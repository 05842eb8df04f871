"""The rules that come with fastlora. A new architecture is a change here and in the tests, and nowhere else."""

from fastlora.match.rule import GroupRule, Rule
from fastlora.patterns import dora, experts, lora, loss, mlp, norms, rotary

RULES: list[Rule | GroupRule] = [
    *norms.RULES,
    *rotary.RULES,
    *mlp.RULES,
    *lora.RULES,
    *dora.RULES,
    *experts.RULES,
    *loss.RULES,
]
