#!/usr/bin/env bash
# Takes the pictures of README.md from a running quickstart. `deploy/pictures.sh --help` says more.
set -euo pipefail

usage() {
    cat <<'END'
Usage: deploy/pictures.sh [--bin DIR]

Starts deploy/quickstart.sh, and writes to deploy/pictures/:

  compare.svg  what `master-agent compare` prints for n1, on an idle quickstart
  page.png     the page in a browser, with some load on the tunnels
  top.svg      `master-agent top` in a terminal: all nodes, and below them n2

It needs root, since the quickstart makes network namespaces, and tmux, Chromium and Python with venv, which it
installs with apt where they are missing. What drives the browser and draws the terminal comes from PyPI. Everything
that it started is gone afterwards.

  --bin DIR  use the binaries in DIR in place of building
END
}

say() { printf '==> %s\n' "$*" >&2; }
die() {
    printf 'pictures: %s\n' "$*" >&2
    exit 1
}

quickstart_arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --bin)
            [ -n "${2:-}" ] || die "$1 needs a directory"
            quickstart_arguments+=(--bin "$2")
            shift
            ;;
        -h | --help) usage && exit ;;
        *) usage >&2 && exit 2 ;;
    esac
    shift
done

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pictures=$repo/deploy/pictures
tools=${CARGO_TARGET_DIR:-$repo/target}/tools/pictures
# The pictures show this path.
dir=/run/quickstart
[ "$(id -u)" = 0 ] || die "this needs root, since the quickstart makes network namespaces"
mkdir "$dir" || die "remove $dir, if no other run uses it"
work=$(mktemp -d)

