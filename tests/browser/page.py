"""Opens the agent's page, or a report of `compare`, in Debian's chromium, and asserts what has to hold there.

    page.py page URL SHOTS NODE PID TARGET   logs in at URL; PID is the process of NODE, and is killed
    page.py many URL SHOTS PID               the same with 5,000 nodes; PID is the agent's, and is killed
    page.py report FILE SHOTS

Screenshots go to the directory SHOTS. Figures are printed; what does not hold is an error.
"""

import os
import pathlib
import signal
import sys
import time
from urllib.parse import urlsplit

import axe_playwright_python
from playwright.sync_api import expect, sync_playwright

AXE = (pathlib.Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
SCHEMES = ["light", "dark"]
WIDTHS = [1280, 390]


class Visit:
    """One browser context; keeps what its page says and asks for."""

    def __init__(self, browser, origin, scheme, width, state=None):
        self.origin, self.name = origin, f"{width}-{scheme}"
        self.context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 900}, storage_state=state
        )
        self.page = self.context.new_page()
        self.said, self.elsewhere = [], []
        # Whether the agent is gone: the browser itself tells of what it can't load.
        self.agent_gone = False
        self.page.on("console", self.hears)
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("request", self.asked)

    def hears(self, message):
        if not (self.agent_gone and message.text.startswith("Failed to load resource: net::")):
            self.said.append(f"{message.type}: {message.text}")

    def asked(self, request):
        if not request.url.startswith(self.origin):
            self.elsewhere.append(request.url)

    def check(self, what):
        """No serious violation, nothing beside the screen."""
        self.page.evaluate(AXE)
        found = self.page.evaluate("axe.run()")
        assert len(found["passes"]) > 10, f"axe has hardly looked: {len(found['passes'])}"
        bad = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
        for violation in bad:
            for node in violation["nodes"][:3]:
                print(violation["id"], node["html"], node["failureSummary"], file=sys.stderr)
        assert not bad, f"{what} at {self.name}: {[v['id'] for v in bad]}"
        wide = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1], f"{what} at {self.name} is wider than the screen: {wide}"

    def shoot(self, directory, what, full=True):
        self.page.screenshot(path=os.path.join(directory, f"{what}-{self.name}.png"), full_page=full)

    def close(self):
        self.context.close()
        assert not self.said, f"on the console at {self.name}: {self.said}"
        assert not self.elsewhere, f"asked for at {self.name}: {self.elsewhere}"


def tab_to(page, selector):
    """Presses Tab until that has the focus."""
    for _ in range(100):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} is not reached by Tab")


def row(page, node):
    return page.locator("#table tbody tr", has=page.get_by_role("button", name=node, exact=True))


def open_page(visit, url):
    visit.page.goto(url)
    expect(visit.page.locator("#table tbody tr")).to_have_count(3)
    expect(visit.page.locator("#table tbody tr.connected")).to_have_count(3)
    expect(visit.page.locator("#refusals tbody tr")).not_to_have_count(0)
    expect(visit.page.locator("#comparison tbody tr")).not_to_have_count(0)


def by_keyboard(page, node, target):
    button = f"#table tbody button:text-is('{node}')"
    page.locator("body").press("Home")
    for _ in range(100):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('tbody') && document.activeElement.textContent") == node:
            break
    else:
        raise AssertionError(f"{node} is not reached by Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#node")).to_be_visible()
    expect(page.locator("#node-title")).to_have_text(node)
    expect(page.locator("#node .about .word")).to_have_text("connected")
    page.keyboard.press("Escape")
    expect(page.locator("#node")).not_to_be_visible()
    expect(page.locator(button)).to_be_focused()
    tab_to(page, "#target")
    page.keyboard.type(target)
    page.keyboard.press("Enter")
    expect(page.locator("#explained dl")).to_contain_text("the node allows it and the target answers", timeout=15000)
    page.locator("#target").fill("no target")
    page.keyboard.press("Enter")
    expect(page.locator("#explained .error")).to_contain_text("is no target")


def filtered_and_sorted(page, node):
    page.locator("#filter").fill(node.upper())
    expect(page.locator("#table tbody tr")).to_have_count(1)
    page.locator("#filter").fill("")
    expect(page.locator("#table tbody tr")).to_have_count(3)
    names = page.locator("#table tbody th")
    page.get_by_role("button", name="Node", exact=True).click()
    expect(names).to_have_text(["n1", "n2", "n3"])
    page.get_by_role("button", name="Node", exact=True).click()
    expect(names).to_have_text(["n3", "n2", "n1"])
    expect(page.locator("th[aria-sort]")).to_have_attribute("aria-sort", "descending")


# Resolves with the time at which the node's state is told in red, seen by whoever is told of each change.
RED = """node => {
    window.red = new Promise(done => {
        const isRed = () => {
            for (const row of document.querySelectorAll('#table tbody tr')) {
                if (row.querySelector('button').textContent !== node) continue;
                const word = row.querySelector('.word');
                const [r, g, b] = getComputedStyle(word).backgroundColor.match(/\\d+/g).map(Number);
                return ['lost', 'retrying'].includes(word.textContent) && r > 100 && r > g + 60 && r > b + 60;
            }
            return false;
        };
        if (isRed()) throw new Error('it is red already');
        const observer = new MutationObserver(() => {
            if (!isRed()) return;
            observer.disconnect();
            done(Date.now());
        });
        observer.observe(document, { subtree: true, childList: true, characterData: true, attributes: true });
    });
    window.stayed = true;
}"""


