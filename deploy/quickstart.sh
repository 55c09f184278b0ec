#!/usr/bin/env bash
# Builds everything, runs a master-agent and three nodes, and fetches over every path.
# `deploy/quickstart.sh --help` says more.
set -euo pipefail

usage() {
    cat <<'END'
Usage: deploy/quickstart.sh [--once] [--dir DIR] [--bin DIR] [--loopback]

Builds the binaries, starts a master-agent and three nodes, each node in its own network namespace, and
fetches from all of them through both egress listeners:

  n1  a node-agent that the master dials on port 22
  n2  a node-agent behind a firewall with no open port, which calls home
  n3  a plain OpenSSH sshd

From each node it also calls the master's front end, directly and through the node's local endpoint: with a client
certificate, with a ServiceAccount token, and without credentials. Last, it opens the direct paths to the kubelets
for about half a minute, compares the tunnels with them, and writes comparison.json and comparison.html.

Then it says what to try, and stays up until Ctrl-C. At the end it stops everything that it started.

  --once      tear down after the comparison; exit with 0 if everything is as expected, otherwise with 1
  --dir DIR   keep state, logs and endpoints.json in DIR; default: a new directory under /tmp, removed at the end
  --bin DIR   use the binaries in DIR (master-agent, node-agent, standin, fetch) instead of building them
  --loopback  make no namespaces, even where that is possible

It makes namespaces if it runs as root and the kernel permits them. Otherwise everything runs on loopback addresses
with high ports, without a firewall. As root it installs missing packages with apt, and creates the system user
`master-agent`, which n3's sshd needs. Packages and user stay.
END
}

say() { printf '==> %s\n' "$*" >&2; }
die() {
    printf 'quickstart: %s\n' "$*" >&2
    exit 1
}

once='' dir='' bin='' loopback=''
while [ $# -gt 0 ]; do
    case $1 in
        --once) once=1 ;;
        --loopback) loopback=1 ;;
        --dir | --bin)
            [ -n "${2:-}" ] || die "$1 needs a directory"
            declare "${1#--}=$2"
            shift
            ;;
        -h | --help) usage && exit ;;
        *) usage >&2 && exit 2 ;;
    esac
    shift
done

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH=$PATH:/usr/sbin:/sbin
root=''
[ "$(id -u)" != 0 ] || root=1

# --- Cleaning up -------------------------------------------------------------------------------------------------

declare -A pids=()
started=()
namespaces=()
links=()
own_dir='' lock='' failed=1

# Whether a process is still the child that was started.
mine() { grep -qs "^PPid:[[:space:]]*$$\$" "/proc/$1/status"; }

stop() {
    local name=$1 pid=${pids[$1]:-} i
    [ -n "$pid" ] || return 0
    unset "pids[$name]"
    mine "$pid" || return 0
    kill -TERM "$pid" 2>/dev/null || true
    for ((i = 0; i < 100; i++)); do
        mine "$pid" || break
        # A zombie is gone as soon as bash looks.
        case $(sed -n 's/^State:[[:space:]]*//p' "/proc/$pid/status" 2>/dev/null) in Z* | '') break ;; esac
        sleep 0.05
    done
    ! mine "$pid" || kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
}

