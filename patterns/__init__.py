"""The built-in rules. Support for a new architecture needs changes only here and in the tests."""

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
