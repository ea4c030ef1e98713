// One function a card: from its part of the state to elements.

import { $, figure, h, percent, put, seconds, short, show, spaced, span, table, when, words } from "./dom.js";
import * as charts from "./charts.js";

const MARKS = { done: "●", kept: "○", running: "◐", waiting: "·", failed: "✕", stopped: "■", held: "‖", absent: "–" };

export function lifecycle(state) {
  put("circle", state.lifecycle.map((step) =>
    h("li", { class: step.state },
      h("span", { class: "mark", "aria-hidden": "true" }, MARKS[step.state]),
      h("strong", {}, step.name),
      h("span", { class: "unseen" }, `, ${step.state}: `),
      h("span", { class: "words", title: step.words }, step.words))));
  const run = state.run;
  put("run", run ? ["Run ", h("code", {}, run.id), ` ${run.state}, `, when(run.finished ?? run.started ?? 0)] : "No run yet.");
  const open = state.rounds.rounds?.find((round) => round.phase !== "ended");
  const found = state.monitor?.diagnosis;
  put("back", open ? `Round ${open.number}: ${open.trigger.cause} → ${open.trigger.stage}, ${open.phase}`
    : found ? `Diagnosis: ${found.cause} → ${found.stage}` : "What production shows leads to the next round");
}

export function rollout(state) {
  const it = state.rollout, broken = it && "error" in it, live = it && !broken;
  show("by-signal", live);
  show("marks", live && it.marks.length > 1);
  show("events", live);
  if (!live) {
    put("versus", h("p", { class: "empty" }, broken ? words(it.error)
      : state.aliases.champion ? "No rollout yet. A new release wins its traffic here, step by step, against the champion."
        : words("Nothing is released yet: the first release becomes champion without a rollout.")));
    put("evidence");
    return;
  }
  put("versus", stepper(it), sides(it, state), h("p", { class: "reason" }, it.reason),
    it.phase === "promoted" || it.phase === "rolled back" ? null : progress(it));
  put("evidence", it.marks.length > 1 ? pictures(it)
    : h("p", { class: "empty" }, "The curves begin with the challenger's first answers."));
  put("signals-table", signals(it));
  put("marks-table", marks(it));
  put("events-list", it.events.toReversed().map((event) => h("li", {}, when(event.at_s), " ",
    h("strong", {}, event.phase === "canary" ? `canary ${percent(event.share)}` : event.phase), ` ${event.reason}`,
    Object.keys(event.detectable).length ? h("small", {}, `finds with 80 % power a rise of ${
      Object.entries(event.detectable).map(([name, rise]) => `${spaced(name)} ${figure(rise)}`).join(", ")}`) : null)));
}

function stepper(it) {
  const last = it.phase === "rolled back" ? "rolled back" : "promoted";
  const active = it.phase === "held" ? it.held_from : it.phase;
  const stops = ["checking", "shadow", ...it.steps.map((share) => `canary ${percent(share, share < 0.01 ? 1 : 0)}`), last];
  const now = active === "canary" ? 2 + it.step : active === "checking" ? 0 : active === "shadow" ? 1 : stops.length - 1;
  return h("ol", { class: `ramp ${it.phase.replace(" ", "-")}` }, stops.map((name, place) =>
    h("li", { class: place < now ? "past" : place === now ? "now" : "ahead", "aria-current": place === now ? "step" : null },
      name, place === now && it.phase === "held" ? h("em", {}, ` held by ${it.held_by}`) : null)));
}

function sides(it, state) {
  const over = it.phase === "promoted" || it.phase === "rolled back";
  const compared = Math.max(...it.signals.map((signal) => signal.champion[1])).toLocaleString("en");
  const side = (css, name, key, share, answers) => h("div", { class: `side ${css}` },
    h("span", { class: "who" }, name), h("code", { title: key }, short(key)), over ? null : h("strong", {}, percent(share)), h("small", {}, answers));
  const shadow = it.pairs ? `, ${it.pairs.toLocaleString("en")} shadow pairs` : "";
  const both = h("div", { class: "sides" },
    side("champion", over ? "Champion before" : "Champion", it.champion, 1 - it.share, `${compared} answers compared`),
    side("challenger", over && state.aliases.champion === it.challenger ? "Challenger, now champion" : "Challenger", it.challenger, it.share,
      `${it.answers.toLocaleString("en")} answers${shadow}`));
  if (over) return [both];
  const part = h("span", { class: it.share ? "challenger" : "" });
  part.style.width = `${100 * it.share}%`;
  return [both, h("div", { class: "split", "aria-hidden": "true" }, part)];
}

