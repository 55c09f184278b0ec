#!/usr/bin/env python3
"""Stands in for the program of an agent that reloads: it takes part in the handover up to a step, and fails there.

It says what the next process of an agent says (proto/net/src/handover), on the socket that is its standard input. The file
FAIL_AT beside it names the step, and then what happens: `killed`, `hangs` or `nonsense`.
"""

import array
import json
import os
import signal
import socket
import sys

channel = socket.socket(fileno=0)


def say(message, *descriptors):
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    channel.sendmsg([json.dumps(message).encode()], rights)


def fail(step):
    with open(os.path.join(os.path.dirname(sys.argv[0]), "FAIL_AT")) as file:
        at, how = file.read().split()
    if step != at:
        return
    if how == "nonsense":
        channel.send(b"nonsense")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def receive_until(last):
    while True:
        message = json.loads(channel.recv(65536))
        if message == last:
            return


if sys.argv[-1] == "--start-next":
    fail("start")
    child = os.fork()
    if child:
        say({"started": child}, os.pidfd_open(child))
        sys.exit()
    os.execv(sys.argv[0], [*sys.argv[:-1], "--take-over"])

fail("begin")
receive_until("load")
fail("load")
say({"loaded": {"version": "9.9.9", "unused": []}})
fail("loaded")
receive_until("link")
fail("link")
say({"failed": "the step is unknown"})
