// Shows what the agent sends. Text that peers influence is only ever inserted with textContent.
'use strict';

(() => {
  const SHOWN = 200; // The number of rows at first, and of further rows for each click on "more".
  const SILENCE = 12_000;
  const STATES = ['lost', 'retrying', 'connecting', 'waiting', 'draining', 'drained', 'connected'];
  const CONNECTED = ['draining', 'drained', 'connected']; // The states of nodes that have a tunnel.

  const $ = (selector) => document.querySelector(selector);
  const nodes = new Map();
  const views = new Map();
  const collator = new Intl.Collator('en', { numeric: true });
  let sortedNames = true;
  let refusals = [];
  let compared = 0;
  let skew = 0;
  let heard = 0;
  let limit = SHOWN;
  let sort = { by: 'state', down: false };
  let rates = false;
  let news = new Map();

  // ---- text

  const now = () => Date.now() + skew;

  function duration(seconds) {
    const s = Math.max(0, Math.floor(seconds));
    if (s < 60) return `${s} s`;
    if (s < 3600) return `${Math.floor(s / 60)} min`;
    if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor(s / 60) % 60} min`;
    return `${Math.floor(s / 86400)} d ${Math.floor(s / 3600) % 24} h`;
  }

  const age = (ms) => (ms ? `${duration((now() - ms) / 1000)} ago` : '–');

  function milliseconds(us) {
    if (us === null || us === undefined) return '–';
    const ms = us / 1000;
    return `${ms < 10 ? ms.toFixed(2) : ms < 100 ? ms.toFixed(1) : ms.toFixed(0)} ms`;
  }

  function bytes(value) {
    for (const unit of ['B', 'kB', 'MB', 'GB', 'TB']) {
      if (value < 999.5) return `${unit === 'B' || value >= 99.95 ? value.toFixed(0) : value.toFixed(1)} ${unit}`;
      value /= 1000;
    }
    return `${value.toFixed(0)} PB`;
  }

  const rate = (value) => (rates ? `${bytes(value)}/s` : '–');
  const many = (count, what) => `${count.toLocaleString('en')} ${what}${count === 1 ? '' : 's'}`;

  // ---- the document

  function element(name, options = {}, ...children) {
    const made = document.createElement(name);
    const { text, ...attributes } = options;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    made.append(...children);
    return made;
  }

  function write(node, text) {
    if (node.textContent !== text) node.textContent = text;
  }

  // Fills a table. A column is [title, class], and a cell is a text. Rows are reused, so that focus and selection stay.
  function fill(table, columns, rows) {
    if (!table.tHead) {
      const head = table.createTHead().insertRow();
      for (const [title, type] of columns) head.append(element('th', { scope: 'col', class: type, text: title }));
      table.append(element('tbody'));
    }
    const body = table.tBodies[0];
    while (body.rows.length > rows.length) body.deleteRow(-1);
    rows.forEach((cells, at) => {
      const row = body.rows[at] ?? body.insertRow();
      cells.forEach((text, column) => {
        const cell = row.cells[column] ?? row.appendChild(element('td', { class: columns[column][1] }));
        write(cell, text);
      });
    });
  }

  // ---- nodes

  const rank = (node) => STATES.indexOf(node.state);
  // Each column is [key, title, class, text, value to sort by]. The values put the most interesting nodes first.
  const COLUMNS = [
    ['name', 'Node', '', null, (n) => n.order],
    ['state', 'State', 'state', null, rank],
    ['direction', 'Direction', 'less', (n) => n.direction ?? '–', (n) => n.direction ?? '~'],
    ['kind', 'Kind', 'spare', (n) => n.kind ?? '–', (n) => n.kind ?? '~'],
    ['round-trip', 'Round trip', 'number', (n) => milliseconds(n.round_trip_microseconds), (n) => -(n.round_trip_microseconds ?? -1)],
    ['streams', 'Streams', 'number', (n) => String(n.streams), (n) => -n.streams],
    ['up', 'Up', 'number less', (n) => rate(n.up), (n) => -n.up],
    ['down', 'Down', 'number less', (n) => rate(n.down), (n) => -n.down],
    ['errors', 'Errors', 'number less', (n) => String(n.errors), (n) => -n.errors],
    ['changed', 'Changed', 'number less', (n) => age(n.changed_unix_milliseconds), (n) => -(n.changed_unix_milliseconds ?? 0)],
  ];

  function makeHead() {
    const head = $('#table thead tr');
    for (const [key, title, type] of COLUMNS) {
      const button = element('button', { type: 'button', text: title });
      button.addEventListener('click', () => sortBy(key));
      head.append(element('th', { scope: 'col', class: type, 'data-key': key }, button));
      $('#sort').append(element('option', { value: key, text: title.toLowerCase() }));
    }
    $('#sort').addEventListener('change', (event) => sortBy(event.target.value, false));
    sortBy('state', false);
  }

  function sortBy(key, down = sort.by === key && !sort.down) {
    sort = { by: key, down };
    for (const cell of document.querySelectorAll('#table thead th')) {
      if (cell.dataset.key === key) cell.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      else cell.removeAttribute('aria-sort');
    }
    $('#sort').value = key;
    schedule();
  }

  function view(name) {
    let made = views.get(name);
    if (made) return made;
    const button = element('button', { type: 'button', text: name });
    button.addEventListener('click', () => open(name));
    const row = element('tr', {}, element('th', { scope: 'row' }, button));
    const word = element('span', { class: 'word' });
    const reason = element('span', { class: 'reason' });
    const cells = COLUMNS.slice(1).map(([key, , type]) => {
      const cell = row.insertCell();
      if (type) cell.className = type;
      if (key === 'state') cell.append(word, reason);
      return cell;
    });
    made = { row, word, reason, cells };
    views.set(name, made);
    return made;
  }

  // Returns the reason without the state, with which it begins because other places show it alone.
  function why(node) {
    const again = `${node.state}: `;
    return node.reason?.startsWith(again) ? node.reason.slice(again.length) : node.reason ?? '';
  }

  function update(made, node) {
    if (made.row.className !== node.state) made.row.className = node.state;
    write(made.word, node.state);
    write(made.reason, why(node));
    COLUMNS.slice(1).forEach(([, , , text], at) => {
      if (text) write(made.cells[at], text(node));
    });
  }

  function matching() {
    const filter = $('#filter').value.trim().toLowerCase();
    const all = [...nodes.values()];
    if (!filter) return all;
    return all.filter((n) => [n.name, n.state, n.reason, n.direction, n.kind].some((t) => t?.toLowerCase().includes(filter)));
  }

  function renderNodes() {
    if (!sortedNames) {
      [...nodes.keys()].sort(collator.compare).forEach((name, order) => { nodes.get(name).order = order; });
      sortedNames = true;
    }
    const key = COLUMNS.find(([key]) => key === sort.by)[4];
    const sign = sort.down ? -1 : 1;
    const found = matching().sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      return x < y ? -sign : x > y ? sign : a.order - b.order;
    });
    const list = found.slice(0, limit);
    const body = $('#table tbody');
    const focused = document.activeElement;
    let at = body.firstElementChild;
    for (const node of list) {
      const made = view(node.name);
      update(made, node);
      if (made.row === at) at = at.nextElementSibling;
      else body.insertBefore(made.row, at);
    }
    while (at) {
      const next = at.nextElementSibling;
      at.remove();
      at = next;
    }
    if (views.size > list.length) {
      const kept = new Set(list.map((node) => node.name));
      for (const name of views.keys()) if (!kept.has(name)) views.delete(name);
    }
    // A row that was moved has lost the focus.
    if (focused !== document.activeElement && body.contains(focused)) focused.focus({ preventScroll: true });
    const part = found.length < nodes.size ? `${many(found.length, 'node')} of ${nodes.size}` : '';
    const first = list.length < found.length ? `the first ${list.length} are shown` : '';
    write($('#shown'), [part, first].filter(Boolean).join('; '));
    $('#more').hidden = list.length === found.length;
    renderCounts();
  }

  function renderCounts() {
    const counts = new Map(STATES.map((state) => [state, 0]));
    let [streams, up, down] = [0, 0, 0];
    for (const node of nodes.values()) {
      counts.set(node.state, (counts.get(node.state) ?? 0) + 1);
      streams += node.streams;
      up += node.up;
      down += node.down;
    }
    const connected = CONNECTED.reduce((sum, state) => sum + counts.get(state), 0);
    const states = [...counts].reverse().filter(([state, count]) => count || state === 'connected');
    const items = [
      [String(nodes.size), nodes.size === 1 ? 'node' : 'nodes', ''],
      ...states.map(([state, count]) => [String(count), state, state]),
      [String(streams), streams === 1 ? 'stream' : 'streams', ''],
      [rate(up), 'up', ''],
      [rate(down), 'down', ''],
    ];
    const list = $('#counts');
    while (list.children.length > items.length) list.lastChild.remove();
    items.forEach(([value, label, state], at) => {
      const item = list.children[at] ?? list.appendChild(element('li', {}, element('b'), ' ', element('span')));
      write(item.firstChild, value);
      write(item.lastChild, label);
      item.className = state;
      item.lastChild.className = state ? 'word' : '';
    });
    document.title = `${connected}/${nodes.size} connected – master-agent`;
  }

  function announce() {
    if (!news.size) return;
    const changed = [...news];
    news = new Map();
    const away = [...nodes.values()].filter((node) => !CONNECTED.includes(node.state)).length;
    const text = changed.length <= 3
      ? changed.map(([name, state]) => `${name} is ${state}`).join(', ')
      : `${changed.length} nodes changed`;
    $('#news').textContent = `${text}; ${away} of ${many(nodes.size, 'node')} not connected.`;
  }

  // ---- a node

  let opened = null;

  function open(name) {
    opened = name;
    $('#node-title').textContent = name;
    for (const table of document.querySelectorAll('#node table')) table.replaceChildren();
    $('#node .about').textContent = 'Asking the agent …';
    $('#node svg').replaceChildren();
    $('#plot-text').textContent = '';
    $('#node').showModal();
    follow();
  }

  let asking = 0;

  async function follow() {
    const turn = ++asking;
    while (opened && turn === asking) {
      await showNode(opened, turn);
      await new Promise((done) => setTimeout(done, 2000));
    }
  }

  async function showNode(name, turn) {
    let detail;
    try {
      const answer = await fetch(`nodes/${encodeURIComponent(name)}`);
      if (!answer.ok) throw new Error(await answer.text());
      detail = await answer.json();
    } catch (error) {
      if (turn === asking) write($('#node .about'), `The node can’t be shown at the moment: ${error.message}`);
      return;
    }
    if (turn !== asking) return;
    const about = $('#node .about');
    const text = `${why(detail) ? `: ${why(detail)}` : ''} – ${bytes(detail.totals.up)} up and ${bytes(detail.totals.down)} down in ${many(detail.totals.streams, 'stream')}`;
    if (about.className !== `about ${detail.state}` || about.children.length !== 1) {
      about.className = `about ${detail.state}`;
      about.replaceChildren(element('span', { class: 'word', text: detail.state }), '');
    }
    if (about.lastChild.data !== text) about.lastChild.data = text;
    plot(detail.round_trips_microseconds, detail.sample_seconds);
    fill($('#tunnels'), [['Role', ''], ['Direction', ''], ['Kind', ''], ['Peer', ''], ['Round trip', 'number'], ['Streams', 'number'], ['Since', 'number']],
      detail.tunnels.map((t) => [t.role, t.direction, t.kind, t.peer ?? '–', milliseconds(t.round_trip_microseconds), String(t.streams), age(t.since_unix_seconds * 1000)]));
    fill($('#streams'), [['Target', ''], ['Egress listener', ''], ['For', 'number'], ['Up', 'number'], ['Down', 'number'], ['Caller', 'text'], ['Why this node', 'text']],
      detail.streams.map((s) => [s.target, s.egress, duration(s.seconds), bytes(s.up), bytes(s.down), s.origin, s.reason]));
    fill($('#events'), [['When', ''], ['What', ''], ['Text', 'text']],
      detail.events.map((e) => [age(e.unix_milliseconds), kind(e), e.text + (e.times > 1 ? ` (${e.times} times)` : '')]));
    write($('#tunnels-title'), detail.tunnels.length ? 'Tunnels' : 'No tunnel');
    write($('#streams-title'), detail.streams.length ? 'Open streams' : 'No open streams');
    write($('#events-title'), detail.events.length ? 'Last events' : 'No events yet');
    for (const table of document.querySelectorAll('#node table')) table.parentNode.hidden = !table.tBodies[0].rows.length;
  }

  const kind = (event) => event.kind.replaceAll('_', ' ');

  function plot(times, every) {
    const svg = $('#node svg');
    const known = times.filter((time) => time !== null);
    if (!known.length) {
      svg.replaceChildren();
      svg.setAttribute('hidden', '');
      write($('#plot-text'), 'Round trip: not measured yet.');
      return;
    }
    svg.removeAttribute('hidden');
    const sorted = [...known].sort((a, b) => a - b);
    const [width, height, left, most] = [svg.clientWidth || 640, 158, 70, sorted[sorted.length - 1]];
    const draw = (name, attributes) => {
      const shape = document.createElementNS('http://www.w3.org/2000/svg', name);
      for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
      return shape;
    };
    const top = most * 1.1 || 1;
    const x = (at) => left + ((at + 1) / times.length) * (width - left - 4);
    const y = (time) => height - (time / top) * (height - 12);
    const shapes = [];
    for (const part of [0, 0.5, 1]) {
      shapes.push(draw('line', { class: 'grid', x1: left, x2: width, y1: y(most * part), y2: y(most * part) }));
      const label = draw('text', { x: left - 6, y: y(most * part) + 5, 'text-anchor': 'end' });
      label.textContent = part ? milliseconds(most * part) : '0';
      shapes.push(label);
    }
    let path = '';
    let broken = true;
    times.forEach((time, at) => {
      if (time === null) broken = true;
      else {
        path += `${broken ? 'M' : 'L'}${x(at).toFixed(1)} ${y(time).toFixed(1)}`;
        // A single sample would not be visible as a line, and the last sample is the most interesting one.
        const alone = broken && (times[at + 1] ?? null) === null;
        if (alone || at === times.length - 1) shapes.push(draw('circle', { cx: x(at), cy: y(time), r: 3 }));
        broken = false;
      }
    });
    shapes.push(draw('path', { class: 'curve', d: path }));
    svg.replaceChildren(...shapes);
    const last = times[times.length - 1];
    const without = times.length - known.length;
    const gap = without ? `; none at ${without} of ${many(times.length, 'sample')}` : '';
    write($('#plot-text'), `Round trip over the last ${duration(times.length * every)}: now ${last === null ? 'none' : milliseconds(last)}, ` +
      `least ${milliseconds(sorted[0])}, median ${milliseconds(sorted[sorted.length >> 1])}, most ${milliseconds(most)}${gap}.`);
  }

  // ---- refusals, explain, comparison

  function renderRefusals() {
    fill($('#refusals table'), [['When', ''], ['Node', ''], ['Rule', 'rule'], ['What', 'text']],
      refusals.map((r) => [age(r.unix_milliseconds), r.node, r.rule ?? kind(r), r.text + (r.times > 1 ? ` (${r.times} times)` : '')]));
    $('#refusals table').hidden = !refusals.length;
    $('#refusals .none').hidden = refusals.length > 0;
  }

  let explaining = 0;

  async function explain(event) {
    event.preventDefault();
    // The answer to an earlier question may arrive after that to a later one.
    const turn = ++explaining;
    const place = $('#explained');
    place.replaceChildren(element('p', { text: 'Dialling …' }));
    let lines;
    try {
      const answer = await fetch('explain', { method: 'POST', body: $('#target').value });
      if (!answer.ok) throw new Error((await answer.text()).trim() || `the agent answers ${answer.status}`);
      const said = await answer.json();
      lines = [
        ['Target', said.target],
        ['Verdict', said.verdict],
        ['Node', said.node ?? '–'],
        ['Reason', said.reason || '–'],
        ...said.candidates.map((way) => ['Candidate', `${way.node} for ${way.target}, ${way.state ?? 'not known here'}` +
          (way.round_trip_microseconds === null ? '' : `, round trip ${milliseconds(way.round_trip_microseconds)}`)]),
        ['Route', milliseconds(said.route_microseconds)],
        ['Dial', milliseconds(said.dial_microseconds)],
      ];
    } catch (error) {
      if (turn === explaining) place.replaceChildren(element('p', { class: 'error', text: error.message }));
      return;
    }
    if (turn !== explaining) return;
    place.replaceChildren(element('dl', {}, ...lines.flatMap(([term, text]) => [element('dt', { text: term }), element('dd', { text })])));
  }

  async function showComparison() {
    if (!compared) return;
    const part = $('#comparison');
    try {
      const answer = await fetch('comparison.json');
      if (!answer.ok) return;
      const said = await answer.json();
      const table = part.querySelector('table');
      table.replaceChildren();
      const values = (line) => line.values.map((value) =>
        (line.closed ? 'closed' : !value ? '–' : value[1] ? `${value[0]} (× ${value[1]})` : value[0]));
      fill(table, [['Target', 'text'], ['Path', ''], ...said.columns.map((title) => [title, 'number'])],
        said.lines.slice(0, SHOWN).map((line) => [line.target, line.path, ...values(line)]));
      const rest = said.lines.length > SHOWN ? ` The first ${SHOWN} of ${said.lines.length} lines are shown.` : '';
      part.querySelector('.about').textContent = `Begun at ${said.started}; ${many(said.rounds, 'round')} in ${said.seconds} s. ` +
        `Medians; in parentheses, the ratio to the direct path, or to the first that is open.${rest}`;
      for (const hidden of part.querySelectorAll('.wide, .whole')) hidden.hidden = false;
    } catch {
      // The comparison is fetched again after the next connection, or when there is a new one.
      compared = 0;
    }
  }

  // ---- what the agent sends

  function take(change) {
    heard = Date.now();
    skew = change.unix_milliseconds - heard;
    if (change.whole) {
      nodes.clear();
      sortedNames = false;
    }
    for (const name of change.gone ?? []) {
      nodes.delete(name);
      news.delete(name);
    }
    for (const node of change.rows ?? []) {
      const before = nodes.get(node.name);
      if (before && before.state !== node.state) news.set(node.name, node.state);
      if (!before) sortedNames = false;
      node.order = before?.order ?? 0;
      nodes.set(node.name, node);
    }
    rates = change.rates ?? rates;
    if (change.refusals) refusals = change.refusals;
    if (change.compared !== undefined && change.compared !== compared) {
      compared = change.compared;
      showComparison();
    }
    schedule();
  }

  let scheduled = false;
  let rendered = 0;

  function schedule() {
    if (scheduled) return;
    scheduled = true;
    requestAnimationFrame(() => {
      scheduled = false;
      rendered = Date.now();
      renderNodes();
      renderRefusals();
    });
  }

  function reachable(text) {
    const place = $('#link');
    place.classList.toggle('lost', text !== null);
    document.body.classList.toggle('stale', text !== null);
    write(place, text ?? 'Live.');
  }

  // Set while the browser connects again. On the front end, it does so once a minute to be authorized again.
  let missed = null;

  function connect() {
    const events = new EventSource('events');
    events.addEventListener('message', (event) => {
      clearTimeout(missed);
      missed = null;
      reachable(null);
      take(JSON.parse(event.data));
    });
    events.addEventListener('error', async () => {
      const gone = 'The agent can’t be reached; trying again. What is shown is old.';
      if (events.readyState !== EventSource.CLOSED) {
        missed ??= setTimeout(() => reachable(gone), 1500);
        return;
      }
      clearTimeout(missed);
      missed = null;
      // The agent has answered with an error, after which the browser does not connect again by itself.
      setTimeout(connect, 5000);
      const answer = await fetch('page.css').catch(() => null);
      if (!answer) reachable(gone);
      else if (answer.ok) reachable('The agent sends nothing: too many pages may be open. Trying again.');
      else if (answer.status === 401) reachable('You are not logged in any more: run master-agent page on the master’s host, and open what it prints.');
      else reachable(`The agent refuses to be watched (${answer.status}). Trying again.`);
    });
  }

  function start() {
    makeHead();
    $('#filter').addEventListener('input', () => { limit = SHOWN; schedule(); });
    $('#more').addEventListener('click', () => { limit += SHOWN; schedule(); });
    $('#explain form').addEventListener('submit', explain);
    $('#close').addEventListener('click', () => $('#node').close());
    $('#node').addEventListener('close', () => { opened = null; });
    setInterval(() => {
      if (heard && Date.now() - heard > SILENCE) reachable(`No word from the agent for ${duration((Date.now() - heard) / 1000)}. What is shown is old.`);
      // Ages also grow while nothing happens.
      if (Date.now() - rendered > 1500 && !document.hidden) schedule();
    }, 1000);
    setInterval(announce, 5000);
    connect();
  }

  start();
})();