function progress(it) {
  const wanted = it.phase === "canary" ? `${it.step_answers} of ${it.answers_a_step} answers in this step. ` : "";
  const missing = it.unproven.length ? `Not yet proven: ${it.unproven.map(spaced).join(", ")}.` : "Every signal is proven.";
  return h("p", { class: "about" }, wanted, missing, " Deadline ", when(it.deadline_s), ".");
}

function pictures(it) {
  const times = it.marks.map((mark) => mark.at_s);
  const needed = it.signals.filter((signal) => signal.needed);
  const slowest = needed.reduce((least, signal) => (least && least.log_fine <= signal.log_fine ? least : signal), null);
  const curve = (name) => it.marks.map((mark) => mark.log_fine[name]);
  const others = needed.filter((signal) => signal !== slowest)
    .map((signal) => ({ name: spaced(signal.name), values: curve(signal.name), css: "other" }));
  const proof = slowest ? [...others, { name: spaced(slowest.name), values: curve(slowest.name), css: "good" }] : others;
  const back = `rolls back at ${figure(Math.exp(it.harm_limit))}`, proven = `proven at ${figure(Math.exp(it.fine_limit))}`;
  return [
    h("figure", {}, h("figcaption", {}, h("strong", {}, "Evidence of harm"),
      ` e-value that the challenger is worse, now ${figure(Math.exp(it.log_harm))}`),
    charts.evidence({ title: "Evidence of harm", about: "E-value that the challenger is worse, against time.", times,
      lines: [{ name: "harm", values: it.marks.map((mark) => mark.log_harm), css: "bad" }], limit: it.harm_limit, limitWords: back })),
    h("figure", {}, h("figcaption", {}, h("strong", {}, "Evidence that it is no worse"), " by more than the margin; every signal must pass"),
    charts.evidence({ title: "Evidence that it is no worse", about: "E-values of being within the margin, against time.", times,
      lines: proof, limit: it.fine_limit, limitWords: proven }),
    charts.key([["good", slowest ? `slowest: ${spaced(slowest.name)}` : "none"], ["other", "the others"]])),
  ];
}

function signals(it) {
  const rate = ([events, n]) => (n ? `${events} of ${n.toLocaleString("en")}` : "–");
  return table(["Signal", "Champion", "Challenger", "Margin", "Harm, e", "Within margin, e", "", ""],
    it.signals.map((signal) => [spaced(signal.name), rate(signal.champion), rate(signal.canary), figure(signal.margin),
      harm(signal, it.harm_limit), figure(Math.exp(signal.log_fine)), signal.needed ? charts.proof(signal.log_fine, it.fine_limit) : "",
      !signal.needed ? h("span", { class: "soft" }, "not needed") : signal.proven ? h("span", { class: "good" }, "✓ proven") : h("span", { class: "open" }, "… open")]),
    { numeric: [1, 2, 3, 4, 5] });
}

function harm(signal, limit) {
  const value = figure(Math.exp(signal.log_harm));
  return signal.log_harm >= limit ? h("strong", { class: "bad" }, `▲ ${value}`) : value;
}

function marks(it) {
  return table(["Time", "Answers", "Pairs", "Share", "Harm, e", "Least within margin, e"],
    it.marks.toReversed().map((mark) => [new Date(mark.at_s * 1000).toLocaleTimeString("en-GB"), mark.answers, mark.pairs,
      percent(mark.share), figure(Math.exp(mark.log_harm)), figure(Math.exp(Math.min(...Object.values(mark.log_fine))))]),
    { numeric: [1, 2, 3, 4, 5] });
}

