"""Starts a program as systemd would: start.py ROOT UNIT[,DROP-IN...] COMMAND...

ROOT is the service's root directory. COMMAND takes the place of ExecStart=. This runs as root in a mount namespace of
its own, applies what of the unit's settings needs no systemd, and becomes the program. A setting that it does not know
is an error, so that none is passed over in silence.
"""

import ctypes
import os
import resource
import subprocess
import sys

# Settings without effect on what a program may do, or that systemd itself, cgroups or devices are needed for.
IGNORED = """
Type NotifyAccess ExecStart ExecReload Restart RestartSec RestartPreventExitStatus WatchdogSec TimeoutStopSec MemoryMax TasksMax
KillMode OOMPolicy FileDescriptorStoreMax
ConfigurationDirectory RuntimeDirectoryPreserve PrivateMounts PrivateDevices PrivateTmp ProtectHome ProtectClock
ProtectControlGroups ProtectHostname ProtectKernelLogs ProtectKernelModules ProtectKernelTunables RemoveIPC
RestrictNamespaces RestrictRealtime RestrictSUIDSGID LockPersonality SystemCallArchitectures
""".split()
CAPABILITIES = {"CAP_NET_BIND_SERVICE": 10}
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}
DIRECTORIES = {"StateDirectory": "/var/lib", "LogsDirectory": "/var/log", "RuntimeDirectory": "/run"}

libc = ctypes.CDLL(None, use_errno=True)
seccomp = ctypes.CDLL("libseccomp.so.2")
seccomp.seccomp_init.restype = ctypes.c_void_p


def check(result):
    if result < 0:
        error = ctypes.get_errno() or -result
        raise OSError(error, os.strerror(error))


def read(files):
    """The settings of [Service]: a later value replaces, or adds to a list; an empty one clears it."""
    settings = {}
    for file in files:
        section = None
        for line in open(file):
            line = line.strip()
            if line.startswith("["):
                section = line
            elif section == "[Service]" and line and not line.startswith("#"):
                name, value = line.split("=", 1)
                values = settings.setdefault(name, [])
                settings[name] = values + [value] if value else []
    return settings


def words(settings, name):
    return " ".join(settings.pop(name, [])).split()


def one(settings, name, default=None):
    return settings.pop(name, [default])[-1]


def accounts(root, file):
    return [line.strip().split(":") for line in open(f"{root}/etc/{file}")]


def mount(*args):
    subprocess.run(["mount", *args], check=True)


def system_calls(name):
    """Those of a group, such as @chown, or the one of that name."""
    if not name.startswith("@"):
        return {name}
    listed = subprocess.run(["systemd-analyze", "syscall-filter", name], check=True, capture_output=True, text=True)
    names = [line.strip() for line in listed.stdout.splitlines()[1:] if not line.strip().startswith("#")]
    return set().union(*(system_calls(n) for n in names if n))


def allowed_system_calls(lines):
    """A first line without ~ makes it a list of what is allowed, which later lines add to and take from."""
    allowed = system_calls("@default")
    assert not lines[0].startswith("~")
    for line in lines:
        named = set().union(*(system_calls(n) for n in line.lstrip("~").split()))
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed


def filter_system_calls(allowed, families):
    """Answers EPERM to what is not allowed, and EAFNOSUPPORT for other sockets. No page is both written and executed."""

    class Compare(ctypes.Structure):
        _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]

    EQUAL, MASKED = 4, 7
    error = lambda number: 0x00050000 | number
    allow = 0x7FFF0000

    def load(otherwise, rules):
        context = ctypes.c_void_p(seccomp.seccomp_init(ctypes.c_uint32(otherwise)))
        for action, name, comparisons in rules:
            number = seccomp.seccomp_syscall_resolve_name(name.encode())
            # Negative are those that this architecture does not have.
            if number >= 0:
                array = (Compare * len(comparisons))(*comparisons)
                check(seccomp.seccomp_rule_add_array(context, ctypes.c_uint32(action), number, len(comparisons), array))
        check(seccomp.seccomp_load(context))

    write, execute = 2, 4
    # Of three families at most, all numbers of those between and beyond them are refused.
    refused = [n for n in range(64) if n not in families]
    load(allow, [(error(97), "socket", [Compare(0, EQUAL, n, 0)]) for n in refused]
         + [(error(1), "mmap", [Compare(2, MASKED, write | execute, write | execute)])]
         + [(error(1), "mprotect", [Compare(2, MASKED, execute, execute)])])
    load(error(1), [(allow, name, []) for name in allowed])


