"""Run a command for as long as whoever started us lives: `python watch.py COMMAND...` in a session of its own.

Our standard input is a pipe from the one who started us; it ends when he closes it or dies, of kill -9 too. Then,
or when the command ends, all that it started goes with it. Imports nothing of ours, so that it starts at once.
"""

import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 10  # seconds between asking the command to end and killing it


def stop_when_alone(child: subprocess.Popen) -> None:
    """Wait for the end of standard input, then end the session's processes, ourselves among them."""
    os.read(sys.stdin.fileno(), 1)
    child.terminate()
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=stop_when_alone, args=[command], daemon=True).start()
    command.wait()
    os.killpg(0, signal.SIGKILL)
