"""Every command and every Python example of README.md and docs/ runs, in order, page by page.

```console blocks: the lines after "$ " are shell commands; what follows a command until the next is what it prints (not compared).
```python blocks run in one interpreter per page, after that page's commands before them.
A block marked ```console title=gpu needs a GPU; title=container, title=cluster or title=heavy what the machine may lack;
title=setup is what the newcomer runs before anything else (make ...).
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile

import psutil
import pytest
from processes import started

from mra_export import libraries

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
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
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_examples_are_shipped() -> None:
    assert shutil.which("bash"), "the demo is a bash script"
    subprocess.run(["bash", "-n", str(ROOT / "examples" / "demo.sh")], check=True)