clean_up() {
    local status=$? name pid
    trap '' INT TERM HUP
    set +e
    if [ "$failed" = 1 ] && [ -n "$lock" ]; then
        for name in "${started[@]}"; do
            printf -- '--- the end of %s/log/%s.log\n' "$dir" "$name" >&2
            tail -n 8 "$dir/log/$name.log" >&2
        done
    fi
    [ ${#started[@]} = 0 ] || say "stopping"
    for name in "${started[@]}"; do stop "$name"; done
    for name in "${namespaces[@]}"; do
        # Connections of sshd and what was started by hand may be left in there.
        for pid in $(ip netns pids "$name" 2>/dev/null); do kill -KILL "$pid" 2>/dev/null; done
    done
    for name in "${links[@]}"; do ip link delete "$name" 2>/dev/null; done
    for name in "${namespaces[@]}"; do ip netns delete "$name" 2>/dev/null; done
    if [ -n "$own_dir" ] && [ "$failed" != 1 ]; then
        ! mv "$own_dir/comparison.html" "${TMPDIR:-/tmp}/quickstart-comparison.html" 2>/dev/null ||
            say "the comparison, with plots, is in ${TMPDIR:-/tmp}/quickstart-comparison.html"
        rm -rf "$own_dir"
    elif [ -n "$lock" ]; then
        rm -f "$dir/connect.sock" "$dir/admin.sock"
        say "state and logs are in $dir"
    fi
    exit "$status"
}
trap clean_up EXIT
trap 'failed=0; exit 130' INT
trap 'failed=0; exit 143' TERM HUP

# --- What it needs -----------------------------------------------------------------------------------------------

install_missing() {
    local pair missing=() had_sshd=1
    for pair in cc:build-essential sshd:openssh-server ssh-keygen:openssh-client ip:iproute2 nft:nftables curl:curl \
        openssl:openssl useradd:passwd setsid:util-linux flock:util-linux; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ -n "$root" ] || die "install these first, or run this as root: ${missing[*]}"
    command -v apt-get >/dev/null || die "install these first: ${missing[*]}"
    say "installing ${missing[*]}"
    command -v sshd >/dev/null || had_sshd=''
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >&2
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
    if [ -z "$had_sshd" ] && [ -d /run/systemd/system ]; then
        # n3 needs the program; a server that listens on this host was not asked for.
        systemctl disable --now ssh.service ssh.socket >/dev/null 2>&1 || true
        say "openssh-server was installed for n3 alone: its service is disabled on this host"
    fi
}

build() {
    local target=${CARGO_TARGET_DIR:-$repo/target}
    command -v cargo >/dev/null || PATH=$PATH:$HOME/.cargo/bin
    command -v cargo >/dev/null || die "cargo is missing: install stable Rust from https://rustup.rs"
    say "building"
    CARGO_TARGET_DIR=$target cargo build --manifest-path "$repo/Cargo.toml" --profile quick --locked \
        -p master-agent -p node-agent -p quickstart \
        --bin master-agent --bin node-agent --bin standin --bin fetch >&2
    bin=$target/quick
}

ipv6=''
# Tries everything that the namespaces need, under names of its own.
can_make_namespaces() {
    [ -n "$root" ] && [ -z "$loopback" ] || return 1
    local ok='' name=qs$$p
    namespaces=("$name") links=("$name" "${name}v")
    if ip netns add "$name" && ip link add "$name" type bridge && ip link add "${name}v" type veth peer name eth0 netns "$name" &&
        ip netns exec "$name" nft add table inet quickstart; then ok=1; fi 2>/dev/null
    ! ip -6 address add fd6d:6171::1/128 dev "$name" nodad 2>/dev/null || ipv6=1
    ip link delete "${name}v" 2>/dev/null || true
    ip link delete "$name" 2>/dev/null || true
    ip netns delete "$name" 2>/dev/null || true
    namespaces=() links=()
    [ -n "$ok" ]
}

install_missing
[ -n "$bin" ] || build
[ -d "$bin" ] || die "there is no directory $bin"
bin=$(cd "$bin" && pwd)
for name in master-agent node-agent standin fetch; do [ -x "$bin/$name" ] || die "$bin/$name is missing"; done

# --- Where everything is -----------------------------------------------------------------------------------------

if [ -z "$dir" ]; then
    own_dir=$(mktemp -d "${TMPDIR:-/tmp}/quickstart.XXXXXX")
    dir=$own_dir
else
    mkdir -p "$dir"
fi
dir=$(cd "$dir" && pwd)
case $dir in *[!A-Za-z0-9/._+@-]*) die "$dir: give a directory without spaces and quotes" ;; esac
[ ${#dir} -le 80 ] || die "$dir is too long for the path of a Unix socket"
if [ ! -e "$dir/.quickstart" ] && [ -n "$(ls -A "$dir")" ]; then die "$dir is not empty and is not from an earlier run"; fi
exec {lock_fd}>>"$dir/.quickstart"
flock -n "$lock_fd" || die "another quickstart runs in $dir"
lock=1
chmod 0755 "$dir"
rm -rf "$dir"/{pki,master,n1,n2,n3,ssh,log,connect.sock,admin.sock,endpoints.json,comparison.json,comparison.html}
mkdir -p "$dir"/{pki,master,n1,n2,n3,ssh,log}

# A subnet for this process: of 10/8, and of 127/8 for what is on loopback.
a=$((128 + $$ % 112)) b=$(($$ / 112 % 256))
nodes=(n1 n2 n3)
declare -A kind=([n1]=node-agent [n2]=node-agent [n3]=sshd) direction=([n1]=dialled [n2]=call-home [n3]=dialled)
declare -A address=() address6=() pod=() pod6=() pods=() pods6=() pod6_port=() admin=() local_endpoint=()
api=127.$a.$b.1:6444 # stands in for kube-apiserver
master_admin=127.$a.$b.1:9070

if can_make_namespaces; then
    mode=namespaces bridge=qs$$
    master=10.$a.$b.1 ssh_port=22
    v6=$(printf 'fd6d:6171:%x:%x' $(($$ >> 16)) $(($$ & 65535)))
    master6=${ipv6:+$v6::1}
    if ip -4 -o address | grep -q " 10\.$a\.$b\."; then die "10.$a.$b.0/24 is taken on this host: try again"; fi
    for i in 1 2 3; do
        n=n$i
        local_endpoint[$n]=127.0.0.1:6443
        address[$n]=10.$a.$b.1$i address6[$n]=${ipv6:+$v6::1$i} admin[$n]=127.0.0.1:9071
        pods[$n]=10.244.$i.0/24 pod[$n]=10.244.$i.2
        pods6[$n]=${ipv6:+$v6:24$i::/80} pod6[$n]=${ipv6:+$v6:24$i::2} pod6_port[$n]=8080
    done
    [ -n "$ipv6" ] || say "this host has no IPv6, so the table has no IPv6 rows"
else
    mode=loopback master=127.$a.$b.1 master6='' ssh_port=2022
    for i in 1 2 3; do
        n=n$i
        local_endpoint[$n]=127.$a.$b.1$i:6443
        address[$n]=127.$a.$b.1$i address6[$n]='' admin[$n]=127.$a.$b.1$i:9071
        pods[$n]=127.$a.$b.$((16 + 16 * i))/28 pod[$n]=127.$a.$b.$((18 + 16 * i)) pod6[$n]='' pods6[$n]='' pod6_port[$n]=''
    done
    # There is one IPv6 address on loopback, and it can be one node's only.
    if [ "$(cat /proc/sys/net/ipv6/conf/lo/disable_ipv6 2>/dev/null)" = 0 ]; then
        pod6[n1]=::1 pods6[n1]=::1/128 pod6_port[n1]=$((20000 + $$ % 20000))
    fi
    cat >&2 <<'END'

  !! No network namespaces here (not root, or not permitted): everything runs on loopback addresses with high ports.
  !! This can't show that tunnels cross firewalls (nothing is blocked), nor port 22, nor IPv6 on other nodes than n1.

END
fi

# --- The network -------------------------------------------------------------------------------------------------

namespace_of() { printf 'qs%s-%s' $$ "$1"; }

# Runs a command on a node, or on the master.
on() {
    local node=$1
    shift
    if [ "$mode" = namespaces ] && [ "$node" != master ]; then
        ip netns exec "$(namespace_of "$node")" "$@"
    else
        "$@"
    fi
}

firewall() {
    local node=$1 open=''
    if [ "$node" != n2 ]; then
        open="ip saddr $master tcp dport 22 accept"
    fi
    on "$node" nft -f - <<END
table inet quickstart {
    counter blocked {}
    chain input {
        type filter hook input priority 0; policy drop;
        iifname "lo" accept
        ct state established,related accept
        meta l4proto { icmp, ipv6-icmp } accept
        $open
        counter name blocked drop
    }
}
END
}

make_network() {
    local node ns i
    say "making a bridge ($bridge, 10.$a.$b.0/24) and three namespaces"
    links+=("$bridge")
    ip link add "$bridge" type bridge
    ip address add "$master/24" dev "$bridge"
    [ -z "$master6" ] || ip -6 address add "$master6/64" dev "$bridge" nodad
    ip link set "$bridge" up
    for i in 1 2 3; do
        node=n$i ns=$(namespace_of n$i)
        namespaces+=("$ns")
        ip netns add "$ns"
        links+=("${bridge}v$i")
        ip link add "${bridge}v$i" type veth peer name eth0 netns "$ns"
        ip link set "${bridge}v$i" master "$bridge" up
        ip -n "$ns" address add "${address[$node]}/24" dev eth0
        [ -z "${address6[$node]}" ] || ip -n "$ns" -6 address add "${address6[$node]}/64" dev eth0 nodad
        # Pods live behind a bridge of their node.
        ip -n "$ns" link add pods type bridge
        ip -n "$ns" address add "${pod[$node]}/24" dev pods
        [ -z "${pod6[$node]}" ] || ip -n "$ns" -6 address add "${pod6[$node]}/80" dev pods nodad
        ip -n "$ns" link set lo up
        ip -n "$ns" link set eth0 up
        ip -n "$ns" link set pods up
        firewall "$node"
    done
}

# --- Keys and certificates ---------------------------------------------------------------------------------------

authority() {
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj "/CN=$2" \
        -keyout "$dir/pki/$1.key" -out "$dir/pki/$1.crt" -config - -extensions ca 2>"$dir/log/openssl.log" <<'END'
[req]
distinguished_name = name
[name]
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
END
}

# authority file common-name usage subject-alternative-names
certificate() {
    local name=$dir/pki/$2
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$3" \
        -keyout "$name.key" -out "$name.csr" 2>"$dir/log/openssl.log"
    openssl x509 -req -in "$name.csr" -CA "$dir/pki/$1.crt" -CAkey "$dir/pki/$1.key" -CAcreateserial -days 30 \
        -out "$name.crt" -extfile - 2>"$dir/log/openssl.log" <<END
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = $4
subjectAltName = $5
END
    rm "$name.csr"
}

base64url() { openssl base64 -A | tr '+/' '-_' | tr -d '='; }

# A key pair as kube-apiserver's for ServiceAccounts, and a token of one as kube-apiserver issues it.
service_account() {
    local key=$dir/pki/service-account.key now claims signed
    openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out "$key" 2>"$dir/log/openssl.log"
    openssl pkey -in "$key" -pubout -out "$dir/pki/service-account.pub"
    now=$(date +%s)
    claims=$(object iss https://quickstart aud '["https://quickstart"]' iat "$now" nbf "$now" exp "$((now + 86400))" \
        sub system:serviceaccount:default:quickstart)
    signed=$(printf '{"alg":"RS256","typ":"JWT"}' | base64url).$(printf '%s' "$claims" | base64url)
    printf 'Authorization: Bearer %s.%s\n' "$signed" "$(printf '%s' "$signed" | openssl dgst -sha256 -sign "$key" -binary | base64url)" \
        >"$dir/pki/service-account.header"
}

make_certificates() {
    local node san all="IP:$master, IP:127.0.0.1"
    say "making certificates"
    (
        umask 077
        authority egress-ca "quickstart egress listener CA"
        certificate egress-ca egress master-agent serverAuth "DNS:master-agent, IP:$master"
        certificate egress-ca client kube-apiserver clientAuth "DNS:kube-apiserver"
        authority kubelet-ca "quickstart kubelet CA"
        authority client-ca "quickstart client CA"
        for node in "${nodes[@]}"; do
            san="DNS:$node, IP:${address[$node]}${address6[$node]:+, IP:${address6[$node]}}"
            certificate kubelet-ca "$node" "system:node:$node" serverAuth "$san"
            certificate client-ca "$node-client" "system:node:$node/O=system:nodes" clientAuth "DNS:$node"
            [ "$mode" = namespaces ] || all+=", IP:${address[$node]}"
        done
        certificate egress-ca front-end master-agent serverAuth "DNS:master-agent, $all"
        certificate kubelet-ca api kube-apiserver serverAuth "DNS:api, IP:${api%:*}"
        certificate client-ca front-proxy-client front-proxy-client clientAuth "DNS:front-proxy-client"
        service_account
    )
    chmod 0644 "$dir"/pki/*.crt
}

# --- Configuration -----------------------------------------------------------------------------------------------

list() {
    local out='' item
    for item in "$@"; do [ -z "$item" ] || out+="${out:+, }\"$item\""; done
    printf '[%s]' "$out"
}

write_configs() {
    local n
    cat >"$dir/master/master-agent.yaml" <<END
state_dir: state
admin: {listen: $master_admin, socket: $dir/admin.sock, page: true}
http_connect:
  unix: {path: $dir/connect.sock}
  tls: {listen: $master:8131, cert: ../pki/egress.crt, key: ../pki/egress.key, client_ca: ../pki/egress-ca.crt}
call_home: {listen: $master:2222}
inventory: inventory.yaml
front_end:
  listen: $master:6443
  certificates: [{cert: ../pki/front-end.crt, key: ../pki/front-end.key}]
  authentication:
    - x509: {ca: ../pki/client-ca.crt}
    - service_account:
        issuers: ["https://quickstart"]
        audiences: ["https://quickstart"]
        key_files: [../pki/service-account.pub]
  upstream:
    servers: ["https://$api"]
    ca: ../pki/kubelet-ca.crt
    cert: ../pki/front-proxy-client.crt
    key: ../pki/front-proxy-client.key
    health_path: /healthz
  audit: {file: $dir/log/audit.log}
shutdown_grace: 1s
END
    {
        echo 'nodes:'
        for n in "${nodes[@]}"; do
            echo "  - name: $n"
            [ "${direction[$n]}" = call-home ] || echo "    dial: ${address[$n]}:$ssh_port"
            [ "$n" != n3 ] || echo "    user: $sshd_user"
            [ "$n" != n3 ] || echo "    front_end_listen: ${local_endpoint[$n]}"
            # n1 gets what nobody else claims, so that its policy has something to refuse.
            [ "$n" != n1 ] || echo "    default_route: true"
            echo "    addresses: $(list "${address[$n]}" "${address6[$n]}")"
            echo "    cidrs: $(list "${pods[$n]}" "${pods6[$n]}")"
        done
    } >"$dir/master/inventory.yaml"
    for n in n1 n2; do
        {
            echo "state_dir: state"
            echo "admin: {listen: ${admin[$n]}, socket: admin.sock}"
            if [ "$n" = n1 ]; then echo "listen: ${address[$n]}:$ssh_port"; else echo "call_home: [\"$master:2222\"]"; fi
            # No certificate makes loopback a node's own address.
            [ "$mode" = namespaces ] || echo "addresses: $(list "${address[$n]}" "${address6[$n]}")"
            echo "front_end: {tcp: ${local_endpoint[$n]}}"
            echo "policy: {kubelet_port: 10250, pod_cidrs: $(list "${pods[$n]}" "${pods6[$n]}")}"
            echo "shutdown_grace: 1s"
        } >"$dir/$n/node-agent.yaml"
    done
}

# --- Processes ---------------------------------------------------------------------------------------------------

# name node command...
start() {
    local name=$1 node=$2 command=("${@:3}")
    if [ "$mode" = namespaces ] && [ "$node" != master ]; then
        command=(ip netns exec "$(namespace_of "$node")" "${command[@]}")
    fi
    # In a session of its own, so that Ctrl-C reaches this script alone, which then stops all in order.
    setsid "${command[@]}" </dev/null >"$dir/log/$name.log" 2>&1 {lock_fd}>&- &
    pids[$name]=$!
    started+=("$name")
}

running() { mine "${pids[$1]}" || die "$1 ended; its log is $dir/log/$1.log"; }

# name seconds command...: until the command succeeds
wait_for() {
    local name=$1 tries=$(($2 * 20)) i
    for ((i = 0; i < tries; i++)); do
        ! "${@:3}" >/dev/null 2>&1 || return 0
        running "$name"
        sleep 0.05
    done
    die "$name is not ready after $2 s; its log is $dir/log/$name.log"
}

master_agent() { "$bin/master-agent" -c "$dir/master/master-agent.yaml" "$@"; }

start_standins() {
    local n arguments
    for n in "${nodes[@]}"; do
        arguments=(--name "$n" --cert "$dir/pki/$n.crt" --key "$dir/pki/$n.key" --kubelet "${address[$n]}:10250" --pod "${pod[$n]}:8080")
        [ -z "${address6[$n]}" ] || arguments+=(--kubelet "[${address6[$n]}]:10250")
        [ -z "${pod6[$n]}" ] || arguments+=(--pod "[${pod6[$n]}]:${pod6_port[$n]}")
        start "standin-$n" "$n" "$bin/standin" "${arguments[@]}"
    done
    start api master "$bin/standin" --name api --cert "$dir/pki/api.crt" --key "$dir/pki/api.key" --kubelet "$api" --pod "${api%:*}:6445"
    wait_for api 10 grep -q ready "$dir/log/api.log"
    for n in "${nodes[@]}"; do wait_for "standin-$n" 10 grep -q ready "$dir/log/standin-$n.log"; done
}

# What the reader would type on the master, then on the new host.
join_node() {
    local node=$1 line words
    line=$(master_agent token create --node "$node")
    read -ra words <<<"$line"
    say "on $node: ${line/--token */--token ...}"
    on "$node" "$bin/${words[0]}" "${words[@]:1}" -c "$dir/$node/node-agent.yaml" >&2
    start "$node" "$node" "$bin/node-agent" -c "$dir/$node/node-agent.yaml" run
}

start_sshd() {
    local n3=$dir/n3 arguments
    say "on n3: an sshd of its own, and what \`master-agent sshd-config n3\` prints"
    ssh-keygen -q -t ed25519 -N '' -C n3 -f "$n3/ssh_host_ed25519_key"
    cat >"$n3/sshd_config" <<END
Include $n3/sshd_config.d/*.conf
Port $ssh_port
ListenAddress ${address[n3]}
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
# $dir may lie under a directory that others may write to, such as /tmp.
StrictModes no
END
    arguments=(n3 --host-key "$n3/ssh_host_ed25519_key.pub" --host-key-path "$n3/ssh_host_ed25519_key"
        --directory "$n3/master-agent" --drop-in "$n3/sshd_config.d/10-master-agent.conf" --files-only)
    # PermitOpen has no CIDRs: of the IPv6 pods, one is named.
    [ -z "${pod6[n3]}" ] || arguments+=(--allow "[${pod6[n3]}]:8080")
    master_agent sshd-config "${arguments[@]}" >"$n3/install.sh"
    sh "$n3/install.sh"
    if [ -n "$root" ]; then
        # The account that `sshd-config` without --files-only would make.
        if ! id "$sshd_user" >/dev/null 2>&1; then
            useradd --system --password '*' --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "$sshd_user"
            say "made the system user $sshd_user for n3's sshd; \`userdel $sshd_user\` removes it"
        fi
        install -d -m 0755 /run/sshd
        setpriv --reuid "$sshd_user" --clear-groups test -r "$n3/master-agent/principals" ||
            die "the user $sshd_user can't read files in $dir: choose a --dir that other users may enter"
    fi
    "$(command -v sshd)" -t -f "$n3/sshd_config"
    start n3 n3 "$(command -v sshd)" -D -e -f "$n3/sshd_config"
}

all_connected() { [ "$(master_agent node list -o json | grep -o '"state":"connected"' | wc -l)" = 3 ]; }

make_person() {
    local ssh=$dir/ssh
    ssh-keygen -q -t ed25519 -N '' -C alice -f "$ssh/id_ed25519"
    master_agent sign-user alice --key "$ssh/id_ed25519.pub" >"$ssh/id_ed25519-cert.pub"
    printf "@cert-authority * %s\n" "$(cat "$dir/master/state/host_ca.pub")" >"$ssh/known_hosts"
    cat >"$ssh/config" <<END
Host n1
    HostName ${address[n1]}
    Port $ssh_port
    HostKeyAlias n1
    User alice
    IdentityFile $ssh/id_ed25519
    IdentitiesOnly yes
    # ssh would offer the key without its certificate first.
    PubkeyAcceptedAlgorithms *-cert-v01@openssh.com
    UserKnownHostsFile $ssh/known_hosts
    StrictHostKeyChecking yes
END
}

# --- endpoints.json ----------------------------------------------------------------------------------------------

# key value [key value]...: an object of strings; a value that begins with { or [, a number and null stay as they are
object() {
    local out='' value
    while [ $# -gt 0 ]; do
        value=$2
        case $value in '{'* | '['* | null) ;; '' | *[!0-9]*) value="\"$value\"" ;; esac
        out+="${out:+, }\"$1\": $value"
        shift 2
    done
    printf '{%s}' "$out"
}

array() {
    local IFS=,
    printf '[%s]' "$*"
}

targets_of() {
    local n=$1 out=()
    out+=("$(object name kubelet-name url "https://$n:10250/pods" expect "web-$n")")
    out+=("$(object name kubelet-address url "https://${address[$n]}:10250/pods" expect "web-$n")")
    out+=("$(object name pod-v4 url "http://${pod[$n]}:8080/" expect "hello from $n")")
    [ -z "${pod6[$n]}" ] || out+=("$(object name pod-v6 url "http://[${pod6[$n]}]:${pod6_port[$n]}/" expect "hello from $n")")
    array "${out[@]}"
}

node_json() {
    local n=$1 ssh=null ns=null its_admin=null config=null
    [ "$mode" != namespaces ] || ns=$(namespace_of "$n")
    [ "${direction[$n]}" = call-home ] || ssh=$(object host "${address[$n]}" port "$ssh_port")
    if [ "${kind[$n]}" = node-agent ]; then
        its_admin=$(object address "${admin[$n]}" metrics "http://${admin[$n]}/metrics" readyz "http://${admin[$n]}/readyz")
        config=$dir/$n/node-agent.yaml
    else
        config=$dir/n3/sshd_config
    fi
    object name "$n" kind "${kind[$n]}" direction "${direction[$n]}" namespace "$ns" \
        addresses "$(list "${address[$n]}" "${address6[$n]}")" pod_cidrs "$(list "${pods[$n]}" "${pods6[$n]}")" \
        ssh "$ssh" admin "$its_admin" config "$config" \
        local_endpoint "$(object url "https://${local_endpoint[$n]}" client_cert "$dir/pki/$n-client.crt" client_key "$dir/pki/$n-client.key")" \
        kubelet "$(object ca "$dir/pki/kubelet-ca.crt" cert "$dir/pki/$n.crt" port 10250)" \
        targets "$(targets_of "$n")"
}

write_endpoints() {
    local name n processes=() all=() pki=$dir/pki
    for name in "${started[@]}"; do
        processes+=("$(object name "$name" pid "${pids[$name]}" log "$dir/log/$name.log")")
    done
    for n in "${nodes[@]}"; do all+=("$(node_json "$n")"); done
    object \
        version 1 mode "$mode" dir "$dir" pid $$ \
        binaries "$(object master_agent "$bin/master-agent" node_agent "$bin/node-agent" fetch "$bin/fetch" standin "$bin/standin")" \
        master "$(object config "$dir/master/master-agent.yaml" inventory "$dir/master/inventory.yaml" state_dir "$dir/master/state" \
            connect_unix "$(object path "$dir/connect.sock")" \
            connect_tls "$(object host "$master" port 8131 url "https://$master:8131" ca "$pki/egress-ca.crt" \
                client_cert "$pki/client.crt" client_key "$pki/client.key")" \
            front_end "$(object url "https://$master:6443" ca "$pki/egress-ca.crt" client_ca "$pki/client-ca.crt" \
                token_header "$pki/service-account.header" audit "$dir/log/audit.log" path /pods)" \
            call_home "$(object host "$master" port 2222)" \
            admin "$(object address "$master_admin" socket "$dir/admin.sock" metrics "http://$master_admin/metrics" \
                livez "http://$master_admin/livez" readyz "http://$master_admin/readyz")")" \
        kubelet_ca "$pki/kubelet-ca.crt" \
        ssh "$(object login alice key "$dir/ssh/id_ed25519" certificate "$dir/ssh/id_ed25519-cert.pub" \
            known_hosts "$dir/ssh/known_hosts" config "$dir/ssh/config" host n1 address "${address[n1]}" port "$ssh_port")" \
        nodes "$(array "${all[@]}")" \
        refused "$(array "$(object target 169.254.169.254:80 status 403)")" \
        processes "$(array "${processes[@]}")" >"$dir/endpoints.json"
    echo >>"$dir/endpoints.json"
    if command -v python3 >/dev/null; then
        python3 -c 'import json, sys; json.load(open(sys.argv[1]))' "$dir/endpoints.json" || die "$dir/endpoints.json is not valid JSON"
    fi
}

# --- The table ---------------------------------------------------------------------------------------------------

bad=0
row() { printf '%-4s %-21s %-6s %-19s %-45s %-11s %5s %8s %8s\n' "$@"; }
field() { sed -n "s/.*\"$1\":\"\\{0,1\\}\\([^,\"}]*\\).*/\\1/p" <<<"$2"; }
describe() { printf '%s, %s' "${kind[$1]}" "${direction[$1]}"; }

# The options of fetch for one of the egress listeners.
fetch_via() {
    case $1 in
        unix) printf '%s\n' --via "unix:$dir/connect.sock" ;;
        tls)
            printf '%s\n' --via "tls:$master:8131" --ca "$dir/pki/egress-ca.crt" --cert "$dir/pki/client.crt" \
                --key "$dir/pki/client.key"
            ;;
    esac
}