def page_of_agent(browser, url, shots, node, pid, target):
    parts = urlsplit(url)
    origin = f"{parts.scheme}://{parts.netloc}/page/"
    first = Visit(browser, origin, "light", 1280)
    open_page(first, url)
    assert first.page.url == origin, first.page.url
    cookies = first.context.cookies()
    assert len(cookies) == 1 and cookies[0]["httpOnly"] and cookies[0]["sameSite"] == "Strict", cookies
    state = first.context.storage_state()
    for scheme in SCHEMES:
        for width in WIDTHS:
            visit = Visit(browser, origin, scheme, width, state)
            open_page(visit, origin)
            visit.page.locator("#target").fill(target)
            visit.page.get_by_role("button", name="Explain").click()
            expect(visit.page.locator("#explained dl")).to_be_visible(timeout=15000)
            visit.shoot(shots, "page")
            visit.check("the page")
            visit.page.get_by_role("button", name="n1", exact=True).click()
            expect(visit.page.locator("#streams tbody tr")).not_to_have_count(0)
            expect(visit.page.locator("#plot-text")).to_contain_text("Round trip over the last")
            visit.shoot(shots, "node", full=False)
            visit.check("a node")
            visit.page.get_by_role("button", name="Close").click()
            # The page's stylesheet is not let into the report, nor the other way round.
            visit.page.get_by_role("link", name="The whole report").click()
            expect(visit.page.locator("h1")).to_have_text("Tunneled and direct paths")
            visit.check("the report")
            visit.close()
    by_keyboard(first.page, "n2", target)
    # The refusal of "no target" is a 400, which the browser itself tells of.
    first.said = [said for said in first.said if "400 (Bad Request)" not in said]
    filtered_and_sorted(first.page, "n3")
    watchers = [first] + [Visit(browser, origin, "dark", width, state) for width in WIDTHS]
    for visit in watchers:
        if visit is not first:
            open_page(visit, origin)
        visit.page.evaluate(RED, node)
    killed = time.time()
    os.kill(pid, signal.SIGKILL)
    for visit in watchers:
        took = visit.page.evaluate("window.red") / 1000 - killed
        print(f"a node that is killed is red after {took:.2f} s at {visit.name}")
        assert took < 3, took
        assert visit.page.evaluate("window.stayed"), "it was loaded again"
    expect(first.page.locator("#news")).to_contain_text(f"{node} is", timeout=15000)
    for visit in watchers:
        visit.check("the page without a node")
        visit.shoot(shots, "killed")
        visit.close()


def many_nodes(browser, url, shots, pid):
    parts = urlsplit(url)
    visit = Visit(browser, f"{parts.scheme}://{parts.netloc}/page/", "light", 1280)
    page = visit.page
    page.add_init_script(
        "window.long = 0; new PerformanceObserver(list => list.getEntries().forEach(entry => {"
        " window.long = Math.max(window.long, entry.duration); })).observe({ type: 'longtask', buffered: true });"
    )
    page.goto(url)
    rows = page.locator("#table tbody tr")
    expect(rows).to_have_count(200)
    expect(page.locator("#counts")).to_contain_text("5000 nodes")
    expect(page.locator("#shown")).to_have_text("the first 200 are shown")
    page.get_by_role("button", name="Show more").click()
    expect(rows).to_have_count(400)
    for text, count in [("n49", 111), ("n4999", 1), ("no such node", 0), ("", 200)]:
        page.locator("#filter").fill(text)
        expect(rows).to_have_count(count)
    page.get_by_role("button", name="Node", exact=True).click()
    page.get_by_role("button", name="Node", exact=True).click()
    expect(page.locator("#table tbody th").first).to_have_text("n4999")
    expect(page.locator("#table tbody th").nth(199)).to_have_text("n4800")
    print(f"with 5,000 nodes, the longest the page was busy is {page.evaluate('window.long'):.0f} ms")
    visit.check("5,000 nodes")
    visit.shoot(shots, "many", full=False)
    visit.agent_gone = True
    os.kill(pid, signal.SIGKILL)
    expect(page.locator("#link")).to_contain_text("can’t be reached", timeout=15000)
    visit.check("5,000 nodes without the agent")
    visit.shoot(shots, "gone", full=False)
    visit.close()


def report(browser, file, shots):
    url = pathlib.Path(file).resolve().as_uri()
    for scheme in SCHEMES:
        for width in WIDTHS:
            visit = Visit(browser, url, scheme, width)
            visit.page.goto(url)
            expect(visit.page.locator("h1")).to_have_text("Tunneled and direct paths")
            visit.check("the report")
            visit.shoot(shots, "report")
            visit.close()


def main(what, *args):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"],
        )
        if what == "page":
            url, shots, node, pid, target = args
            page_of_agent(browser, url, shots, node, int(pid), target)
        elif what == "many":
            url, shots, pid = args
            many_nodes(browser, url, shots, int(pid))
        else:
            report(browser, *args)
        browser.close()


main(*sys.argv[1:])
