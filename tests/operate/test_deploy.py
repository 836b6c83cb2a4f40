"""The files under deploy/, as far as they can be tried without Docker, a cluster, or systemd's own processes; what their
formats' own checkers say is in scripts/lint."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from autotag.config import Settings, environment_names
from autotag.install.migrations import migrations
from autotag.worker.run import SHUTDOWN_GRACE
from conftest import ROOT, skip
from support import Library, until

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")


def test_what_the_image_is_built_from_makes_a_worker_that_starts(tmp_path: Path) -> None:
    """Copies the files of the Dockerfile's COPY lines into an empty folder, installs from there, and imports the
    worker."""
    source, site = tmp_path / "src", tmp_path / "site"
    seen = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    _, build, _ = DOCKERFILE.split("\nFROM ")
    for *files, target in (shlex.split(line)[1:] for line in build.splitlines() if line.startswith("COPY")):
        for file in files:
            assert any(file == top or file.startswith(f"{top}/") for top in seen), f".dockerignore hides {file}"
            _copy(ROOT / file, source / target / (Path(file).name if target.endswith("/") else ""))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "--target", site, "."],
        cwd=source, check=True,
    )  # fmt: skip
    told = subprocess.run(
        [sys.executable, "-c", "import autotag.cli.app, autotag.install.migrations as m;"
         "print(autotag.cli.__file__, *(each.name for each in m.migrations(with_host_baseline=True)))"],
        cwd=tmp_path, env={"PYTHONPATH": str(site)}, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert told == [
        str(site / "autotag" / "cli" / "__init__.py"),
        *(m.name for m in migrations(with_host_baseline=True)),
    ]


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
    assert int(found[1]) >= Settings.model_fields["stop_deadline"].default + SHUTDOWN_GRACE


# --- What a worker that somebody took over could do: nothing but its work. ---

SECRETS = [  # the settings that are secrets, by the names in use
    names[-1] if name != "supabase_secret_key" else "SUPABASE_SECRET_KEY"
    for name in ("database_url", "openai_api_key", "supabase_secret_key", "openai_webhook_secret")
    if (names := environment_names(name, Settings.model_fields[name]))
]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
MANIFESTS = {m["kind"]: m for m in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]


def unit() -> dict[str, list[str]]:
    """The keys of the systemd unit's section [Service], each with its values in order."""
    told = defaultdict(list)
    section = (DEPLOY / "autotag-worker@.service").read_text().split("[Service]\n", 1)[1].split("\n[Install]")[0]
    for line in section.splitlines():
        if line and not line.startswith("#"):
            key, value = line.split("=", 1)
            told[key].append(value)
    return told


def test_images_are_named_by_their_digest() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.\d+-slim@sha256:[0-9a-f]{64}", base) for base in bases)
    assert len(set(bases)) == 1, "both stages have the same Python"
    for name, service in COMPOSE["services"].items():
        assert service.get("image", "autotag") == "autotag", f"{name} has a foreign image: name it by its digest"


def test_the_image_is_built_from_pinned_packages_alone() -> None:
    commands = [
        c for line in DOCKERFILE.splitlines() if line.startswith("RUN") for c in line[4:].split("&&") if "pip" in c
    ]
    installs = [
        shlex.split(c) for c in commands if "pip install" in c or "install" in c.split() or "wheel" in c.split()
    ]
    assert len(installs) == 4
    for words in installs:
        pinned = "--require-hashes" in words and "requirements/" in words[words.index("--requirement") + 1]
        offline = {"--no-index", "--no-deps"} <= set(words)
        assert pinned or offline, words
        assert not pinned or words[words.index("--only-binary") + 1] == ":all:"


COMPOSED = [
    ("cap_drop", ["ALL"]), ("security_opt", ["no-new-privileges:true"]), ("read_only", True),
    ("tmpfs", ["/tmp:size=1g,mode=1777"]), ("user", "10001:10001"), ("pids_limit", 128), ("mem_limit", "2g"),
    ("privileged", None), ("volumes", None), ("network_mode", None), ("ports", None), ("cap_add", None),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), COMPOSED, ids=[key for key, _ in COMPOSED])
def test_compose_gives_a_worker_no_more_than_it_needs(key: str, value: object) -> None:
    assert COMPOSE["services"]["worker"].get(key) == value


