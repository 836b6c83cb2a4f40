"""The files under deploy/, as far as they can be tried without Docker, a cluster, or systemd's own processes; what their
formats' own checkers say is in scripts/lint."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from autotag.config import Settings, environment_names
from autotag.install.migrations import migrations
from autotag.worker import HAND_OVER
from conftest import ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")


def test_what_the_image_is_built_from_makes_a_worker_that_starts(tmp_path: Path) -> None:
    """The Dockerfile's own COPY lines, in a folder without anything else of this repository."""
    source, site = tmp_path / "src", tmp_path / "site"
    seen = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    _, build, _ = DOCKERFILE.split("\nFROM ")
    for *files, target in (shlex.split(line)[1:] for line in build.splitlines() if line.startswith("COPY")):
        for file in files:
            assert any(file == top or file.startswith(f"{top}/") for top in seen), f".dockerignore hides {file}"
            _copy(ROOT / file, source / target / (Path(file).name if target == "./" else ""))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target", site, "."],
        cwd=source, check=True,
    )  # fmt: skip
    told = subprocess.run(
        [sys.executable, "-c", "import autotag.cli, autotag.install.migrations as m;"
         "print(autotag.cli.__file__, *(each.path.name for each in m.migrations(with_host_baseline=True)))"],
        cwd=tmp_path, env={"PYTHONPATH": str(site)}, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert told == [str(site / "autotag" / "cli.py"), *(m.path.name for m in migrations(with_host_baseline=True))]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():  # as Docker does it: a link stays a link
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_images_health_check(status: int, healthy: bool) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    command = re.search(r"HEALTHCHECK .*?CMD (\[.*\])", DOCKERFILE)
    assert command
    _, *rest = [part.replace("127.0.0.1:8080", f"127.0.0.1:{server.server_port}") for part in json.loads(command[1])]
    done = subprocess.run([sys.executable, *rest], capture_output=True, check=False)
    thread.join()
    server.server_close()
    assert (done.returncode == 0) is healthy


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "kubernetes.yaml", "autotag-worker@.service"])
def test_every_setting_that_is_named_is_one(name: str) -> None:
    known = {n for key, field in Settings.model_fields.items() for n in environment_names(key, field)}
    known |= {"OTEL_EXPORTER_OTLP_ENDPOINT"}
    named = set(
        re.findall(r"\b(?:AUTOTAG_|OPENAI_|SUPABASE_|OTEL_)[A-Z_]+|\bDATABASE_URL\b", (DEPLOY / name).read_text())
    )
    assert named
    assert named <= known


@pytest.mark.parametrize(
    ("name", "patience"),
    [
        ("compose.yaml", r"stop_grace_period: (\d+)s"),
        ("kubernetes.yaml", r"terminationGracePeriodSeconds: (\d+)"),
        ("autotag-worker@.service", r"TimeoutStopSec=(\d+)"),
    ],
)
def test_nobody_is_killed_before_the_worker_has_handed_over(name: str, patience: str) -> None:
    found = re.search(patience, (DEPLOY / name).read_text())
    assert found
    assert int(found[1]) >= Settings.model_fields["stop_deadline"].default + HAND_OVER
