"""The report: complete, safe with any text, silent in a browser; tables and pictures beside it."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from restpoint import bundled
from restpoint.errors import RestpointError
from restpoint.model.load import Loaded
from restpoint.report.charts import Chart, Line, beside
from restpoint.report.figures import figure, rounded, visible
from restpoint.report.page import write_report
from restpoint.report.pictures import export_pictures
from restpoint.report.reading import Reader, depth_axis
from restpoint.report.sections import sections
from restpoint.report.tables import export_tables
from restpoint.trajectory.atlas import Atlas, Subject
from restpoint.trajectory.options import MEASURES, SurveyOptions
from restpoint.trajectory.reading import Sample
from restpoint.trajectory.scenes import Scene
from restpoint.trajectory.survey import survey
from restpoint.trajectory.surveyed import Surveyed

LAYERS = 12
NASTY = "He said \"</script><script>throw 1</script>\" & <b>bold</b> <!-- 'no' 🦊\n\tשלום עולם مرحبا " + "long" * 40
SECTIONS = {
    "geometry": ["geometry", "clusters"],
    "pairs": ["pairs"],
    "lens": ["lens"],
    "saturation": ["saturation"],
    "tasks": ["tasks"],
    "sinks": ["sinks"],
    "transport": ["transport"],
    "bounds": ["bounds"],
}


def subject(layers: int = LAYERS, **changes: object) -> Subject:
    return replace(
        Subject("some/model", "f00d", "llama", "decoder", layers, 320, 8192, 21_000_000, "float32"), **changes
    )


def scene(text: str, tokens: list[str], layers: int = LAYERS) -> Scene:
    depth, count = layers + 1, len(tokens)
    steps = torch.randn(depth, count, 3) * 0.12
    plane = steps.cumsum(0) + 0.5 * torch.randn(count, 3)
    settled = torch.randint(0, depth, (count,))
    words = [[tokens[(at + max(0, int(settled[at]) - level)) % count] for at in range(count)] for level in range(depth)]
    return Scene(
        text,
        tokens,
        plane * torch.linspace(1, 0.5, depth)[:, None, None],
        torch.linspace(1, 30, depth)[:, None].expand(depth, count).clone(),
        words,
        torch.linspace(0.05, 0.95, depth)[:, None].expand(depth, count) * torch.rand(count),
        torch.linspace(6, 1, depth)[:, None].expand(depth, count).clone(),
        settled,
        "code",
    )


def results(layers: int = LAYERS) -> dict[str, dict[str, torch.Tensor]]:
    """What all measures find, with plausible numbers."""
    depth = layers + 1
    along = torch.linspace(0, 1, depth, dtype=torch.float64)

    def noise(*shape: int) -> torch.Tensor:
        return 0.05 * torch.rand(*shape, dtype=torch.float64)

    geometry = {}
    lengths = {"step": layers, "relative_step": layers, "state_angle": layers, "angle": layers - 1}
    lengths |= {"acceleration": layers - 1, "curvature": layers - 1, "norm": depth}
    for name, count in lengths.items():
        mean = 1 + along[depth - count :] ** 2 + noise(count)
        geometry[f"{name}.mean"] = mean
        geometry[f"{name}.std"] = 0.2 * mean
        for quantile, factor in (("q05", 0.6), ("q25", 0.85), ("q50", 0.97), ("q75", 1.2), ("q95", 1.5)):
            geometry[f"{name}.{quantile}"] = factor * mean
        geometry[f"{name}.position"] = mean[:, None] * torch.linspace(1.4, 0.9, 9, dtype=torch.float64)
    for name, values in {
        "anisotropy": 0.2 + 0.5 * along,
        "effective_rank": 20 * (1 - 0.6 * along),
        "participation_ratio": 10 * (1 - 0.6 * along),
        "effective_rank.without_sinks": 22 * (1 - 0.5 * along),
        "participation_ratio.without_sinks": 12 * (1 - 0.5 * along),
        "clusters.components": 30 * (1 - 0.7 * along),
        "clusters.rank": 28 * (1 - 0.6 * along),
        "clusters.share": 0.4 * along,
        "rank_collapse": 5 - 2 * along,
    }.items():
        geometry[name] = values + noise(depth)
    betas = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    geometry["energy.betas"] = betas
    geometry["energy"] = (betas[:, None] * (0.3 + 0.4 * along)).exp() / (2 * betas[:, None])
    gap = (along[:, None] - along).abs()
    histogram = torch.stack([100 * torch.exp(-((along - at / 8 - 0.3) ** 2) * 30) for at in range(5)])
    lens = {}
    for name in ("logit", "ridge"):
        lens[f"{name}.entropy"] = 6 - 4 * along
        lens[f"{name}.kl"] = 5 * (1 - along) * (0.7 if name == "ridge" else 1)
        lens[f"{name}.tv"] = 0.9 * (1 - along)
        lens[f"{name}.agreement"] = along**2
    number = lambda value: torch.tensor(value, dtype=torch.float64)  # noqa: E731
    return {
        "geometry": geometry,
        "pairs": {"r2": 1 - gap},
        "lens": lens,
        "saturation": {
            "layer.mean": 0.6 * layers + torch.arange(5, dtype=torch.float64) * 0.5,
            "layer.histogram": histogram,
            "tau": number(0.37),
            "tau.p": number(0.001),
            "tau.null": number(-0.4),
        },
        "tasks": {
            "probe.accuracy": 0.5 + noise(5),
            "probe.control": 0.3 + noise(5),
            "probe.chance": number(1 / 3),
            "probe.confusion": torch.tensor([[60, 20, 20], [25, 50, 25], [10, 30, 60]], dtype=torch.float64),
            "switching.switched": number(0.5),
            "switching.control.switched": number(0.1),
        },
        "sinks": {
            "received.first": torch.rand(layers, 8, dtype=torch.float64),
            "sink_rate": along[1:].clone(),
            "value_drain": 1 - 0.8 * along[1:],
            "peaks": 3 * along,
            "surprise": torch.tensor([12345.0, math.nan], dtype=torch.float64),
        },
        "transport": {
            f"{kind}.{way}": value
            for kind in ("raw", "unit")
            for way, value in {
                "gaussian.to_final": 40 * (1 - along),
                "gaussian.between": 3 + noise(layers),
                "sliced.to_final": 4 * (1 - along),
                "sliced.between": 0.4 + noise(layers),
                "gaussian.flat_from": number(float(layers - 3)),
            }.items()
        },
        "bounds": {
            "violations": torch.zeros(layers, dtype=torch.float64),
            "variation": 0.9 * (1 - along[:-1]),
            "variation.bound": 1 - 0.5 * along[:-1],
            "tightness.q10": 0.2 + noise(layers),
            "tightness.q50": 0.5 + noise(layers),
            "tightness.q90": 0.8 + noise(layers),
            "contraction.share": 0.9 - 0.3 * along[1:-1],
            "contraction.holds": 0.9 - 0.3 * along[1:-1],
            "contraction.geometric_ratio": 1 + 2 * along[1:-1],
            "transport.lower": 2 - along[:-1],
            "transport.upper": 2.2 - along[:-1],
        },
    }


def atlas(layers: int = LAYERS, **changes: object) -> Atlas:
    torch.manual_seed(layers)
    scenes = [
        scene("The quick brown fox jumps.", ["The", " quick", " brown", " fox", " jumps", "."], layers),
        scene(
            NASTY,
            [
                "</script>",
                "<b>",
                '"',
                "'",
                "&",
                "🦊",
                "\n",
                "\t",
                " שלום",
                " مرحبا",
                "long" * 40,
                "\ud83d",
                "a" * 21,
                " ",
            ],
            layers,
        ),
    ]
    found = results(layers)
    corpus = {"texts": 20, "tokens": 34567, "skipped": 1, "domains": {"code": 20000, "prose": 14567}, "source": NASTY}
    papers = {measure: [f"Somebody 2024, on {measure} & <more>"] for measure in found} | {"unused": ["Nobody 1999"]}
    conditions = {"date": "2026-01-01", "threads": 2, "seconds": 12.345, "torch": "2.13.0"}
    return replace(Atlas(subject(layers), corpus, conditions, found, papers, scenes), **changes)


@pytest.fixture(scope="module")
def whole() -> Atlas:
    return atlas()


@pytest.fixture(scope="module")
def page(whole: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    other = atlas(8, subject=subject(8, untrained=True))
    return write_report(whole, tmp_path_factory.mktemp("report") / "deep" / "report.html", other)


class Reading(HTMLParser):
    """Elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.data = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data += data
        elif not self._inside:
            self.text.append(data)

    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.elements if "id" in attributes]


