// The chat: one conversation, streamed through the console to the gateway; each answer shows who gave it and takes
// feedback.

import { $, h, put, short, show } from "./dom.js";
import { post } from "./api.js";

const turns = [];
let running = null;

export function begin() {
  $("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask($("chat-text").value.trim());
  });
  $("chat-text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("chat-form").requestSubmit();
    }
  });
  $("chat-stop").addEventListener("click", () => running?.abort());
  $("chat-new").addEventListener("click", () => {
    running?.abort();
    turns.length = 0;
    put("turns");
    show("chat-new", false);
    $("chat-text").focus();
  });
}

async function ask(text) {
  if (!text || running) return;
  const entry = { user: text, answer: "" };
  const said = h("div", { class: "turn user" }, h("p", {}, text));
  const body = h("p", { class: "answer" });
  const meta = h("div", { class: "meta" });
  const turn = h("div", { class: "turn model", "aria-busy": "true" }, meta, body);
  $("turns").append(said, turn);
  $("chat-text").value = "";
  wait(true);
  running = new AbortController();
  try {
    const messages = [...turns.flatMap((old) => [{ role: "user", content: old.user }, { role: "assistant", content: old.answer }]), { role: "user", content: text }];
    const reply = await post("/api/chat", { messages }, { signal: running.signal });
    entry.release = reply.headers.get("x-fmops-release");
    meta.replaceChildren(h("code", { class: "release", title: entry.release }, short(entry.release) ?? "unknown release"));
    for await (const event of events(reply.body)) {
      if (event.error) throw new Error(event.error.message);
      entry.id ??= event.id;
      entry.answer += event.choices?.[0]?.delta?.content ?? "";
      body.textContent = entry.answer;
      $("turns").scrollTop = $("turns").scrollHeight;
    }
    turns.push(entry);
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (stopped && entry.answer) turns.push(entry);
    turn.append(h("p", { class: "wrong", role: "alert" }, stopped ? "Stopped." : error.message));
  } finally {
    running = null;
    turn.removeAttribute("aria-busy");
    if (entry.id) turn.append(feedback(entry, meta));
    wait(false);
    $("turns").scrollTop = $("turns").scrollHeight;
  }
}

function wait(yes) {
  $("chat-send").disabled = yes;
  show("chat-stop", yes);
  show("chat-new", !yes && $("turns").childElementCount > 0);
}

function feedback(entry, meta) {
  meta.append(h("code", { class: "id", title: "The answer's id: fmops trace follows it back to its data" }, entry.id));
  const told = h("span", { class: "told", role: "status" });
  const send = async (said, words) => {
    try {
      await post("/api/feedback", { id: entry.id, ...said });
      told.textContent = words;
      return true;
    } catch (error) {
      told.textContent = error.message;
      return false;
    }
  };
  const thumb = (kind, sign, name) => h("button", { class: "thumb", "aria-label": name, "aria-pressed": "false", onclick: async (event) => {
    const button = event.currentTarget;
    if (await send({ thumb: kind }, `${name}: kept`)) {
      for (const other of button.parentElement.querySelectorAll(".thumb")) other.setAttribute("aria-pressed", String(other === button));
    }
  } }, sign);
  const text = h("textarea", { rows: 3, "aria-label": "What the answer should have been", maxlength: 8000 }, entry.answer);
  const form = h("form", { class: "correction", hidden: true, onsubmit: async (event) => {
    event.preventDefault();
    if (text.value.trim() && await send({ correction: text.value }, "correction kept")) form.hidden = true;
  } }, text, h("button", { class: "primary" }, "Send the correction"));
  const correct = h("button", { class: "quiet", "aria-expanded": "false", onclick: () => {
    form.hidden = !form.hidden;
    correct.setAttribute("aria-expanded", String(!form.hidden));
    if (!form.hidden) text.focus();
  } }, "Correct…");
  return h("div", { class: "feedback" }, thumb("up", "Good", "Good answer"), thumb("down", "Bad", "Bad answer"), correct, told, form);
}

// Server-sent events as parsed JSON; `[DONE]` ends them.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
  throw new Error("The answer broke off.");
}