# node listener what url expected-text
through() {
    local json arguments mark=ok
    mapfile -t arguments < <(fetch_via "$2")
    if ! json=$("$bin/fetch" "${arguments[@]}" --target-ca "$dir/pki/kubelet-ca.crt" --expect "$5" "$4"); then
        mark=FAILED bad=$((bad + 1))
    fi
    row "$1" "$(describe "$1")" "$2" "$3" "$4" "$(field status "$json") $mark" "$(field bytes "$json")" \
        "$(field connect_ms "$json")" "$(field total_ms "$json")"
    [ "$mark" = ok ] || echo "     $(field error "$json")"
}

# node listener what url: must be refused with 403
refused() {
    local json arguments mark=refused
    mapfile -t arguments < <(fetch_via "$2")
    json=$("$bin/fetch" "${arguments[@]}" "$4") || true
    [ "$(field status "$json")" = 403 ] || { mark=FAILED bad=$((bad + 1)); }
    row "$1" "$(describe "$1")" "$2" "$3" "$4" "$(field status "$json") $mark" - "$(field connect_ms "$json")" "$(field total_ms "$json")"
    sed -n 's/.*"error":"\(.*\)","status".*/     \1/p' <<<"$json"
}

dropped() { on "$1" nft list counter inet quickstart blocked | sed -n 's/.*packets \([0-9]*\).*/\1/p'; }