export function monitor(state) {
  const it = state.monitor;
  if (!it || "error" in it) {
    put("monitor-about");
    put("levels", h("p", { class: "empty" }, it ? words(it.error) : words("The monitor has not looked yet. It looks every minute while `fmops up` runs.")));
    put("alarms");
    put("diagnosis");
    return;
  }
  put("monitor-about", `${it.answers.toLocaleString("en")} answers of ${short(it.release)}, looked `, when(it.at_s),
    it.golden === null ? "" : `, golden prompts ${percent(it.golden)} as certified`);
  put("diagnosis", it.diagnosis ? diagnosis(it.diagnosis) : null);
  put("alarms", it.alarms.map((alarm) => h("li", { class: alarm.kind },
    h("span", { class: "mark", "aria-hidden": "true" }, alarm.kind === "harm" ? "▲" : "◆"),
    h("strong", {}, `${alarm.kind}: ${spaced(alarm.signal)}`),
    alarm.reference !== null && alarm.now !== null ? ` ${percent(alarm.reference, 1)} → ${percent(alarm.now, 1)}` : "",
    ` after ${alarm.answers.toLocaleString("en")} answers, `, when(alarm.at_s))));
  const rate = (pair) => (pair ? percent(pair[0] / Math.max(pair[1], 1), 1) : "–");
  put("levels", it.rows.length ? [
    table(["Signal", "Normal", "Now", "Level of 1, logarithmic", ""], it.rows.map((row) => [
      spaced(row.name), row.psi === null ? rate(row.normal) : "", row.psi === null ? rate(row.now) : `PSI ${figure(row.psi)}`,
      charts.level(row.level ?? 0, it.promise), row.level !== null && row.level < 0.001 ? "< 0.001" : figure(row.level)]), { numeric: [1, 2, 4] }),
    h("p", { class: "about" }, `A level of 1 is an alarm: at least ${it.promise.toLocaleString("en")} answers, on average, between two false ones.`),
  ] : h("p", { class: "empty" }, `Normal is being measured: ${it.answers.toLocaleString("en")} of ${it.reference.toLocaleString("en")} answers.`));
}

function diagnosis(found) {
  const line = (name, text) => [h("dt", {}, name), h("dd", {}, text)];
  return h("div", { class: "diagnosis" }, h("h3", {}, `${found.cause} → ${found.stage}`),
    h("dl", {}, line("because", found.because.join("; ")), line("confirmed if", found.confirm), line("refuted if", found.refute),
      found.also_possible.length ? line("also possible", found.also_possible.join(", ")) : [],
      found.examples.length ? line("look at", found.examples.map((id) => [h("code", {}, id), " "]).flat()) : []),
    found.beside ? diagnosis(found.beside) : null);
}

export function rounds(state) {
  const it = state.rounds;
  if ("error" in it) {
    put("rounds-about");
    put("rounds-list", h("li", { class: "empty" }, words(it.error)));
    return;
  }
  put("rounds-about", `${it.automatic} of ${it.per_week} automatic in seven days. `,
    it.waits ? `The next one waits: ${it.waits}.` : "The next one may begin.");
  put("rounds-list", it.rounds.length ? it.rounds.map((round) => {
    const ended = round.phase === "ended";
    const css = !ended ? "running" : round.outcome === "promoted" ? "good" : "bad";
    return h("li", {}, h("span", { class: "number" }, round.number),
      h("div", {}, h("strong", {}, `${round.trigger.cause} → ${round.trigger.stage} `), h("span", { class: `chip ${css}` }, ended ? round.outcome : round.phase),
        h("p", {}, round.trigger.why),
        ended && round.reason ? h("p", { class: "soft" }, round.reason.split("\n")[0]) : null,
        round.phase === "waiting for approval" ? h("p", {}, words(`A person lets it train: \`fmops loop --approve ${round.number}\``)) : null,
        h("small", {}, "began ", when(round.began_s), ended ? `, took ${span(round.changed_s - round.began_s)}` : "")));
  }) : h("li", { class: "empty" }, "No round yet. New data, an alarm, feedback, the calendar or a person begins one."));
}

