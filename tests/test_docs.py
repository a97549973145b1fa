"""What the documents say is so: their code runs, their files exist, their tables are those of the code and of a run."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

import restpoint
from families import FAMILIES, REFUSED
from restpoint import bundled, cli

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
THEORY = ROOT / "docs" / "theory.md"
DOCUMENTS = [
    README,
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("how-it-works", "atlas", "early-exit", "equilibrium", "solvers")),
    THEORY,
]
FIGURES = ROOT / "docs" / "bench.json"
NOT_CODE = {"text", "sh"}

_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    reason: str | None

    @property
    def commands(self) -> list[list[str]]:
        """Arguments of each ``$ restpoint`` line."""
        lines = [line.removeprefix("$ ") for line in self.body.splitlines() if line.startswith("$ ")]
        words = [shlex.split(line) for line in lines]
        assert words
        assert all(first == "restpoint" for first, *_ in words)
        return [rest for _, *rest in words]


def blocks(language: str, *, run: bool) -> list[Block]:
    return [block for block in _blocks() if block.language == language and (block.reason is None) == run]


def _blocks() -> list[Block]:
    found = _FENCE.finditer(README.read_text(encoding="utf-8"))
    return [Block(one["language"], one["body"], one["reason"]) for one in found]


def section(name: str) -> str:
    """What README.md has between ``<!-- name -->`` and ``<!-- /name -->``."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README.read_text(encoding="utf-8"), re.S)
    assert found is not None, f"README.md has no section {name}"
    return found[1]


def table(markdown: str) -> list[list[str]]:
    """Cells of a Markdown table, its heading first, without emphasis."""
    lines = [line.strip().strip("|").split("|") for line in markdown.splitlines() if line.strip().startswith("|")]
    rows = [[cell.strip().strip("*") for cell in line] for line in lines]
    return rows[:1] + rows[2:]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder where ``restpoint fit -o profile/`` has been run."""
    shutil.copytree(bundled.PROFILE_PATH, tmp_path / "profile")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- code ---


def test_every_block_is_run_or_says_why_not():
    found = _blocks()
    assert len(found) == README.read_text(encoding="utf-8").count("```") / 2
    for block in found:
        assert block.language in NOT_CODE | {"python", "console"}, block
        assert block.language != "sh" or block.reason, block
    assert blocks("python", run=True)
    assert blocks("console", run=True)


def test_python_blocks_run(folder):
    namespace: dict[str, object] = {}
    for block in blocks("python", run=True):
        exec(compile(block.body, str(README), "exec"), namespace)


def test_python_blocks_that_are_not_run_import_what_exists():
    for block in blocks("python", run=False):
        tree = ast.parse(block.body)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert imports
        exec(compile(ast.Module(imports, []), str(README), "exec"), {})


@pytest.mark.parametrize(
    "arguments", [words for block in blocks("console", run=True) for words in block.commands], ids=shlex.join
)
def test_console_lines_run(folder, arguments, capsys):
    assert cli.main(arguments) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "arguments", [words for block in blocks("console", run=False) for words in block.commands], ids=shlex.join
)
def test_console_lines_that_are_not_run_can_be_parsed(arguments, capsys, monkeypatch):
    parsed: list[object] = []
    for verb in get_args(cli.Verb):
        verb = get_args(verb)[0]
        monkeypatch.setattr(verb, "run", lambda verb: parsed.append(verb))
    assert cli.main(arguments) == 0, capsys.readouterr().err
    assert len(parsed) == 1


def test_make_targets_exist():
    rules = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word for path in DOCUMENTS for word in re.findall(r"\bmake (\w+)", _code_of(path.read_text()))}
    assert {"demo", "test"} <= named
    assert named <= rules


def _code_of(text: str) -> str:
    """The fenced blocks and code spans of a document."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))
    return "\n".join([*fenced, *spans])


