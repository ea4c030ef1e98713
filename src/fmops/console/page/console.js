// The page: asks for the state every two seconds while somebody looks, draws what has changed, and sends orders.

import { $, ago, h, put, short, show, words } from "./dom.js";
import { forget, look, post } from "./api.js";
import * as views from "./views.js";
import * as chat from "./chat.js";

const EVERY_MS = 2000;
const ASKS = {
  start: ["Roll out a release", "Start the rollout", () => "Its engine starts, its checks run, then traffic moves to it step by step."],
  promote: ["Promote the challenger", "Promote", (then) => `It takes all traffic now: ${then.reason}.`],
  hold: ["Hold the rollout", "Hold", () => "Traffic stays split as it is until somebody resumes."],
  resume: ["Resume the rollout", "Resume", () => "It goes on where it was held."],
  rollback: ["Roll back", "Roll back", () => "All traffic returns to the champion; the rollout ends."],
};
const CARDS = [
  [["lifecycle", "run", "rounds", "monitor"], views.lifecycle], [["rollout", "aliases"], views.rollout],
  [["monitor"], views.monitor], [["rounds"], views.rounds], [["gate"], views.gate], [["serving"], views.serving],
];
let state = null, drawn = new Map(), pending = null, timer = null;

async function poll() {
  clearTimeout(timer);
  try {
    const fresh = await look();
    if (fresh) draw(fresh);
    alive(true);
  } catch (error) {
    if (error.status === 401) return door();
    alive(false);
    views.problems([{ what: error.message, remedy: "What is below is the last that was known. `fmops up` starts the console again." }]);
    forget();
  }
  if (!document.hidden) timer = setTimeout(poll, EVERY_MS);
}

function draw(fresh) {
  state = fresh;
  document.body.dataset.view = "wall";
  show("door", false);
  show("wall", true);
  views.head(state);
  views.problems(state.problems, { young: !state.aliases.champion });
  CARDS.forEach(([parts, view], place) => {
    const seen = JSON.stringify(parts.map((part) => state[part]));
    if (drawn.get(place) === seen) return;
    drawn.set(place, seen);
    view(state);
  });
}

function alive(yes) {
  $("live").classList.toggle("dead", !yes);
  put("live-words", yes ? "live" : "no answer");
}

function door(message = "") {
  document.body.dataset.view = "door";
  show("wall", false);
  show("door", true);
  put("door-wrong", ...words(message));
  drawn = new Map();
  forget();
  $("token").focus();
}

async function enter(token) {
  try {
    await post("/api/session", { token });
    $("token").value = "";
    await poll();
  } catch (error) {
    door(error.message);
  }
}

function confirm(order) {
  const [title, button, consequence] = ASKS[order];
  const it = state.rollout;
  pending = { order, seen: order === "start" ? state.aliases.champion : it.id };
  const then = order === "start" ? null : it.orders[order];
  put("confirm-title", title);
  const who = order === "start" ? `Champion: ${state.aliases.champion}. ` : `${it.challenger} against ${it.champion}. `;
  put("confirm-words", who, consequence(then));
  put("confirm-do", button);
  put("confirm-wrong");
  $("confirm-why").value = "";
  show("confirm-choice", order === "start");
  put("confirm-release", state.releases.map((one) => h("option", { value: one.key }, `${short(one.key)}, made ${ago(Date.parse(one.created) / 1000)}`)));
  $("confirm-do").classList.toggle("danger", order === "rollback");
  $("confirm").showModal();
}

async function give(event) {
  event.preventDefault();
  const body = { ...pending, why: $("confirm-why").value };
  if (pending.order === "start") body.release = $("confirm-release").value;
  $("confirm-do").disabled = true;
  try {
    const { said } = await (await post("/api/orders", body)).json();
    $("confirm").close();
    toast(said);
  } catch (error) {
    put("confirm-wrong", ...words(error.message));
  } finally {
    $("confirm-do").disabled = false;
    forget();
    poll();
  }
}

let toasting = null;

function toast(text) {
  clearTimeout(toasting);
  put("toast", text);
  $("toast").classList.add("shown");
  toasting = setTimeout(() => $("toast").classList.remove("shown"), 8000);
}

function begin() {
  $("door-form").addEventListener("submit", (event) => {
    event.preventDefault();
    enter($("token").value.trim());
  });
  $("orders").addEventListener("click", (event) => event.target.dataset.order && confirm(event.target.dataset.order));
  $("confirm-form").addEventListener("submit", give);
  $("confirm-cancel").addEventListener("click", () => $("confirm").close());
  $("leave").addEventListener("click", async () => {
    await post("/api/session", undefined, { method: "DELETE" });
    clearTimeout(timer);
    door();
  });
  document.addEventListener("visibilitychange", () => document.hidden || poll());
  setInterval(() => {
    for (const time of document.querySelectorAll("time")) time.textContent = ago(Date.parse(time.dateTime) / 1000);
  }, 10000);
  chat.begin();
  // The token comes behind the #, which no server sees; it must not stay in the history either.
  const token = location.hash.slice(1);
  if (/^[\w-]{43}$/.test(token)) {
    history.replaceState(null, "", location.pathname);
    enter(token);
  } else {
    poll();
  }
}

begin();