# node what url: the direct path must be blocked
direct() {
    local node=$1 before after status=0 mark=blocked
    if [ "$mode" != namespaces ]; then
        row "$node" "$(describe "$node")" direct "$2" "$3" "open" - - -
        return
    fi
    before=$(dropped "$node")
    curl -sk -o /dev/null --connect-timeout 1 --interface "if!$bridge" "$3" || status=$?
    after=$(dropped "$node")
    # This shows a firewall only if the packets arrived and were dropped.
    [ "$status" = 28 ] && [ "$after" -gt "$before" ] || { mark=FAILED bad=$((bad + 1)); }
    row "$node" "$(describe "$node")" direct "$2" "$3" "$mark" - - -
}

table() {
    local n d
    echo
    row NODE KIND VIA TARGET URL STATUS BYTES 'OPEN ms' 'TOTAL ms'
    for n in "${nodes[@]}"; do
        for d in unix tls; do
            through "$n" "$d" 'kubelet by name' "https://$n:10250/pods" "web-$n"
            through "$n" "$d" 'kubelet by address' "https://${address[$n]}:10250/pods" "web-$n"
            through "$n" "$d" 'pod, IPv4' "http://${pod[$n]}:8080/" "hello from $n"
            [ -z "${pod6[$n]}" ] || through "$n" "$d" 'pod, IPv6' "http://[${pod6[$n]}]:${pod6_port[$n]}/" "hello from $n"
        done
    done
    for n in "${nodes[@]}"; do
        direct "$n" 'kubelet by address' "https://${address[$n]}:10250/pods"
        direct "$n" 'pod, IPv4' "http://${pod[$n]}:8080/"
    done
    refused n1 unix 'link-local' 'http://169.254.169.254:80/'
    refused n2 tls 'port 22 of the node' 'http://n2:22/'
    refused n3 unix 'port 22 of the node' 'http://n3:22/'
    echo
    master_agent node list
    echo
}

