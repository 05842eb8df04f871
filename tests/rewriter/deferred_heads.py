"""A head that runs unchanged and with deferred logits, to compare results and gradients."""

import torch
import torch.nn.functional as F
from tiny_models import relative
from torch import nn

from fastlora.frontend.head_gate import HeadGate
from fastlora.frontend.options import Options
from fastlora.frontend.session import Session

VOCABULARY, WIDTH = 40, 8
LABELS = torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))


class Heads:
    """One head with hidden states, run eagerly and with deferred logits."""

    def __init__(self, bias: bool = False, dtype: torch.dtype = torch.float32, frozen: bool = False) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(2, 5, WIDTH, dtype=dtype, requires_grad=True)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(not frozen)
        session = Session(Options())
        self.deferral_stats = session.deferral_stats
        self.deferred_head = HeadGate(self.head, session)

    def both(self, use, **autocast):
        """Return the results of `use` on ordinary and on deferred logits, each with the gradients of all its leaves."""
        results = []
        for head in (self.head, self.deferred_head):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast.get("autocast", False)):
                value = use(head(self.hidden))
            wanted = [t for t in (self.hidden, *self.head.parameters()) if t.requires_grad]
            gradients = torch.autograd.grad(value.float().sum(), wanted, allow_unused=True)
            results.append((value.detach(), gradients))
        return results


def assert_same(results, bound: float = 1e-6) -> None:
    (expected, wanted), (found, gradients) = results
    assert relative(found, expected) < bound
    for mine, its in zip(gradients, wanted, strict=True):
        assert (mine is None) == (its is None)
        assert mine is None or relative(mine, its) < bound


def shifted(logits, labels=LABELS, **options):
    return F.cross_entropy(
        logits[..., :-1, :].contiguous().view(-1, VOCABULARY), labels[..., 1:].reshape(-1), **options
    )
