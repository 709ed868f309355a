// An answer as tokens: each with a bar for its depth, a mark for its source, and details.

import { announce, byId, h, number, percent } from "./dom.js";
import { model, SOURCE_NAMES } from "./depth.js";

const WORDS = {
  model: (token) => (token.layer < model.layers ? "The model, at this exit" : "The model, at full depth"),
  stayed: () => "The model at full depth; its score would have let it leave, but that would not have paid",
  head: () => "The draft head, confirmed at full depth",
  ngram: () => "The text so far, confirmed at full depth",
  exit: () => "An exit, confirmed at full depth",
  grammar: () => "The answer's form, which left no choice",
};

/** Whitespace and control characters made visible. */
export function visible(text) {
  const shown = text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
  return shown || "∅";
}

/** The tokens of one answer: grows, has one place in the order of tabs and arrow keys inside. */
export class TokenView {
  constructor(label) {
    this.tokens = [];
    this.text = "";
    this.ids = [];
    this._decoder = new TextDecoder();
    this._lane = h("div", { className: "tokens", aria: { role: "group", label: `${label}. Arrow keys go from token to token.` } });
    this._spoken = h("p", { className: "sr-only" });
    this.element = h("div", { className: "answer" }, this._spoken, this._lane);
    this._lane.addEventListener("mouseover", (event) => this._show(event.target));
    this._lane.addEventListener("mouseout", () => detail.hide());
    this._lane.addEventListener("focusin", (event) => this._focused(event.target));
    this._lane.addEventListener("focusout", () => detail.hide());
    this._lane.addEventListener("click", (event) => this._pin(event.target));
    this._lane.addEventListener("keydown", (event) => this._key(event));
  }

  /** Take a chunk's choice; `now` and `start` are in ms. Returns the tokens it brought. */
  push(choice, now, start) {
    this.text += choice.delta?.content ?? "";
    this.ids.push(...(choice.token_ids ?? []));
    const before = this.tokens.at(-1);
    const scored = choice.logprobs?.content ?? [];
    // A token that ends the answer has no text, and comes without a log-probability.
    const tokens = (choice.exit_layers ?? []).slice(0, scored.length).map((layer, index) => ({
      ...scored[index],
      id: choice.token_ids[index],
      layer,
      source: choice.token_sources[index],
      time: now - start,
      gap: index ? 0 : before && now - start - before.time,
      first: !before && !index,
      text: this._decoder.decode(new Uint8Array(scored[index].bytes), { stream: true }),
    }));
    for (const token of tokens) {
      this.tokens.push(token);
      this._lane.append(this._element(token, this.tokens.length - 1));
    }
    if (tokens.length && this.tokens.length === tokens.length) this._lane.firstChild.tabIndex = 0;
    return tokens;
  }

  /** The answer ended: screen readers get it as one text. */
  end({ speak = true } = {}) {
    this._spoken.textContent = this.text;
    if (speak) announce(`Answer: ${this.text}`);
  }

  /** Mark the tokens at these places as other than those of full depth. */
  markDiffering(places) {
    for (const place of places) {
      const element = this._lane.children[place];
      if (element) {
        element.classList.add("differs");
        element.setAttribute("aria-label", `${element.getAttribute("aria-label")}, differs`);
      }
    }
  }

  _element(token, index) {
    const names = [visible(token.text), `layer ${token.layer} of ${model.layers}`];
    if (token.source !== "model") names.push(SOURCE_NAMES[token.source]);
    const lines = token.text.split("\n");
    const parts = lines.flatMap((line, i) =>
      i ? [h("span", { className: "newline" }, "↵"), "\n", line] : [line],
    );
    return h("span", {
      className: "token",
      tabIndex: -1,
      data: { index, layer: token.layer, source: token.source },
      aria: { role: "button", label: names.join(", ") },
    }, parts);
  }

  _of(target) {
    const element = target.closest?.(".token");
    return element && { element, token: this.tokens[Number(element.dataset.index)] };
  }

  _show(target) {
    const found = this._of(target);
    // What is pinned stays while the pointer goes elsewhere.
    if (found && !detail.pinned) detail.show(found.element, found.token);
  }

