"""Opens a Unix socket and says what came of it: caller.py USER GROUPS SOCKET TARGET [ROOT DIRECTORY].

With ROOT it does so in a container: that is its root, and of the host it has the one directory. Then come the sockets that
can be found there. It needs a mount namespace of its own.
"""

import errno
import os
import socket
import subprocess
import sys

user, groups, path, target, *container = sys.argv[1:]
if container:
    root, directory = container
    inside = root + "/run/" + os.path.basename(directory)
    os.makedirs(inside)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", directory, inside], check=True)
    os.chroot(root)
    os.chdir("/")
os.setgroups([int(group) for group in groups.split(",") if group])
os.setresgid(int(user), int(user), int(user))
os.setresuid(int(user), int(user), int(user))
try:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(path)
        caller.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        answer = caller.makefile(newline="\n")
        print(answer.readline().split()[1])
        while answer.readline().strip():
            pass
        print(answer.readline().strip())
except OSError as error:
    print(errno.errorcode[error.errno])
if container:
    for directory, _, files in os.walk("/"):
        for file in files:
            print("found", os.path.join(directory, file))