clean_up() {
    local status=$? running
    trap '' INT TERM HUP
    set +e
    terminal kill-server 2>/dev/null
    # The quickstart, which stops what it has started itself, and what loads its tunnels.
    mapfile -t running < <(jobs -pr)
    [ ${#running[@]} = 0 ] || kill -TERM "${running[@]}"
    wait
    rm -rf "$dir" "$work"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# --- What it needs -----------------------------------------------------------------------------------------------

install_missing() {
    local pair missing=()
    for pair in tmux:tmux chromium:chromium python3:python3; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
    if [ ${#missing[@]} -gt 0 ]; then
        command -v apt-get >/dev/null || die "install these first: ${missing[*]}"
        say "installing ${missing[*]}"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq >&2
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
    fi
    # The browser's driver is that of the tests.
    cat "$repo/tests/browser/requirements.txt" - >"$work/requirements.txt" <<'END'
rich==15.0.0
pillow==13.0.0
END
    if ! cmp -s "$work/requirements.txt" "$tools/installed"; then
        rm -rf "$tools"
        python3 -m venv "$tools"
        "$tools/bin/pip" install --quiet --disable-pip-version-check -r "$work/requirements.txt"
        cp "$work/requirements.txt" "$tools/installed"
    fi
}

# --- The quickstart ----------------------------------------------------------------------------------------------

start_quickstart() {
    "$repo/deploy/quickstart.sh" --dir "$dir" "${quickstart_arguments[@]}" >"$work/quickstart" &
    until grep -q '^It stays up' "$work/quickstart"; do
        [ -n "$(jobs -pr)" ] || die "the quickstart ended"
        sleep 0.5
    done
    if ! grep -q '^All of it is as it should be' "$work/quickstart"; then
        cat "$work/quickstart" >&2
        die "the quickstart found faults"
    fi
    [ "$(endpoint mode)" = namespaces ] || die "network namespaces can't be made here"
}

# The value at a path of keys in endpoints.json.
endpoint() {
    "$tools/bin/python" - "$dir/endpoints.json" "$@" <<'END'
import json, sys

value = json.load(open(sys.argv[1]))
for key in sys.argv[2:]:
    value = value[int(key) if isinstance(value, list) else key]
print(value)
END
}

master_agent() { "$(endpoint binaries master_agent)" -c "$(endpoint master config)" "$@"; }

# The address of a node's pod.
pod() { endpoint nodes "$1" targets 2 url | cut -d/ -f3; }

# Opens streams through the Unix socket, each at a rate that leaves the machine idle.
start_load() {
    "$tools/bin/python" - "$(endpoint master connect_unix path)" "$(endpoint kubelet_ca)" \
        "$(pod 0)" "$(pod 1)" "$(pod 2)" <<'END' &
import socket, ssl, sys, threading, time

path, ca, pod1, pod2, pod3 = sys.argv[1:]
PAUSE = 0.05  # seconds
LENGTH = 10**12


def connect(target):
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(path)
    stream.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += stream.recv(1)
    assert b" 200 " in head, head
    host, port = target.split(":")
    if port == "10250":
        stream = ssl.create_default_context(cafile=ca).wrap_socket(stream, server_hostname=host)
    return stream


def download(target, rate):
    stream = connect(target)
    stream.sendall(f"GET /bytes/{LENGTH} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    body = stream.makefile("rb")
    while body.read(int(rate * PAUSE)):
        time.sleep(PAUSE)


def upload(target, rate):
    stream = connect(target)
    stream.sendall(f"POST /upload HTTP/1.1\r\nHost: {target}\r\nContent-Length: {LENGTH}\r\n\r\n".encode())
    while True:
        stream.sendall(bytes(int(rate * PAUSE)))
        time.sleep(PAUSE)


for stream in [
    (download, pod1, 4e6),
    (upload, pod1, 3e5),
    (download, pod2, 3e6),
    (download, "n2:10250", 9e5),
    (upload, pod2, 1.2e6),
    (upload, "n2:10250", 6e5),
    # Not a download: without flow control for single streams, an sshd's would be reset at such a rate.
    (upload, pod3, 7e5),
]:
    threading.Thread(target=stream[0], args=stream[1:]).start()
END
}

# --- The pictures ------------------------------------------------------------------------------------------------

# file title text: draws text with its escape sequences as a terminal.
draw() {
    "$tools/bin/python" - "$@" <<'END'
import io, re, sys
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.ansi import AnsiDecoder
from rich.console import Console
from rich.terminal_theme import TerminalTheme

file, title, text = sys.argv[1:]
lines = list(AnsiDecoder().decode(open(text).read()))
console = Console(record=True, width=max(line.cell_len for line in lines), file=io.StringIO(), force_terminal=True)
for line in lines:
    console.print(line, no_wrap=True, crop=False, highlight=False)
black, red, green, yellow = (48, 54, 61), (255, 123, 114), (86, 211, 100), (227, 179, 65)
blue, magenta, cyan, white = (121, 192, 255), (210, 168, 255), (86, 212, 221), (201, 209, 217)
colours = [black, red, green, yellow, blue, magenta, cyan, white]
theme = TerminalTheme((22, 27, 34), (230, 237, 243), colours)
# A picture that loads nothing: with the fonts of whoever looks at it.
frame = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
frame = frame.replace("Fira Code, monospace", "ui-monospace, DejaVu Sans Mono, Menlo, Consolas, monospace")
frame = frame.replace("font-family: arial", "font-family: system-ui, sans-serif")
svg = console.export_svg(title=title, theme=theme, code_format=frame, unique_id="terminal")
open(file, "w").write("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")
END
}

compare() {
    local arguments=(compare n1 --ca "$dir/pki/kubelet-ca.crt" --download /bytes/4000000000 --upload /upload)
    say "comparing once more, for the picture"
    # For this, the direct path to the kubelet of n1 is open.
    ip netns exec "$(endpoint nodes 0 namespace)" nft insert rule inet quickstart input tcp dport 10250 accept
    master_agent "${arguments[@]}" >"$work/compare"
    draw "$pictures/compare.svg" "master-agent ${arguments[*]//"$dir/pki/"/}" "$work/compare"
}

page() {
    say "opening the page"
    "$tools/bin/python" - "$(master_agent page)" "$(pod 1)" "$pictures/page.png" <<'END'
import io, sys
from PIL import Image
from playwright.sync_api import expect, sync_playwright

url, pod, file = sys.argv[1:]
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
        executable_path="/usr/bin/chromium",
        args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"],
    )
    size = {"width": 1000, "height": 600}
    page = browser.new_context(color_scheme="light", viewport=size, device_scale_factor=2).new_page()
    page.goto(url)
    expect(page.locator("#table tbody tr.connected")).to_have_count(3)
    expect(page.locator("#comparison tbody tr")).not_to_have_count(0)
    page.locator("#target").fill(pod)
    page.get_by_role("button", name="Explain").click()
    expect(page.locator("#explained dl")).to_be_visible()
    expect(page.locator("#counts")).to_contain_text("MB/s")
    below = page.locator("#refusals").bounding_box()["y"]
    shot = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": size["width"], "height": below})
    browser.close()
# A page of text has few colours.
Image.open(io.BytesIO(shot)).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)
END
}

terminal() { env -u TMUX LC_ALL=C.UTF-8 TERM=xterm-256color tmux -u -f /dev/null -S "$work/tmux" "$@"; }

# file text: the screen as soon as it has the text
screen() {
    local i
    for ((i = 0; i < 300; i++)); do
        terminal capture-pane -e -p -N >"$1"
        ! grep -q "$2" "$1" || return 0
        sleep 0.1
    done
    cat "$1" >&2
    die "the terminal does not show $2"
}

top() {
    say "watching top"
    terminal new-session -d -x 110 -y 6 "$(endpoint binaries master_agent)" -c "$(endpoint master config)" top
    screen "$work/nodes" '[1-9] MB'
    terminal send-keys Down
    screen "$work/nodes" $'\e\[[0-9;]*7mn2 '
    terminal resize-window -x 110 -y 20
    terminal send-keys Enter
    # The rates of streams are known a second after the streams.
    screen "$work/node" 'MB.*MB.*connect-unix'
    { cat "$work/nodes" && printf '\e[0m\n' && cat "$work/node"; } >"$work/top"
    draw "$pictures/top.svg" 'master-agent top' "$work/top"
}

install_missing
mkdir -p "$pictures"
start_quickstart
compare
start_load
page
top
say "wrote compare.svg, page.png and top.svg to $pictures"
