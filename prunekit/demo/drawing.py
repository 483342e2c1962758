"""HTML below the two pictures: costs, the router's scores, and the expert's architecture."""

from __future__ import annotations

from html import escape

from prunekit.demo.answering import Answer, Demo
from prunekit.demo.opening import shares_of
from prunekit.report.architectures import NOTE, drawing
from prunekit.report.svg import color, inline_svg, new_figure, style
from prunekit.serving.drawer import Picture

SCORES = (
    "A score is the cosine similarity of the prompt's architecture embedding to the expert's code, times the "
    "embedding's length, which is the same for all experts, plus the shift that balances them."
)
OTHERS = "#7F7F7F"  # bars of the experts that were not chosen


def caption(drawn: Picture, title: str) -> str:
    """Return a picture's caption: the model, its time, and the MACs of all its denoiser calls."""
    macs = f"{drawn.macs / 1e12:.2f} T" if drawn.macs >= 1e12 else f"{drawn.macs / 1e9:.2f} G"
    return f"<p class='caption'><b>{escape(title)}</b> {drawn.seconds:.2f} s · {macs}MACs</p>"


def explanation(demo: Demo, answer: Answer) -> str:
    """Return the explanation of an answer: the saving, the router's scores, and the expert's architecture."""
    parts = [f"<p class='saving'>{escape(saving(demo, answer))}</p>"]
    figures = [scores(answer)] if len(answer.scores) > 1 else []
    chosen = demo.architectures[answer.expert]
    if chosen is not None:
        title = f"Expert {answer.expert}" if demo.pipeline.num_experts > 1 else "The pruned model"
        figures.append(drawing(title, shares_of(chosen), chosen.cost.ratio(chosen.architecture), chosen.places))
    drawn = "".join(f"<figure>{svg}</figure>" for svg in figures)
    notes = [SCORES] if len(answer.scores) > 1 else []
    notes += [NOTE.format(legend=chosen.legend)] if chosen is not None else []
    note = "".join(f"<p class='small'>{escape(text)}</p>" for text in notes)
    return f"<div class='explanation'>{''.join(parts)}<div class='figures'>{drawn}</div>{note}</div>"


def saving(demo: Demo, answer: Answer) -> str:
    """Return a text on the chosen expert, its share of the dense MACs, and the times."""
    count, text = demo.pipeline.num_experts, ""
    if count > 1 and answer.known:
        text = (
            f"The router sends this prompt to expert {answer.expert} of {count}: it has the highest score of the "
            "experts with training prompts. "
        )
    elif count > 1:
        text = (
            f"The prompt encoder knows no word of this prompt, so the fallback draws it: expert {answer.expert} "
            f"of {count}. "
        )
    if answer.dense is None:
        return text + demo.no_dense
    share = 100 * answer.pruned.macs / answer.dense.macs
    times = f"{answer.pruned.seconds:.2f} s, the dense model's {answer.dense.seconds:.2f} s (each measured once)"
    return f"{text}It takes {share:.1f} % of the dense model's MACs. The picture took {times}."


def scores(answer: Answer) -> str:
    """Return the router's score of every expert as bars around their mean, the chosen one in color."""
    experts, mean = list(range(len(answer.scores))), sum(answer.scores) / len(answer.scores)
    above = [score - mean for score in answer.scores]
    with style():
        figure, panel = new_figure(4.6, 1.1 + 0.28 * len(experts), left=0.8)
        colors = [color(1) if expert == answer.expert else OTHERS for expert in experts]
        bars = panel.barh(experts, above, 0.7, color=colors)
        panel.bar_label(bars, fmt="{:+.3g}", fontsize=8, padding=3)
        panel.axvline(0, color="#000000", linewidth=0.8)
        panel.set_yticks(experts, [f"expert {expert}" for expert in experts], fontsize=9)
        panel.invert_yaxis()
        panel.margins(x=0.25)
        panel.grid(visible=False, axis="y")
        panel.set_xlabel("score above the mean of all experts")
        panel.set_title("Why: the router's score of each expert")
        return inline_svg(figure, f"the router's scores; expert {answer.expert} is chosen")
