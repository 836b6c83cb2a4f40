"""The processes that decode images: ``python -m autotag.images.child PARENT CONTROL``.

Image files come from strangers, and decoders have bugs. So the worker, which has the project's keys, decodes no file
itself. It starts one *fork server*, which is this program with an empty environment and a single socket. The fork
server imports the decoders and forks a child for each order of the worker, so a new child takes only 3 ms and a few
megabytes. A child gets files as descriptors over its own socket, and answers with bytes. `children` is the worker's
side.

Neither process can get more rights, write files, open many files, or outlive the worker. A child also has limits on
memory and processor time. The worker watches both, and kills a child that exceeds them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any, NoReturn

HEADER = struct.Struct("!II")  # lengths of the JSON and of the bytes after it
MAX_REQUEST = 1000  # bytes of a request's JSON
NICENESS = 5  # lower priority than the worker, which also serves other images
OPEN_FILES = 64

#: From linux/prctl.h.
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38


def main() -> None:
    """Runs the fork server until the worker ends."""
    parent, control = int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    _restrict(parent)
    os.nice(NICENESS)
    _warm_up()
    gc.collect()
    gc.freeze()  # the collector would write to pages that are shared with the children
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MAX_REQUEST, 1)
        if not message:
            return
        order: dict[str, Any] = json.loads(message)
        if "reap" in order:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(order["reap"], 0)
            control.sendall(b"{}\n")
            continue
        [descriptor] = descriptors
        fork_server = os.getpid()
        pid = os.fork()
        if pid == 0:
            control.close()
            _become_child(fork_server, socket.socket(fileno=descriptor), order)
        os.close(descriptor)
        control.sendall(json.dumps({"pid": pid}).encode() + b"\n")


def _restrict(parent: int) -> None:
    """Removes the rights and resources that this process does not need.

    SIGTERM and SIGINT are ignored: a service manager sends them to all processes of the worker, but the worker still
    decodes images while it stops.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _die_with(parent)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))


def _die_with(parent: int) -> None:
    """Ends this process when its parent ends, even if the parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _warm_up() -> None:
    """Imports the decoders, and the modules that they import with their first image."""
    import io

    from PIL import Image

    importlib.import_module("autotag.images.prepare")
    importlib.import_module("autotag.images.vips").start()
    Image.init()
    Image.new("RGB", (8, 8)).save(io.BytesIO(), "JPEG")


def _become_child(fork_server: int, line: socket.socket, order: dict[str, Any]) -> NoReturn:
    """Turns this process into a child, which answers requests until the worker closes its line."""
    code = 1
    try:
        _die_with(fork_server)
        seconds, data = int(order["cpu"]), used_memory("self") + int(order["data"])
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        while (request := _receive(line)) is not None:
            answer, image = _answer(*request, data)
            text = json.dumps(answer).encode()
            line.sendall(HEADER.pack(len(text), len(image)) + text + image)
        code = 0
    finally:
        os._exit(code)


def used_memory(process: int | str) -> int:
    """Bytes of a process that RLIMIT_DATA counts; 0 if the system does not provide this."""
    try:
        with open(f"/proc/{process}/statm", "rb") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except OSError:
        return 0


def _receive(line: socket.socket) -> tuple[int, dict[str, Any]] | None:
    """The next request and the descriptor of its file; None: the worker has closed the line."""
    message, descriptors, _, _ = socket.recv_fds(line, MAX_REQUEST, 1)
    if not message:
        return None
    return descriptors[0], json.loads(message)


def _answer(descriptor: int, request: dict[str, Any], data: int) -> tuple[dict[str, Any], bytes]:
    """Prepares an image. data: the bytes that this process may allocate.

    A decoder that runs out of memory may report that the file is damaged. So a file counts as damaged only if decoding
    also fails with a much higher limit. During that second try, the worker limits the memory: it kills a process that
    uses too much.
    """
    try:
        path = Path(f"/dev/fd/{descriptor}")
        _limit_memory(data)
        answer = _try(path, request, data)
        if answer[0].get("code") == "damaged_image":
            _limit_memory(data + int(request["most"]))
            answer = _try(path, request, data)
        return answer
    finally:
        os.close(descriptor)


def _limit_memory(data: int) -> None:
    """Sets how many bytes this process may allocate."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data if most == resource.RLIM_INFINITY else min(data, most), most))


def _try(path: Path, request: dict[str, Any], data: int) -> tuple[dict[str, Any], bytes]:
    """Prepares an image if the request allows the memory that it needs; otherwise only returns that need."""
    from autotag.errors import TaggingError
    from autotag.images.prepare import measure, prepare_opened

    try:
        side = int(request["side"])
        opened = measure(path, side, int(request["most"]))
        about = {"width": opened.width, "height": opened.height, "need": opened.need}
        if opened.need > int(request["max_need"]):
            return about | {"advice": opened.advice}, b""
        if opened.silent:
            _limit_memory(data + int(request["most"]))
        prepared = prepare_opened(opened, side)
        return about | {"notes": prepared.notes}, prepared.jpeg
    except TaggingError as error:
        return {"code": error.code, "message": error.message}, b""
    except MemoryError:
        return {"memory": True}, b""
    except Exception as error:  # noqa: BLE001 (a bug, which the worker logs)
        return {"bug": f"{type(error).__name__}: {error}"[:500]}, b""


if __name__ == "__main__":
    main()
