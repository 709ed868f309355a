// Small helpers around the document.

export const byId = (id) => document.getElementById(id);

/** An element with properties, `data` and `aria` attributes, CSS variables in `vars`, children. */
export function h(tag, { data = {}, aria = {}, vars = {}, on = {}, ...props } = {}, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, props);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(aria)) {
    element.setAttribute(name === "role" ? name : `aria-${name}`, value);
  }
  for (const [name, value] of Object.entries(vars)) element.style.setProperty(name, value);
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener);
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

/** An SVG element with attributes. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const checked = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

/** Check a radio button, unless it is disabled. */
export function check(name, value) {
  const radio = document.querySelector(`input[name="${name}"][value="${value}"]`);
  if (!radio.disabled) radio.checked = true;
}

/** A number with as many digits as help, in the reader's own notation. */
export function number(value, digits = value >= 100 ? 0 : value >= 10 ? 1 : 2) {
  return value.toLocaleString(undefined, {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  });
}

export function percent(share) {
  if (share > 0 && share < 0.0005) return "< 0.1 %";
  return `${number(100 * share, share > 0 && share < 0.1 ? 1 : 0)} %`;
}

/** Say something to screen readers. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** Let a text field grow with its text. */
export function grows(area) {
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${Math.min(area.scrollHeight + 2, 320)}px`;
  };
  area.addEventListener("input", fit);
  return fit;
}

/** Let Enter send a field's form, unless that is busy; with Shift it breaks the line. */
export function sendsOnEnter(area, isBusy) {
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!isBusy()) area.form.requestSubmit();
  });
}
