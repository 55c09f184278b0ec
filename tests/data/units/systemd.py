#!/usr/bin/env python3
"""Runs Debian's systemd as PID 1 in namespaces of its own, for tests of units. Needs root, and no more than the stdlib.

    systemd.py run   ROOT [OPTION...]   in the foreground; ends with SIGTERM, or at the end of stdin with --stdin
    systemd.py start ROOT [OPTION...]   the same in the background, once it is up
    systemd.py stop  ROOT
    systemd.py exec  ROOT COMMAND...    runs a command inside (systemctl, journalctl, ...)
    systemd.py hostpid ROOT PID...      the pids out here of pids in there

`run` and `start` print one line, the host's pid of that systemd, when its default target is reached. ROOT is an existing
or new directory; it appears inside under its own path. What else is inside:

  /                        an overlay of the host's /; whatever is written goes to a tmpfs and is gone at the end
  /run, /tmp, /dev         tmpfs
  /proc/sys, irq, ...      read-only, since systemd would raise the host's limits. But units with ProtectControlGroups=,
                           ProtectProc= and the like get a new /proc from systemd: don't run root's units with those.
  /usr/lib/systemd/system  a few units only. There is a journald, but no D-Bus, udev, logind, getty or timer.
  network                  the caller's
  cgroups                  a version 2 hierarchy without the controllers that the host has bound to version 1

Options, each any number of times:

  --unit FILE[:NAME]         a unit for /etc/systemd/system; NAME may be a drop-in, x.service.d/y.conf
  --user NAME:ID             a user and a group with that name and id
  --copy SRC:DST[:MODE]      copies a file to the overlay, and makes DST's directories; owner root
  --bind SRC:DST             binds a file or directory, read-only
  --start UNIT               starts a unit at boot
  --env NAME=VALUE           for PID 1
  --stdin                    ends when stdin does (the caller may have been killed)
"""

import argparse
import ctypes
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import traceback

SYSTEMD = "/usr/lib/systemd/systemd" if os.path.exists("/usr/lib/systemd/systemd") else "/lib/systemd/systemd"
LIB_UNITS = os.path.join(os.path.dirname(SYSTEMD), "system")
# What is taken from the host's systemd. Everything else is left out.
UNITS = """
basic.target multi-user.target sockets.target timers.target paths.target slices.target network.target
network-pre.target network-online.target shutdown.target final.target umount.target poweroff.target systemd-poweroff.service
exit.target systemd-exit.service nss-user-lookup.target time-sync.target local-fs.target systemd-journald.service
systemd-journald.socket systemd-journald-dev-log.socket
""".split()
SYSINIT = """[Unit]
Description=System Initialization
DefaultDependencies=no
Wants=systemd-journald.service
After=systemd-journald.service
"""
SYSTEM_CONF = "[Manager]\nShowStatus=no\nCrashShell=no\nLogTarget=journal\n"
# Audit= would be switched on for the whole machine.
JOURNALD_CONF = "[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\nForwardToWall=no\nRateLimitIntervalSec=0\nRuntimeMaxUse=64M\n"

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWPID = 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x20000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
CAP_SYS_MODULE, CAP_SYS_TIME = 16, 25
PREFIX = "systemd-py-"

libc = ctypes.CDLL(None, use_errno=True)
libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]


def check(result, what):
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def mount(source, target, kind=None, flags=0, data=None):
    c = lambda s: None if s is None else os.fsencode(s)
    check(libc.mount(c(source), c(target), c(kind), flags, c(data)), f"mount {source} {target} {kind} {data}")


def write(path, text, mode=0o644):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(text)
    os.chmod(path, mode)


def touch_like(source, target):
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "a").close()


# ---- cgroups, seen from the host

def cgroup2():
    """The directory, under the host's mount of cgroup v2, of this process's cgroup."""
    own = next(line.split(":", 2)[2] for line in open("/proc/self/cgroup").read().splitlines() if line.startswith("0::"))
    for line in open("/proc/self/mountinfo"):
        left, right = line.split(" - ")
        if right.split()[0] == "cgroup2":
            root, point = left.split()[3:5]
            relative = os.path.relpath(own, root)
            if not relative.startswith(".."):
                return os.path.normpath(os.path.join(point, relative))
    raise SystemExit("no cgroup2 is mounted")


