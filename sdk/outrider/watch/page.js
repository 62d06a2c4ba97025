"use strict";
// Whatever a device says is put into the page by textContent alone: nothing of it is ever read as HTML.
const CHART_DEVICES = 6;
const MAX_POINTS = 360;
const DASHES = ["", "7 3", "2 3", "10 3 2 3", "4 4", "9 3 2 3 2 3"];
const MARKS = {online: "●", stale: "◐", offline: "○", unknown: "◌"};
const CHARTS = [
  {key: 2, title: "Latency p95", unit: "ms", format: (v) => digits(v)},
  {key: 3, title: "Offload share", unit: "%", format: (v) => digits(100 * v), scale: 100},
  {key: 1, title: "Answers", unit: "per second", format: (v) => digits(v)},
  {key: 4, title: "Temperature", unit: "°C", format: (v) => digits(v)},
];
const STATES = ["offline", "stale", "unknown", "online"];
const COLUMNS = [
  {name: "Device", of: (d) => d.device, text: (d) => d.device, head: true},
  {name: "State", of: (d) => STATES.indexOf(d.state), text: (d) => `${MARKS[d.state]} ${d.state}`,
    style: (d) => d.state, hint: (d) => d.reason},
  {name: "Model", of: (d) => d.model, text: (d) => d.model === null ? "–" : `${d.model} ${d.version}`,
    hint: (d) => d.engine},
  {name: "Variant", of: (d) => d.variant, text: (d) => d.variant ?? "–"},
  {name: "Answers/s", of: (d) => d.per_second, text: (d) => fixed(d.per_second, 1), number: true},
  {name: "p50 ms", of: (d) => d.p50_ms, text: (d) => fixed(d.p50_ms, 2), number: true},
  {name: "p95 ms", of: (d) => d.p95_ms, text: (d) => fixed(d.p95_ms, 2), number: true},
  {name: "Offload", of: (d) => d.offload_share, text: (d) => share(d.offload_share), number: true},
  {name: "Degraded", of: (d) => d.degraded_share, text: (d) => share(d.degraded_share), number: true},
  {name: "Temp", of: (d) => d.temperature_c, number: true,
    text: (d) => d.temperature_c === null ? "–" : `${fixed(d.temperature_c, 0)} °C`},
  {name: "Heard", of: (d) => d.heard_s, text: (d) => d.heard_s ? age(now() - d.heard_s) : "–", number: true},
  {name: "Problems", of: (d) => d.problems.length, style: (d) => d.problems.length ? "problems" : "",
    text: (d) => d.problems.length ? `▲ ${d.problems.join(", ")}` : "–"},
  {name: "Last event", of: (d) => d.event === null ? null : d.event.at_s, style: () => "event",
    text: eventText, hint: eventText},
];

const devices = new Map();
const chosen = new Set();
let chosenByHand = false;
let about = {broker: "", connected: false, error: "", malformed: 0};
let streaming = false;
let clockOffset = 0;
let sorted = {column: 0, down: false};
let drawing = false;

const byId = (id) => document.getElementById(id);
const now = () => Date.now() / 1000 + clockOffset;

function digits(value) {
  const size = Math.abs(value);
  return value.toLocaleString("en", {maximumFractionDigits: size >= 100 ? 0 : size >= 10 ? 1 : 2});
}
function fixed(value, places) {
  const fractions = {minimumFractionDigits: places, maximumFractionDigits: places};
  return value === null ? "–" : value.toLocaleString("en", fractions);
}
function share(value) { return value === null ? "–" : `${fixed(100 * value, 1)} %`; }
function age(seconds) {
  const s = Math.max(0, seconds);
  if (s < 120) return `${Math.round(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} d`;
}
function clock(at) { return new Date(1000 * at).toLocaleTimeString([], {hour: "2-digit", minute: "2-digit"}); }
function eventText(d) {
  return d.event === null ? "–" : `${d.event.name} ${d.event.detail}`.trim() + `, ${age(now() - d.event.at_s)} ago`;
}
function make(name, fields = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(fields)) key in node ? node[key] = value : node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function svg(name, fields = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(fields)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}
function put(node, text) { if (node.textContent !== text) node.textContent = text; }

// ---- what the server says