def test_compose_gives_the_webhook_no_more_than_a_worker() -> None:
    webhook = COMPOSE["services"]["webhook"]
    assert webhook.pop("extends") == {"service": "worker"}
    assert set(webhook) == {"profiles", "environment", "secrets", "ports"}
    assert all(port.startswith("127.0.0.1:") for port in webhook["ports"])


DEPLOYED = [
    (POD, "automountServiceAccountToken", False), (POD, "hostNetwork", None), (POD, "hostPID", None),
    (POD["securityContext"], "runAsNonRoot", True), (POD["securityContext"], "runAsUser", 10001),
    (POD["securityContext"], "seccompProfile", {"type": "RuntimeDefault"}),
    (CONTAINER["securityContext"], "allowPrivilegeEscalation", False),
    (CONTAINER["securityContext"], "readOnlyRootFilesystem", True),
    (CONTAINER["securityContext"], "capabilities", {"drop": ["ALL"]}),
    (CONTAINER["resources"], "limits", {"cpu": "2", "memory": "768Mi", "ephemeral-storage": "2Gi"}),
]  # fmt: skip


@pytest.mark.parametrize(("where", "key", "value"), DEPLOYED, ids=[key for _, key, _ in DEPLOYED])
def test_kubernetes_gives_a_worker_no_more_than_it_needs(where: dict[str, Any], key: str, value: object) -> None:
    assert where.get(key) == value


