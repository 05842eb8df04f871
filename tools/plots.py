"""The picture of the loss curves."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def plot_losses(path: Path, fused: list[float], eager: list[float] | None) -> None:
    """Write a PNG. Eager is drawn wide and fastlora dashed on top, so that equal curves can both be seen."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no window system and no global state, unlike pyplot
    axes = figure.add_subplot()
    if eager is not None:
        axes.plot(range(1, len(eager) + 1), eager, color="tab:orange", linewidth=4, alpha=0.5, label="eager")
    axes.plot(range(1, len(fused) + 1), fused, color="tab:blue", linestyle="--", label="fastlora")
    axes.set(title="Training loss", xlabel="step", ylabel="cross entropy per token (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
