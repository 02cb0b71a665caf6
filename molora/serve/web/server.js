// What the page asks the server. A key that the server wants stays in this module.

let key = "";
let askForKey = async () => null;

/** An error in the server's own words. */
export class ServerError extends Error {}

/** `ask(refused)` gives a key, or null for none; it is called where the server wants one, or `refused` what it got. */
export function whenKeyIsNeeded(ask) {
  askForKey = ask;
}

/** The names under which the model can be asked, each with the types of parts that it takes. */
export async function models() {
  return (await (await ask("v1/models")).json()).data;
}

/** Questions to begin with, each as the content of a message, and by type what a part of a modality's own looks like. */
export async function examples() {
  return (await ask("examples")).json();
}

/** The API, as OpenAPI describes it. */
export async function description() {
  return (await ask("openapi.json")).json();
}

/** What a path answers, as text. `request` may have a method and a body of JSON. */
export async function raw(path, request = {}) {
  return (await ask(path, { headers: { "content-type": "application/json" }, ...request })).text();
}

/** Pieces of an answer as they come. Aborting `signal` ends the request, and with it the work of the server. */
export async function* answer(body, signal) {
  const options = { include_usage: true, continuous_usage_stats: true };
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: options }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError("The connection ended before the answer did.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message);
      yield chunk;
    }
  }
}

async function ask(path, request = {}) {
  for (;;) {
    const headers = { ...request.headers, ...(key && { authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { ...request, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server cannot be reached. Is it running?");
    }
    if (response.ok) return response;
    const told = await words(response);
    const given = response.status === 401 ? await askForKey(key !== "") : null;
    if (given === null) throw new ServerError(told);
    key = given;
  }
}

async function words(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    // Not from the server itself, but from what stands in front of it.
    return `${response.status} ${response.statusText}`;
  }
}