def test_kubernetes_lets_a_worker_write_to_tmp_alone() -> None:
    assert POD["volumes"] == [
        {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
        {"name": "secrets", "secret": {"secretName": "autotag", "defaultMode": 0o440}},
    ]
    assert [m["mountPath"] for m in CONTAINER["volumeMounts"] if not m.get("readOnly")] == ["/tmp"]


GUARDED = {
    "DynamicUser": "yes", "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes",
    "PrivateDevices": "yes", "CapabilityBoundingSet": "", "AmbientCapabilities": "", "SystemCallFilter": "@system-service",
    "SystemCallArchitectures": "native", "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX", "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes", "RestrictRealtime": "yes", "ProtectKernelTunables": "yes", "ProtectKernelModules": "yes",
    "ProtectKernelLogs": "yes", "ProtectControlGroups": "yes", "ProtectClock": "yes", "ProtectHostname": "yes",
    "ProtectProc": "invisible", "LockPersonality": "yes", "UMask": "0077", "MemoryMax": "2G", "TasksMax": "128",
}  # fmt: skip


@pytest.mark.parametrize("key", GUARDED)
def test_systemd_gives_a_worker_no_more_than_it_needs(key: str) -> None:
    assert unit()[key] == [GUARDED[key]]


def environments() -> Iterator[tuple[str, str, str]]:
    """Every variable that a file under deploy/ sets: the file, the name, the value."""
    for service in COMPOSE["services"].values():
        for name, value in service["environment"].items():
            yield "compose.yaml", name, value
    for variable in CONTAINER["env"]:
        yield "kubernetes.yaml", variable["name"], variable["value"]
    for line in unit()["Environment"]:
        for name, value in (pair.split("=", 1) for pair in line.split()):
            yield "autotag-worker@.service", name, value


def test_secrets_are_files_and_not_in_any_environment() -> None:
    given = defaultdict(set)
    for file, name, value in environments():
        if name in SECRETS:
            assert value.startswith("@"), f"{file} puts {name} into the environment"
            given[file].add(name)
    assert given["compose.yaml"] == given["kubernetes.yaml"] == set(SECRETS)
    assert given["autotag-worker@.service"] == set(SECRETS) - {"OPENAI_WEBHOOK_SECRET"}
    assert all("secretRef" not in source for source in CONTAINER["envFrom"])
    mounted = [m["mountPath"] for m in CONTAINER["volumeMounts"] if m["name"] == "secrets"]
    assert all(v["value"].startswith(f"@{mounted[0]}/") for v in CONTAINER["env"] if v["name"] in SECRETS)
    loaded = {line.split(":")[0] for line in unit()["LoadCredential"]}
    assert {v.removeprefix("@%d/") for f, n, v in environments() if f.endswith("service") and n in SECRETS} == loaded
    for service in COMPOSE["services"].values():
        named = {v.removeprefix("@/run/secrets/") for n, v in service["environment"].items() if n in SECRETS}
        assert named == set(service["secrets"]) <= set(COMPOSE["secrets"])


def lets_out(address: str, port: int) -> bool:
    """Whether the NetworkPolicy lets a worker connect to this address and port."""
    target = ipaddress.ip_address(address)
    for rule in MANIFESTS["NetworkPolicy"]["spec"]["egress"]:
        if port in [p["port"] for p in rule["ports"]]:
            for block in (to["ipBlock"] for to in rule["to"] if "ipBlock" in to):
                inside = target in ipaddress.ip_network(block["cidr"])
                if inside and not any(target in ipaddress.ip_network(e) for e in block.get("except", [])):
                    return True
    return False


@pytest.mark.parametrize(
    ("address", "port", "out"),
    [
        ("104.18.6.192", 443, True), ("3.65.151.229", 5432, True), ("3.65.151.229", 6543, True),
        ("2a05:d014:1c06:5f0::1", 5432, True), ("2606:4700::6812:6c0", 443, True), ("169.254.20.10", 53, True),
        ("104.18.6.192", 80, False), ("104.18.6.192", 22, False), ("8.8.8.8", 53, False),
        ("169.254.169.254", 443, False), ("169.254.169.254", 80, False), ("169.254.170.2", 443, False),
        ("169.254.20.10", 443, False), ("fd00:ec2::254", 443, False), ("100.100.100.200", 443, False),
        ("10.96.0.1", 443, False), ("172.20.0.1", 443, False), ("192.168.1.1", 5432, False), ("127.0.0.1", 5432, False),
        ("fe80::1", 443, False), ("fc00::1", 5432, False), ("::1", 443, False), ("64:ff9b::a9fe:a9fe", 443, False),
        ("::ffff:169.254.169.254", 443, False),
    ],
)  # fmt: skip
def test_the_network_policy_lets_workers_reach_the_internet_alone(address: str, port: int, out: bool) -> None:
    assert lets_out(address, port) is out


def test_the_network_policy_lets_nobody_else_in() -> None:
    policy = MANIFESTS["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == MANIFESTS["Deployment"]["spec"]["selector"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["ingress"] == [
        {"from": [{"namespaceSelector": {}}], "ports": [{"port": "http", "protocol": "TCP"}]},
        {"ports": [{"port": "webhook", "protocol": "TCP"}]},
    ]
    ports = {p["name"]: p["containerPort"] for p in CONTAINER["ports"]}
    assert ports == {"http": 8080, "webhook": 8081}


#: Makes every file system read-only in a view of its own, with an empty /tmp; then runs a command without capabilities.
READ_ONLY = """
set -e
awk '{print $5}' /proc/self/mountinfo | while read -r place; do mount -o remount,bind,ro "$place" 2>/dev/null || :; done
mount -t tmpfs -o size=1g tmpfs /tmp
for place in . / /usr /var/tmp /dev/shm; do
  if touch "$place/written" 2>/dev/null; then echo "$place is writable" >&2; exit 99; fi
done
unset HOME PWD
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""


@pytest.fixture
def view() -> list[str]:
    """The command that runs another one with a view of the file systems of its own."""
    unshare = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--user", "--map-root-user"])]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        skip("no mount namespace can be made here")
    return unshare


async def test_a_worker_needs_nothing_writable_but_tmp(library: Library, tmp_path: Path, view: list[str]) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    environment = library.stack.worker_environment() | {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    for name in set(SECRETS) & set(environment):
        (secrets / name).write_text(environment[name])
        environment[name] = f"@secrets/{name}"  # from where it starts: the test's own /tmp is hidden from it
    assets = await library.upload(60)
    job = library.enqueue(assets)
    assert job["strategy"] == "batch"
    process = await asyncio.create_subprocess_exec(
        *view, "sh", "-c", READ_ONLY, "sh", sys.executable, "-m", "autotag", "worker",
        env=environment, cwd=tmp_path, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        await until(
            lambda: bool(library.job(job["job_id"])["finished_at"]) or process.returncode is not None, "the job"
        )
    finally:
        if process.returncode is None:
            process.terminate()
        _, said = await process.communicate()
    assert process.returncode == 0, said.decode()
    assert "Read-only file system" not in said.decode()
    library.check_tags(assets)