def remove_cgroup(path):
    """Removes it with those below it. A cgroup whose last process has just been reaped may be busy for a moment."""
    deadline = time.monotonic() + 5
    while os.path.isdir(path):
        for directory, _, _ in os.walk(path, topdown=False):
            try:
                os.rmdir(directory)
            except OSError:
                pass
        if time.monotonic() > deadline:
            raise SystemExit(f"{path} is still in use")
        time.sleep(0.01)


def lives(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def sweep(parent):
    """Cgroups left by a `run` that was killed. Those in use can't be removed, so that trying is harmless."""
    for name in os.listdir(parent):
        pid = name.removeprefix(PREFIX)
        if pid != name and pid.isdigit() and not lives(pid):
            for directory, _, _ in os.walk(os.path.join(parent, name), topdown=False):
                try:
                    os.rmdir(directory)
                except OSError:
                    pass


# ---- the inside

def build(root, options, console):
    """In the new mount and PID namespaces: makes the tree, and enters it."""
    mount(None, "/", None, REC | PRIVATE)
    area = os.path.join(root, ".overlay")
    os.makedirs(area, exist_ok=True)
    mount("tmpfs", area, "tmpfs", 0, "mode=755")
    os.chdir(area)
    for name in ["upper", "work", "root"]:
        os.mkdir(name)
    # Relative names, since commas and colons would have to be escaped.
    mount("overlay", "root", "overlay", 0, "lowerdir=/,upperdir=upper,workdir=work")
    new = os.path.join(area, "root")

    mount("proc", f"{new}/proc", "proc", NOSUID | NODEV | NOEXEC)
    for name in ["sys", "sysrq-trigger", "irq", "bus", "fs"]:
        path = f"{new}/proc/{name}"
        if os.path.exists(path):
            mount(path, path, None, BIND)
            mount(None, path, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV | NOEXEC)
    mount("sysfs", f"{new}/sys", "sysfs", NOSUID | NODEV | NOEXEC | RDONLY)
    mount("cgroup2", f"{new}/sys/fs/cgroup", "cgroup2", NOSUID | NODEV | NOEXEC)
    mount("tmpfs", f"{new}/run", "tmpfs", NOSUID | NODEV, "mode=755")
    mount("tmpfs", f"{new}/tmp", "tmpfs", NOSUID | NODEV, "mode=1777")
    mount("tmpfs", f"{new}/dev", "tmpfs", NOSUID, "mode=755")
    for name, minor in [("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)]:
        os.mknod(f"{new}/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(1, minor))
        os.chmod(f"{new}/dev/{name}", 0o666)
    os.mknod(f"{new}/dev/tty", stat.S_IFCHR | 0o666, os.makedev(5, 0))
    os.chmod(f"{new}/dev/tty", 0o666)
    for name, target in [("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
                         ("stderr", "/proc/self/fd/2"), ("ptmx", "pts/ptmx")]:
        os.symlink(target, f"{new}/dev/{name}")
    for name in ["pts", "shm"]:
        os.mkdir(f"{new}/dev/{name}")
    mount("devpts", f"{new}/dev/pts", "devpts", NOSUID | NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5")
    mount("tmpfs", f"{new}/dev/shm", "tmpfs", NOSUID | NODEV, "mode=1777")
    touch_like(console, f"{new}/dev/console")
    mount(console, f"{new}/dev/console", None, BIND)

    # Nothing starts but what is named here.
    texts = {}
    for name in UNITS:
        path = os.path.join(LIB_UNITS, name)
        if os.path.isfile(path):
            texts[name] = open(path).read()
    units = new + LIB_UNITS
    mount("tmpfs", units, "tmpfs", 0, "mode=755")
    for name, text in texts.items():
        write(f"{units}/{name}", text)
    write(f"{units}/sysinit.target", SYSINIT)
    os.makedirs(f"{units}/sockets.target.wants")
    for name in ["systemd-journald.socket", "systemd-journald-dev-log.socket"]:
        os.symlink(f"../{name}", f"{units}/sockets.target.wants/{name}")
    for path in [f"{os.path.dirname(LIB_UNITS)}/system-generators", "/etc/systemd/system-generators", "/etc/systemd/system",
                 "/usr/lib/systemd/system-environment-generators", "/etc/systemd/system.conf.d",
                 "/etc/systemd/journald.conf.d", "/usr/local/lib/systemd/system"]:
        if os.path.isdir(new + path) or path == "/etc/systemd/system":
            os.makedirs(new + path, exist_ok=True)
            mount("tmpfs", new + path, "tmpfs", 0, "mode=755")
    write(f"{new}/etc/systemd/system.conf", SYSTEM_CONF)
    write(f"{new}/etc/systemd/journald.conf", JOURNALD_CONF)
    # Without it systemd would enable every unit by its presets.
    write(f"{new}/etc/machine-id", os.urandom(16).hex() + "\n", 0o444)
    write(f"{new}/etc/hostname", "container\n")

    for name, number in options.user:
        for file, line in [("passwd", f"{name}:x:{number}:{number}::/nonexistent:/usr/sbin/nologin\n"), ("group", f"{name}:x:{number}:\n")]:
            lines = [l for l in open(f"{new}/etc/{file}") if l.split(":")[0] != name]
            write(f"{new}/etc/{file}", "".join(lines) + line)
    for source, name in options.unit:
        write(f"{new}/etc/systemd/system/{name}", open(source).read())
    for source, target, mode in options.copy:
        os.makedirs(os.path.dirname(new + target), exist_ok=True)
        if os.path.lexists(new + target):
            os.unlink(new + target)
        shutil.copyfile(source, new + target)
        os.chmod(new + target, mode if mode is not None else os.stat(source).st_mode & 0o7777)
    for source, target in options.bind:
        touch_like(source, new + target)
        mount(source, new + target, None, BIND)
        mount(None, new + target, None, REMOUNT | BIND | RDONLY)
    if options.start:
        os.makedirs(f"{new}/etc/systemd/system/multi-user.target.wants", exist_ok=True)
    for name in options.start:
        os.symlink(f"/etc/systemd/system/{name}", f"{new}/etc/systemd/system/multi-user.target.wants/{name}")
    os.makedirs(new + root, exist_ok=True)
    mount(root, new + root, None, BIND)

    os.chdir(new)
    check(libc.pivot_root(b".", b"."), "pivot_root")
    check(libc.umount2(b".", 2), "umount")
    os.chdir("/")


def become_systemd(root, options, cgroup, console, address, report):
    try:
        check(libc.prctl(1, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
        os.setsid()
        with open(f"{cgroup}/cgroup.procs", "w") as file:
            file.write("0")
        check(libc.unshare(NEWNS | NEWUTS | NEWIPC | NEWCGROUP), "unshare")
        build(root, options, console)
        for capability in [CAP_SYS_MODULE, CAP_SYS_TIME]:
            check(libc.prctl(24, capability, 0, 0, 0), "PR_CAPBSET_DROP")
        null = os.open("/dev/null", os.O_RDONLY)
        out = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY)
        for fd, target in [(null, 0), (out, 1), (out, 2)]:
            os.dup2(fd, target)
        os.closerange(3, report)
        os.closerange(report + 1, 1024)
        os.umask(0o022)
        for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):
                pass
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        env = {"container": "other", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM": "dumb",
               "LANG": "C.UTF-8", "NOTIFY_SOCKET": address}
        env.update(e.split("=", 1) for e in options.env)
        os.execve(SYSTEMD, [SYSTEMD, "--system", "--unit=multi-user.target"], env)
    except BaseException:
        os.write(report, traceback.format_exc().encode())
    finally:
        os._exit(1)


# ---- the outside

def run(root, options):
    """Gives the exit code. What is left of an earlier `run` that was killed goes first."""
    os.makedirs(root, exist_ok=True)
    parent = cgroup2()
    sweep(parent)
    cgroup = os.path.join(parent, f"{PREFIX}{os.getpid()}")
    os.mkdir(cgroup)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    for number in [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]:
        signal.signal(number, lambda *_: None)
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    notify.bind("")  # an abstract name, which the kernel chooses
    address = "@" + notify.getsockname()[1:].decode()
    master, slave = pty.openpty()
    log = open(os.path.join(root, "console.log"), "ab", buffering=0)
    reports, report = os.pipe()

    check(libc.unshare(NEWPID), "unshare")
    pid = os.fork()
    if pid == 0:
        become_systemd(root, options, cgroup, os.ttyname(slave), address, report)
    os.close(report)
    file = os.path.join(root, "systemd.pid")
    try:
        failure = b""
        while chunk := os.read(reports, 65536):
            failure += chunk
        if failure:
            sys.stderr.write(failure.decode())
            return 1
        write(file, json.dumps({"pid": pid, "run": os.getpid()}))
        ended = os.pidfd_open(pid)
        watched = [ended, wake, notify, master] + ([0] if options.stdin else [])
        deadline = time.monotonic() + options.timeout
        up = False
        while True:
            ready, _, _ = select.select(watched, [], [], None if up else max(0, deadline - time.monotonic()))
            if master in ready:
                try:
                    log.write(os.read(master, 65536))
                except OSError:
                    watched.remove(master)
            if notify in ready:
                said = notify.recv(65536)
                if not up and b"READY=1" in said.splitlines():
                    up = True
                    print(pid, flush=True)
            if wake in ready or (0 in ready and not os.read(0, 4096)):
                return 0
            if ended in ready:
                print("systemd has ended", file=sys.stderr)
                return 0 if up else 1
            if not up and time.monotonic() >= deadline:
                print(f"systemd is not up after {options.timeout} s; see console.log", file=sys.stderr)
                return 1
    finally:
        # With PID 1 of the namespace all others in it are killed, and it is reaped once they are gone. So are the mounts.
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(pid, 0)
        remove_cgroup(cgroup)
        for leftover in [file, os.path.join(root, ".overlay")]:
            if os.path.isdir(leftover):
                os.rmdir(leftover)
            elif os.path.exists(leftover):
                os.unlink(leftover)


def state(root):
    with open(os.path.join(root, "systemd.pid")) as file:
        return json.load(file)


def start(root, arguments):
    os.makedirs(root, exist_ok=True)
    with open(os.path.join(root, "run.log"), "ab") as log:
        child = subprocess.Popen([sys.executable, os.path.abspath(__file__), "run", root, *arguments], stdin=subprocess.DEVNULL,
                                 stdout=subprocess.PIPE, stderr=log, start_new_session=True)
    line = child.stdout.readline().decode()
    if not line:
        child.wait()
        sys.stderr.write(open(os.path.join(root, "run.log")).read())
        raise SystemExit(1)
    print(line, end="", flush=True)


def stop(root):
    try:
        supervisor = state(root)["run"]
        fd = os.pidfd_open(supervisor)
    except (FileNotFoundError, ProcessLookupError):
        return
    if b"systemd.py" not in open(f"/proc/{supervisor}/cmdline", "rb").read():
        return
    signal.pidfd_send_signal(fd, signal.SIGTERM)
    select.select([fd], [], [])


def host_pid(systemd, inner):
    """The pid out here of a pid in the PID namespace whose PID 1 is `systemd`."""
    namespace = os.readlink(f"/proc/{systemd}/ns/pid")
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.readlink(f"/proc/{name}/ns/pid") == namespace:
                    line = next(l for l in open(f"/proc/{name}/status") if l.startswith("NSpid:"))
                    if int(line.split()[-1]) == inner:
                        return int(name)
            except OSError:
                pass
    return None


def enter(systemd):
    return ["nsenter", "-t", str(systemd), "-m", "-p", "-u", "-i", "--"]


def parse(arguments):
    def pair(text):
        source, target = text.split(":", 1)
        return os.path.abspath(source), target

    def unit(text):
        source, _, name = text.partition(":")
        return os.path.abspath(source), name or os.path.basename(source)

    def user(text):
        name, number = text.split(":")
        return name, int(number)

    def copy(text):
        source, target, *mode = text.split(":")
        return os.path.abspath(source), target, int(mode[0], 8) if mode else None

    parser = argparse.ArgumentParser()
    for name, kind in [("unit", unit), ("user", user), ("copy", copy), ("bind", pair), ("start", str), ("env", str)]:
        parser.add_argument(f"--{name}", type=kind, action="append", default=[])
    parser.add_argument("--stdin", action="store_true")
    parser.add_argument("--timeout", type=float, default=30)
    return parser.parse_args(arguments)


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in ("run", "start", "stop", "exec", "hostpid"):
        print(__doc__)
        return 2
    verb, root, rest = sys.argv[1], os.path.realpath(sys.argv[2]), sys.argv[3:]
    if rest[:1] == ["--"]:
        rest = rest[1:]
    if verb == "run":
        return run(root, parse(rest))
    if verb == "start":
        parse(rest)
        return start(root, rest)
    if verb == "stop":
        return stop(root)
    systemd = state(root)["pid"]
    if verb == "hostpid":
        for inner in rest:
            print(host_pid(systemd, int(inner)))
        return 0
    command = enter(systemd) + rest
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
