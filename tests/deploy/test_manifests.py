"""examples/deploy: no container engine and no cluster is here: its files are checked by linter, schemas and our own commands."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kserve_schema import KServe

from mra_export.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "examples" / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))
MANIFESTS = sorted(DEPLOY.glob("*.yaml"))
CHECKERS = ROOT / ".downloads" / "manifests"
KUBERNETES = "1.33.0"
KSERVE = {"InferenceService": "V1beta1InferenceService", "ServingRuntime": "V1alpha1ServingRuntime"}


def needs_checkers(test: Any) -> Any:
    there = (CHECKERS / "kserve").is_dir()
    return pytest.mark.heavy(pytest.mark.skipif(not there, reason=f"no schemas in {CHECKERS}: make test-heavy gets them")(test))


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, its arguments), in order; continuation lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in text.splitlines() if line.strip()]


def resources(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def containers(resource: dict[str, Any]) -> list[dict[str, Any]]:
    spec = resource["spec"]
    return spec.get("containers", []) or spec.get("template", {}).get("spec", {}).get("containers", [])


def accepted(arguments: list[str]) -> dict[str, Any]:
    """What `mra-export serve` makes of these arguments; a wrong one raises."""
    return main.commands["serve"].make_context("serve", list(arguments)).params  # type: ignore[attr-defined]


# Dockerfiles


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_a_dockerfile_copies_what_is_there_and_runs_as_nobody(file) -> None:
    steps = instructions(file)
    for name, arguments in steps:
        if name == "COPY" and "--from=" not in arguments:
            *sources, _ = shlex.split(arguments)
            for source in sources:
                assert (ROOT / source).exists(), f"{file.name} copies {source}"
    names = [name for name, _ in steps]
    last_stage = steps[len(names) - 1 - names[::-1].index("FROM") :]
    users = [arguments for name, arguments in last_stage if name == "USER"]
    assert users, "a user is set"
    assert int(users[-1].split(":")[0]) > 0, "and it is not root"
    assert not any(name == "RUN" and "g++" in arguments for name, arguments in last_stage), "the compiler stays in the builder"
    assert any(name == "HEALTHCHECK" and "/v2/health/ready" in arguments for name, arguments in last_stage)


@pytest.mark.parametrize("file", [file for file in DOCKERFILES if file.name != "triton.Dockerfile"], ids=lambda file: file.name)
def test_the_command_of_an_image_is_one_that_serve_takes(file) -> None:
    steps = dict(instructions(file))
    assert json.loads(steps["ENTRYPOINT"]) == ["mra-export", "serve"]
    options = accepted(json.loads(steps["CMD"]))
    assert (options["host"], options["port"]) == ("0.0.0.0", int(steps["EXPOSE"]))
    assert f"127.0.0.1:{options['port']}/" in steps["HEALTHCHECK"]


def test_the_health_check_tells_a_ready_server_from_one_that_is_not(monkeypatch) -> None:
    import http.server
    import threading

    status = 503

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/v2/health/ready" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    check = dict(instructions(DEPLOY / "cpu.Dockerfile"))["HEALTHCHECK"].split("CMD", 1)[1]
    code = json.loads(check)[2].replace(":8080/", f":{server.server_address[1]}/")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0
    status = 200
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    server.shutdown()


def test_the_cpu_image_installs_what_serving_needs_and_no_torch(bundles) -> None:
    """The bundle is served where only the packages of requirements-serve.txt, and what those bring, can be imported."""
    lines = [line for line in (DEPLOY / "requirements-serve.txt").read_text().splitlines() if not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(lines) <= {*project["dependencies"], *project["optional-dependencies"]["serve"]}, "the bounds are the project's"
    assert set(project["optional-dependencies"]["serve"]) <= set(lines)
    absent = {re.split(r"[><=;]", line)[0].strip() for line in {*project["dependencies"]} - set(lines)}
    assert {"torch", "transformers"} <= absent
    code = f"""
import sys, time
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from fastapi.testclient import TestClient
import mra_export.cli, mra_export.serve.server
from mra_export.serve.app import make_app
from mra_export.serve.settings import Settings
with TestClient(make_app({str(bundles("fp32"))!r}, Settings(name="mra"))) as client:
    until = time.monotonic() + 120
    while client.get("/v2/health/ready").status_code != 200 and time.monotonic() < until:
        time.sleep(0.1)
    assert client.get("/v2/health/ready").status_code == 200, client.app.state.model.failure
    assert client.post("/v1/fill-mask", json={{"text": "a <mask>"}}).status_code == 200