# node way url credential status curl-arguments...
call() {
    local said status time mark=ok
    said=$(on "$1" curl -s -o /dev/null --max-time 10 --cacert "$dir/pki/egress-ca.crt" -w '%{http_code} %{time_total}' "${@:6}" "$3/pods") || true
    status=${said%% *} time=${said#* }
    [ "$status" = "$5" ] || { mark=FAILED bad=$((bad + 1)); }
    printf '%-4s %-21s %-15s %-23s %-27s %-11s %8s\n' "$1" "$(describe "$1")" "$2" "$4" "$3" "$status $mark" \
        "$(awk "BEGIN { printf \"%.1f\", ${time:-0} * 1000 }")"
}

calls() {
    local n way url pki=$dir/pki
    printf '%-4s %-21s %-15s %-23s %-27s %-11s %8s\n' FROM KIND WAY CREDENTIAL URL ANSWER 'TOTAL ms'
    for n in "${nodes[@]}"; do
        for way in direct 'local endpoint'; do
            url=https://$master:6443
            [ "$way" = direct ] || url=https://${local_endpoint[$n]}
            call "$n" "$way" "$url" 'client certificate' 200 --cert "$pki/$n-client.crt" --key "$pki/$n-client.key"
            call "$n" "$way" "$url" 'ServiceAccount token' 200 -H "@$pki/service-account.header"
            call "$n" "$way" "$url" none 401
        done
    done
    echo
}

# What the tunnels cost. Only for that, the direct paths to the kubelets are open.
comparison() {
    local n handle
    say "comparing tunneled and direct paths to the kubelets"
    if [ "$mode" = namespaces ]; then
        say "the nodes' firewalls are open for port 10250 until this is done, in about half a minute"
        for n in "${nodes[@]}"; do on "$n" nft insert rule inet quickstart input ip saddr "$master" tcp dport 10250 accept; done
    fi
    master_agent compare --ca "$dir/pki/kubelet-ca.crt" --download /bytes/4000000000 --upload /upload --rounds 3 --slice 250ms \
        --timeout 1s --json "$dir/comparison.json" --html "$dir/comparison.html" || bad=$((bad + 1))
    if [ "$mode" = namespaces ]; then
        for n in "${nodes[@]}"; do
            handle=$(on "$n" nft -a list chain inet quickstart input | sed -n 's/.*dport 10250 accept # handle //p')
            on "$n" nft delete rule inet quickstart input handle "$handle"
        done
    fi
    echo
}

# The local endpoints follow their tunnels, and an sshd is asked to listen after that.
endpoints_listen() {
    local n
    for n in "${nodes[@]}"; do on "$n" curl -sko /dev/null --max-time 2 "https://${local_endpoint[$n]}/" || return 1; done
}

what_to_try() {
    local tls="-x https://$master:8131 --proxy-cacert $dir/pki/egress-ca.crt --proxy-cert $dir/pki/client.crt --proxy-key $dir/pki/client.key"
    local agent="$bin/master-agent -c $dir/master/master-agent.yaml" enter='' blocked=''
    if [ "$mode" = namespaces ]; then
        enter="ip netns exec $(namespace_of n2) "
        blocked=' (the direct paths are blocked again, so this measures the tunnels only)'
    fi
    cat <<END
It stays up until Ctrl-C. Addresses and files are listed in $dir/endpoints.json.
In another terminal, try:

  # the pod of n2, a node without an open port, through the mutual TLS egress listener
  curl -sp $tls http://${pod[n2]}:8080/

  # the kubelet of n3 by its node's name, verified end to end
  curl -s $tls --cacert $dir/pki/kubelet-ca.crt https://n3:10250/healthz

  # 1 GB through the Unix socket, as kube-apiserver would come in
  $bin/fetch --via unix:$dir/connect.sock http://${pod[n1]}:8080/bytes/1000000000

  # what the tunnels cost$blocked; in a browser: $dir/comparison.html
  $agent compare n1 n2 --ca $dir/pki/kubelet-ca.crt

  # which way a target is reached, and why; the nodes and their tunnels
  $agent explain ${pod[n3]}:8080
  $agent node list

  # all nodes live: in the terminal, and in a browser on this host, at the address that the second line prints
  $agent top
  $agent page

  # stock ssh with a certificate of the master's CA: forwarding within n1's policy, and nothing else
  ssh -F $dir/ssh/config -N -L 127.0.0.1:18080:${pod[n1]}:8080 n1 & sleep 1; curl -s http://127.0.0.1:18080/; kill \$!
  ssh -F $dir/ssh/config n1 id

  # a call to the master's front end from n2, as its kubelet; who called, and what was decided
  ${enter}curl -s --cacert $dir/pki/egress-ca.crt --cert $dir/pki/n2-client.crt --key $dir/pki/n2-client.key https://${local_endpoint[n2]}/pods
  tail -n 1 $dir/log/audit.log

  # a lost node: its callers get 503, until it runs again (in the foreground of your terminal)
  kill -9 ${pids[n2]}; sleep 1; $agent node list
  ${enter}$bin/node-agent -c $dir/n2/node-agent.yaml run

  # the master's metrics, and all logs
  curl -s http://$master_admin/metrics
  tail -f $dir/log/*.log

END
}

# --- The whole ---------------------------------------------------------------------------------------------------

sshd_user=master-agent
[ -n "$root" ] || sshd_user=$(id -un)

[ "$mode" != namespaces ] || make_network
make_certificates
write_configs
start_standins
start master-agent master "$bin/master-agent" -c "$dir/master/master-agent.yaml" run
wait_for master-agent 10 test -S "$dir/admin.sock"
join_node n1
join_node n2
start_sshd
say "waiting for the tunnels"
wait_for master-agent 30 all_connected
wait_for master-agent 30 endpoints_listen
make_person
write_endpoints
table
calls
comparison
if [ "$bad" = 0 ]; then
    echo "All of it is as it should be."
    failed=0
else
    echo "$bad of the results above are not as they should be."
fi
if [ -n "$once" ]; then exit "$((bad > 0))"; fi
failed=0
trap 'exit "$((bad > 0))"' INT TERM HUP
what_to_try
while :; do sleep 1; done
