// Elements from plain values. Text becomes a text node, never markup: models and users write parts of this page.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

export function h(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function s(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function put(id, ...children) {
  $(id).replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
}

export function show(id, yes) {
  $(id).hidden = !yes;
}

export function table(head, rows, { numeric = [] } = {}) {
  const cell = (tag, value, place) => h(tag, numeric.includes(place) ? { class: "number" } : {}, value ?? "–");
  return h("table", {},
    h("thead", {}, h("tr", {}, head.map((value, place) => cell("th", value, place)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((value, place) => cell("td", value, place))))));
}

// `a`b`c` → text, code, text: remedies name commands between backticks.
export function words(text) {
  return String(text).split("`").map((part, place) => (place % 2 ? h("code", {}, part) : part));
}

const NAMES = { first_token_s: "time to the first token", token_s: "time a token", invalid_json: "invalid JSON" };
export const spaced = (name) => NAMES[name] ?? name.replaceAll("_", " ");
export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;
export const short = (key) => (key && key.startsWith("release-") ? `release-${key.slice(8, 16)}` : key);

export function figure(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace("e+", "e").replace("-", "−");
  return size >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}

export const seconds = (value) =>
  value === null || value === undefined ? "–" : value < 1 ? `${Math.round(value * 1000)} ms` : `${figure(value)} s`;

export function when(at) {
  return h("time", { datetime: new Date(at * 1000).toISOString(), title: new Date(at * 1000).toLocaleString() }, ago(at));
}

export function ago(at) {
  const past = Date.now() / 1000 - at;
  if (past < 0) return `in ${span(-past)}`;
  return past < 5 ? "now" : `${span(past)} ago`;
}

export function span(length) {
  if (length < 90) return `${Math.round(length)} s`;
  if (length < 5400) return `${Math.round(length / 60)} min`;
  if (length < 172800) return `${Math.round(length / 3600)} h`;
  return `${Math.round(length / 86400)} days`;
}
