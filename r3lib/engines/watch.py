"""Run a command until the parent process exits: `python watch.py COMMAND...`, in its own session.

Standard input is a pipe from the parent, which ends when the parent closes it or dies, even of
kill -9. Then, or when the command ends, every process of the session is stopped.
"""

import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 10  # seconds between asking the command to end and killing it


def stop_on_exit(child: subprocess.Popen) -> None:
    """Wait for the end of standard input, then end all processes of the session, this one too."""
    os.read(sys.stdin.fileno(), 1)
    child.terminate()
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=stop_on_exit, args=[command], daemon=True).start()
    command.wait()
    os.killpg(0, signal.SIGKILL)