"""
    pytest.importorskip("httpx")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.heavy
@pytest.mark.skipif(not (CHECKERS / "bin" / "hadolint").is_file(), reason=f"no hadolint in {CHECKERS}: make test-heavy gets it")
@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_has_nothing_to_say(file, tmp_path) -> None:
    hadolint = CHECKERS / "bin" / "hadolint"
    done = subprocess.run([hadolint, "--no-color", file], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    worse = tmp_path / "Dockerfile"
    worse.write_text(file.read_text() + "RUN cd /tmp && sudo apt-get install curl\n")
    assert subprocess.run([hadolint, worse], capture_output=True).returncode != 0


# Kubernetes


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_containers_run_a_command_that_serve_takes_and_probe_what_it_has(file) -> None:
    found = [container for resource in resources(file) for container in containers(resource)]
    assert found
    for container in found:
        options = accepted([argument.replace("{{.Name}}", "mra") for argument in container["args"]])
        assert options["host"] == "0.0.0.0"
        assert container["ports"][0]["containerPort"] == options["port"]
        assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
        assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
        image = container["image"].split(":")[1]
        assert (DEPLOY / f"{image}.Dockerfile").is_file()


def test_services_name_the_runtime_that_comes_with_them() -> None:
    for file in DEPLOY.glob("kserve-*.yaml"):
        runtime, service = resources(file)
        model = service["spec"]["predictor"]["model"]
        assert model["runtime"] == runtime["metadata"]["name"]
        assert model["modelFormat"]["name"] in [known["name"] for known in runtime["spec"]["supportedModelFormats"]]
        assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]


@pytest.fixture(scope="module")
def definitions() -> dict[str, Any]:
    folder = CHECKERS / "kubernetes_validate" / "kubernetes-json-schema" / f"v{KUBERNETES}-local-strict"
    return json.loads((folder / "_definitions.json").read_text())["$defs"]


@pytest.fixture(scope="module")
def kubernetes() -> Any:
    """validate(resources as JSON) -> messages, in a process that has the checkers' packages."""

    def run(kind: str, value: Any) -> list[str]:
        code = """
import json, sys
sys.path.insert(0, sys.argv[1])
kind, value = json.load(sys.stdin)
import kubernetes_validate, jsonschema
if kind == "resource":
    try:
        kubernetes_validate.validate(value, sys.argv[2], strict=True)
        print("[]")
    except kubernetes_validate.ValidationError as error:
        print(json.dumps([error.message]))
else:
    from kubernetes_validate.utils import schema_contents
    schemas = schema_contents(f"kubernetes-json-schema/v{sys.argv[2]}-local-strict/_definitions.json", sys.argv[2])
    schema = {**schemas, "$ref": f"#/$defs/{kind}"}
    print(json.dumps([error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]))
"""
        command = [sys.executable, "-c", code, str(CHECKERS), KUBERNETES]
        done = subprocess.run(command, input=json.dumps([kind, value]), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def problems(resource: dict[str, Any], kubernetes: Any, definitions: dict[str, Any]) -> list[str]:
    if resource["kind"] not in KSERVE:
        return kubernetes("resource", resource)
    return KServe(CHECKERS, definitions).problems(resource, KSERVE[resource["kind"]], kubernetes)


@needs_checkers
@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_every_resource_is_valid(file, kubernetes, definitions) -> None:
    for resource in resources(file):
        assert problems(resource, kubernetes, definitions) == []


@needs_checkers
def test_the_schemas_find_mistakes(kubernetes, definitions) -> None:
    runtime, service = resources(DEPLOY / "kserve-cpu.yaml")
    deployment = resources(DEPLOY / "kubernetes.yaml")[0]
    for resource, keys, value in (
        (service, ("spec", "predictor", "model", "storageURL"), "pvc://bundles/mra"),
        (service, ("spec", "predictor", "minReplicas"), "1"),
        (service, ("spec", "predictor", "model", "resources"), {"request": {}}),
        (runtime, ("spec", "containers", 0, "port"), 8080),
        (runtime, ("spec", "protocolVersions"), "v2"),
        (deployment, ("spec", "replicas"), "two"),
        (deployment, ("spec", "template", "spec", "containers", 0, "arg"), []),
    ):
        wrong = copy.deepcopy(resource)
        place: Any = wrong
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        assert problems(wrong, kubernetes, definitions), keys
