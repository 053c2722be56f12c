"""The command from a process that has imported what it needs: each call is a fork of it, quicker by seconds of imports.

`command()` gives a program that takes the place of `python -m batchlab`: it hands its arguments, folder, environment
and streams to a server, which runs them in a process of their own and answers with the exit code. Tests of signals, of
terminals and of what is imported run the real one.
"""

import atexit
import functools
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

CLIENT = """#!{python} -SE
import json, os, socket, sys
call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [len(call).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(call)
    code = int(server.recv(16))
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@functools.cache
def command() -> Path:
    """The program; the server that it speaks to is begun with it and ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    address, client = f"{folder.name}/address", Path(folder.name) / "batchlab"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    source = str(Path(__file__).parents[1] / "src")
    server = subprocess.Popen(
        [sys.executable, __file__, address],
        env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None and server.stdout.read(1) == b"!", "the server did not begin"
    atexit.register(folder.cleanup)
    atexit.register(server.kill)
    return client


def serve(address: str) -> None:
    """Until this process's stdin is closed."""
    import torch  # noqa: F401

    import batchlab.cli.tables
    import batchlab.spine.tune  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    sys.stdout.write("!")
    sys.stdout.flush()
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            answer(connection)
            os._exit(0)
        connection.close()


def answer(connection: socket.socket) -> None:
    """Runs one call in a child and sends its exit code, negative for a signal."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    call = b""
    while len(call) < int.from_bytes(size, "big"):
        call += connection.recv(1 << 16)
    child = os.fork()
    if child == 0:
        connection.close()
        run(*json.loads(call), streams)
    connection.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


def run(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """As `python -m batchlab`: in that folder, with that environment and those streams."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["batchlab", *arguments]
    sys.path[0] = folder
    sys.path[1:1] = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part not in sys.path]
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode) for number, mode in enumerate("rww"))  # noqa: SIM115
    code: object = 1
    try:
        runpy.run_module("batchlab", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(int(code) if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve(sys.argv[1])
