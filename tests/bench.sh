#!/usr/bin/env bash
# Measures direct connections, `ssh -L`, nginx and the agents beside each other, as root: a table, or one object with
# --json. --quick takes less data and fewer rounds, --only NAME only some figures, and --table also writes the table to
# deploy/reference/benchmark.md. --help names the other options.
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()
command -v cc >/dev/null || missing+=(build-essential)
command -v ssh >/dev/null || missing+=(openssh-client)
command -v tmux >/dev/null || missing+=(tmux)
command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || missing+=(nginx-light)
[ -x /usr/sbin/sshd ] || missing+=(openssh-server)
command -v ip >/dev/null || missing+=(iproute2)
if [ ${#missing[@]} -gt 0 ]; then
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y "${missing[@]}"; } >&2
fi

cargo build --profile dist -p master-agent -p node-agent -p tests --bin master-agent --bin node-agent --bin bench >&2
args=()
for arg in "$@"; do
    args+=("$arg")
    [ "$arg" != --table ] || args+=(deploy/reference/benchmark.md)
done
exec "${CARGO_TARGET_DIR:-target}/dist/bench" "${args[@]}"
