#!/usr/bin/env bash
# Runs every test: format, lints, dependencies, unit tests, and whole agents against real peers.
#
#   tests/run.sh             everything
#   tests/run.sh quick       fmt, clippy and unit: needs neither root nor packages beyond a compiler and OpenSSH
#   tests/run.sh STEP...     only these: fmt clippy deny unit instructions e2e quickstart bench
#
# It installs what the steps need (as root, with apt, pip and cargo). The steps e2e, quickstart and bench need root for
# what they test: network namespaces, a DNS server on port 53, accounts. Nothing is skipped: what cannot run fails.
# TEST_BYTES and TEST_STREAMS make the longest end-to-end tests shorter, and TEST_THREADS says how many of the others
# run at once. A further step, chaos, is for tests/chaos.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
tools=$CARGO_TARGET_DIR/tools

die() {
    printf 'tests/run.sh: %s\n' "$*" >&2
    exit 1
}

# What a step needs, as COMMAND:PACKAGE.
needs() {
    case $1 in
        fmt) ;;
        clippy | deny) echo cc:build-essential ;;
        unit) echo cc:build-essential ssh-keygen:openssh-client sshd:openssh-server ;;
        instructions) echo cc:build-essential valgrind:valgrind python3:python3 ;;
        e2e)
            echo cc:build-essential sshd:openssh-server ssh:openssh-client ip:iproute2 nft:nftables curl:curl \
                openssl:openssl setpriv:util-linux useradd:passwd python3:python3 systemd-analyze:systemd \
                chromium:chromium tmux:tmux promtool:prometheus prometheus:prometheus
            ;;
        quickstart)
            echo cc:build-essential sshd:openssh-server ssh:openssh-client ip:iproute2 nft:nftables curl:curl \
                openssl:openssl setpriv:util-linux useradd:passwd python3:python3
            ;;
        chaos)
            echo cc:build-essential sshd:openssh-server ssh-keygen:openssh-client ip:iproute2 prlimit:util-linux \
                useradd:passwd
            ;;
        bench)
            echo cc:build-essential sshd:openssh-server ssh:openssh-client setpriv:util-linux useradd:passwd \
                python3:python3 nginx:nginx-light tmux:tmux ip:iproute2
            ;;
        *) die "there is no step $1" ;;
    esac
}

