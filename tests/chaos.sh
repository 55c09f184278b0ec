#!/usr/bin/env bash
# Runs callers of every kind while links, processes, disks and certificates fail around the agents, as root.
#
#   tests/chaos.sh [--minutes N] [--seed S]    one minute and a random seed without these
#
# The first line names the seed. The same seed gives the same faults in the same order.
set -euo pipefail
minutes=1
seed=$((RANDOM * 32768 + RANDOM))
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) minutes=${2:?--minutes needs a number} ;;
        --seed) seed=${2:?--seed needs a number} ;;
        *)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
            exit 2
            ;;
    esac
    shift 2
done
export CHAOS_SECONDS=$((minutes * 60)) CHAOS_SEED=$seed
exec "$(dirname "$0")/run.sh" chaos