function listen() {
  const source = new EventSource("/events");
  let first = true;
  source.onopen = () => { streaming = first = true; };
  source.onmessage = (message) => {
    const said = JSON.parse(message.data);
    if (first) devices.clear();
    clockOffset = said.now_s - Date.now() / 1000;
    about = said;
    for (const each of said.devices) take(each, first);
    first = false;
    if (!chosenByHand) choose();
    draw();
  };
  source.onerror = () => { streaming = false; draw(); };
}

function take(said, quiet) {
  const known = devices.get(said.device);
  const points = new Map((known ? known.points : []).map((point) => [point[0], point]));
  for (const point of said.points) points.set(point[0], point);
  said.points = [...points.values()].sort((a, b) => a[0] - b[0]).slice(-MAX_POINTS);
  if (!quiet && (!known || known.state !== said.state)) put(byId("news"), `${said.device} is ${said.state}`);
  devices.set(said.device, said);
}

// Until someone chooses: whoever has a problem when the page is opened, then whoever comes first.
function choose() {
  const troubled = [...devices.values()].filter((d) => d.problems.length > 0);
  for (const each of [...troubled, ...devices.values()]) if (chosen.size < CHART_DEVICES) chosen.add(each.device);
}

// ---- the page

function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    for (const part of [drawAbout, drawSummary, drawTable, drawLegend, drawCharts]) part();
  });
}

function drawAbout() {
  const up = streaming && about.connected;
  byId("link").className = up ? "up" : "down";
  put(byId("link-mark"), up ? "●" : "○");
  const why = streaming ? `no broker: ${about.error || "connecting"}` : "the watch does not answer";
  put(byId("link-text"), up ? "live" : why);
  put(byId("broker"), about.broker);
}

function drawSummary() {
  const all = [...devices.values()];
  const counted = (test) => all.filter(test).length;
  const sum = (key) => all.reduce((total, d) => total + (d[key] ?? 0), 0);
  const offline = counted((d) => d.state === "offline"), stale = counted((d) => d.state === "stale");
  const troubled = counted((d) => d.problems.length > 0);
  const offloaded = all.reduce((total, d) => total + (d.offload_share ?? 0) * d.predictions, 0);
  const tiles = [
    ["Devices", `${all.length}`, ""],
    ["Online", `${counted((d) => d.state === "online")}`, "good"],
    ["Stale", `${stale}`, stale ? "warn" : ""],
    ["Offline", `${offline}`, offline ? "bad" : ""],
    ["With problems", `${troubled}`, troubled ? "bad" : ""],
    ["Answers/s", digits(all.filter((d) => d.state === "online").reduce((t, d) => t + (d.per_second ?? 0), 0)), ""],
    ["Offloaded", sum("predictions") ? share(offloaded / sum("predictions")) : "–", ""],
  ];
  const list = byId("summary");
  while (list.children.length < tiles.length) list.append(make("div", {}, make("dt"), make("dd")));
  tiles.forEach(([name, value, style], at) => {
    const [term, data] = list.children[at].children;
    put(term, name);
    put(data, value);
    data.className = style;
  });
}

function drawHeads() {
  const heads = COLUMNS.map((column, at) => {
    const head = make("th", {scope: "col", className: column.number ? "number" : ""});
    const isIt = sorted.column === at;
    if (isIt) head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
    const arrow = make("span", {ariaHidden: "true"}, isIt ? (sorted.down ? " ↓" : " ↑") : "");
    head.append(make("button", {type: "button", onclick: () => {
      sorted = {column: at, down: isIt ? !sorted.down : Boolean(column.number)};
      drawHeads();
      byId("heads").children[at + 1].firstChild.focus();
      draw();
    }}, column.name, arrow));
    return head;
  });
  byId("heads").replaceChildren(make("th", {scope: "col", className: "plain"}, "Chart"), ...heads);
}

function inOrder() {
  const wanted = byId("filter").value.trim().toLowerCase();
  const {of} = COLUMNS[sorted.column];
  const compare = (a, b) => {
    const [x, y] = [of(a), of(b)];
    if (x === null || y === null) return (x === null) - (y === null);  // what is not known comes last either way
    const order = typeof x === "string" ? x.localeCompare(y, "en", {numeric: true}) : x - y;
    return sorted.down ? -order : order;
  };
  return [...devices.values()]
    .filter((d) => `${d.device} ${d.model ?? ""}`.toLowerCase().includes(wanted))
    .sort((a, b) => compare(a, b) || a.device.localeCompare(b.device, "en", {numeric: true}));
}