# --- the page ---


def test_the_page_is_complete_and_small(page: Path) -> None:
    assert page.stat().st_size < 8_000_000
    found = Reading(page.read_text(encoding="utf-8"))
    wanted = ["trajectories", "predictions", *(name for names in SECTIONS.values() for name in names), "methods"]
    sections_found = [attributes.get("id") for tag, attributes in found.elements if tag == "section"]
    assert sections_found == wanted
    charts = [attributes["data-chart"] for _, attributes in found.elements if "data-chart" in attributes]
    assert len(charts) == len(set(charts)) == 41
    assert set(charts) == set(json.loads(found.data)["charts"])
    assert len(found.ids()) == len(set(found.ids()))
    links = [attributes["href"] for tag, attributes in found.elements if tag == "a"]
    assert {link.removeprefix("#") for link in links if link} <= set(found.ids())
    text = " ".join(found.text)
    assert "34.6 k" in text
    assert "random weights" in text
    assert "Somebody 2024, on lens & <more>" in text
    assert "Nobody 1999" not in text
    assert "12345" in text, "a result that no chart shows is listed"


def test_nothing_is_asked_for_from_outside(page: Path) -> None:
    found = Reading(page.read_text(encoding="utf-8"))
    for tag, attributes in found.elements:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
        for name in ("src", "srcset", "data", "action", "poster"):
            assert name not in attributes, (tag, name)
        assert tag != "a" or (attributes["href"] or "").startswith("#")
    from plotly.offline import get_plotlyjs

    own = page.read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert len(own) < 1_000_000
    assert not re.search(r"https?://|@import|url\(", own)
    policies = [a["content"] or "" for tag, a in found.elements if tag == "meta" and "http-equiv" in a]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none';")


