"""Every command and every Python example of README.md and docs/ runs, in order, page by page.

```console blocks: the lines after "$ " are shell commands; what follows a command until the next is what it prints (not compared).
```python blocks run in one interpreter per page, after that page's commands before them.
A block marked ```console title=gpu needs a GPU; title=container, title=cluster or title=heavy what the machine may lack;
title=setup is what the newcomer runs before anything else (make ...).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mra_export import libraries

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(console|python)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


NEEDS = {"embedding-cpp.md": ("session", ("cmake", "c++"))}
"""Page -> a library and programs that its commands need; where one is missing the page is skipped, with the reason."""


def blocks(page: Path) -> list[tuple[str, str, str]]:
    return [(language, info.strip(), body) for language, info, body in BLOCK.findall(page.read_text())]


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
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    for number, (language, info, body) in enumerate(blocks(page)):
        if info:
            continue  # gpu and setup blocks: run by `make gpu-check` and by the newcomer
        todo = [["bash", "-euc", command] for command in commands(body)]
        if language == "python":
            script = tmp_path / f"block_{number}.py"
            script.write_text(body)
            todo = [[sys.executable, str(script)]]
        for command in todo:
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{page.name}: {command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_setup_commands_are_make_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for _, info, body in blocks(page):
            if info == "title=setup":
                for command in commands(body):
                    program, target = command.split()[:2]
                    assert (program, target in targets) == ("make", True), f"{page.name}: {command}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
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


def test_examples_are_shipped() -> None:
    assert shutil.which("bash"), "the demo is a bash script"
    subprocess.run(["bash", "-n", str(ROOT / "examples" / "demo.sh")], check=True)