const lines = new Map();

function drawTable() {
  const ordered = inOrder();
  const body = byId("rows");
  for (const [name, line] of lines) if (!devices.has(name)) { line.remove(); lines.delete(name); }
  ordered.forEach((device, at) => {
    if (!lines.has(device.device)) lines.set(device.device, newLine(device.device));
    const line = lines.get(device.device);
    fillLine(line, device);
    if (body.children[at] !== line) body.insertBefore(line, body.children[at] ?? null);
  });
  while (body.children.length > ordered.length) body.lastChild.remove();
  byId("empty").hidden = devices.size > 0;
}

function newLine(name) {
  const box = make("input", {type: "checkbox", ariaLabel: `Show ${name} in the charts`, onchange: () => {
    chosenByHand = true;
    if (box.checked) chosen.add(name); else chosen.delete(name);
    if (chosen.size > CHART_DEVICES) chosen.delete(chosen.values().next().value);
    draw();
  }});
  const cells = COLUMNS.map((column) => column.head ? make("th", {scope: "row"}) : make("td"));
  return make("tr", {}, make("td", {}, box), ...cells);
}

function fillLine(line, device) {
  line.className = device.state === "offline" ? "offline-row" : "";
  line.firstChild.firstChild.checked = chosen.has(device.device);
  COLUMNS.forEach((column, at) => {
    const cell = line.children[at + 1];
    put(cell, column.text(device));
    cell.className = [column.number ? "number" : "", column.style ? column.style(device) : ""].join(" ").trim();
    if (column.hint) cell.title = column.hint(device) ?? "";
  });
}

// ---- charts: each device by colour, dashes and name

function series() {
  return [...chosen].filter((name) => devices.has(name)).map((name, at) => (
    {name, colour: `s${at % 6}`, dash: DASHES[at % 6], points: devices.get(name).points}
  ));
}

function drawLegend() {
  byId("legend").replaceChildren(...series().map(({name, colour, dash}) => {
    const sample = svg("svg", {viewBox: "0 0 34 12", "aria-hidden": "true", class: colour});
    sample.append(svg("line", {x1: 0, x2: 34, y1: 6, y2: 6, class: "curve", "stroke-dasharray": dash}));
    return make("li", {}, sample, name);
  }));
}

function drawCharts() {
  const all = series();
  for (const chart of CHARTS) {
    chart.figure ??= newFigure(chart);
    drawChart(chart, all);
  }
}

function newFigure(chart) {
  const tip = make("div", {className: "tip", hidden: true});
  const picture = svg("svg", {role: "img"});
  const values = make("tbody");
  const heads = ["Device", "Now", "Lowest", "Highest"].map((name) => make("th", {scope: "col"}, name));
  const table = make("table", {}, make("caption", {className: "unseen"}, chart.title),
    make("thead", {}, make("tr", {}, ...heads)), values);
  const caption = make("figcaption", {}, `${chart.title} `, make("span", {}, chart.unit));
  const details = make("details", {}, make("summary", {}, "Values"), table);
  const figure = make("figure", {}, caption, picture, tip, details);
  picture.addEventListener("mousemove", (event) => point(chart, event));
  picture.addEventListener("mouseleave", () => { tip.hidden = true; chart.cross?.remove(); });
  byId("charts").append(figure);
  Object.assign(chart, {picture, tip, values});
  return figure;
}

const BOX = {left: 46, right: 12, top: 10, bottom: 24};

