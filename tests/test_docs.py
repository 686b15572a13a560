"""Every command and every Python example of README.md and docs/ runs, in order, page by page.

```console blocks: the lines after "$ " are shell commands; what follows a command until the next is what it prints (not compared).
```python blocks run in one interpreter per page, after that page's commands before them.
A block marked ```console title=gpu needs a GPU; title=container, title=cluster or title=heavy what the machine may lack;
title=setup is what the newcomer runs before anything else (make ...).
"""

import dataclasses
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from types import ModuleType
from xml.etree import ElementTree

import psutil
import pytest
from processes import started

from mra_export import contract, libraries

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PLUGINS = ROOT / "mra_export" / "plugins"
PLUGIN_PAGES = [page for page in sorted(PLUGINS.rglob("README.md")) if "third_party" not in page.parts]
BLOCK = re.compile(r"^```(console|python)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


NEEDS = {"embedding-cpp.md": ("session", ("cmake", "c++"))}
"""Page -> a library and programs that its commands need; where one is missing the page is skipped, with the reason."""


PORT = "8467"
"""What pages listen on. Here it is one that is free."""


def blocks(page: Path) -> list[tuple[str, str, str]]:
    return [(language, info.strip(), body) for language, info, body in BLOCK.findall(page.read_text())]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def commands(body: str) -> list[str]:
    joined = body.replace("\\\n", " ")
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_page_runs(page: Path, tmp_path: Path) -> None:
    if page.name in NEEDS:
        library, programs = NEEDS[page.name]
        if libraries.find(library) is None:
            pytest.skip(f"{libraries.FILES[library]} is not built: {libraries.GET[library]}")
        if lacking := [program for program in programs if not shutil.which(program)]:
            pytest.skip(f"not on PATH: {', '.join(lacking)}")
        (tmp_path / "mra_export").mkdir()
        for part in ("plugins", "embed"):  # the whole package would be imported from here
            (tmp_path / "mra_export" / part).symlink_to(ROOT / "mra_export" / part)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    port = free_port()
    with ExitStack() as stack:  # ends what a command leaves running, such as a server that a later one stops
        for number, (language, info, body) in enumerate(blocks(page)):
            if info:
                continue  # gpu and setup blocks: run by `make gpu-check` and by the newcomer
            body = body.replace(PORT, port)
            todo = [["bash", "-euc", command] for command in commands(body)]
            if language == "python":
                script = tmp_path / f"block_{number}.py"
                script.write_text(body)
                todo = [[sys.executable, str(script)]]
            for command in todo:
                with TemporaryFile("w+") as output:  # a pipe would wait for what the command leaves running
                    options = {"cwd": tmp_path, "env": {**os.environ, "HF_HUB_OFFLINE": "1"}}
                    process = stack.enter_context(started(command, stdout=output, stderr=output, **options))
                    status = process.wait(300)
                    output.seek(0)
                    assert status == 0, f"{page.name}: {command[-1]}\n{output.read()[-4000:]}"


def test_what_a_command_leaves_running_ends_with_it(tmp_path: Path) -> None:
    left: list[psutil.Process] = []

    def fail() -> None:
        with started(["bash", "-c", "sleep 600 & echo $! > pid"], cwd=tmp_path) as process:
            assert process.wait(60) == 0
            left.append(psutil.Process(int((tmp_path / "pid").read_text())))
            raise RuntimeError("the test fails")

    with pytest.raises(RuntimeError, match="the test fails"):
        fail()
    _, alive = psutil.wait_procs(left, 10)
    assert not alive


def test_setup_commands_are_make_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for _, info, body in blocks(page):
            if info == "title=setup":
                for command in commands(body):
                    program, target = command.split()[:2]
                    assert (program, target in targets) == ("make", True), f"{page.name}: {command}"


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, *PLUGIN_PAGES]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: a link that leads nowhere, a page outside the navigation or a name that the reference cannot find is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {str(page.relative_to(tmp_path / "site")): page.read_text() for page in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "operator.html", "faq.html", "api/python.html"} <= set(pages)
    assert not [name for name, text in pages.items() if "```" in text], "a code block that the site does not understand"
    for name, text in pages.items():
        written = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
        odd = [tag for tag in re.findall(r"</?([a-z][^\s<>/]*)", written) if not re.fullmatch(r"[a-z0-9-]+", tag)]
        assert not odd, f"{name}: a formula that the site took for a tag: put it into backticks"
        assert not re.findall(r"<em>[^<]*[=+][^<]*</em>", written), f"{name}: stars of a formula taken for italics: use backticks"
    reference = pages["api/python.html"]
    assert all(f"mra_export.{name}" in reference for name in ("runtime.MraRuntime.run", "bundle.Bundle.load", "errors.BundleError"))
    assert "mra_session_run" in re.sub("<[^>]+>", "", pages["api/c.html"])