  _focused(target) {
    const found = this._of(target);
    if (!found) return;
    this._lane.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
    found.element.tabIndex = 0;
    detail.show(found.element, found.token);
  }

  _pin(target) {
    const found = this._of(target);
    if (found) detail.pin(found.element, found.token);
  }

  _key(event) {
    const found = this._of(event.target);
    if (!found) return;
    const { element } = found;
    const moves = {
      ArrowLeft: element.previousElementSibling,
      ArrowRight: element.nextElementSibling,
      Home: this._lane.firstElementChild,
      End: this._lane.lastElementChild,
    };
    if (event.key in moves) {
      moves[event.key]?.focus();
    } else if (event.key === "Enter" || event.key === " ") {
      this._pin(element);
    } else {
      return;
    }
    event.preventDefault();
  }
}

/** The box beside a token: what is known of it, and, once pinned, what else might have come. */
const detail = {
  box: byId("detail"),
  pinned: null,

  show(element, token) {
    if (this.pinned && this.pinned !== element) this.unpin();
    this._place(element, token);
  },

  pin(element, token) {
    if (this.pinned === element) {
      this.unpin();
      return;
    }
    this.unpin();
    this.pinned = element;
    element.classList.add("pinned");
    this._place(element, token);
    const best = (token.top_logprobs ?? []).map((each) => `${visible(each.token)} ${percent(Math.exp(each.logprob))}`);
    announce(best.length ? `Might have come: ${best.join(", ")}` : "No alternatives are known");
  },

  hide() {
    if (!this.pinned) this.box.hidden = true;
  },

  unpin() {
    this.pinned?.classList.remove("pinned");
    this.pinned = null;
    this.box.hidden = true;
  },

  _place(element, token) {
    this.box.replaceChildren(...contents(token, element === this.pinned));
    this.box.hidden = false;
    this._described?.removeAttribute("aria-describedby");
    this._described = element;
    element.setAttribute("aria-describedby", "detail");
    // The first line of a token that goes over two.
    const at = [...element.getClientRects()].find((box) => box.width > 2) ?? element.getBoundingClientRect();
    const own = this.box.getBoundingClientRect();
    const below = at.bottom + 8 + own.height < innerHeight;
    const left = Math.min(Math.max(at.left, 8), innerWidth - own.width - 8);
    const top = below ? at.bottom + 6 : at.top - own.height - 6;
    this.box.style.left = `${left + scrollX}px`;
    this.box.style.top = `${Math.max(top, 8) + scrollY}px`;
  },
};

addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || detail.box.hidden) return;
  detail.unpin();
  // It closes what is open; an answer under way goes on.
  event.stopImmediatePropagation();
});
addEventListener("pointerdown", (event) => {
  if (!event.target.closest?.(".token, .detail")) detail.unpin();
});

function contents(token, pinned) {
  const rows = [
    ["Layer", `${token.layer} of ${model.layers}${token.layer === model.layers ? ", full depth" : ""}`],
    ["From", WORDS[token.source](token)],
    ["Probability", percent(Math.exp(token.logprob))],
    ["Time", `${number(token.time, 0)} ms${token.first ? ", the first" : token.gap ? `, ${number(token.gap, 1)} ms after the one before` : ", with the one before"}`],
  ];
  const list = h("dl", {}, rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  const head = h("div", { className: "detail-token", data: { layer: token.layer } }, h("code", {}, visible(token.text)));
  if (!pinned) {
    const hint = token.top_logprobs?.length ? h("p", { className: "hint" }, "Press for what else might have come") : null;
    return [head, list, hint].filter(Boolean);
  }
  const best = token.top_logprobs ?? [];
  const isOwn = (each) => each.bytes.join() === token.bytes.join();
  const others = (best.some(isOwn) ? best : [...best, token]).map((each) => {
    const chance = Math.exp(each.logprob);
    const chosen = isOwn(each);
    return h("li", { className: chosen ? "chosen" : "" },
      h("code", {}, visible(each.token)),
      h("i", { className: "meter", vars: { "--share": chance } }),
      h("span", {}, percent(chance)));
  });
  return [head, list, h("h3", {}, "Might have come"), h("ol", { className: "others" }, others)];
}