function drawChart(chart, all) {
  const width = Math.max(240, chart.picture.clientWidth), height = 190;
  const told = all.map((one) => ({...one, points: one.points.filter((point) => point[chart.key] !== null)}));
  const flat = told.flatMap((one) => one.points);
  chart.picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  chart.picture.setAttribute("aria-label", describe(chart, told));
  chart.picture.replaceChildren();
  fillValues(chart, told);
  if (flat.length === 0) {
    chart.scales = null;
    const middle = {x: width / 2, y: height / 2, "text-anchor": "middle", class: "none"};
    chart.picture.append(svg("text", middle, "nothing told yet"));
    return;
  }
  const times = flat.map((point) => point[0]);
  const [begin, end] = [Math.min(...times), Math.max(...times, Math.min(...times) + 60)];
  const [ticks, low, high] = niceTicks(chart, flat.map((point) => point[chart.key]));
  const x = (at) => BOX.left + (at - begin) / (end - begin) * (width - BOX.left - BOX.right);
  const y = (value) => height - BOX.bottom - (value - low) / (high - low) * (height - BOX.top - BOX.bottom);
  for (const tick of ticks) {
    chart.picture.append(svg("line", {x1: BOX.left, x2: width - BOX.right, y1: y(tick), y2: y(tick), class: "grid"}),
      svg("text", {x: BOX.left - 6, y: y(tick) + 4, "text-anchor": "end", class: "axis"}, chart.format(tick)));
  }
  for (const at of [begin, (begin + end) / 2, end]) {
    const anchor = at === begin ? "start" : at === end ? "end" : "middle";
    chart.picture.append(svg("text", {x: x(at), y: height - 7, "text-anchor": anchor, class: "axis"}, clock(at)));
  }
  for (const one of told) drawCurve(chart, one, x, y);
  Object.assign(chart, {scales: {x, begin, end, width}, told});
}

function drawCurve(chart, one, x, y) {
  if (one.points.length === 0) return;
  const places = one.points.map((each) => `${x(each[0]).toFixed(1)} ${y(each[chart.key]).toFixed(1)}`);
  const path = {d: `M${places.join("L")}`, class: `curve ${one.colour}`, "stroke-dasharray": one.dash};
  const last = one.points.at(-1);
  const dot = {cx: x(last[0]), cy: y(last[chart.key]), r: 3.5, class: `dot ${one.colour}`};
  chart.picture.append(svg("path", path), svg("circle", dot));
}

function niceTicks(chart, values) {
  const scale = chart.scale ?? 1;
  let low = Math.min(...values) * scale, high = Math.max(...values) * scale;
  if (chart.title !== "Temperature") low = Math.min(0, low);
  if (high - low < 1e-9) { high += 1; if (low > 0) low -= 1; }
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const first = Math.floor(low / step), last = Math.ceil(high / step);
  const ticks = Array.from({length: last - first + 1}, (_, at) => (first + at) * step / scale);
  return [ticks, ticks[0], ticks.at(-1)];
}

function describe(chart, told) {
  const latest = told.filter((one) => one.points.length).map((one) => [one.name, one.points.at(-1)[chart.key]]);
  const parts = latest.map(([name, value]) => `${name} ${chart.format(value)}`);
  return `${chart.title}, ${chart.unit}, now: ${parts.join("; ") || "nothing told yet"}`;
}

function fillValues(chart, told) {
  chart.values.replaceChildren(...told.filter((one) => one.points.length).map((one) => {
    const values = one.points.map((point) => point[chart.key]);
    const cells = [values.at(-1), Math.min(...values), Math.max(...values)].map((value) => chart.format(value));
    return make("tr", {}, make("th", {scope: "row"}, one.name), ...cells.map((text) => make("td", {}, text)));
  }));
}

function point(chart, event) {
  if (!chart.scales) return;
  const {x, begin, end, width} = chart.scales;
  const box = chart.picture.getBoundingClientRect();
  const inside = (event.clientX - box.left) * width / box.width - BOX.left;
  const at = begin + inside / (width - BOX.left - BOX.right) * (end - begin);
  const near = (points) => points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
  const found = chart.told.filter((one) => one.points.length).map((one) => [one.name, near(one.points)]);
  const when = near(found.map(([, each]) => each))[0];
  chart.cross?.remove();
  chart.cross = svg("line", {x1: x(when), x2: x(when), y1: BOX.top, y2: 190 - BOX.bottom, class: "cross"});
  chart.picture.append(chart.cross);
  put(chart.tip, [clock(when), ...found.map(([name, each]) => `${name}  ${chart.format(each[chart.key])}`)].join("\n"));
  chart.tip.hidden = false;
  const left = event.clientX - box.left + 24;
  chart.tip.style.left = `${Math.min(left, box.width - chart.tip.offsetWidth)}px`;
  chart.tip.style.top = `${event.clientY - box.top + 40}px`;
}

drawHeads();
draw();
byId("filter").addEventListener("input", draw);
addEventListener("resize", draw);
setInterval(() => { drawAbout(); drawTable(); }, 1000);  // ages grow without a message
listen();