def test_the_faq_quotes_errors_that_exist() -> None:
    """Each heading below the second level is an error's words, with ... for its values."""
    sources = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in (ROOT / "mra_export").rglob("*.py")))
    fixed = re.sub(r"\{[^{}]*\}", "...", sources)
    for heading in re.findall(r"^### (.+?)(?: \(exit code \d\))?$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE):
        for part in heading.replace("`", "").split("..."):
            words = part.strip(" :")
            assert words in fixed, f"docs/faq.md: no error says {words!r}"


@pytest.mark.parametrize("page", PLUGIN_PAGES, ids=lambda p: str(p.relative_to(PLUGINS)))
def test_a_plugins_readme_has_the_contracts_parameters(page: Path) -> None:
    _, *sections = re.split(r"^## (.+)\n", page.read_text(), flags=re.MULTILINE)
    text = dict(zip(sections[::2], sections[1::2], strict=True))
    assert list(text)[:3] == ["Description", "Inputs and output", "Parameters"]
    assert list(text)[-2:] == ["Changelog", "Known issues"]

    def table(section: str) -> list[list[str]]:
        lines = [line for line in text[section].splitlines() if line.startswith("|")]
        return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[2:]]

    defaults = {
        field.name: "required" if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(contract.Attributes)
    }
    written = {name: default if not default.isdigit() else int(default) for name, _, _, default, _ in table("Parameters")}
    assert list(written.items()) == list(defaults.items())
    assert [row[1] for row in table("Inputs and output")] == ["query", "key", "value", "mask", "context"]
    assert table("Changelog")[-1][0] == contract.PLUGIN_VERSION == str(contract.OP_VERSION)


@pytest.fixture(scope="module")
def drawings() -> ModuleType:
    """tools/drawings.py, which is no part of the package."""
    specification = importlib.util.spec_from_file_location("drawings", ROOT / "tools" / "drawings.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["data-way", "launches", "lane", "blocks"])
def test_a_drawing_is_what_its_script_draws(drawings: ModuleType, name: str) -> None:
    file = ROOT / "docs" / "images" / f"{name}.svg"
    drawn = drawings.DRAWINGS[name]()
    assert file.read_text(encoding="utf-8") == drawn, "run python tools/drawings.py and look at the result"
    assert len(drawn) < 30_000
    assert "://" not in drawn.replace('xmlns="http://www.w3.org/2000/svg"', ""), "a request to another server"
    svg = ElementTree.fromstring(drawn)
    space = "{http://www.w3.org/2000/svg}"
    assert svg.findtext(f"{space}title")
    assert svg.findtext(f"{space}desc")
    shown = [page for page in PAGES if re.search(rf"!\[[^\]]{{20,}}\]\([^)]*images/{name}\.svg\)", page.read_text())]
    assert shown, "no page shows it with a text for those who cannot see it"


@pytest.mark.parametrize(
    ("launches", "files"),
    [
        (["pool"], ["pool"]),
        (["select", "select, large"], ["select", "order", "logit", "low"]),
        (["logits"], ["logit"]),
        (["low resolution"], ["low"]),
        (["attend"], ["attend_mma"]),
        (["attend"], ["attend", "attend_fp32"]),
    ],
)
def test_the_launches_are_drawn_as_the_kernels_are(drawings: ModuleType, launches: list[str], files: list[str]) -> None:
    """What a launch reads and writes is every tensor and section of the workspace that its source names."""

    def drawn(launches: Iterable[str]) -> set[str]:
        return {name for launch in launches for names in drawings.LAUNCHES[launch] for name in names}

    sources = "".join((PLUGINS / "cuda" / f"mra_attention_{file}.cuh").read_text() for file in files)
    assert set(re.findall(r"\bp\.(\w+)", sources)) & drawn(drawings.LAUNCHES) == drawn(launches)


def test_the_lane_is_drawn_as_the_kernel_loads(drawings: ModuleType) -> None:
    source = (PLUGINS / "cuda" / "mra_attention_attend_mma.cuh").read_text()
    assert all(f"= {formula};" in source for formula in drawings.QUERY_PAIR)


def test_examples_are_shipped() -> None:
    assert shutil.which("bash"), "the demo is a bash script"
    subprocess.run(["bash", "-n", str(ROOT / "examples" / "demo.sh")], check=True)
