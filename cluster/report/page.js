"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");

function add(parent, name, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return parent.appendChild(node);
}

const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const UNITS = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];

function duration(seconds) {
  if (!seconds) return "0";
  if (seconds < 1) return Math.round(seconds * 1000) + " ms";
  if (seconds < 60) return +seconds.toPrecision(3) + " s";
  const at = UNITS.findIndex(([, size]) => Math.round(seconds) >= size);
  const [[big, bigSize], [small, smallSize]] = [UNITS[at], UNITS[at + 1]];
  let [whole, rest] = [Math.floor(seconds / bigSize), Math.round((seconds % bigSize) / smallSize)];
  if (rest * smallSize === bigSize) [whole, rest] = [whole + 1, 0];
  return rest ? `${whole} ${big} ${rest} ${small}` : `${whole} ${big}`;
}

function ticks(low, high, count, steps) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = (steps || []).find(s => s >= rough) || [1, 2, 5, 10].map(m => m * power).find(s => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step + 0); // + 0: never -0
  return found;
}
const TIME_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 432000];

/** An empty chart with its axes; `x` and `y` map values to pixels. */
function frame(id, { height, left, low, high, xHigh, xLow = 0, xText, yText, xSteps, label = "", bottom = 22, yTicks = 4 }) {
  const figure = document.getElementById(id);
  const width = Math.max(280, figure.clientWidth);
  figure.replaceChildren();
  const svg = add(figure, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label || id });
  const right = width - 12, top = label ? 24 : 10, base = height - bottom;
  const x = v => left + (v - xLow) / (xHigh - xLow || 1) * (right - left);
  const y = v => base - (v - low) / (high - low || 1) * (base - top);
  if (label) add(svg, "text", { x: 0, y: 12 }, label);
  if (yText) for (const t of ticks(low, high, yTicks)) {
    add(svg, "line", { class: "grid", x1: left, x2: right, y1: y(t), y2: y(t) });
    add(svg, "text", { x: left - 8, y: y(t) + 4, "text-anchor": "end" }, yText(t));
  }
  if (xText) for (const t of ticks(xLow, xHigh, Math.max(2, width / 110), xSteps)) {
    add(svg, "line", { class: "axis", x1: x(t), x2: x(t), y1: base, y2: base + 4 });
    add(svg, "text", { x: x(t), y: base + 17, "text-anchor": "middle" }, xText(t));
  }
  const hair = add(svg, "line", { class: "hair", y1: top, y2: base, visibility: "hidden" });
  const value = event => xLow + (event.clientX - svg.getBoundingClientRect().left - left) / (right - left) * (xHigh - xLow);
  return { svg, x, y, left, right, top, base, hair, value };
}

const path = (points, x, y) => points.map((p, i) => `${i ? "L" : "M"}${x(p).toFixed(1)},${y(p).toFixed(1)}`).join("");

function nearest(points, at, v) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (at(points[middle]) < v) low = middle + 1; else high = middle;
  }
  return low && v - at(points[low - 1]) < at(points[low]) - v ? points[low - 1] : points[low];
}

function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = Math.min(event.clientX + 14, innerWidth - width - 8) + "px";
  tip.style.top = Math.max(8, event.clientY - height - 12) + "px";
}

function watch(chart, charts, tell) {
  chart.svg.addEventListener("pointermove", event => {
    const text = tell(chart.value(event), event);
    tip.hidden = true;
    if (!text) return;
    for (const each of charts) {
      const at = Math.min(each.right, Math.max(each.left, event.clientX - each.svg.getBoundingClientRect().left));
      each.hair.setAttribute("x1", at);
      each.hair.setAttribute("x2", at);
      each.hair.setAttribute("visibility", "visible");
      each.svg.append(each.hair);
    }
    showTip(event, text);
  });
  chart.svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    for (const each of charts) each.hair.setAttribute("visibility", "hidden");
  });
}

function empty(id, text) {
  const note = document.createElement("p");
  note.className = "muted";
  note.textContent = text;
  document.getElementById(id).replaceChildren(note);
}

function drawLoss() {
  const points = data.loss;
  if (!points.length) return empty("loss", "No step has been finished yet.");
  const values = points.flatMap(p => [p[1], p[2]]).concat(data.valLoss.map(p => p[1]));
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = (high - low || 1) * 0.04;
  const chart = frame("loss", {
    height: 320, left: 44, low: low - pad, high: high + pad, xHigh: points.at(-1)[0], xText: t => short.format(t), bottom: 40,
    yText: t => +t.toFixed(4), yTicks: 6,
  });
  const { svg, x, y } = chart;
  add(svg, "text", { x: (chart.left + chart.right) / 2, y: 318, "text-anchor": "middle" }, "tokens");
  const crowded = data.borders.length > 25;
  let labelled = -99;
  for (const [tokens, attempt, size] of data.borders.slice(1)) {
    add(svg, "line", { class: crowded ? "border crowded" : "border", x1: x(tokens), x2: x(tokens), y1: chart.top, y2: chart.base });
    if (crowded || x(tokens) - labelled < 62 || x(tokens) > chart.right - 50) continue;
    add(svg, "text", { x: x(tokens) + 4, y: chart.top + 10 }, `#${attempt}, ${size}x`);
    labelled = x(tokens);
  }
  add(svg, "path", { class: "raw", d: path(points, p => x(p[0]), p => y(p[1])) });
  add(svg, "path", { class: "smooth", d: path(points, p => x(p[0]), p => y(p[2])) });
  add(svg, "path", { class: "val", d: path(data.valLoss, p => x(p[0]), p => y(p[1])) });
  for (const p of data.valLoss) add(svg, "circle", { class: "dot", cx: x(p[0]), cy: y(p[1]), r: 4 });
  watch(chart, [chart], v => {
    const p = nearest(points, q => q[0], v);
    const val = data.valLoss.length && nearest(data.valLoss, q => q[0], p[0]);
    const near = val && Math.abs(x(val[0]) - x(p[0])) < 8 ? `\nvalidation ${val[1].toFixed(4)}` : "";
    return `step ${p[3]}, ${short.format(p[0])} tokens\nloss ${p[1].toFixed(4)}, smoothed ${p[2].toFixed(4)}${near}`;
  });
}

