"""Logging of graphs: `TORCH_LOGS="fastlora"` shows a line for each graph, `TORCH_LOGS="+fastlora"` all passes.

Loggers are named after modules, so PyTorch's `TORCH_LOGS` and `torch._logging.set_logs(modules=...)` find them without
registration; `logging.getLogger("fastlora").setLevel(...)` works as well. CUDA graphs are logged by
`fastlora.runtime.cuda_graphs`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastlora.reports.from_rewrite import misses
from fastlora.rewrite.state import Rewrite

_log = logging.getLogger(__name__)


def log_graph(rewrites: Sequence[Rewrite], region: str, *, recompiled: bool, seconds: float) -> None:
    """Log what the passes did to a graph and to the bodies of its checkpointed regions."""
    if not _log.isEnabledFor(logging.INFO):
        return
    name = region or "the model"
    fused, missed = (sum(len(getattr(r, each)) for r in rewrites) for each in ("chosen", "missed"))
    _log.info(
        "%s: %s a graph in %.1f ms: %d ops fused, %d candidates not fused",
        *(name, "recompiled" if recompiled else "compiled", seconds * 1e3, fused, missed),
    )
    for rewritten in rewrites:
        for record in rewritten.records:
            counts = ", ".join(f"{count} {what}" for what, count in record.counts.items())
            _log.debug("%s: %s %.2f ms: %s", name, record.name, record.seconds * 1e3, counts)
        for miss in misses(rewritten, region, 1):
            _log.debug("%s: %s at %s is not fused: %s", name, miss.op, miss.where, miss.reason)
