"""The plot of the loss curves."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def plot_losses(path: Path, fused: list[float], eager: list[float] | None) -> None:
    """Write a PNG of the loss curves. Eager's line is wider, so that both are visible when they coincide."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # unlike pyplot, needs no display and has no global state
    axes = figure.add_subplot()
    if eager is not None:
        axes.plot(range(1, len(eager) + 1), eager, color="tab:orange", linewidth=4, alpha=0.5, label="eager")
    axes.plot(range(1, len(fused) + 1), fused, color="tab:blue", linestyle="--", label="fastlora")
    axes.set(title="Training loss", xlabel="step", ylabel="cross entropy per token (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