function drawTime() {
  if (!data.spanS) {
    for (const id of ["world", "speed"]) document.getElementById(id).replaceChildren();
    return empty("nodes", "Nothing was booked yet.");
  }
  const narrow = document.body.clientWidth < 640;
  const common = { left: narrow ? 76 : 112, xHigh: data.spanS };
  const charts = [];
  if (data.worlds.length) {
    const most = Math.max(...data.worlds.map(w => w.size));
    const world = frame("world", { ...common, height: 110, low: 0, high: most * 1.1, bottom: 6, label: "ranks", yTicks: Math.min(most, 3),
      yText: t => Number.isInteger(t) ? t : "" });
    for (const w of data.worlds) {
      const [a, b, top] = [world.x(w.startS), world.x(w.endS), world.y(w.size)];
      add(world.svg, "rect", { class: "block", x: a, width: Math.max(1, b - a), y: top, height: world.base - top });
      add(world.svg, "line", { class: "top", x1: a, x2: Math.max(a + 1, b), y1: top, y2: top });
    }
    for (const [at, kind] of data.incidents) {
      if (at < 0 || at > data.spanS) continue;
      const mark = add(world.svg, "path", { class: "incident", d: `M${world.x(at) - 5},${world.top - 9}h10l-5,8z` });
      add(mark, "title", {}, kind);
    }
    const fastest = Math.max(...data.worlds.flatMap(w => w.speed.map(p => p[1])));
    const speed = frame("speed", { ...common, height: 140, low: 0, high: fastest * 1.05, bottom: 6, label: "tokens/s", yTicks: 3, yText: t => short.format(t) });
    for (const w of data.worlds) add(speed.svg, "path", { class: "smooth", "stroke-width": 1.5, d: path(w.speed, p => speed.x(p[0]), p => speed.y(p[1])) });
    charts.push(world, speed);
  }
  const row = data.nodes.length > 40 ? 10 : 20;
  const nodes = frame("nodes", { ...common, height: 50 + row * data.nodes.length, low: 0, high: 1, xText: t => duration(t), xSteps: TIME_STEPS, label: "nodes" });
  const letters = Math.floor(common.left / 7) - 1;
  const laneAt = [];
  data.nodes.forEach((node, i) => {
    const y = 26 + i * row;
    laneAt.push(y);
    if (row > 12 || i % 2 === 0) {
      const shown = node.name.length > letters ? node.name.slice(0, letters - 1) + "\u2026" : node.name;
      add(nodes.svg, "text", { x: common.left - 8, y: y + row / 2 + 2, "text-anchor": "end" }, shown);
    }
    for (const [start, end, state] of node.bars) {
      const a = nodes.x(start);
      add(nodes.svg, "rect", { x: a.toFixed(2), width: Math.max(0.4, nodes.x(end) - a).toFixed(2), y, height: row - 4, style: `fill: var(--${data.states[state]})` });
    }
  });
  charts.push(nodes);
  const tell = (t, event) => {
    if (t < 0 || t > data.spanS) return "";
    const lines = [duration(t) + " after the start"];
    const world = data.worlds.find(w => w.startS <= t && t <= w.endS);
    if (world) {
      const p = nearest(world.speed, q => q[0], t);
      lines.push(`attempt ${world.attempt}, ${world.size} ranks`, `step ${p[2]}, ${short.format(p[1])} tokens/s`);
    } else if (data.worlds.length) lines.push("no steps");
    const inside = nodes.svg.contains(event.target) && event.clientY - nodes.svg.getBoundingClientRect().top;
    const node = data.nodes[laneAt.findIndex(y => inside !== false && y <= inside && inside < y + row)];
    const bar = node && node.bars.find(([a, b]) => a <= t && t < b);
    if (bar) lines.push(`${node.name}: ${data.states[bar[2]]} for ${duration(bar[1] - bar[0])}`);
    return lines.join("\n");
  };
  for (const chart of charts) watch(chart, charts, tell);
}

let width = 0;
function draw() {
  if (document.body.clientWidth === width) return;
  width = document.body.clientWidth;
  drawLoss();
  drawTime();
}
addEventListener("resize", draw);
draw();