export function gate(state) {
  const it = state.gate;
  if (!it) {
    put("budget", h("p", { class: "empty" }, "The gate has not judged a candidate yet."));
    return;
  }
  put("budget",
    h("div", { class: "figures" },
      h("div", {}, h("strong", {}, figure(it.wealth ?? it.start)), h("span", {}, `of α ${figure(it.alpha)} left`)),
      h("div", {}, h("strong", {}, figure(it.next_level)), h("span", {}, "level of the next round")),
      h("div", {}, h("strong", { class: it.verdict === "promote" ? "good" : "bad" }, it.verdict), h("span", {}, "last verdict, ", when(Date.parse(it.created) / 1000)))),
    it.rounds.length ? charts.budget(it) : null,
    it.rounds.length ? h("p", { class: "about" }, "● promoted, earns α back   ■ not promoted, spent its level") : null,
    h("details", {}, h("summary", {}, "Reasons and rounds"),
      h("ul", { class: "reasons" }, it.reasons.map((reason) => h("li", {}, reason))),
      h("div", { class: "scroll" }, table(["Round", "Level", "p", "Left", ""], it.rounds.map((round, place) =>
        [place + 1, figure(round.level), figure(round.p_value), figure(round.wealth), round.promoted ? "promoted" : "not promoted"]), { numeric: [1, 2, 3] }))));
}

export function serving(state) {
  const it = state.serving;
  if ("error" in it) {
    put("serving-about");
    put("processes", h("p", { class: "empty" }, words(it.error)));
    put("traffic");
    return;
  }
  put("serving-about", it.up ? `Gateway: ${it.gateway}` : "");
  put("processes", it.processes.length ? table(["Process", "State", "Release", "Restarts", "Address"], it.processes.map((one) => [
    one.release ? `engine (${one.arm})` : one.name,
    h("span", { class: one.healthy ? "good" : "bad" }, one.healthy ? "● answers" : "✕ not answering"),
    one.release ? h("code", { title: one.release }, short(one.release)) : "", one.restarts || "", h("code", {}, one.url.replace("http://", ""))]),
  { numeric: [3] }) : h("p", { class: "empty" }, it.up ? "The gateway runs without a supervisor." : words("Nothing is up. `fmops up` starts engines, gateway, monitor and this console.")));
  put("traffic", it.traffic?.length ? table(["Arm", "Release", "Requests", "Failed", "Tokens", "First token p50", "p95", "A token p50"], it.traffic.map((arm) => [
    arm.arm, h("code", { title: arm.release }, short(arm.release)), arm.requests.toLocaleString("en"), arm.failed.toLocaleString("en"),
    arm.tokens.toLocaleString("en"), seconds(arm.first_p50), seconds(arm.first_p95), seconds(arm.token_p50)]), { numeric: [2, 3, 4, 5, 6, 7] }) : null);
}

// A workspace that has nothing yet is no fault: the first thing to do is said without alarm.
export function problems(list, { young = false } = {}) {
  put("problems", list.map((problem) => h("p", { class: young ? "problem first" : "problem" }, h("strong", {}, `${problem.what}. `), words(problem.remedy ?? ""))));
}

export function head(state) {
  document.title = `${state.name} · FMOps console`;
  put("name", state.name);
  put("headline", state.headline);
  put("workspace", state.read_only ? "This console only shows." : "");
  for (const button of document.querySelectorAll("#orders button")) {
    const order = button.dataset.order, live = state.rollout && !("error" in state.rollout);
    const over = !live || Object.keys(state.rollout.orders).length === 0;
    button.hidden = state.read_only || (order === "start"
      ? !(over && state.aliases.champion && state.releases.length && !(state.rollout && "error" in state.rollout))
      : !(live && order in state.rollout.orders));
  }
  show("chat", !state.read_only);
  document.body.classList.toggle("alone", state.read_only);
  $("circle").setAttribute("aria-label", "The stages with their state");
}
