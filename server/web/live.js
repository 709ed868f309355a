// The panel that follows an answer while it is made, and keeps what it cost.

import { audits } from "./api.js";
import { byId, h, number } from "./dom.js";
import { costs, rateOf } from "./generation.js";
import { depthPlot, ratePlot, rates, sourcePlot } from "./plots.js";

const EMPTY = [["tokens/s", "–"], ["passes/token", "–"], ["layers/token", "–"]];

class Live {
  constructor() {
    this._drawing = false;
    this.reset();
  }

  reset() {
    this.tokens = [];
    this.metrics = null;
    this.off = null;
    this._draw();
  }

  add(tokens) {
    this.tokens.push(...tokens);
    // At most once a frame, however many tokens come.
    if (this._drawing) return;
    this._drawing = true;
    requestAnimationFrame(() => {
      this._drawing = false;
      this._draw();
    });
  }

  end(metrics) {
    this.metrics = metrics;
    this._draw();
    this._tellAudits();
  }

  /** Audits come after answers, of some of them: all that can be told are the server's totals. */
  async _tellAudits() {
    const { audited, differed } = await audits().catch(() => ({ audited: 0 }));
    byId("audits").hidden = !audited;
    byId("audits").textContent =
      `Of the answers since the server started, ${audited} tokens that left early were read again at full depth; ${differed} differed.`;
  }

  /** The same was measured with exits off, at this rate. */
  setOff(rate) {
    this.off = rate;
    this._draw();
  }

  _draw() {
    const times = this.tokens.map((token) => token.time);
    ratePlot(byId("rate-plot"), times, this.off);
    depthPlot(byId("depth-plot"), this.tokens);
    sourcePlot(byId("source-plot"), this.tokens);
    byId("tiles").replaceChildren(
      ...this._costs(times).map(([name, value, more]) =>
        h("div", {}, h("dt", {}, name), h("dd", {}, value, more && h("small", {}, more))),
      ),
    );
  }

  _costs(times) {
    if (!this.metrics) {
      const now = rates(times).at(-1);
      return now ? [["tokens/s", number(now.rate, 0)], ...EMPTY.slice(1)] : EMPTY;
    }
    const found = costs(this.metrics);
    const rate = rateOf(this.metrics);
    if (this.off && rate) found[0][2] = `${number(rate / this.off, 2)} × off`;
    return found;
  }
}

export const live = new Live();
// Which rows there are is known by then.
document.addEventListener("model", () => live.reset());
