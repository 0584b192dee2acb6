"""A server whose children run `fedamole` commands: imports take most of the time of a tiny job.

Every command runs in a process of its own, forked when all libraries are loaded, with the folder,
environment and streams of its caller. Start it with the path of a socket.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path


def serve(path: Path) -> None:
    """Answer until killed."""
    _load_libraries()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(64)
        # The system clears the children away.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            connection, _ = server.accept()
            if not os.fork():
                server.close()
                _answer(connection)
            connection.close()


def _load_libraries() -> None:
    """Import what the commands import; nothing is computed, so that no thread is there to fork."""
    from fedamole.cli.libraries import prepare_libraries

    prepare_libraries(offline=True)
    import fedamole.client
    import fedamole.datasets.loading
    import fedamole.figures
    import fedamole.tables  # noqa: F401


def _answer(connection: socket.socket) -> None:
    """Run the command of a connection, send its exit status, and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    length, content = int.from_bytes(head, "big"), b""
    while len(content) < length:
        content += connection.recv(1 << 20)
    request = json.loads(content)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["fedamole", *request["argv"]]
    from fedamole.cli import main

    status = 1
    try:
        status = main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(bytes([status]))
        os._exit(status)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
