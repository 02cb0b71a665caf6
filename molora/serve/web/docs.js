// The API to look at and to try, from the server's own description of it.

import "./key.js";
import { description, models, raw } from "./server.js";

const api = await shown(description);
const [model] = api ? ((await shown(models)) ?? []) : [];

for (const [path, operations] of Object.entries(api?.paths ?? {})) {
  for (const [method, operation] of Object.entries(operations)) {
    document.getElementById("operations").append(shownOperation(path, method.toUpperCase(), operation));
  }
}

/** What the server says; what it refuses is shown. */
async function shown(ask) {
  try {
    return await ask();
  } catch (error) {
    document.getElementById("error").textContent = error.message;
  }
}

function shownOperation(path, method, { description, parameters, requestBody }) {
  const inside = made("div", "operation");
  const content = requestBody?.content ?? {};
  const [type] = Object.keys(content);
  if (type) {
    const schema = resolved(content[type].schema);
    inside.append(...(schema.description ? [prose(schema.description)] : []), fieldsOf(schema));
    if (type === "application/json") inside.append(trial(path, method, exampleOf(schema)));
    else inside.append(made("p", "note", `Sent as ${type}.`));
  } else if (!parameters) inside.append(trial(path, method));
  const summary = made("summary");
  summary.append(made("h2", "", `${method} ${path}`), made("span", "note", description));
  const details = made("details");
  details.append(summary, inside);
  return details;
}

function fieldsOf(schema) {
  const table = made("table");
  const head = made("tr");
  head.append(...["field", "what it is", "needed"].map((name) => made("th", "", name)));
  table.append(head);
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const row = made("tr");
    const needed = schema.required?.includes(name) ? "yes" : "";
    row.append(made("td", "", name), made("td", "", kindOf(field)), made("td", "", needed));
    table.append(row);
  }
  const scrolled = made("div", "fields");
  scrolled.tabIndex = 0;
  scrolled.append(table);
  return scrolled;
}

/** A request to change and send, and what comes back. */
function trial(path, method, body) {
  const form = made("form", "try");
  const field = made("textarea");
  const send = made("button", "", "Send");
  const answer = made("pre");
  answer.hidden = true;
  answer.tabIndex = 0;
  if (body) {
    field.value = JSON.stringify(body, null, 2);
    field.rows = field.value.split("\n").length + 1;
    field.spellcheck = false;
    const label = made("label", "", "Body");
    label.append(field);
    form.append(label);
  }
  form.append(send, answer);
  form.onsubmit = async (event) => {
    event.preventDefault();
    send.disabled = true;
    answer.hidden = false;
    answer.textContent = "…";
    answer.textContent = await raw(path.slice(1), body && { method, body: field.value })
      .then(indented)
      .catch((error) => error.message);
    send.disabled = false;
  };
  return form;
}

/** JSON in lines; what is none, as it is. */
function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** A body with what is needed, from the examples in the schema. */
function exampleOf({ properties, required }) {
  const given = required.map((name) => [name, name === "model" ? model?.id : properties[name].examples?.[0]]);
  return { ...Object.fromEntries(given), max_tokens: 16 };
}

function kindOf(schema) {
  const all = resolved(schema);
  if (all.anyOf) return all.anyOf.map(kindOf).filter((kind) => kind !== "null").join(" or ");
  if (all.enum ?? all.const !== undefined) return (all.enum ?? [all.const]).map((value) => JSON.stringify(value)).join(" or ");
  if (all.type === "array") return `list of ${kindOf(all.items)}`;
  const bounds = { minimum: "from", exclusiveMinimum: "above", maximum: "to", exclusiveMaximum: "below" };
  // Larger ones say how wide an integer is, and JavaScript does not have them exactly.
  const within = Object.entries(bounds).filter(([key]) => Math.abs(all[key]) <= Number.MAX_SAFE_INTEGER);
  return [all.type ?? "anything", ...within.map(([key, word]) => `${word} ${all[key].toLocaleString("en")}`)].join(" ");
}

function resolved(schema) {
  const name = schema.$ref?.replace("#/components/schemas/", "");
  return name ? { ...resolved(api.components.schemas[name]), ...schema, $ref: undefined } : schema;
}

/** Text in which names stand between backticks. */
function prose(text) {
  const paragraph = made("p", "note");
  paragraph.append(...text.split("`").map((piece, i) => (i % 2 ? made("code", "", piece) : piece)));
  return paragraph;
}

function made(name, kind = "", text = "") {
  const element = document.createElement(name);
  if (kind) element.className = kind;
  element.textContent = text;
  return element;
}