# --- files ---


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    prose = _FENCE.sub("", text)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", re.sub("`[^`\n]+`", "", prose)) if "://" not in link]
    missing = [link for link in links if not (path.parent / link).exists()]
    spans = re.findall(r"`([\w./-]+/[\w-]+\.\w+)`", prose)
    missing += [span for span in spans if not any((root / span).exists() for root in (ROOT, ROOT / "src/restpoint"))]
    assert not missing


def test_every_room_is_on_the_map():
    rooms = next(block.body for block in blocks("text", run=True) if block.body.startswith("src/restpoint/"))
    entries = {
        entry.rstrip("/,") for line in rooms.splitlines() for entry in re.split(r" {2,}", line.strip())[0].split()
    }
    here = ROOT / "src" / "restpoint"
    package = {path.name for path in here.iterdir() if path.is_dir() or path.suffix == ".py"}
    package -= {"__init__.py", "__pycache__"}
    assert entries == package | {"src/restpoint", "benchmarks", "scripts", "tests"}


# --- tables ---


def test_families_are_those_that_are_tested():
    described: dict[str, set[str]] = {}
    for families, refused, decoding in table(section("families"))[1:]:
        for family in re.findall(r"`(\w+)`", families):
            described[family] = set(re.findall(r"`(\w+)`", refused))
            assert decoding.startswith("plain") == bool(described[family] & {"depth", "cached", "rollback"})
    assert described == {family: REFUSED.get(family, set()) for family in FAMILIES}


def test_figures_are_those_of_the_run():
    rows = json.loads(FIGURES.read_text())["rows"]
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    ratios = {(row["method"], row["domain"]): row["ratio_to_plain"] for row in rows}
    methods = [row["method"] for row in rows if row["domain"] == domains[0] and row["ratio_to_plain"] is not None]
    expected = [["method", *domains]]
    expected += [[method, *(f"{ratios[method, domain]:.2f}" for domain in domains)] for method in methods]
    wanted = "\n".join(
        "| " + " | ".join(row) + " |" for row in [expected[0], ["---"] * (len(domains) + 1), *expected[1:]]
    )
    found = table(section("figures"))
    assert found, f"README.md lacks the figures of docs/bench.json:\n{wanted}"
    kept = [index for index, heading in enumerate(found[0]) if heading in expected[0]]
    assert sorted([row[index] for index in kept] for row in found) == sorted(expected), f"it should be:\n{wanted}"


# --- propositions ---


def propositions() -> dict[int, set[tuple[str, str]]]:
    """Of each proposition in docs/theory.md: file and name of the tests that it says it is checked by."""
    found: dict[int, set[tuple[str, str]]] = {}
    for part in re.split(r"^##+ ", THEORY.read_text(encoding="utf-8"), flags=re.M):
        if number := re.match(r"Proposition (\d+): ", part):
            assert int(number[1]) not in found
            found[int(number[1])] = set(re.findall(r"`(tests/\w+\.py)::(\w+)`", part.partition("**Checked by**")[2]))
    return found


def names_of_tests(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_proposition_names_tests_that_exist():
    found = propositions()
    assert list(found) == list(range(1, len(found) + 1))
    assert found
    for number, named in found.items():
        assert named, f"proposition {number} names no test"
        missing = [f"{path}::{name}" for path, name in named if name not in names_of_tests(path)]
        assert not missing, f"proposition {number} names tests that do not exist: {missing}"


def test_the_theory_of_token_dynamics_names_tests_that_exist():
    dynamics = THEORY.read_text(encoding="utf-8").partition("## Token dynamics")[2]
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", dynamics)
    assert len(named) >= 7
    assert not [f"{path}::{name}" for path, name in named if name not in names_of_tests(path)]


def test_every_test_of_a_proposition_is_named():
    named = {name for tests in propositions().values() for path, name in tests if path == "tests/test_propositions.py"}
    assert named == names_of_tests("tests/test_propositions.py")


# --- public names ---


def test_public_names():
    for name in restpoint.__all__:
        assert getattr(restpoint, name) is not None
    assert set(restpoint.__all__) <= set(dir(restpoint))
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        restpoint.fitt  # noqa: B018


def test_import_needs_no_torch():
    names = "restpoint.RestpointError, restpoint.FitOptions, restpoint.SamplingSettings, restpoint.__version__"
    code = f"import sys, restpoint; {names}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_fit_profile_is_the_function_whatever_was_imported_before():
    import restpoint.fit.run
    from restpoint import fit_profile

    assert fit_profile is restpoint.fit.run.fit_profile
