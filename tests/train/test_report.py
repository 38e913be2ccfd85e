"""The report: right numbers, everything escaped, nothing loaded from elsewhere, and it survives what runs leave."""

from __future__ import annotations

import html.parser
import json
import math
import pathlib
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from lmobj.errors import UserError
from lmobj.train import report

_EVIL = "</p><script>alert('x')</script><img src=x onerror=alert(1)> {{ 7 * 7 }} & $\\frac{1}{2}$"


class _Page(html.parser.HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def _write(folder: pathlib.Path, **files: Any) -> pathlib.Path:
    for name, value in files.items():
        path = folder / name.replace("_", ".")
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def _metrics(judged: str = "bits_per_byte") -> str:
    lines: list[dict[str, float]] = []
    for step in range(1, 61):
        lines.append({
            "step": step,
            "train/loss": 8 / step,
            "train/learning_rate": 1e-3 * step,
            "perf/tokens_per_second": 1000.0 + step,
        })  # fmt: skip
        if step % 20 == 0:
            lines.append({"step": step, "eval/loss": 4 / step, "eval/perplexity": 9.5, f"eval/{judged}": 40 / step})
    return "\n".join(map(json.dumps, lines)) + "\n"


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    return _write(
        tmp_path,
        metrics_jsonl=_metrics(),
        config_yaml=f"name: {json.dumps('run ' + _EVIL)}\nmodel: {{name: decoder}}\nobjective: {{name: causal_lm}}\n",
        environment_json={"packages": {"jax": "0.10.2"}, "devices": "1 x cpu", "flags": {}, _EVIL: [_EVIL]},
        baselines_json={"unigram": {"bits_per_byte": 4.0}, _EVIL: {"bits_per_byte": 0.5}, "other": {"accuracy": 1}},
        samples_json=[
            {"step": 1234, "prompt": "Once <b>", "text": "Once <b>" + _EVIL},
            {"step": 1234, "prompt": "a [MASK] c", "text": "a b c"},
        ],
    )


def _page(run: pathlib.Path) -> _Page:
    return _Page(report.write_report(run).read_text())


def test_final_figures_and_baselines_stand_in_the_page(run: pathlib.Path) -> None:
    text = " ".join(_page(run).text.split())
    # The last evaluation is at step 60: bits per byte 40 / 60, loss 4 / 60; throughputs 1001..1060 have median 1030.5.
    assert "0.6667 bits per byte held-out" in text
    assert "9.5 perplexity held-out" in text
    assert "0.06667 loss held-out" in text
    assert "0.1333 training loss last logged" in text
    assert "1,030 tokens per second median" in text
    assert "causal lm · decoder · 60 steps · 1 x cpu" in text
    assert "after 1,234 steps Once <b> </p><script>" in text, "a text that goes on from its prompt"
    assert "after 1,234 steps a [MASK] c a b c" in text, "a text with its masks filled"
    assert "packages jax 0.10.2" in text
    # Best first by bits per byte: 0.5, then this model's 0.667, then 4.
    table = text[text.index("Bits per byte beside baselines") : text.index("Curves")]
    assert table.index("0.500") < table.index("this model 0.667") < table.index("unigram 4.000")
    assert "other" not in table, "known by another metric only"


def test_bars_are_as_long_as_their_values(run: pathlib.Path) -> None:
    widths = [value for name, value in _page(run).attributes if name == "style" and value.startswith("width")]
    # Shares of the largest, 4: 0.5 / 4, 0.6667 / 4, 4 / 4.
    assert widths == ["width: 12.5%", "width: 16.7%", "width: 100.0%"]


def test_everything_shown_is_escaped(run: pathlib.Path) -> None:
    page = _page(run)
    assert not {"script", "img", "iframe", "object", "link"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("alert('x')") >= 5, "shown as text: title, config, environment, table, sample, chart"
    assert "{{ 7 * 7 }}" in page.text
    assert "49 &" not in page.text


def test_nothing_is_loaded_from_elsewhere(run: pathlib.Path) -> None:
    text = (report.write_report(run)).read_text()
    page = _Page(text)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "poster", "data"):
            assert value.startswith("#"), (name, value)
    assert "url(http" not in text
    assert "@import" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_charts_are_drawn_for_what_was_measured(run: pathlib.Path) -> None:
    text = report.write_report(run).read_text()
    charts = [chunk[: chunk.index("</svg>") + 6] for chunk in text.split("</figcaption>")[1:]]
    words = [" ".join(ET.fromstring(chart).itertext()) for chart in charts]
    assert len(words) == 4
    assert "loss (nats)" in words[0]
    assert "training (smoothed)" in words[0]
    assert "held-out bits per byte" in words[1]
    assert "unigram 4.000" in words[1]
    assert "this model 0.667" in words[1]
    assert "tokens per second" in words[2]
    assert "learning rate" in words[3]


def test_a_long_baseline_name_is_cut_in_the_chart_and_whole_in_the_table(tmp_path: pathlib.Path) -> None:
    name = "wide " * 60 + "end"
    run = _write(tmp_path, metrics_jsonl=_metrics(), baselines_json={name: {"bits_per_byte": 4.0}})
    text = report.write_report(run).read_text()
    assert name in text[: text.index("<svg")]
    chart = text[text.index("<svg") :]
    assert "wide wide wide wide wid… 4.000" in chart
    assert "wide end" not in chart


@pytest.mark.parametrize(("judged", "shown"), [("top5_accuracy", "66.7%"), ("accuracy", "66.7%")])
def test_masked_runs_are_judged_by_accuracy(tmp_path: pathlib.Path, judged: str, shown: str) -> None:
    metrics = _metrics(judged).replace("0.6666666666666666", "0.667")
    run = _write(tmp_path, metrics_jsonl=metrics, baselines_json={"unigram": {judged: 0.25}, "best": {judged: 0.9}})
    text = " ".join(_page(run).text.split())
    table = text[text.index("beside baselines") : text.index("Curves")]
    assert table.index("best 90.0%") < table.index(f"this model {shown}") < table.index("unigram 25.0%")
    assert "higher is better" in table


def test_a_folder_with_metrics_alone_makes_a_report(tmp_path: pathlib.Path) -> None:
    page = _page(_write(tmp_path, metrics_jsonl='{"step": 1, "train/loss": 2.5}\n'))
    assert "2.5" in page.text
    assert page.tags.count("svg") == 1
    assert "beside baselines" not in page.text
    assert tmp_path.name in page.text


def test_a_run_without_a_step_yet_says_so(tmp_path: pathlib.Path) -> None:
    assert "No metrics were recorded yet." in _page(_write(tmp_path, metrics_jsonl="")).text


def test_values_that_are_not_finite_are_left_out_of_the_curves(tmp_path: pathlib.Path) -> None:
    lines = '{"step": 1, "train/loss": 2.0, "perf/tokens_per_second": NaN}\n{"step": 2, "train/loss": Infinity}\n'
    page = _page(_write(tmp_path, metrics_jsonl=lines))
    assert page.tags.count("svg") == 1
    assert "inf" in page.text, "the last training loss is told as it is"


def test_a_last_line_cut_off_by_a_crash_is_left_out(tmp_path: pathlib.Path) -> None:
    page = _page(_write(tmp_path, metrics_jsonl='{"step": 1, "train/loss": 2.5}\n{"step": 2, "train/lo'))
    assert "1 steps" in page.text


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({}, "has no metrics.jsonl"),
        ({"metrics_jsonl": '{"step": 1}\n{"step\n{"step": 3}\n'}, "metrics.jsonl:2 is damaged"),
        ({"metrics_jsonl": "", "samples_json": "[1,\n2"}, "samples.json:2 is not JSON"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: pathlib.Path, files: dict[str, str], part: str) -> None:
    with pytest.raises(UserError) as error:
        report.write_report(_write(tmp_path, **files))
    assert part in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_the_same_run_gives_the_same_page(run: pathlib.Path) -> None:
    assert report.write_report(run).read_bytes() == report.write_report(run).read_bytes()


def test_smoothing_is_a_mean_over_a_window_cut_at_the_ends() -> None:
    # Up to 166 points the window reaches 2 to each side.
    values = np.array([1.0, 2.0, 6.0, 3.0, 8.0])
    expected = [(1 + 2 + 6) / 3, (1 + 2 + 6 + 3) / 4, 20 / 5, (2 + 6 + 3 + 8) / 4, (6 + 3 + 8) / 3]
    np.testing.assert_allclose(report._smooth(values), expected, rtol=1e-15)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (2.13712, "2.137"), (0.001, "0.001"), (12345.6, "12,346"), (1e-5, "1.000e-05"), (math.inf, "inf")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert report._short(value) == text


def test_plot_curves_makes_pictures(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert report.plot_curves(run, tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    svg = report.plot_curves(run, tmp_path / "c.svg").read_bytes()
    assert ET.fromstring(svg).tag.endswith("svg")
    assert svg == report.plot_curves(run, tmp_path / "c2.svg").read_bytes()
