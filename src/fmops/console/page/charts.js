// Pictures as SVG elements: evidence against time on a logarithmic scale, and the error budget. Each has a title, a
// description and, on the page, a table that says the same.

import { figure, h, s } from "./dom.js";

const WIDTH = 380, HEIGHT = 176, LEFT = 46, RIGHT = 12, TOP = 16, BOTTOM = 26;
const LOWEST = -4; // Decades below 1 that are drawn; less evidence than that looks the same.
let number = 0;

function frame(title, description, parts, width = WIDTH, height = HEIGHT) {
  const id = `chart-${(number += 1)}`;
  return s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": `${id}-t ${id}-d` },
    s("title", { id: `${id}-t` }, title), s("desc", { id: `${id}-d` }, description), parts);
}

// lines: [{name, values, css}] of natural logs beside `times` (Unix seconds); limit: natural log.
export function evidence({ title, about, times, lines, limit, limitWords }) {
  const decades = (value) => Math.max(LOWEST, value / Math.LN10);
  const all = lines.flatMap((line) => line.values.filter((value) => value !== undefined).map(decades));
  const low = Math.floor(Math.min(-1, ...all)), high = Math.ceil(Math.max(decades(limit) + 0.3, ...all));
  const first = times[0], last = Math.max(times.at(-1), first + 1);
  const across = (time) => LEFT + ((time - first) / (last - first)) * (WIDTH - LEFT - RIGHT);
  const down = (value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const stride = Math.ceil((high - low) / 5);
  const ticks = Array.from({ length: high - low + 1 }, (_, place) => low + place).filter((tick) => tick % stride === 0);
  const grid = ticks.flatMap((tick) => [
    s("line", { class: tick ? "grid" : "grid one", x1: LEFT, x2: WIDTH - RIGHT, y1: down(tick), y2: down(tick) }),
    s("text", { class: "tick", x: LEFT - 8, y: down(tick) + 4, "text-anchor": "end" }, power(tick)),
  ]);
  const marks = hours(first, last).map((time) => s("text", {
    class: "tick", x: Math.min(WIDTH - RIGHT - 14, Math.max(LEFT + 14, across(time))), y: HEIGHT - 6,
    "text-anchor": "middle",
  }, clock(time, last - first)));
  const at = down(decades(limit));
  const threshold = [
    s("line", { class: "limit", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }),
    s("text", { class: "limit-words", x: LEFT + 4, y: at - 5 }, limitWords),
  ];
  const curves = lines.flatMap((line) => {
    const points = line.values.map((value, place) => [value, times[place]]).filter(([value]) => value !== undefined)
      .map(([value, time]) => [across(time), down(decades(value))]);
    if (!points.length) return [];
    const path = points.map(([x, y], place) => `${place ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");
    const [x, y] = points.at(-1);
    return [s("path", { class: `curve ${line.css}`, d: path }), s("circle", { class: `end ${line.css}`, cx: x, cy: y, r: 3.5 })];
  });
  const ends = lines.map((line) => `${line.name} ${figure(Math.exp(line.values.at(-1) ?? 0))}`).join(", ");
  const description = `${about} Now: ${ends}. ${limitWords}.`;
  return frame(title, description, [...grid, ...marks, ...threshold, ...curves]);
}

// rounds: [{wealth, promoted, level, p_value}]; start: α before the first.
export function budget({ rounds, start, alpha }) {
  const width = 420, height = 150, left = 44, bottom = 24, top = 12;
  const high = Math.max(alpha, start, ...rounds.map((round) => round.wealth)) * 1.1;
  const step = (width - left - 12) / Math.max(rounds.length, 1);
  const down = (value) => top + (1 - value / high) * (height - top - bottom);
  const grid = [0, alpha / 2, alpha].flatMap((tick) => [
    s("line", { class: "grid", x1: left, x2: width - 12, y1: down(tick), y2: down(tick) }),
    s("text", { class: "tick", x: left - 8, y: down(tick) + 4, "text-anchor": "end" }, figure(tick)),
  ]);
  let path = `M${left},${down(start)}`, before = start;
  const marks = rounds.flatMap((round, place) => {
    const x = left + (place + 0.5) * step, y = down(round.wealth);
    path += `H${x}V${y}`;
    const words = `round ${place + 1}: ${round.promoted ? "promoted" : "not promoted"}, level ${figure(round.level)}, p ${figure(round.p_value)}, left ${figure(round.wealth)}`;
    before = round.wealth;
    const dot = round.promoted
      ? s("circle", { class: "promoted", cx: x, cy: y, r: 5 }, s("title", {}, words))
      : s("rect", { class: "rejected", x: x - 4.5, y: y - 4.5, width: 9, height: 9 }, s("title", {}, words));
    const label = rounds.length <= 16 || place === rounds.length - 1
      ? s("text", { class: "tick", x, y: height - 6, "text-anchor": "middle" }, place + 1) : null;
    return [dot, label];
  });
  path += `H${width - 12}`;
  const description = `α that later rounds may still spend, after each round the gate tested. ${figure(before)} of ${figure(alpha)} is left.`;
  return frame("Error budget", description, [...grid, s("path", { class: "curve challenger", d: path }), ...marks.filter(Boolean)], width, height);
}

// A detector's level as a share of its threshold, in decades from 1/promise to 1.
export function level(value, promise) {
  const share = value > 0 ? 1 + Math.log10(value) / Math.log10(promise) : 0;
  return meter(share, value >= 1 ? "over" : share > 0.75 ? "near" : "calm");
}

// How far the proof is that a signal is within its margin: from an e-value of 1, which proves nothing, to the limit.
export function proof(logValue, limit) {
  return meter(logValue / limit, logValue >= limit ? "proven" : logValue < 0 ? "near" : "open");
}

// The number stands beside it: the bar is for the eye alone.
function meter(share, css) {
  const bar = h("span", { class: css });
  bar.style.width = `${100 * Math.min(1, Math.max(0.015, share))}%`;
  return h("span", { class: "meter", "aria-hidden": "true" }, bar);
}

export function key(entries) {
  return h("span", { class: "key" }, entries.map(([css, name]) =>
    h("span", {}, s("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, s("line", { class: `curve ${css}`, x1: 0, x2: 22, y1: 4, y2: 4 })), name)));
}

function power(decade) {
  return decade >= -3 && decade <= 4 ? String(Number((10 ** decade).toPrecision(1))) : `1e${decade}`.replace("-", "−");
}

function hours(first, last) {
  const steps = [15, 60, 300, 900, 3600, 10800, 21600, 86400];
  const step = steps.find((each) => (last - first) / each <= 5) ?? 86400;
  const shift = new Date(first * 1000).getTimezoneOffset() * 60;
  const found = [];
  for (let time = Math.ceil((first - shift) / step) * step + shift; time <= last; time += step) found.push(time);
  return found.length ? found : [first];
}

function clock(time, length) {
  const options = length > 172800 ? { day: "numeric", month: "short" }
    : { hour: "2-digit", minute: "2-digit", ...(length < 300 ? { second: "2-digit" } : {}) };
  return new Date(time * 1000).toLocaleString("en-GB", options);
}
