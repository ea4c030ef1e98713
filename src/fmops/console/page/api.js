// Requests to the console. What it refuses becomes an Error with its words, its code and its status.

export class Refused extends Error {
  constructor(message, { status = 0, code = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export async function post(path, body, { method = "POST", ...options } = {}) {
  const reply = await fetch(path, {
    method,
    headers: { "content-type": "application/json", "x-fmops-console": "1" },
    body: body === undefined ? undefined : JSON.stringify(body),
    ...options,
  }).catch((error) => {
    throw error.name === "AbortError" ? error : new Refused("The console does not answer. `fmops up` starts it again.");
  });
  if (!reply.ok) throw await refusal(reply);
  return reply;
}

let tag = null;

// The state, or null where nothing has changed since the last one.
export async function look() {
  const reply = await fetch("/api/state", { headers: tag ? { "if-none-match": tag } : {}, cache: "no-store" }).catch(() => {
    throw new Refused("The console does not answer");
  });
  if (reply.status === 304) return null;
  if (!reply.ok) throw await refusal(reply);
  const state = await reply.json();
  tag = reply.headers.get("etag");
  return state;
}

export function forget() {
  tag = null;
}

async function refusal(reply) {
  const { error } = await reply.json().catch(() => ({}));
  return new Refused(error?.message ?? `The console answered ${reply.status}.`, { status: reply.status, code: error?.code });
}
