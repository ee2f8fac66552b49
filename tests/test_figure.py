"""How pictures look: colours of sides, names at the ends of lines, intervals, and what is only predicted."""

from pathlib import Path

import numpy as np
import pytest
from test_load_stats import level, record

from gemma_mtp.measure import figure, load_plot, plot
from gemma_mtp.measure.acceptance import GREEDY, Acceptance, AcceptanceReport, PromptAcceptance
from gemma_mtp.measure.load import OpenLoop
from gemma_mtp.measure.shares import FEWEST_PROMPTS, conditional, joint
from gemma_mtp.measure.speedup import Prediction

matplotlib_figure = pytest.importorskip("matplotlib.figure")


def report(*histograms: tuple[int, ...]) -> AcceptanceReport:
    prompts = tuple(PromptAcceptance(str(i), "", 1, 1, Acceptance(counts)) for i, counts in enumerate(histograms))
    return AcceptanceReport(len(histograms[0]) - 1, GREEDY, "exact", prompts)


def test_intervals_are_drawn_over_prompts_and_hold_the_pooled_share() -> None:
    random = np.random.default_rng(0)
    many = report(*(tuple(int(n) for n in random.multinomial(30, (0.3, 0.3, 0.4))) for _ in range(40)))
    few = report(*((3, 3, 4) for _ in range(FEWEST_PROMPTS - 1)))
    for shares, pooled in ((conditional(many), many.pooled.by_position), (joint(many), many.pooled.joint_by_position)):
        assert shares.values == tuple(pooled) and shares.intervals is not None
        for value, (low, high) in zip(shares.values, shares.intervals, strict=True):
            error = (value * (1 - value) / (40 * 30)) ** 0.5  # rounds are independent here, so the binomial's holds
            assert low < value < high and 3 * error < high - low < 6 * error
    assert conditional(few).intervals is None
    same = conditional(report(*((3, 3, 4) for _ in range(FEWEST_PROMPTS))))
    assert same.intervals == tuple((value, value) for value in same.values), "prompts that are alike show no spread"


def test_plain_decoding_has_one_colour_everywhere() -> None:
    assert figure.colours(["no drafts", "drafts auto"], "no drafts") == {
        "no drafts": figure.PLAIN,
        "drafts auto": figure.DRAFTED[0],
    }
    assert figure.colours(["greedy", "temperature 1"]) == dict(
        zip(("greedy", "temperature 1"), figure.DRAFTED, strict=False)
    )
    style = (Path(figure.__file__).parents[1] / "server" / "page" / "style.css").read_text(encoding="utf-8")
    assert f"--ink-soft: light-dark({figure.PLAIN}," in style and f"--accent: light-dark({figure.DRAFTED[0]}," in style


def test_names_at_line_ends_do_not_lie_upon_each_other() -> None:
    axes = matplotlib_figure.Figure(figsize=(5, 4)).subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    figure.label_ends(axes, [figure.End(1, y, f"line {y}", "black") for y in (0.5, 0.501, 0.9, 0.499)])
    scale = 72 / axes.figure.dpi
    heights = sorted(axes.transData.transform((1, t.xy[1]))[1] * scale + t.xyann[1] for t in axes.texts)
    assert min(np.diff(heights)) >= figure.LABEL_GAP - 1e-6
    assert [t.get_text() for t in axes.texts][:3] == ["line 0.499", "line 0.5", "line 0.501"], "in their order"


def test_what_lies_beyond_the_measured_positions_is_dashed() -> None:
    rows = [Prediction(k, 1.0, 1.0, 1.0 + k / 10, extrapolated=k > 2) for k in range(5)]
    axes = matplotlib_figure.Figure().subplots()
    plot._speedups(axes, {"greedy": rows}, {"greedy": "#1d55b5"})
    drawn = {line.get_linestyle(): list(line.get_xdata()) for line in axes.lines}
    assert drawn["--"] == [2, 3, 4] and drawn["-"] == [0, 1, 2]
    assert axes.get_legend() is None and [text.get_text() for text in axes.texts] == ["greedy"]


def test_a_side_has_a_colour_and_a_load_a_line_style(tmp_path: Path) -> None:
    results = [
        level([record(i, i / 8, 1.0 + i / 50) for i in range(60)], shape=OpenLoop(rate), side=side)
        for rate in (2.0, 4.0)
        for side in ("no drafts", "drafts auto")
    ]
    axes = matplotlib_figure.Figure().subplots()
    load_plot._cumulative(axes, "Time to first token", results, lambda record: record.time_to_first_token)
    assert [line.get_color() for line in axes.lines] == [figure.PLAIN, figure.DRAFTED[0]] * 2
    styles = [line._dash_pattern for line in axes.lines]
    assert styles[0] == styles[1] != styles[2] == styles[3]
    assert [text.get_text() for text in axes.texts] == [f"{result.label} (n = 60)" for result in results]
    load_plot.plot_load(results, tmp_path / "a.svg", "Latency", figure.measured_on("tiny", "a machine"))
    drawn = (tmp_path / "a.svg").read_text(encoding="utf-8")
    for text in ("Latency", "tiny · a machine · 2", "drafts auto, p50", "ms; 95% intervals"):
        assert f"<!-- {text}" in drawn