def test_text_of_the_corpus_cannot_break_out(page: Path) -> None:
    raw = page.read_text(encoding="utf-8")
    found = Reading(raw)
    assert [attributes.get("id") for tag, attributes in found.elements if tag == "script"] == ["data", None, None]
    assert "<b>bold" not in raw
    assert not any(sign in found.data for sign in "<>&")
    scenes = json.loads(found.data)["scenes"]
    assert scenes[1]["text"] == NASTY
    assert scenes[1]["tokens"][0] == "</script>"
    assert "<b>bold</b>" in "".join(found.text)


def test_what_was_not_measured_has_no_section(tmp_path: Path, whole: Atlas) -> None:
    for measure, names in SECTIONS.items():
        less = {name: found for name, found in whole.results.items() if name != measure}
        made = [section.name for section in sections(replace(whole, results=less))]
        assert not set(names) & set(made)
        assert made == [name for known in SECTIONS if known != measure for name in SECTIONS[known]]
    bare = write_report(replace(whole, results={}, papers={}, scenes=[]), tmp_path / "bare.html")
    found = Reading(bare.read_text(encoding="utf-8"))
    assert [attributes.get("id") for tag, attributes in found.elements if tag == "section"] == ["methods"]


def test_a_measure_that_the_page_does_not_know_is_listed(whole: Atlas) -> None:
    strange = {"novel": {"one": torch.tensor(2.5).double(), "table": torch.arange(6.0).double().reshape(2, 3)}}
    made = sections(replace(whole, results=strange))
    assert [section.name for section in made] == ["novel"]
    assert made[0].rest == [("one", ["2.5"]), ("table[0]", ["0", "1", "2"]), ("table[1]", ["3", "4", "5"])]
    odd = {"pairs": {"r2": torch.zeros(3).double(), "huge": torch.zeros(200, 200).double()}}
    (only,) = sections(replace(whole, results=odd))
    assert [name for name, _ in only.rest] == ["r2", "huge"]
    assert only.charts == []