install_missing() {
    local step pairs pair missing=()
    for step in "$@"; do
        pairs=$(needs "$step")
        for pair in $pairs; do
            command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
        done
        if [ "$step" = e2e ]; then
            python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
        fi
    done
    if [ ${#missing[@]} -gt 0 ]; then
        [ "$(id -u)" = 0 ] && [ -z "$quick" ] || die "install these first: ${missing[*]}"
        DEBIAN_FRONTEND=noninteractive apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
    fi
    command -v cargo >/dev/null || die "cargo is missing: install stable Rust from https://rustup.rs"
}

fmt() { cargo fmt --all --check; }

# Everything is built with the profile of the agents under test, so that each dependency is compiled once.
profile=quick

clippy() { cargo clippy --locked --profile "$profile" --workspace --all-targets -- -D warnings; }

# Licences, bans and sources, which this tree alone decides. New advisories are no property of a commit: they need
# the advisory database from the network, and a run of their own (`cargo deny check advisories`).
deny() {
    if [ ! -x "$tools/bin/cargo-deny" ]; then
        CARGO_PROFILE_DEV_DEBUG=none cargo install --quiet --locked --debug --root "$tools" \
            --target-dir "$tools/target" cargo-deny --version "^0.20"
        rm -rf "$tools/target"
    fi
    "$tools/bin/cargo-deny" --locked check bans licenses sources
}

# What drives the browser for the tests of pages.
browser() {
    local venv=$tools/browser
    if ! cmp -s tests/browser/requirements.txt "$venv/installed"; then
        rm -rf "$venv"
        python3 -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check -r tests/browser/requirements.txt
        cp tests/browser/requirements.txt "$venv/installed"
    fi
    export BROWSER_PYTHON=$venv/bin/python
}

unit() {
    cargo test --locked --profile "$profile" --workspace --lib --bins \
        --test architecture --test corpora --test documents --test reference
}

# The instructions of the hot paths, compared with those in tests/data/instructions.txt. UPDATE=1 writes that file.
instructions() {
    local runner=$tools/bin/gungraun-runner version
    version=$(sed -n '/^name = "gungraun-runner"$/{n;s/^version = "\(.*\)"$/\1/p}' Cargo.lock)
    if [ "$("$runner" --version 2>/dev/null)" != "gungraun-runner $version" ]; then
        CARGO_PROFILE_DEV_DEBUG=none cargo install --quiet --locked --debug --root "$tools" \
            --target-dir "$tools/target" gungraun-runner --version "=$version"
        rm -rf "$tools/target"
    fi
    # Otherwise gungraun compares with the counts of the last run by itself. Some containers do not let it switch off the
    # randomisation of addresses, which changes no count.
    rm -rf "$CARGO_TARGET_DIR/gungraun"
    GUNGRAUN_RUNNER=$runner cargo bench --locked --profile "$profile" -p tests --bench instructions -- \
        --allow-aslr --output-format=json >"$CARGO_TARGET_DIR/instructions.json"
    python3 - "$CARGO_TARGET_DIR/instructions.json" tests/data/instructions.txt "$(rustc --version)" <<'END'
import json, os, platform, sys
results, baseline, rustc = sys.argv[1:]
most = 5  # percent
now = {}
for line in open(results):
    one = json.loads(line)
    (profile,) = one["profiles"]
    name = "::".join(part for part in (one["group"], one["function_name"], one.get("id")) if part)
    now[name] = profile["data"]["total"]["metrics"]["Ir"]["values"]["new"]
# What the counts depend on besides the code. The C library copies and compares in other ways without AVX2.
avx2 = " with AVX2" if "avx2" in open("/proc/cpuinfo").read().split() else ""
made = f"{' '.join(rustc.split()[:2])}, {platform.machine()}{avx2}"
if os.environ.get("UPDATE"):
    with open(baseline, "w") as out:
        print("# Written by UPDATE=1 tests/run.sh instructions", file=out)
        print(f"# {made}", file=out)
        for name, count in now.items():
            print(name, count, file=out)
lines = open(baseline).read().splitlines() if os.path.exists(baseline) else []
made_before = [line[2:] for line in lines if line.startswith("#")][-1:]
before = {name: int(count) for name, count in (line.split() for line in lines if not line.startswith("#"))}
failed, improved = [], []
print(f"{'instructions of':40} {'baseline':>12} {'now':>12} {'difference':>11}")
for name in [*now, *(name for name in before if name not in now)]:
    old, new = before.get(name), now.get(name)
    difference = ""
    if old is None:
        failed.append(f"{name} is not in {baseline}")
    elif new is None:
        failed.append(f"{name} is in {baseline}, but there is no such benchmark")
    else:
        percent = 100 * (new - old) / old
        difference = f"{percent:+.2f} %"
        if percent > most:
            failed.append(f"{name} takes {percent:.2f} % more instructions than in {baseline}; {most} % are allowed")
        elif percent < -most:
            improved.append(f"{name} takes {-percent:.2f} % fewer instructions")
    print(f"{name:40} {'-' if old is None else old:>12} {'-' if new is None else new:>12} {difference:>11}")
if improved:
    print(*improved, "so that it stays that way, run UPDATE=1 tests/run.sh instructions and commit the file", sep="\n")
comparable = not made_before or made_before == [made]
if failed and not comparable:
    print(*failed, f"NOT COMPARED: {baseline} was made with {made_before[0]}, and this is {made}", sep="\n")
elif failed:
    failed.append("if the change is intended, run UPDATE=1 tests/run.sh instructions and commit the file")
    sys.stdout.flush()
    sys.exit("\n".join(failed))
END
}

binaries() {
    cargo build --locked --profile "$profile" -p master-agent -p node-agent -p tests -p quickstart --bins
}

# The time at which a process started, in the kernel's ticks.
started() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20; }

# A test that ends takes along what it has started. One that is killed does not: this ends the processes and removes the
# network namespaces and mounts that the tests have noted in TEST_STARTED.
end_leftovers() {
    local kind what since
    [ -e "$TEST_STARTED" ] || return 0
    while read -r kind what since; do
        case $kind in
            process) [ "$(started "$what")" != "$since" ] || kill -KILL "$what" || true ;;
            namespace)
                [ -e "/run/netns/$what" ] || continue
                ip netns pids "$what" | xargs -r kill -KILL || true
                ip netns delete "$what" || true
                ;;
            mount) ! mountpoint -q "$what" || umount --lazy "$what" || true ;;
        esac
    done <"$TEST_STARTED"
}