def main():
    root, units, command = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
    settings = read(units)
    for name in IGNORED:
        settings.pop(name, None)

    name = one(settings, "User")
    user = next(a for a in accounts(root, "passwd") if a[0] == name)
    groups = {a[0]: int(a[2]) for a in accounts(root, "group")}
    member = [int(a[2]) for a in accounts(root, "group") if user[0] in a[3].split(",")]
    uid, gid = int(user[2]), groups[one(settings, "Group")]
    member += [groups[g] for g in words(settings, "SupplementaryGroups")]

    # Directories, and a root that is otherwise read-only.
    writable = []
    for kind, parent in DIRECTORIES.items():
        mode = int(one(settings, f"{kind}Mode", "0755"), 8)
        for name in words(settings, kind):
            path = f"{root}{parent}/{name}"
            os.makedirs(path, exist_ok=True)
            os.chmod(path, mode)
            os.chown(path, uid, gid)
            writable.append(path)
    mount("--make-rprivate", "/")
    assert one(settings, "ProtectSystem") == "strict"
    mount("--bind", root, root)
    mount("-o", "remount,bind,ro", root)
    for path in writable:
        mount("--bind", path, path)
        mount("-o", "remount,bind,rw", path)
    for path in ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ssl"]:
        if os.path.isdir(path) and os.path.isdir(root + path) and not os.path.islink(root + path):
            mount("--bind", "-o", "ro", path, root + path)
    for device in ["null", "urandom"]:
        mount("--bind", f"/dev/{device}", f"{root}/dev/{device}")
    mount("-t", "tmpfs", "tmpfs", f"{root}/tmp")
    invisible, subset = one(settings, "ProtectProc"), one(settings, "ProcSubset")
    mount("-t", "proc", "-o", f"hidepid={invisible},subset={subset}", "proc", f"{root}/proc")

    allowed = allowed_system_calls(settings.pop("SystemCallFilter"))
    assert one(settings, "SystemCallErrorNumber") == "EPERM"
    families = [FAMILIES[name] for name in words(settings, "RestrictAddressFamilies")]
    assert one(settings, "MemoryDenyWriteExecute") == "yes"

    for name in ["NOFILE", "CORE"]:
        kind = getattr(resource, f"RLIMIT_{name}")
        highest = resource.getrlimit(kind)[1]
        limit = int(one(settings, f"Limit{name}"))
        limit = limit if highest == resource.RLIM_INFINITY else min(limit, highest)
        resource.setrlimit(kind, (limit, limit))
    os.umask(int(one(settings, "UMask"), 8))
    os.chroot(root)
    os.chdir("/")

    # Capabilities and identity, in the order in which systemd has them.
    ambient = [CAPABILITIES[c] for c in words(settings, "AmbientCapabilities")]
    bounding = [CAPABILITIES[c] for c in words(settings, "CapabilityBoundingSet")]
    PR_SET_KEEPCAPS, PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 8, 23, 24, 38, 47
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) == 1 and capability not in bounding:
            check(libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0))
    check(libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))
    os.setgroups(member)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    mask = sum(1 << c for c in ambient)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)))
    for capability in ambient:
        check(libc.prctl(PR_CAP_AMBIENT, 2, capability, 0, 0))
    assert one(settings, "NoNewPrivileges") == "yes"
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))

    assert not settings, f"not applied: {settings}"
    environment = {k: v for k, v in os.environ.items() if k in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
    filter_system_calls(allowed, families)
    os.execve(command[0], command, environment)


main()