def test_numbers_that_are_none_and_models_of_one_layer(tmp_path: Path) -> None:
    found = results(1)
    found["bounds"]["variation.bound"][:] = math.inf
    found["transport"]["raw.gaussian.flat_from"] = torch.tensor(math.nan).double()
    empty = atlas(1, results={m: {n: v for n, v in r.items() if v.numel()} for m, r in found.items()})
    page = write_report(empty, tmp_path / "one.html")
    assert "Infinity" not in Reading(page.read_text(encoding="utf-8")).data
    few = {measure: empty.results[measure] for measure in ("saturation", "transport")}
    assert export_pictures(replace(empty, results=few), tmp_path)


def test_a_page_that_cannot_be_written_says_so(whole: Atlas, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RestpointError, match=r"^output: "):
        write_report(whole, tmp_path / "file" / "report.html")


def test_without_plotly_it_says_what_to_install(whole: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(RestpointError, match=r"^report: plotly.* pip install 'restpoint\[report\]'"):
        write_report(whole, tmp_path / "report.html")


# --- the charts ---


def test_profiles_end_at_the_last_layer() -> None:
    read = Reader({"a": torch.zeros(5).double(), "b": torch.zeros(4).double(), "c": torch.zeros(3).double()}, 4)
    assert [read.profile(name, name)[0].x[0] for name in "abc"] == [0, 1, 2]
    assert [read.profile(name, name)[0].x[-1] for name in "abc"] == [4, 4, 4]
    assert read.rest() == []


def test_another_atlas_is_dashed_and_on_relative_depth_where_depths_differ(whole: Atlas) -> None:
    for layers in (LAYERS, 8):
        other = atlas(layers, subject=subject(layers, untrained=True))
        for section in sections(whole, other):
            for chart in section.charts:
                if not chart.lines:
                    continue
                ours = [line for line in chart.lines if not line.second]
                theirs = [line for line in chart.lines if line.second]
                assert len(ours) == len(theirs)
                assert all(line.name.endswith("random weights") and not line.bands for line in theirs)
                if layers != LAYERS:
                    assert all((line.y if chart.upright else line.x).max() <= 1 for line in chart.lines)
                    assert chart.upright or all(line.x[-1] >= 0.87 for line in chart.lines)
                    assert "relative depth" in (chart.y if chart.upright else chart.x)
    same = Chart("a", "", "", "layer", "", [Line("x", np.arange(3.0), np.arange(3.0))], layers=2)
    assert beside([same], [], "none") == [same]
    assert [trace["line"]["dash"] for trace in figure(beside([same], [same], "it")[0])["data"]] == ["solid", "dash"]


def test_data_has_five_digits_and_no_infinities() -> None:
    assert rounded(np.array([[1.23456789, math.nan], [math.inf, 3.0]])) == [[1.2346, None], [None, 3]]
    assert rounded(torch.tensor([123456.0, 1e-9, -0.000123456])) == [123460, 1e-9, -0.00012346]


def test_tokens_show_their_white_space() -> None:
    assert [visible(token) for token in (" the", "a b", "\n", "  ", "x" * 30)] == [
        "·the",
        "a b",
        "⏎",
        "··",
        "x" * 19 + "…",
    ]
    assert visible("\ud83d") == "\ufffd"


# --- in a browser ---

_COLLECT = """<script>
window.found = [];
const note = (text) => {
  window.found.push(String(text));
  document.documentElement.dataset.errors = JSON.stringify(window.found);
};
addEventListener("error", (event) => note(event.message));
addEventListener("unhandledrejection", (event) => note(event.reason));
addEventListener("securitypolicyviolation", (event) => note(event.blockedURI));
// A colour scheme that can be switched.
const real = window.matchMedia.bind(window), scheme = Object.assign(new EventTarget(), { matches: false });
window.matchMedia = (query) => (query.includes("color-scheme") ? scheme : real(query));
for (const level of ["error", "warn"]) console[level] = (...all) => note(all.join(" "));
</script>"""

_USE = """<script>
const end = () => {
  const root = document.documentElement;
  if (root.dataset.drawn !== root.dataset.charts) return setTimeout(end, 20);
  root.dataset.width = innerWidth;
  root.dataset.wide = root.scrollWidth - root.clientWidth;
  if (document.getElementById("scene")) {
    document.getElementById("scene").value = "1";
    document.getElementById("scene").dispatchEvent(new Event("change"));
    document.getElementById("layer").value = "5";
    document.getElementById("layer").dispatchEvent(new Event("input"));
    const labels = [...document.querySelectorAll("#chart-trajectories text")];
    root.dataset.labels = JSON.stringify(labels.map((text) => text.textContent));
    document.getElementById("play").click();
  }
  const papers = () => [...new Set([...document.querySelectorAll(".main-svg")].map((svg) => svg.style.background))]
    .filter((paper) => paper && !paper.includes("none")).join("; ");
  root.dataset.light = papers();
  scheme.matches = true;
  scheme.dispatchEvent(new Event("change"));
  root.dataset.dark = papers();
  root.dataset.used = "yes";
  if (parent !== window) parent.postMessage({ ...root.dataset }, "*");
};
end();
</script>"""


# Headless windows are 500 pixels wide at least; a frame may be narrower, and is what the page then calls its window.
_FRAME = """<!doctype html><html><body><script>
addEventListener("message", (event) => Object.assign(document.documentElement.dataset, event.data));
</script><iframe src="copy.html" width="{width}" height="2000" frameborder="0"></iframe></body></html>"""


def browse(page: Path, tmp_path: Path, *, width: int = 0) -> dict[str, str]:
    """What the page comes to in headless Chromium: the ``data-`` attributes of its root, and what was logged.

    With a width, in a frame of that width.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.fail("this test needs a browser: install the Debian package chromium (apt-get install chromium)")
    copy = tmp_path / "copy.html"
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("<head>", f"<head>{_COLLECT}").replace("</body>", f"{_USE}</body>"), encoding="utf-8")
    if width:
        copy = tmp_path / "frame.html"
        copy.write_text(_FRAME.replace("{width}", str(width)), encoding="utf-8")
    done = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--enable-logging=stderr", "--v=0", "--window-size=1280,2000"),
            *(f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=60000", "--dump-dom", copy.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    root = re.search(r"<html[^>]*>", done.stdout)
    assert root, done.stderr
    found = {name.removeprefix("data-"): value or "" for name, value in Reading(root[0]).elements[0][1].items()}
    found["console"] = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    found["dom"] = done.stdout
    return found


def test_a_browser_draws_all_without_a_word(page: Path, tmp_path: Path) -> None:
    found = browse(page, tmp_path)
    assert "errors" not in found, found["errors"]
    assert found["console"] == ""
    assert found["used"] == "yes"
    assert found["drawn"] == found["charts"] == "42"
    assert found["wide"] == "0"
    assert (found["light"], found["dark"]) == ("rgb(255, 255, 255)", "rgb(27, 31, 36)")
    labels = json.loads(found["labels"])
    assert {"</script>", "<b>", '"', "&", "🦊", "⏎"} <= set(labels), labels
    table = Reading(found["dom"])
    assert sum(tag == "td" and "settled" in (a.get("class") or "") for tag, a in table.elements) == 14


def test_a_phone_shows_it_without_scrolling_sideways(whole: Atlas, tmp_path: Path) -> None:
    few = {"saturation": whole.results["saturation"], "sinks": whole.results["sinks"]}
    found = browse(write_report(replace(whole, results=few), tmp_path / "phone.html"), tmp_path, width=390)
    assert found["width"] == "390"
    assert found["wide"] == "0"
    assert "errors" not in found


def test_a_page_that_throws_is_found_out(whole: Atlas, tmp_path: Path) -> None:
    broken = write_report(replace(whole, results={}), tmp_path / "broken.html")
    text = broken.read_text(encoding="utf-8").replace("function draw(", "function drawn_not(", 1)
    broken.write_text(text.replace("</body>", '<script src="https://example.org/x.js"></script></body>'), "utf-8")
    found = browse(broken, tmp_path)
    assert "draw is not defined" in found["errors"]
    assert "https://example.org/x.js" in found["errors"]
    assert "used" not in found


# --- tables and pictures ---


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_tables_hold_every_number_in_full(whole: Atlas, tmp_path: Path) -> None:
    written = export_tables(whole, tmp_path / "tables")
    names = {path.name for path in written}
    assert {f"{measure}.csv" for measure in whole.results if measure != "tasks"} | {"tasks.other.csv"} <= names
    for measure, values in whole.results.items():
        if measure == "tasks":  # nothing there runs along depth
            continue
        rows = read_csv(tmp_path / "tables" / f"{measure}.csv")
        assert [row["layer"] for row in rows] == [str(layer) for layer in range(LAYERS + 1)]
        other = tmp_path / "tables" / f"{measure}.other.csv"
        singles = read_csv(other) if other.exists() else []
        for name, value in values.items():
            along_last = name in ("energy", "layer.histogram")
            if "flat_from" in name or name in ("energy.betas", "layer.mean", "tau", "tau.p", "tau.null", "surprise"):
                read = [float(row["value"]) for row in singles if row["quantity"] == name]
                wanted = value.reshape(-1).tolist()
            elif value.ndim == 1:
                read = [float(row[name]) for row in rows if row[name]]
                assert [row[name] for row in rows[: LAYERS + 1 - len(value)]] == [""] * (LAYERS + 1 - len(value))
                wanted = value.tolist()
            else:
                matrix = value.T if along_last else value
                read = [float(row[f"{name}[{at}]"]) for row in rows[-len(matrix) :] for at in range(matrix.shape[1])]
                wanted = matrix.reshape(-1).tolist()
            np.testing.assert_array_equal(read, wanted)


def test_which_axis_is_depth() -> None:
    assert depth_axis("anything", torch.zeros(4, 13), 12) == 1
    assert depth_axis("anything", torch.zeros(11, 13), 12) == 0
    assert depth_axis("energy", torch.zeros(12, 13), 12) == 1
    assert depth_axis("layer.mean", torch.zeros(5), 4) is None
    assert depth_axis("anything", torch.zeros(()), 12) is None
    assert depth_axis("anything", torch.zeros(5, 5), 12) is None


def drawn(found: Atlas, folder: Path) -> list[str]:
    """Names of the pictures, each of which has something in it."""
    from matplotlib.image import imread

    written = export_pictures(found, folder, atlas(8))
    for path in written:
        image = imread(path)
        assert image.shape[0] > 400
        assert image[..., :3].std() > 0.02, path.name
    return [path.name for path in written]


def test_charts_have_pictures(whole: Atlas, tmp_path: Path) -> None:
    few = {"saturation": whole.results["saturation"], "transport": whole.results["transport"]}
    names = [
        "trajectories-1",
        "trajectories-2",
        "saturation-order",
        "saturation-histogram",
        *(f"transport-{kind}-{what}" for kind in ("raw", "unit") for what in ("to-final", "between")),
    ]
    assert drawn(replace(whole, results=few), tmp_path) == [f"{name}.png" for name in names]


@pytest.mark.slow
def test_every_chart_has_a_picture(whole: Atlas, tmp_path: Path) -> None:
    assert sum(len(section.charts) for section in sections(whole)) == 41
    assert len(drawn(whole, tmp_path)) == 41 + len(whole.scenes)


def test_every_measure_of_a_real_model_is_drawn(reference: Loaded) -> None:
    """The page knows results by name: a name that changes there would leave its chart out without a word."""
    subject = Surveyed("reference", reference.model, reference.tokenizer)
    options = SurveyOptions(max_tokens=8000, sequence_length=128)
    found = survey(subject, (Sample(text, kind) for kind, text in bundled.documents()), options)
    assert set(found.results) == set(MEASURES)
    drawn_here = {section.name: {chart.name for chart in section.charts} for section in sections(found)}
    expected = {section.name: {chart.name for chart in section.charts} for section in sections(atlas())}
    assert len(drawn_here.pop("two-scale")) > 4  # test_two_scale has its charts
    assert drawn_here == expected
    assert all(line.x[-1] <= 16 for section in sections(found) for chart in section.charts for line in chart.lines)


def test_points_without_neighbours_are_seen() -> None:
    """A lens with maps for layers 1 and 3 alone has no line between them."""
    x = np.arange(5.0)
    apart = Line("fitted lens", x, np.array([np.nan, 0.4, np.nan, 0.6, np.nan]))
    joined = Line("logit lens", x, np.array([np.nan, 0.4, 0.5, 0.6, np.nan]))
    drawn = [figure(Chart("lens", "", "", "layer", "", lines=[line]))["data"][-1] for line in (apart, joined)]
    assert ["markers" in one["mode"] for one in drawn] == [True, False]
