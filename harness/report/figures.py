"""The report's figures as SVG text: the same data give the same bytes."""

from __future__ import annotations

import io
import re
from typing import Any

from harness.report.document import Figure, Paired, Progress

# Colours by role; a page puts its own light or dark one in place (see `themed`).
PALETTE = {
    "paper": "#fffffe",
    "ink": "#22262a",
    "soft": "#8a9097",
    "line": "#dde0e3",
    "accent": "#0f6e66",
    "arm1": "#4269a5",
    "arm2": "#b0632a",
    "arm3": "#7d5ba6",
    "arm4": "#5c7a2e",
}
COLOURS, MARKS = ("soft", "arm1", "arm2", "arm3", "arm4"), "osD^vPX"
OUTLINE = {"mec": PALETTE["ink"], "mew": 1.2}
CROWD = 0.1  # share of the worst scores that may lie off the top of the progress figure
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def svg(figure: Figure) -> str:
    """The figure as a self-contained SVG document in light colours."""
    from matplotlib import figure as plotting
    from matplotlib import rc_context

    style = {
        "svg.hashsalt": figure.name,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": PALETTE["ink"],
        "axes.labelcolor": PALETTE["ink"],
        "axes.edgecolor": PALETTE["line"],
        "axes.facecolor": PALETTE["paper"],
        "figure.facecolor": PALETTE["paper"],
        "xtick.color": PALETTE["soft"],
        "ytick.color": PALETTE["soft"],
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        draw, size = (_progress, (5.2, 3.4)) if isinstance(figure.data, Progress) else (_paired, (5.2, 1.6))
        canvas = plotting.Figure(figsize=size, layout="constrained")
        draw(canvas.subplots(), figure.data)
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata=NO_METADATA)
    return out.getvalue()


def themed(text: str, name: str) -> str:
    """An SVG document made to stand inside a page: the page's colours, ids of its own, no prolog."""
    text = text[text.index("<svg") :]
    for role, colour in PALETTE.items():
        text = text.replace(colour, "none" if role == "paper" else f"var(--{role})")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)


def _progress(axes: Any, data: Progress) -> None:
    from matplotlib.lines import Line2D

    scored = [d for d in data.dots if d.y.value is not None]
    top = _ceiling(sorted(d.y.value for d in scored)) if scored else 1.0
    edge = axes.get_xaxis_transform()  # x in trainings, y 0 at the axis and 1 at the top
    handles = []
    for i, arm in enumerate(dict.fromkeys(d.arm for d in data.dots)):
        colour, mark = PALETTE[COLOURS[i % len(COLOURS)]], MARKS[i % len(MARKS)]
        style = {"color": colour, "marker": mark, "ls": ""}
        handles.append(Line2D([], [], ms=5, label=arm, **style))
        mine = [d for d in scored if d.arm == arm]
        for kept, look in ((False, {"alpha": 0.5, "ms": 4, "mew": 0}), (True, {"ms": 7, **OUTLINE})):
            dots = [d for d in mine if d.kept == kept and d.y.value <= top]
            axes.plot([d.x for d in dots], [d.y.value for d in dots], zorder=3 + kept, **style, **look)
        off = [d.x for d in mine if d.y.value > top]
        axes.plot(
            off, [1.0] * len(off), color=colour, marker="$\\uparrow$", ls="", transform=edge, clip_on=False
        )
    if any(d.kept for d in scored):
        handles.append(Line2D([], [], color="none", marker="o", ms=7, ls="", label="kept", **OUTLINE))
    failed = [d.x for d in data.dots if d.y.value is None]
    if failed:
        style = {"color": PALETTE["ink"], "ls": "", "marker": "|", "ms": 9, "label": "failed"}
        handles += axes.plot(failed, [0.0] * len(failed), transform=edge, clip_on=False, zorder=5, **style)
    end = max(d.x for d in data.dots)
    if data.steps:
        xs, ys = zip(*data.steps, strict=True)
        line = {"color": PALETTE["accent"], "lw": 1.6, "label": "incumbent's mean", "where": "post"}
        handles += axes.step([*xs, end + 1], [y.value for y in (*ys, ys[-1])], **line)
        place = {"xycoords": ("axes fraction", "data"), "xytext": (4, 0), "textcoords": "offset points"}
        axes.annotate(
            str(ys[-1]),
            (1, ys[-1].value),
            color=PALETTE["accent"],
            va="center",
            annotation_clip=False,
            **place,
        )
    axes.set(xlabel="trainings, in the order of finishing", ylabel="val bits per byte", xlim=(0, end + 1))
    levels = [d.y.value for d in scored] + [y.value for _, y in data.steps]
    if levels:
        margin = 0.1 * max(top - min(levels), 1e-3)
        axes.set_ylim(min(levels) - margin, max(top, *(y.value for _, y in data.steps)) + margin)
    axes.figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=8.5)


def _ceiling(scores: list[float]) -> float:
    """The highest score shown in place: the worst few may lie off the top, so that the rest can be told apart."""
    crowd = scores[min(len(scores) - 1, int((1 - CROWD) * len(scores)))]
    spread = max(crowd - scores[0], 1e-3)
    return min(scores[-1], crowd + 0.5 * spread)


def _paired(axes: Any, data: Paired) -> None:
    axes.axvline(0, color=PALETTE["soft"], lw=1)
    axes.plot(
        [data.low.value, data.high.value], [0, 0], color=PALETTE["accent"], lw=3, solid_capstyle="round"
    )
    axes.plot([data.delta.value], [0], "D", color=PALETTE["accent"], ms=8)
    axes.plot(
        [g.value for g in data.gains], [1] * len(data.gains), "o", color=PALETTE["ink"], alpha=0.6, ms=6
    )
    axes.set_yticks([0, 1], ["estimate, 95 %", "seed by seed"])
    axes.set(ylim=(-0.7, 1.7), xlabel="gain, bits per byte (right is better)")
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
