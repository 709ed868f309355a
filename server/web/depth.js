// The scale of depths: cividis, deep standing out from the background, and the legend.

import { byId, h } from "./dom.js";

// Cividis (Nunez, Anderton and Renslow 2018) at nine even places, dark to light.
const CIVIDIS = [
  [0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115],
  [138, 134, 120], [165, 156, 116], [195, 179, 105], [254, 232, 56],
];

function cividis(share) {
  const at = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1);
  const low = Math.min(Math.floor(at), CIVIDIS.length - 2);
  const mixed = CIVIDIS[low].map((from, i) => from + (CIVIDIS[low + 1][i] - from) * (at - low));
  return `rgb(${mixed.map(Math.round).join(" ")})`;
}

// Exits are mostly far up, so most of the colours are for the upper layers. The ends that would vanish
// in the background are left out.
const lightTheme = (share) => cividis(0.06 + 0.84 * (1 - share ** 3));
const darkTheme = (share) => cividis(0.2 + 0.7 * share ** 3);

const sheet = new CSSStyleSheet();
document.adoptedStyleSheets.push(sheet);

export const SOURCES = {
  head: "draft head",
  ngram: "text so far",
  exit: "an exit",
  grammar: "answer's form",
  stayed: "stayed",
};
export const SOURCE_NAMES = { model: "the model itself", ...SOURCES };

/** What the served model has; set once it is known. */
export const model = { name: null, layers: 1, exits: [], qualities: [], tasks: {}, draftHead: false };

/** Make the rules that colour `[data-layer]`, and the legend. */
export function setScale() {
  const rules = [];
  for (let layer = 0; layer <= model.layers; layer += 1) {
    const share = layer / model.layers;
    const color = `light-dark(${lightTheme(share)}, ${darkTheme(share)})`;
    rules.push(`[data-layer="${layer}"] { --depth-color: ${color}; --depth: ${share.toFixed(4)}; }`);
  }
  sheet.replaceSync(rules.join("\n"));
  const ticks = new Set([1, ...model.exits, model.layers]);
  const steps = [];
  for (let layer = 1; layer <= model.layers; layer += 1) {
    const label = ticks.has(layer) && h("span", { className: "tick" }, String(layer));
    steps.push(h("i", { className: "step", data: { layer } }, h("b"), label));
  }
  byId("scale").replaceChildren(...steps);
  byId("scale").setAttribute("role", "img");
  const exits = model.exits.length ? `exits after ${model.exits.join(", ")}` : "no exits";
  byId("scale").setAttribute(
    "aria-label",
    `A colour and a height for each of ${model.layers} layers, ${exits}; the last is full depth.`,
  );
}

/** The marks of sources, once. */
export function showMarks() {
  byId("marks").replaceChildren(
    ...Object.entries(SOURCES).map(([source, name]) =>
      h("li", {}, h("i", { className: "mark", data: { source } }), name),
    ),
  );
}