# Most tests wait more than they compute, so several run at once. Those in the folder `alone` measure memory, CPU time
# or throughput, and run one at a time.
e2e() {
    [ "$(id -u)" = 0 ] || die "the end-to-end tests need root (network namespaces, accounts, port 53)"
    binaries
    browser
    export TEST_BIN_DIR=$CARGO_TARGET_DIR/$profile TEST_FIGURES=$CARGO_TARGET_DIR/e2e-figures.txt
    export TEST_STARTED=$CARGO_TARGET_DIR/e2e-started.txt
    rm -f "$TEST_FIGURES" "$TEST_STARTED"
    trap end_leftovers EXIT
    local failed=() logs
    logs=$(mktemp -d /tmp/e2e-logs.XXXXXX)
    # A page of 5,000 nodes keeps a browser and an agent busy, and its CPU time is measured.
    local busy=ui::page::five_thousand
    cargo test --locked --profile "$profile" -p tests --test e2e -- --skip alone:: --skip "$busy" --test-threads="${TEST_THREADS:-6}" |
        tee "$logs/parallel" || failed+=(parallel)
    end_leftovers
    cargo test --locked --profile "$profile" -p tests --test e2e -- alone:: "$busy" --test-threads=1 |
        tee "$logs/alone" || failed+=(alone)
    if [ -e "$TEST_FIGURES" ]; then
        printf '\n==== figures on the way\n'
        cat "$TEST_FIGURES"
    fi
    if [ ${#failed[@]} -gt 0 ]; then
        printf '\n==== why tests failed\n'
        grep -h -A 6 'panicked at' "$logs"/* | cut -c 1-1000 | tail -n 60 || true
    fi
    rm -rf "$logs"
    end_leftovers
    trap - EXIT
    [ ${#failed[@]} = 0 ] || die "end-to-end tests failed: ${failed[*]}"
}

# The test that e2e runs for a minute with one seed, for as long and with the seed that tests/chaos.sh says.
chaos() {
    [ "$(id -u)" = 0 ] || die "the chaos suite needs root (network namespaces, accounts, mounts)"
    binaries
    export TEST_BIN_DIR=$CARGO_TARGET_DIR/$profile TEST_STARTED=$CARGO_TARGET_DIR/chaos-started.txt
    rm -f "$TEST_STARTED"
    trap end_leftovers EXIT
    cargo test --locked --profile "$profile" -p tests --test e2e -- --nocapture \
        --exact alone::chaos::agents_keep_their_promises_while_everything_around_them_fails
    end_leftovers
    trap - EXIT
}

quickstart() {
    binaries
    local dir
    dir=$(mktemp -d /tmp/quickstart-test.XXXXXX)
    chmod 0755 "$dir"
    deploy/quickstart.sh --once --dir "$dir" --bin "$CARGO_TARGET_DIR/$profile" | tee "$dir.output"
    python3 - "$dir" <<'END'
import json, os, re, sys
read = lambda name: open(os.path.join(sys.argv[1], name)).read()
e = json.loads(read("endpoints.json"))
assert e["mode"] == "namespaces", "network namespaces can't be made here: " + e["mode"]
assert [n["name"] for n in e["nodes"]] == ["n1", "n2", "n3"], e["nodes"]
for n in e["nodes"]:
    assert n["local_endpoint"]["url"].startswith("https://"), n
    assert len(n["targets"]) >= 3 and os.path.exists(n["kubelet"]["ca"]), n
sshd = read("n3/sshd_config").splitlines()
assert {"PasswordAuthentication no", "KbdInteractiveAuthentication no"} <= set(sshd), sshd
# The table, the JSON and the page of the comparison are of one run.
comparison, page = json.loads(read("comparison.json")), read("comparison.html")
table = open(sys.argv[1] + ".output").read()
assert [t["node"] for t in comparison["targets"]] == ["n1", "n2", "n3"], comparison
assert comparison["started"] in page and f"in {comparison['seconds']:g} s;" in table
ratios = 0
for target in comparison["targets"]:
    assert [(p["name"], p["closed"]) for p in target["paths"]] == [("direct", None), ("tunnel", None)], target
    assert len(target["figures"]) == 9, target
    block = table[table.index("\n%s  %s\n" % (target["node"], target["url"])):].split("\n\n")[0]
    section = page[page.index("<h2 id="):]
    for figure in target["figures"]:
        for path, ratio in zip(figure["paths"], figure["ratios"]):
            if ratio:
                shown = "%.2f (%.2f-%.2f)" % (ratio["median"], ratio["low"], ratio["high"])
                assert shown in block and shown in section, (shown, block)
                ratios += 1
            if figure["unit"] == "1/s":
                assert "%.0f/s" % path["p50"] in block and "%.0f/s" % path["p50"] in section, (path, block)
assert ratios == 27, ratios
END
    rm -rf "$dir" "$dir.output"
}

# That every figure can be taken; what the figures are is for people to read.
bench() {
    binaries
    "$CARGO_TARGET_DIR/$profile/bench" --quick --json >"$CARGO_TARGET_DIR/bench.json"
    python3 - "$CARGO_TARGET_DIR/bench.json" <<'END'
import json, sys
report = json.load(open(sys.argv[1]))
machine, figures = report["machine"], report["figures"]
wanted = {
    "download_throughput", "download_throughput_4", "upload_throughput", "upload_throughput_4", "cpu_per_gb",
    "new_connection_get_p50", "new_connection_rate_32", "kept_get_p50", "kept_get_rate_32", "mixed_get_p50",
    "mixed_get_p99", "mixed_download", "mixed_download_kept", "idle_stream_memory", "idle_tunnel_memory",
    "idle_tunnel_cpu", "download_100ms_rtt", "second_stream_100ms_rtt", "packets_capacity", "packets_capacity_hop_cpu",
    "packets_50ms_loss_download", "packets_50ms_loss_download_4", "packets_50ms_loss_hop_cpu",
    "packets_300ms_download", "packets_300ms_download_4", "packets_300ms_hop_cpu", "packets_20ms_get_p50",
    "packets_20ms_get_p99", "packets_20ms_download", "isolation_rate", "isolation_throughput", "isolation_memory",
    "route_lookup_p99", "route_update_p99", "route_memory", "dial_p99_100_updates", "watch_memory",
    "konnectivity_isolation_rate", "konnectivity_isolation_throughput", "konnectivity_isolation_memory",
    "front_end_rate_32_by_nginx", "front_end_added_p50_by_nginx", "front_end_rate_32_by_anonymous",
    "front_end_cpu_by_nginx", "front_end_watch_memory", "call_home_https_download", "call_home_https_upload",
    "call_home_https_cpu_per_gb", "call_home_https_kept_get_p50", "call_home_https_rate_32", "watching_throughput",
    "watching_rate_32",
}
columns = {
    "unit", "direct", "openssh", "openssh_default", "ours", "konnectivity", "ratio", "ratio_default",
}
# How fast the path of packets itself is.
without_ours = {"packets_capacity", "packets_capacity_hop_cpu"}
assert set(figures) == wanted, set(figures) ^ wanted
for name, figure in figures.items():
    assert set(figure) == columns, (name, figure)
    assert figure["direct" if name in without_ours else "ours"] is not None, (name, figure)
    print(f"{name}: {figure}")
for name in ["cipher", "openssh default cipher", "cpu", "kernel", "net.ipv4.tcp_congestion_control"]:
    print(f"{name}: {machine[name]}")
END
}

quick=''
if [ "$*" = quick ]; then
    quick=1
    set -- fmt clippy unit
fi
[ $# -gt 0 ] || set -- fmt clippy deny unit instructions e2e quickstart bench
install_missing "$@"
for step in "$@"; do
    printf '\n==== %s\n' "$step"
    began=$SECONDS
    "$step"
    printf '==== %s passed in %d s\n' "$step" $((SECONDS - began))
done
printf '\n%d passed, 0 failed\n' $#
