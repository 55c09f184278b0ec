#!/usr/bin/env bash
# Measures direct connections, `ssh -L`, nginx and the agents beside each other: a table, or one object with --json.
# --quick takes less data and fewer rounds, --only NAME only some figures.
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()
command -v cc >/dev/null || missing+=(build-essential)
command -v ssh >/dev/null || missing+=(openssh-client)
command -v tmux >/dev/null || missing+=(tmux)
command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || missing+=(nginx-light)
[ -x /usr/sbin/sshd ] || missing+=(openssh-server)
if [ ${#missing[@]} -gt 0 ]; then
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y "${missing[@]}"; } >&2
fi

cargo build --profile dist -p master-agent -p node-agent -p tests --bin master-agent --bin node-agent --bin bench >&2
exec "${CARGO_TARGET_DIR:-target}/dist/bench" "$@"
