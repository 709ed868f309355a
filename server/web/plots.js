// Plots of one answer: tokens per second over time, and rows of counts.

import { h, number, percent, svg } from "./dom.js";
import { model, SOURCE_NAMES } from "./depth.js";

const WIDTH = 300;
const HEIGHT = 84;
const PAD = { left: 30, right: 6, top: 6, bottom: 16 };
// A rate is that of so many ms before: shorter jumps with every pass.
const WINDOW_MS = 400;

/** Rates at the times (ms) at which tokens came, of those within the window before. */
export function rates(times) {
  const found = [];
  let from = 0;
  times.forEach((time, index) => {
    while (times[from] < time - WINDOW_MS) from += 1;
    const span = time - times[from];
    if (index && span > WINDOW_MS / 4) found.push({ time, rate: (1000 * (index - from)) / span });
  });
  return found;
}

/** A line of rates; `off` is the measured rate with exits off, or null. */
export function ratePlot(box, times, off) {
  const points = rates(times);
  const most = Math.max(10, off ?? 0, ...points.map((point) => point.rate)) * 1.1;
  const end = Math.max(1000, times.at(-1) ?? 0);
  const x = (time) => PAD.left + (time / end) * (WIDTH - PAD.left - PAD.right);
  const y = (rate) => HEIGHT - PAD.bottom - (rate / most) * (HEIGHT - PAD.top - PAD.bottom);
  const step = niceStep(most / 3);
  const grid = [];
  for (let rate = 0; rate < most; rate += step) {
    grid.push(
      svg("line", { class: "grid", x1: PAD.left, x2: WIDTH - PAD.right, y1: y(rate), y2: y(rate) }),
      svg("text", { class: "axis", x: PAD.left - 4, y: y(rate) + 3, "text-anchor": "end" }, String(rate)),
    );
  }
  const seconds = niceStep(end / 3000);
  for (let time = 0; time <= end / 1000; time += seconds) {
    grid.push(svg("text", { class: "axis", x: x(time * 1000), y: HEIGHT - 3, "text-anchor": "middle" }, `${number(time, seconds < 1 ? 1 : 0)} s`));
  }
  const line = points.map((point) => `${x(point.time).toFixed(1)},${y(point.rate).toFixed(1)}`);
  const label = `Tokens per second, up to ${number(Math.max(0, ...points.map((p) => p.rate)), 0)}`;
  const plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, ...grid);
  if (off != null) {
    plot.append(
      svg("line", { class: "off", x1: PAD.left, x2: WIDTH - PAD.right, y1: y(off), y2: y(off) }),
      svg("text", { class: "axis strong", x: PAD.left + 4, y: y(off) + (y(off) > 16 ? -4 : 11) }, `off: ${number(off, 0)}`),
    );
  }
  if (line.length > 1) plot.append(svg("polyline", { class: "rate", points: line.join(" ") }));
  box.replaceChildren(plot);
}

function niceStep(rough) {
  const size = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((each) => each * size).find((each) => each >= rough) ?? size;
}

/** A row for each exit and for full depth. */
export function depthPlot(box, tokens) {
  const counts = new Map([...model.exits, model.layers].map((layer) => [layer, 0]));
  for (const token of tokens) counts.set(token.layer, (counts.get(token.layer) ?? 0) + 1);
  rows(box, [...counts].map(([layer, count]) => ({ name: String(layer), count, data: { layer } })), tokens.length);
}

/** A row for each source that gave a token. */
export function sourcePlot(box, tokens) {
  const counts = new Map([["model", 0]]);
  for (const token of tokens) counts.set(token.source, (counts.get(token.source) ?? 0) + 1);
  rows(box, [...counts].map(([source, count]) => ({ name: SOURCE_NAMES[source], count, mark: source })), tokens.length);
}

function rows(box, found, total) {
  box.replaceChildren(...found.map(({ name, count, data = {}, mark }) =>
    h("div", { className: "row" },
      h("span", { className: "row-name" }, mark && mark !== "model" ? h("i", { className: "mark", data: { source: mark } }) : null, name),
      h("i", { className: "meter", data, vars: { "--share": total ? count / total : 0 } }),
      h("span", { className: "row-count" }, `${count}`, h("small", {}, total ? percent(count / total) : "")))));
}
